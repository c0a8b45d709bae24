"""Tables of the committed rows: every figure of docs/results.md is printed from here."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.runs import (
    BATCH,
    FEW,
    GROUP_PROMPTS,
    GROUPED,
    LEARNING_RATE,
    METHODS,
    OFF,
    ON,
    REWARDS,
    UPDATES,
)
from distill.base.errors import UserError
from distill.base.files import write_atomically

DOCS = Path(__file__).parents[2] / "docs"
ROWS = DOCS / "results/evidence.json"
RESAMPLES = 4000
# Asked where prompts are few: a method, what it is compared with, and which student of that.
QUESTIONS = (
    ("is off-policy enough when it stops early?", ON, OFF, "best"),
    ("or with four teacher responses to each?", ON, "off_samples", "last"),
    ("does a teacher's distribution beat SFT on fixed data?", OFF, "sft", "last"),
    ("half of the batches off-policy?", "mix", ON, "last"),
    ("off-policy first, then on-policy?", "warm", ON, "last"),
    ("JSD(0.5) on own responses?", "on_jsd", ON, "last"),
    ("reverse KL on own responses?", "on_reverse", ON, "last"),
)

Row = dict[str, Any]
Table = list[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that differ in the seed alone.

    Attributes:
      rows: of the runs, by seed.
      when: 'last' for the student after all updates, 'best' for the one that validation chose.
    """

    rows: dict[int, Row]
    when: str = "last"

    def right(self, seeds: Iterable[int] | None = None) -> np.ndarray:
        """[seeds, problems], whether each was solved."""
        of = self.rows.keys() if seeds is None else seeds
        return np.array([[c == "1" for c in self._of(seed)["right"]] for seed in of], float)

    def mean(self, name: str) -> float:
        return float(np.mean([self._of(seed)[name] for seed in self.rows]))

    def _of(self, seed: int) -> Row:
        return self.rows[seed]["best"] if self.when == "best" else self.rows[seed]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and problems, with a 95% interval; in shares, not in points."""

    value: float
    low: float
    high: float


def estimate(values_sp: np.ndarray) -> Estimate:
    """The mean, with its interval by bootstrap over seeds and, apart from that, over problems."""
    seeds, problems = (resampled(size) for size in values_sp.shape)
    means = ((seeds @ values_sp) * problems).sum(axis=1)
    return Estimate(float(values_sp.mean()), *map(float, np.quantile(means, (0.025, 0.975))))


@functools.cache
def resampled(size: int) -> np.ndarray:
    """[RESAMPLES, size], how often each of so many is drawn, as a share of all draws."""
    rng = np.random.default_rng(size)
    return rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) / size


def gain(cell: Cell, reference: Cell) -> Estimate:
    """Accuracy of one above another: seeds that both have, the same problems in each resample."""
    seeds = sorted(cell.rows.keys() & reference.rows.keys())
    return estimate(cell.right(seeds) - reference.right(seeds))


class Evidence:
    """All rows, by what was run."""

    def __init__(self, rows: Sequence[Row]):
        self.base = next(row for row in rows if row["method"] == "base")
        self.rows = [row for row in rows if row["method"] != "base"]

    def cell(
        self, method: str, prompts: int, when: str = "last", rate: float = LEARNING_RATE
    ) -> Cell | None:
        """None where nothing was run."""
        key = method, prompts, rate
        found = [r for r in self.rows if (r["method"], r["prompts"], r["learning_rate"]) == key]
        by_seed = {row["seed"]: row for row in sorted(found, key=lambda row: row["seed"])}
        return Cell(by_seed, when) if by_seed else None

    def keys(self) -> list[tuple[str, int, float]]:
        """Method, prompts and rate of all cells, in the order of the tables."""
        found = {(r["method"], r["prompts"], r["learning_rate"]) for r in self.rows}
        return sorted(found, key=lambda key: (key[1], key[2], list(METHODS).index(key[0])))

    def prompts(self) -> list[int]:
        """Sizes at which on-policy and off-policy were both run."""
        sizes = sorted({row["prompts"] for row in self.rows})
        return [n for n in sizes if self.cell(OFF, n) and self.cell(ON, n)]


def make_report(output: Path | None) -> None:
    """Writes JSON, tables and pictures; the JSON is read where there is no `output`."""
    from benchmarks.evidence.plots import make_plots

    if output:
        rows = [json.loads(path.read_text()) for path in sorted((output / "rows").glob("*.json"))]
        if not rows:
            raise UserError(f"no rows in {output / 'rows'}: run without --report first")
        write_rows(ROWS, map(_rounded, rows))
    evidence = Evidence(json.loads(ROWS.read_text()))
    publish(make_tables(evidence))
    make_plots(evidence, DOCS / "images")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON with a line for each row."""
    lines = ",\n".join(map(json.dumps, rows))
    write_atomically(path, f"[\n{lines}\n]\n")


