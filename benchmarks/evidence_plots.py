"""Plots of benchmarks/evidence.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.evidence_methods import FIRST_STUDENT, POSITIONS, STUDENTS
from benchmarks.evidence_report import (
    BUDGETS,
    COMPARED,
    accuracy,
    departure_shares,
    group_rows,
    interval,
    perplexities,
    title,
    totals,
)

# In all plots: without new data in grey and brown, off-policy in blues, on-policy in reds.
COLORS = {
    "base": "#9a9a9a",
    "sft": "#7f6a52",
    "self_training": "#c2a878",
    "sequence_kd": "#9ecae1",
    "off_policy_forward": "#3182bd",
    "off_policy_forward_cached": "#08519c",
    "mix_forward": "#756bb1",
    "on_policy_forward": "#de2d26",
    "on_policy_reverse": "#fb6a4a",
    "on_policy_jsd": "#a50f15",
}
SHOWN = ("base", "sft", "off_policy_forward", "on_policy_forward", "on_policy_reverse")

Row = dict[str, Any]


def make_plots(rows: Sequence[Row], folder: Path) -> None:
    """Writes evidence-accuracy.svg, evidence-levels.svg and evidence-positions.svg."""
    folder.mkdir(exist_ok=True)
    plots = {"accuracy": plot_accuracy, "levels": plot_levels, "positions": plot_positions}
    # The same file for the same numbers.
    style = {"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9}
    with rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        for name, plot in plots.items():
            path = folder / f"evidence-{name}.svg"
            plot(rows).savefig(path, metadata={"Date": None, "Creator": None})


def plot_accuracy(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(12, 3), layout="constrained")
    grid = figure.subplots(1, len(COMPARED), sharex=True)
    for axes, (student, budget) in zip(grid, COMPARED, strict=True):
        groups = group_rows(rows, student, budget)
        for place, (method, group) in enumerate(reversed(groups.items())):
            _bar(axes, place, method, group)
        axes.set_yticks(range(len(groups)), [title(m) for m in reversed(groups)])
        axes.set_title(f"{student} weights, {BUDGETS[budget]}", loc="left")
        axes.set_xlim(0, 1)
        axes.set_xlabel("accuracy: 95% interval, and each seed")
    return figure


def _bar(axes, place: int, method: str, group: Sequence[Row]) -> None:
    rate, (low, high) = accuracy(group), interval(group)
    error = [[rate - low], [high - rate]]
    axes.barh(place, rate, color=COLORS[method], xerr=error, ecolor="#333333", capsize=2)
    seeds = [accuracy([row]) for row in group]
    axes.plot(seeds, [place] * len(seeds), "o", color="black", markersize=2.5)


def plot_levels(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    grid = figure.subplots(1, len(STUDENTS))
    for axes, student in zip(grid, STUDENTS, strict=True):
        for method, group in _shown(rows, student):
            right, count = (totals(group, "greedy", name) for name in ("right", "count"))
            rates = [r / n for r, n in zip(right, count, strict=True)]
            axes.plot(range(1, len(rates) + 1), rates, "o-", **_line(method))
        axes.set_title(f"{student} weights", loc="left")
        axes.set_xlabel("level: steps of the problem")
        axes.set_ylim(0, 1.02)
    grid[0].set_ylabel("held-out accuracy")
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def plot_positions(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, group in _shown(rows, FIRST_STUDENT):
        left.plot(POSITIONS, perplexities(group), "o-", **_line(method))
        shares = [math.nan if x == 0 else x for x in departure_shares(group)]
        right.plot(POSITIONS, shares, "o-", **_line(method))
    left.set_title(f"{FIRST_STUDENT} weights: teacher's perplexity of samples", loc="left")
    right.set_title("greedy: first departures, of answers left", loc="left")
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("position in the answer, from")
    return figure


def _shown(rows: Sequence[Row], student: str):
    groups = group_rows(rows, student, "updates")
    return [(method, groups[method]) for method in SHOWN if method in groups]


def _line(method: str) -> dict[str, Any]:
    return {"color": COLORS[method], "label": title(method), "markersize": 3}
