"""Tables and the picture of docs/estimators.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.estimators.estimators import FORWARD, KS, REVERSE
from benchmarks.evidence.report import fill, markdown
from distill.base.files import write_atomically

DOCS = Path(__file__).parents[2] / "docs"
ROWS = DOCS / "results/estimators.json"
COLORS = {"plain": "#de2d26", "renormalised": "#3182bd", "bucket": "#31a354"}

NAMES = ("built_in", "smollm2")
Found = dict[str, list[dict[str, Any]]]


def make_tables(found: Found) -> dict[str, str]:
    """All tables, by their names in docs/estimators.md."""
    states = found["states"]
    tables = {
        "sampled": markdown(_state_table([row for row in states if not row["k"]])),
        "top_k": markdown(_state_table([row for row in states if row["k"]])),
    }
    if "batches" in found:
        sizes = [name for name in found["batches"][0] if name.isdigit()]
        header = "estimator", "of", "bias", *(f"{size} responses" for size in sizes)
        rows = [
            (row["name"], row["claims"], *(_shown(row[n]) for n in ("bias", *sizes)))
            for row in found["batches"]
        ]
        tables["batches"] = markdown([header, *rows])
        rows = [(row["name"], str(row["span"]), f"{row['bias']:.2g}") for row in found["spans"]]
        tables["spans"] = markdown([("expected gradient", "tokens", "bias"), *rows])
    return tables


def _state_table(rows: Sequence[dict[str, Any]]) -> list[Sequence[str]]:
    header = "estimator", "of", "its mean estimates", "bias", "noise of one token"
    table: list[Sequence[str]] = [(*header, "cosine to reverse", "to forward")]
    for row in rows:
        numbers = [row[name] for name in ("bias", "noise", "cosine_reverse", "cosine_forward")]
        table.append((row["name"], row["claims"], row["estimates"], *map(_shown, numbers)))
    return table


def _shown(value: Sequence[float]) -> str:
    if max(map(abs, value)) < 1e-4:
        return "0"
    return f"{value[0]:.3g} ({value[1]:.3g} to {value[2]:.3g})"


def page_tables() -> dict[str, str]:
    """Those of the committed rows."""
    return {
        f"{models}/{name}": table
        for models, found in read_rows().items()
        for name, table in make_tables(found).items()
    }


def write_docs(found: Found, models: str) -> None:
    """Rows, tables and picture, of one pair of models anew."""
    lines = ",\n".join(
        json.dumps({"models": each, "table": name, **_rounded(row)})
        for each, tables in (read_rows() | {models: found}).items()
        for name, rows in tables.items()
        for row in rows
    )
    write_atomically(ROWS, f"[\n{lines}\n]\n")
    page = DOCS / "estimators.md"
    write_atomically(page, fill(page.read_text(), page_tables()))
    style = {"svg.hashsalt": "estimators", "svg.fonttype": "none", "font.size": 9}
    with rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        path = DOCS / "images/estimators.svg"
        draw(read_rows()["built_in"]).savefig(path, metadata={"Date": None, "Creator": None})


def read_rows() -> dict[str, Found]:
    """The committed rows by models and table."""
    found: dict[str, Found] = {}
    for row in json.loads(ROWS.read_text()):
        found.setdefault(row.pop("models"), {}).setdefault(row.pop("table"), []).append(row)
    return found


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    def short(value):
        if isinstance(value, list):
            return [short(each) for each in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {name: short(value) for name, value in row.items()}


def draw(found: Found) -> Figure:
    """Bias of what knows k tokens, and errors by the size of the batch."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, color in COLORS.items():
        for claims, line in ((REVERSE, "-"), (FORWARD, "--")):
            rows = [
                row
                for row in found["states"]
                if row["name"].endswith(f", {kind}") and row["claims"] == claims
            ]
            y = [max(row["bias"][0], 1e-6) for row in rows]
            left.plot(KS[: len(y)], y, line, color=color, marker="o", label=f"{kind}, {claims}")
    left.set(xlabel="k tokens of the teacher", ylabel="bias", xscale="log", yscale="log")
    shown_k = KS[: len(y)]
    left.set_xticks(shown_k, [str(k) for k in shown_k])
    left.set_xticks([], minor=True)
    left.legend(fontsize=7)
    shown = (
        ("exact reverse KL", "#000000"),
        ("advantage log p - log q", "#de2d26"),
        ("the same less batch mean", "#fc9272"),
        ("the same less state mean", "#31a354"),
        ("advantage, proximal 0.5", "#3182bd"),
        ("advantage of spans of 4", "#756bb1"),
        ("k3 as a loss", "#999999"),
    )
    by_name = {row["name"]: row for row in found["batches"] if row["claims"] == REVERSE}
    sizes = [name for name in found["batches"][0] if name.isdigit()]
    for name, color in shown:
        row = by_name[name]
        y = [row[size][0] for size in sizes]
        bars = [[row[s][0] - row[s][1] for s in sizes], [row[s][2] - row[s][0] for s in sizes]]
        bars = [[max(each, 0.0) for each in side] for side in bars]
        right.errorbar(list(map(int, sizes)), y, bars, color=color, label=name, marker="o", ms=3)
    right.set(xlabel="responses in a batch", ylabel="error of the gradient", xscale="log")
    right.set(yscale="log")
    right.legend(fontsize=7)
    return figure