def kept_row(path: Path, make: Callable[[], Row]) -> Row:
    """What is in the file, which is made first where it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text())


def publish(tables: dict[str, str]) -> None:
    """Writes tables to their places in docs/results.md, and prints them."""
    page = DOCS / "results.md"
    write_atomically(page, fill(page.read_text(), tables))
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")


def fill(text: str, tables: dict[str, str]) -> str:
    """The page with each table between its two marks, `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if (text.count(begin), text.count(end)) != (1, 1):
            raise UserError(f"the page needs one place for the table {name}: {begin} and {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


def make_tables(evidence: Evidence) -> dict[str, str]:
    """All tables, by their names in docs/results.md."""
    # Late: they import this module.
    from benchmarks.evidence import forgetting, language_model, mending, own_teacher, styles

    own = {
        name: (module, json.loads(module.ROWS.read_text()))
        for name, module in dict(
            mending=mending,
            forgetting=forgetting,
            styles=styles,
            own_teacher=own_teacher,
            language_model=language_model,
        ).items()
    }
    more = [line for module, rows in own.values() for line in module.situations(rows)]
    return {
        "situations": markdown([*situation_table(evidence), *more]),
        **{name: markdown(module.make_table(rows)) for name, (module, rows) in own.items()},
        "said": language_model.make_texts(own["language_model"][1]),
        "each_style": markdown(styles.make_style_table(own["styles"][1])),
        "rivals": markdown(rival_table(evidence)),
        "rewards": markdown(reward_table(evidence)),
        "accuracy": align(accuracy_table(evidence)),
        "stopping": align(stopping_table(evidence)),
        "cost": align(cost_table(evidence)),
    }


def situation_table(evidence: Evidence) -> Table:
    """What a user has, what to use there, and what it was worth here."""
    table: Table = [("your situation", "what to use", "measured effect, held-out accuracy")]
    for n in evidence.prompts():
        text = f"{n:,} prompts, {UPDATES * BATCH / n:.3g} epochs: off-policy or on-policy?"
        compared = evidence.cell(ON, n), evidence.cell(OFF, n)
        titles = METHODS[ON].title, METHODS[OFF].title
        table.append(situation(text, compared, titles, evidence.base))
    n = FEW
    for text, method, reference, when in QUESTIONS:
        compared = evidence.cell(method, n), evidence.cell(reference, n, when)
        if all(compared):
            titles = METHODS[method].title, METHODS[reference].title
            table.append(situation(f"{n:,} prompts: {text}", compared, titles, evidence.base))
    return table


def situation(
    text: str, compared: Sequence[Cell], titles: Sequence[str], base: Row | None
) -> Sequence[str]:
    """The text, the better method where the interval has no zero in it, and the figures.

    `base`: of the student to begin with, where neither method should end below it.
    """
    more, start = gain(*compared), Cell({0: base}).right().mean() if base else 0.0
    advice = titles[0] if more.low > 0 else titles[1] if more.high < 0 else "either"
    if max(cell.right().mean() for cell in compared) < start:
        advice = f"neither: both end below the {percent(start)} of the start"
    seeds = sorted(compared[0].rows.keys() & compared[1].rows.keys())
    shares = (percent(cell.right(seeds).mean()) for cell in compared)
    count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return text, advice, f"{' against '.join(shares)}: {points(more)}, {count}"


def rival_table(evidence: Evidence) -> Table:
    """All methods on few prompts, above plain off-policy distillation and below on-policy."""
    n = FEW
    header = f"{n} distinct prompts", "seeds", "accuracy", "above off-policy"
    table: Table = [(*header, "above on-policy")]
    for title, cell in rival_cells(evidence, n).items():
        right = cell.right()
        others = [
            points(gain(cell, evidence.cell(method, n)))
            if cell != evidence.cell(method, n)
            else "-"
            for method in (OFF, ON)
        ]
        table.append((title, str(len(right)), interval(estimate(right)), *others))
    return table


def rival_cells(evidence: Evidence, prompts: int) -> dict[str, Cell]:
    """Cells by title: every method, and the two main ones stopped early and with other rates."""
    found = {}
    for method, n, rate in evidence.keys():
        if n != prompts:
            continue
        title = METHODS[method].title
        if rate != LEARNING_RATE:
            title += f", rate {rate:g}"
        found[title] = evidence.cell(method, n, rate=rate)
        if (method, rate) == (OFF, LEARNING_RATE):
            found[f"{title}, stopped early"] = evidence.cell(method, n, "best")
    return {title: cell for title, cell in found.items() if cell}


def reward_table(evidence: Evidence) -> Table:
    """A reward beside the teacher, and each alone, on own responses in groups."""
    n, start = GROUP_PROMPTS, Cell({0: evidence.base}).right()
    header = "objective", "peak rate", "seeds", "accuracy", "each seed", "above the teacher alone"
    table: Table = [
        (*header, "above the start"),
        ("before", "", "", interval(estimate(start)), "", "", ""),
    ]
    for method, rate in REWARDS:
        cell, teacher = evidence.cell(method, n, rate=rate), evidence.cell(GROUPED, n)
        if not (cell and teacher):
            continue
        right = cell.right()
        more = "-" if cell == teacher else points(gain(cell, teacher))
        each = " ".join(f"{100 * x:.1f}" for x in right.mean(axis=1))
        row = METHODS[method].title, f"{rate:g}", str(len(right)), interval(estimate(right))
        table.append((*row, each, more, points(estimate(right - start))))
    return table


def accuracy_table(evidence: Evidence) -> Table:
    """All that was run."""
    header = "prompts", "method", "rate", "seeds", "accuracy", "each seed", "forward KL"
    table: Table = [(*header, "reverse KL", "length", "cut off")]
    base = evidence.base
    numbers = [base[name] for name in ("forward_kl", "reverse_kl", "mean_length", "truncated")]
    right = estimate(Cell({0: base}).right())
    table.append(("-", "student as it comes", "-", "-", interval(right), "-", *_numbers(*numbers)))
    for method, n, rate in evidence.keys():
        cell = evidence.cell(method, n, rate=rate)
        right = cell.right()
        each = " ".join(f"{100 * x:.1f}" for x in right.mean(axis=1))
        numbers = map(cell.mean, ("forward_kl", "reverse_kl", "mean_length", "truncated"))
        row = str(n), METHODS[method].title, f"{rate:g}", str(len(right))
        table.append((*row, interval(estimate(right)), each, *_numbers(*numbers)))
    return table


def stopping_table(evidence: Evidence) -> Table:
    """Validation accuracy on the way, and what the step that it chooses is worth."""
    steps = [point["step"] for point in evidence.rows[0]["curve"]]
    header = "prompts", "method", *(f"at {step}" for step in steps)
    table: Table = [(*header, "chosen", "held out: chosen", "last")]
    for n in evidence.prompts():
        for method in (OFF, ON):
            cell, best = evidence.cell(method, n), evidence.cell(method, n, "best")
            curves = [[p["accuracy"] for p in row["curve"]] for row in cell.rows.values()]
            shown = [percent(x) for x in np.mean(curves, axis=0)]
            chosen = " ".join(str(row["best_step"]) for row in cell.rows.values())
            ends = [percent(estimate(each.right()).value) for each in (best, cell)]
            table.append((str(n), METHODS[method].title, *shown, chosen, *ends))
    return table


def cost_table(evidence: Evidence) -> Table:
    header = "method", "runs", "s per update", "s in all", "CPU s", "teacher scored"
    table: Table = [(*header, "student sampled")]
    for method in METHODS:
        rows = [row for row in evidence.rows if row["method"] == method]
        if not rows:
            continue
        phase = METHODS[method].phases[0]
        has_teacher = phase.get("distillation.objective.divergence", 1) > 0
        scored = has_teacher and "distillation.hard_labels" not in phase
        table.append(
            (
                METHODS[method].title,
                str(len(rows)),
                f"{_median(rows, 'seconds_per_update'):.3f}",
                f"{_median(rows, 'seconds'):.0f}",
                f"{_median(rows, 'cpu_seconds'):.0f}",
                f"{scored * _median(rows, 'tokens') / 1000:.0f}k",
                f"{_median(rows, 'sampled_tokens') / 1000:.0f}k",
            )
        )
    return table


def _median(rows: Sequence[Row], name: str) -> float:
    return float(np.median([row[name] for row in rows]))


def percent(share: float) -> str:
    return f"{share:.1%}"


def interval(x: Estimate) -> str:
    return f"{x.value:.1%} ({100 * x.low:.1f} to {100 * x.high:.1f})"


def points(x: Estimate) -> str:
    return f"{100 * x.value:+.1f} points ({100 * x.low:+.1f} to {100 * x.high:+.1f})"


def _numbers(forward: float | None, reverse: float | None, length: float, cut: float) -> list[str]:
    return [f"{forward:.3f}", f"{reverse:.3f}", f"{length:.1f}", f"{cut:.1%}"]


def markdown(table: Table) -> str:
    header, *rows = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def align(table: Table) -> str:
    """As Markdown's indented text."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "    "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def _rounded(value: Any) -> Any:
    """With six digits, which is more than is known."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
