"""Pictures of the evidence: one for each question."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence import forgetting, styles
from benchmarks.evidence.forgetting_task import NEW, OLD
from benchmarks.evidence.report import Cell, Estimate, Evidence, estimate, gain, rival_cells
from benchmarks.evidence.runs import FEW, METHODS, OFF, ON

OFF_COLOR, STOPPED_COLOR, ON_COLOR, OTHER_COLOR = "#3182bd", "#9ecae1", "#de2d26", "#555555"


def make_plots(evidence: Evidence, folder: Path) -> None:
    """Writes a picture for each question, the same for the same numbers."""
    plots = {"prompts": plot_prompts, "rivals": plot_rivals}
    plots |= {"forgetting": plot_forgetting, "styles": plot_styles}
    style = {"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9}
    with rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        for name, plot in plots.items():
            path = folder / f"evidence-{name}.svg"
            plot(evidence).savefig(path, metadata={"Date": None, "Creator": None})


def plot_prompts(evidence: Evidence) -> Figure:
    """Accuracy by the number of distinct prompts, and what on-policy data gains."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = evidence.prompts()
    lines = (
        (METHODS[ON].title, ON_COLOR, ON, "last"),
        (METHODS[OFF].title, OFF_COLOR, OFF, "last"),
        (f"{METHODS[OFF].title}, stopped early", STOPPED_COLOR, OFF, "best"),
    )
    for label, color, method, when in lines:
        cells = [evidence.cell(method, n, when) for n in sizes]
        shown = [estimate(cell.right()) for cell in cells]
        _draw(left, sizes, shown, color, label)
    before = estimate(Cell({0: evidence.base}).right()).value
    left.axhline(100 * before, color=OTHER_COLOR, linestyle=":", label="student as it comes")
    left.set(ylabel="held-out accuracy, %", ylim=(0, 100))
    left.legend(fontsize=7)
    for label, color, when in (
        ("over off-policy", OFF_COLOR, "last"),
        ("over off-policy, stopped early", STOPPED_COLOR, "best"),
    ):
        shown = [gain(evidence.cell(ON, n), evidence.cell(OFF, n, when)) for n in sizes]
        _draw(right, sizes, shown, color, label)
    right.axhline(0, color=OTHER_COLOR, linewidth=0.8)
    right.set(ylabel="points that on-policy gains")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="distinct prompts, at equal updates", xticks=sizes)
        axes.set_xticks([], minor=True)
        axes.set_xticklabels([f"{n:,}" for n in sizes])
    return figure


def _draw(axes: Axes, x: list[int], shown: list[Estimate], color: str, label: str) -> None:
    values = np.array([100 * each.value for each in shown])
    axes.errorbar(x, values, _bars(shown), color=color, label=label, marker="o", capsize=3)


def _bars(shown: list[Estimate]) -> np.ndarray:
    """Lengths below and above the values, in points."""
    return 100 * np.array(
        [[x.value - x.low for x in shown], [x.high - x.value for x in shown]]
    ).clip(0)


def plot_rivals(evidence: Evidence) -> Figure:
    """Every method on few prompts, above plain off-policy distillation."""
    n = FEW
    reference = evidence.cell(OFF, n)
    cells = {title: cell for title, cell in rival_cells(evidence, n).items() if cell != reference}
    shown = [gain(cell, reference) for cell in cells.values()]
    figure = Figure(figsize=(9, 0.8 + 0.3 * len(cells)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(cells))
    colors = [ON_COLOR if title.startswith("on-policy") else OFF_COLOR for title in cells]
    values = [100 * each.value for each in shown]
    axes.errorbar(values, places, xerr=_bars(shown), fmt="none", ecolor=OTHER_COLOR, capsize=3)
    axes.scatter(values, places, color=colors, zorder=3)
    axes.axvline(0, color=OTHER_COLOR, linewidth=0.8)
    axes.set_yticks(places, list(cells))
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set(xlabel=f"points above {METHODS[OFF].title}, {n} distinct prompts")
    return figure


def plot_forgetting(_: Evidence) -> Figure:
    """Accuracy on old problems against that on new ones, a line for each method."""
    rows = json.loads(forgetting.ROWS.read_text())
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, method in forgetting.METHODS.items():
        curves = forgetting.Curves(rows, name)
        new, old = (100 * curves.resampled(task)[0] for task in (NEW, OLD))
        axes.plot(new, old, marker="o", markersize=4, label=method.title)
    axes.set(xlabel="accuracy on new problems, %", ylabel="on old problems, %", ylim=(0, 100))
    axes.legend(fontsize=7)
    return figure


def plot_styles(_: Evidence) -> Figure:
    """Sampled accuracy against the entropy of styles, a point for each method."""
    found, titles = styles.students(json.loads(styles.ROWS.read_text())), styles.titles()
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, cell in found.items():
        accuracy, bits = estimate(cell.right()), cell.entropy()
        x_bars, y_bars = _bars([bits]) / 100, _bars([accuracy])
        marker = "o" if name in styles.METHODS else "x"
        axes.errorbar(
            bits.value, 100 * accuracy.value, y_bars, x_bars, fmt=marker, label=titles[name]
        )
    axes.set(xlabel="entropy of styles, bits", ylabel="sampled accuracy, %", ylim=(0, 105))
    figure.legend(fontsize=7, loc="outside right upper")
    return figure
