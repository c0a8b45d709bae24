"""The student as its own teacher: what it says with the solution before it.

    python -m benchmarks.evidence.own_teacher --output=runs/own_teacher
    python -m benchmarks.evidence --report

The first command makes a student that can read a solution before a problem, from it the students
that are missing, and writes docs/results/own_teacher.json. The second makes the page of that.

A problem is the sum of three numbers of two digits. Every other problem that the first student
learned from has its solution before it. So it copies better than it works.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from benchmarks.evidence.own_teacher_task import BOTH, PLAIN, SOLVED, TASK
from benchmarks.evidence.report import (
    DOCS,
    Cell,
    Row,
    Table,
    estimate,
    gain,
    interval,
    kept_row,
    points,
    situation,
    write_rows,
)
from benchmarks.evidence.runs import Overrides, task_config
from distill.config import cli

if TYPE_CHECKING:
    from benchmarks.evidence.held_out import HeldOut

ROWS = DOCS / "results/own_teacher.json"
LONGEST, SEEDS, HELD_OUT = 24, 3, 512
UPDATES, START_UPDATES = 300, 1200
START, READS = "start", "reads"

SFT, SOLUTION, REVERSE, AVERAGE = "sft", "opsd", "opsd_reverse", "sdft_slow"
_SOLVED = {"teacher.prompt_template": "{response}\n{problem}"}
_RIGHT = {  # of four responses
    "teacher.prompt_template": "{feedback}\n{problem}",
    "reward.function": "accuracy",
    "distillation.generate_strategy.num_generations": 4,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: overrides of the config, and seeds."""

    title: str
    overrides: Overrides
    seeds: int = SEEDS

    def at(self, rate: float, seeds: int = 1) -> Method:
        """At another peak learning rate than 2e-3."""
        overrides = self.overrides | {"policy.optimizer.learning_rate": rate}
        return Method(f"{self.title}, rate {rate:g}", overrides, seeds)


def _average(decay: float) -> Overrides:
    return {"distillation.teacher_model_path": "ema", "teacher.ema_decay": decay}


_BASIC = {
    SFT: Method(
        "SFT on the solutions",
        {"distillation.lambda_": 0.0, "distillation.hard_labels": True},
    ),
    SOLUTION: Method("itself with the solution, on-policy (OPSD)", _SOLVED),
    REVERSE: Method(
        "itself with the solution, on-policy, reverse KL",
        _SOLVED | {"distillation.kl_type": "reverse"},
    ),
    AVERAGE: Method(
        "its average, decay 0.999, with the solution (SDFT)", _SOLVED | _average(0.999)
    ),
}
# More seeds for a method's best other rate.
METHODS = {
    SFT: _BASIC[SFT],
    "sft_6e-4": _BASIC[SFT].at(6e-4, SEEDS),
    "off": Method("itself with the solution, off-policy", _SOLVED | {"distillation.lambda_": 0.0}),
    SOLUTION: _BASIC[SOLUTION],
    "opsd_6e-4": _BASIC[SOLUTION].at(6e-4),
    "opsd_2e-4": _BASIC[SOLUTION].at(2e-4, SEEDS),
    REVERSE: _BASIC[REVERSE],
    "opsd_reverse_6e-4": _BASIC[REVERSE].at(6e-4, SEEDS),
    "opsd_reverse_2e-4": _BASIC[REVERSE].at(2e-4),
    AVERAGE: _BASIC[AVERAGE],
    "sdft_slow_6e-4": _BASIC[AVERAGE].at(6e-4),
    "sdft_slow_2e-4": _BASIC[AVERAGE].at(2e-4),
    "sdft": Method("its average, decay 0.99, with the solution", _SOLVED | _average(0.99)),
    "sdpo_slow": Method(
        "its average, decay 0.999, with a right response of its own (SDPO)",
        _RIGHT | _average(0.999),
    ),
    "sdpo": Method(
        "its average, decay 0.99, with a right response of its own", _RIGHT | _average(0.99)
    ),
}
TITLES = {
    START: "student before",
    READS: "the same, with the solution in its prompt",
    **{name: method.title for name, method in METHODS.items()},
}


