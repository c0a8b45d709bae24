"""Tables and plots of benchmarks/evidence.py, from its rows: docs/results.md, docs/images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.evidence_methods import (
    BATCH,
    CACHED,
    FIRST_STUDENT,
    KEPT,
    METHODS,
    POSITIONS,
    STUDENTS,
)
from distill.base.errors import UserError
from distill.base.files import write_atomically
from distill.evaluation.grading import wilson_interval

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "results/evidence.json"
BUDGETS = {"updates": "equal updates", "teacher": "equal teacher tokens"}
# What is compared, by student and budget.
COMPARED = [(FIRST_STUDENT, "updates"), (FIRST_STUDENT, "teacher"), ("33k", "updates")]

Row = dict[str, Any]
Table = list[Sequence[str]]


def make_report(output: Path) -> None:
    """Writes JSON, tables and plots; `output` may be without rows, and the JSON is read instead."""
    from benchmarks.evidence_plots import make_plots

    if found := sorted((output / "rows").glob("*.json")):
        rows = [json.loads(path.read_text()) for path in found]
        ROWS.parent.mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
        write_atomically(ROWS, f"[\n{lines}\n]\n")
    if not ROWS.exists():
        raise UserError(f"no rows in {output / 'rows'}: run without --report first")
    rows = json.loads(ROWS.read_text())
    page = DOCS / "results.md"
    write_atomically(page, fill(page.read_text(), make_tables(rows)))
    make_plots(rows, DOCS / "images")


def fill(text: str, tables: dict[str, str]) -> str:
    """The page with each table between its two marks, `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if (text.count(begin), text.count(end)) != (1, 1):
            raise UserError(f"the page needs one place for the table {name}: {begin} and {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


def make_tables(rows: Sequence[Row]) -> dict[str, str]:
    """All tables, by their names in docs/results.md."""
    tables: dict[str, Table] = {}
    for student, budget in COMPARED:
        groups = group_rows(rows, student, budget)
        tables[f"accuracy {student} {budget}"] = accuracy_table(groups)
        tables[f"cost {student} {budget}"] = cost_table(groups)
        tables[f"gain {student} {budget}"] = gain_table(groups)
    for student in STUDENTS:
        groups = group_rows(rows, student, "updates")
        tables[f"levels {student}"] = level_table(groups)
        tables[f"departures {student}"] = departure_table(groups)
        tables[f"perplexity {student}"] = perplexity_table(groups)
    tables["answer"] = answer_table(rows)
    for budget in ("small", "long"):
        tables[budget] = accuracy_table(group_rows(rows, FIRST_STUDENT, budget))
    tables["rates"] = rate_table(rows)
    return {name: align(table) for name, table in tables.items()}


def group_rows(rows: Iterable[Row], student: str, budget: str) -> dict[str, list[Row]]:
    """Rows of the same method, by method, the student as it came first.

    With equal teacher tokens, those that ask the teacher anew for every update, or never, are those
    of equal updates.
    """

    def belongs(row: Row, method: str) -> bool:
        own = method in KEPT if budget == "teacher" else method != "base"
        wanted = budget if own else "updates"
        return (row["student"], row["method"], row["budget"]) == (student, method, wanted)

    groups = {m: [row for row in rows if belongs(row, m)] for m in ("base", *METHODS)}
    return {method: sorted(g, key=lambda row: row["seed"]) for method, g in groups.items() if g}


def title(method: str) -> str:
    return "student as it comes" if method == "base" else METHODS[method].title


def total(rows: Iterable[Row], kind: str, name: str) -> float:
    """Sum over seeds of a number of one kind of answers, or of a list's entries."""
    values = [row[kind][name] for row in rows]
    return sum(sum(x) if isinstance(x, list) else x for x in values)


def totals(rows: Sequence[Row], kind: str, name: str) -> list[float]:
    """Sums over seeds, entry by entry."""
    return [sum(entries) for entries in zip(*(row[kind][name] for row in rows), strict=True)]


def accuracy(rows: Sequence[Row], kind: str = "greedy") -> float:
    return total(rows, kind, "right") / total(rows, kind, "count")


def interval(rows: Sequence[Row]) -> tuple[float, float]:
    """Wilson's 95% interval: of one run's problems, since all seeds have the same."""
    right, count = (total(rows, "greedy", name) / len(rows) for name in ("right", "count"))
    return wilson_interval(right, count)


def per_token(rows: Sequence[Row], kind: str, name: str) -> float:
    return total(rows, kind, name) / total(rows, kind, "tokens")


def answer_table(rows: Sequence[Row]) -> Table:
    """On-policy against off-policy forward KL: the loss is the same, the data differ."""
    header = "weights, budget", "off-policy", "on-policy", "points more", "levels 1-3", "levels 4-6"
    table: Table = [(*header, "times the gain", "times s per update")]
    for student, budget in COMPARED:
        groups = group_rows(rows, student, budget)
        off = CACHED if budget == "teacher" else "off_policy_forward"
        if {"base", off, "on_policy_forward"} <= groups.keys():
            cells = _compare(groups["base"], groups[off], groups["on_policy_forward"])
            table.append((f"{student}, {BUDGETS[budget]}", *cells))
    return table


def _compare(base: Sequence[Row], off: Sequence[Row], on: Sequence[Row]) -> list[str]:
    by_level = [
        [
            r / n
            for r, n in zip(*(totals(rows, "greedy", x) for x in ("right", "count")), strict=True)
        ]
        for rows in (off, on)
    ]
    more = [100 * (mine - theirs) for theirs, mine in zip(*by_level, strict=True)]
    seconds = [mean(row["seconds_per_update"] for row in rows) for rows in (on, off)]
    return [
        f"{accuracy(off):.1%}",
        f"{accuracy(on):.1%}",
        f"{100 * (accuracy(on) - accuracy(off)):+.1f}",
        *(f"{mean(part):+.1f}" for part in (more[:3], more[3:])),
        _ratio(on, off, accuracy(base)),
        f"{seconds[0] / seconds[1]:.1f}",
    ]


def accuracy_table(groups: dict[str, list[Row]]) -> Table:
    header = "method", "accuracy", "95% interval", "seeds", "sampled", "forward KL", "reverse KL"
    table: Table = [(*header, "on teacher's")]
    for method, rows in groups.items():
        low, high = interval(rows)
        seeds = [accuracy([row]) for row in rows]
        table.append(
            (
                title(method),
                f"{accuracy(rows):.1%}",
                f"{low:.1%} - {high:.1%}",
                f"{min(seeds):.1%} - {max(seeds):.1%}" if len(rows) > 1 else f"{len(rows)} seed",
                f"{accuracy(rows, 'sampled'):.1%}",
                f"{per_token(rows, 'greedy', 'forward_kl'):.4f}",
                f"{per_token(rows, 'greedy', 'reverse_kl'):.4f}",
                f"{per_token(rows, 'on_teacher_answers', 'forward_kl'):.4f}",
            )
        )
    return table


def cost_table(groups: dict[str, list[Row]]) -> Table:
    header = "method", "updates", "problems", "teacher scored", "teacher generated"
    table: Table = [(*header, "student sampled", "s per update", "s in all", "CPU s")]
    for method, rows in groups.items():
        if method == "base":
            continue
        # Kept scores are asked for once, for every problem.
        scored = map(_scored_once if method == CACHED else itemgetter("teacher_scored"), rows)
        table.append(
            (
                title(method),
                str(rows[0]["updates"]),
                str(rows[0]["prompts"]),
                thousands(mean(scored)),
                thousands(mean(row["teacher_generated"] for row in rows)),
                thousands(mean(row["sampled_tokens"] for row in rows)),
                f"{mean(row['seconds_per_update'] for row in rows):.3f}",
                *(f"{mean(row['seconds'][k] for row in rows):.0f}" for k in ("wall", "cpu")),
            )
        )
    return table


def _scored_once(row: Row) -> float:
    return row["teacher_scored"] * row["prompts"] / (row["updates"] * BATCH)


def gain_table(groups: dict[str, list[Row]]) -> Table:
    """Points above the student as it came, and how often those of off-policy distillation."""
    off_policy = [m for m in ("off_policy_forward", CACHED, "sequence_kd") if m in groups]
    table: Table = [("method", "gain in points", *(f"times {title(m)}" for m in off_policy))]
    if "base" not in groups:
        return table
    start = accuracy(groups["base"])
    for method, rows in groups.items():
        if method == "base":
            continue
        gain = accuracy(rows) - start
        ratios = [_ratio(rows, groups[other], start) for other in off_policy]
        table.append((title(method), f"{100 * gain:+.1f}", *ratios))
    return table


def _ratio(rows: Sequence[Row], others: Sequence[Row], start: float) -> str:
    """Of two gains, pooled over seeds; and the smallest and largest of seeds that both have.

    "-" where there is no gain to compare with.
    """
    gain = accuracy(others) - start
    by_seed = {row["seed"]: accuracy([row]) - start for row in others}
    if min(gain, *by_seed.values()) <= 0:
        return "-"
    pooled = (accuracy(rows) - start) / gain
    ratios = [
        (accuracy([row]) - start) / by_seed[row["seed"]] for row in rows if row["seed"] in by_seed
    ]
    if len(ratios) < 2:
        return f"{pooled:.2f}"
    return f"{pooled:.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def level_table(groups: dict[str, list[Row]]) -> Table:
    counts = totals(next(iter(groups.values()))[:1], "greedy", "count") if groups else []
    table: Table = [("method", *(f"level {i} (n={n})" for i, n in enumerate(counts, start=1)))]
    for method, rows in groups.items():
        cells = []
        right, count = totals(rows, "greedy", "right"), totals(rows, "greedy", "count")
        for r, n in zip(right, count, strict=True):
            low, high = wilson_interval(r / len(rows), n / len(rows))
            cells.append(f"{100 * r / n:.1f} ({100 * low:.1f} - {100 * high:.1f})")
        table.append((title(method), *cells))
    return table


def departure_table(groups: dict[str, list[Row]]) -> Table:
    header = [f"from {start}" for start in POSITIONS]
    table: Table = [("method", *header, "right after", "KL before", "KL after")]
    for method, rows in groups.items():
        departed = totals(rows, "greedy", "departed")
        right = sum(totals(rows, "greedy", "departed_right")) / max(sum(departed), 1)
        kls = [
            total(rows, "greedy", f"{when}_kl") / max(total(rows, "greedy", f"{when}_tokens"), 1)
            for when in ("before", "after")
        ]
        table.append(
            (
                title(method),
                *(_or_dash(share, ".1%") for share in departure_shares(rows)),
                f"{right:.1%}",
                *(f"{kl:.4f}" for kl in kls),
            )
        )
    return table


def departure_shares(rows: Sequence[Row]) -> list[float]:
    """Of the answers that had kept to the teacher's choices until there, by position."""
    departed, kept = (totals(rows, "greedy", name) for name in ("departed", "kept"))
    return [d / k if k else math.nan for d, k in zip(departed, kept, strict=True)]


def perplexity_table(groups: dict[str, list[Row]]) -> Table:
    table: Table = [("method", *(f"from {start}" for start in POSITIONS), "all", "top-5 overlap")]
    for method, rows in groups.items():
        surprise = total(rows, "sampled", "position_surprise") / total(rows, "sampled", "tokens")
        table.append(
            (
                title(method),
                *(_or_dash(x, ".3f") for x in perplexities(rows)),
                f"{math.exp(surprise):.3f}",
                f"{per_token(rows, 'sampled', 'overlap'):.1%}",
            )
        )
    return table


def perplexities(rows: Sequence[Row]) -> list[float]:
    """The teacher's, of answers sampled at temperature 1, by position."""
    surprise, tokens = (totals(rows, "sampled", f"position_{x}") for x in ("surprise", "tokens"))
    return [math.exp(s / n) if n else math.nan for s, n in zip(surprise, tokens, strict=True)]


def rate_table(rows: Sequence[Row]) -> Table:
    """Accuracy with other learning rates, one seed."""
    mine = [row for row in rows if (row["student"], row["seed"]) == (FIRST_STUDENT, 0)]
    mine = [row for row in mine if row["budget"] in ("updates", "rate")]
    rates = sorted({row["learning_rate"] for row in mine})
    table: Table = [("method", *(f"rate {rate:g}" for rate in rates))]
    for method in METHODS:
        found = {row["learning_rate"]: accuracy([row]) for row in mine if row["method"] == method}
        if len(found) > 1:
            cells = (f"{found[rate]:.1%}" if rate in found else "-" for rate in rates)
            table.append((title(method), *cells))
    return table


def align(table: Table) -> str:
    """As Markdown's indented text."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "    "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def thousands(tokens: float) -> str:
    return f"{tokens / 1000:.0f}k" if tokens else "0"


def _rounded(value: Any) -> Any:
    """With six digits, which is more than is known."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