def run_config(method: str, seed: int, output: Path) -> ConfigDict:
    """Of a method, or of the student that all begin with."""
    config = task_config(TASK, LONGEST, UPDATES, seed)
    config.distillation.save_steps = 0
    if method == START:
        config.data.subset, config.distillation.max_steps = BOTH, START_UPDATES
        config.update_from_flattened_dict(METHODS[SFT].overrides)
        return config
    config.data.subset = PLAIN
    config.policy.model_name = str(output / START / "student")
    config.distillation.teacher_model_path = "start"
    config.update_from_flattened_dict(METHODS[method].overrides)
    return config


def held_out_config(output: Path, subset: str) -> ConfigDict:
    config = run_config(SFT, 0, output)
    config.data.validation.split, config.data.validation.max_samples = "test", HELD_OUT
    config.data.subset = subset
    return config


def perform_all(output: Path) -> None:
    """A killed call is repeated with the same command."""
    import jax

    import distill
    from benchmarks.evidence.held_out import HeldOut

    if not (output / START / "student").exists():
        distill.train(run_config(START, 0, output), output / START)
    plain, solved = (HeldOut(held_out_config(output, subset)) for subset in (PLAIN, SOLVED))
    runs = [
        (method, seed)
        for seed in range(SEEDS)
        for method in METHODS
        if seed < METHODS[method].seeds
    ]
    rows = []
    for method, seed in [(START, 0), (READS, 0), *runs]:
        folder = output / (f"{method}-seed{seed}" if method in METHODS else START)
        held_out = solved if method == READS else plain
        make = functools.partial(_perform, method, seed, folder, held_out)
        row = kept_row(output / "rows" / f"{method}-seed{seed}.json", make)
        print(f"{method}, seed {seed}: {row['right'].count('1')} of {HELD_OUT}", flush=True)
        rows.append(dict(method=method, seed=seed, **row))
        jax.clear_caches()  # of programs that no other run will call
    write_rows(ROWS, rows)


def _perform(method: str, seed: int, folder: Path, held_out: HeldOut) -> Row:
    """What is solved at temperature 1, and greedily."""
    import distill

    if not (folder / "student").exists():
        distill.train(run_config(method, seed, folder.parent), folder)
    sampled, greedy = (
        "".join(
            str(int(held_out.is_correct(*each)))
            for each in held_out.responses(folder / "student", greedy=greedy)[:HELD_OUT]
        )
        for greedy in (False, True)
    )
    return dict(right=sampled, greedy=greedy)


def cells(rows: Sequence[Row], name: str = "right") -> dict[str, Cell]:
    """By method; what is right sampled, or greedily."""
    return {
        method: Cell(
            {row["seed"]: dict(right=row[name]) for row in rows if row["method"] == method}
        )
        for method in TITLES
        if any(row["method"] == method for row in rows)
    }


def make_table(rows: Sequence[Row]) -> Table:
    found, greedy = cells(rows), cells(rows, "greedy")
    header = "teacher", "seeds", "accuracy, sampled", "above the start", "above SFT"
    table: Table = [(*header, "accuracy, greedy")]
    for name, cell in found.items():
        right, more = cell.right(), ["-", "-", "-"]
        if name in METHODS:
            above_sft = points(gain(cell, found[SFT])) if name != SFT else "-"
            more = [str(len(right)), points(estimate(right - found[START].right())), above_sft]
        shown = TITLES[name], more[0], interval(estimate(right)), *more[1:]
        table.append((*shown, interval(estimate(greedy[name].right()))))
    return table


def situations(rows: Sequence[Row]) -> Table:
    """Whether the student can be its own teacher where there are solutions, at its best rate."""
    found, lines = cells(rows), []
    for name, by in (("opsd_2e-4", ""), ("opsd_reverse_6e-4", ", by reverse KL")):
        text = (
            "no larger teacher, but solutions, sampled: the student with the solution as its "
            f"teacher{by}?"
        )
        compared, titles = (found[name], found[SFT]), (TITLES[name], TITLES[SFT])
        lines.append(situation(text, compared, titles, found[START].rows[0]))
    return lines


def main() -> None:
    perform_all(Path(output_flag.value).absolute())


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    cli.run(main)
