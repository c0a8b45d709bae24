"""What does a student forget when it learns something new, and with which method?

    python -m benchmarks.evidence.forgetting --output=runs/forgetting
    python -m benchmarks.evidence --report

The first command trains a teacher, a student that knows the old convention, and from that the
students that are missing, and writes docs/results/forgetting.json. The second makes the page of
that.

Old are the built-in problems of two and three operations, new the same modulo ten. Students learn
from the new prompts alone, but for the method that rehearses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.evidence.forgetting_task import BOTH, NEW, OLD, TASK
from benchmarks.evidence.report import (
    DOCS,
    Cell,
    Estimate,
    Row,
    Table,
    estimate,
    gain,
    interval,
    kept_row,
    points,
    resampled,
    situation,
    write_rows,
)
from benchmarks.evidence.runs import LEARNING_RATE, TEACHER, Overrides, task_config
from distill.config import cli

if TYPE_CHECKING:
    from benchmarks.evidence.held_out import HeldOut

ROWS = DOCS / "results/forgetting.json"
LONGEST, PROBLEMS, SEEDS = 26, 256, 3
UPDATES, EVERY, POINTS = 150, 25, (25, 50, 100, 150)
LEARNED = 0.8  # of the new problems, where methods of different speed are compared


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: overrides of the config, and whether half of the prompts are old."""

    title: str
    overrides: Overrides
    rehearses: bool = False


SFT = {"distillation.lambda_": 0.0, "distillation.hard_labels": True}
REFERENCE = "sft"
METHODS = {
    REFERENCE: Method("SFT on the dataset's responses", SFT),
    "sft_slow": Method(
        "SFT, a quarter of the rate", SFT | {"policy.optimizer.learning_rate": LEARNING_RATE / 4}
    ),
    "off": Method("off-policy, forward KL", {"distillation.lambda_": 0.0}),
    "on": Method("on-policy, forward KL", {}),
    "on_reverse": Method("on-policy, reverse KL", {"distillation.kl_type": "reverse"}),
    "rehearse": Method("on-policy, forward KL, half of the prompts old", {}, rehearses=True),
}
START, GENERALIST = "start", "teacher"
MODELS = {START: "student before", GENERALIST: "the teacher"}


def config_of(subset: str, updates: int, every: int, seed: int = 0) -> ConfigDict:
    config = task_config(TASK, LONGEST, updates, seed)
    config.data.subset = subset
    config.distillation.save_steps, config.checkpointing.keep = every, updates // every
    return config


def start_config() -> ConfigDict:
    """A student that knows the old convention."""
    return config_of(OLD, 200, 200)


def teacher_config() -> ConfigDict:
    """A teacher that knows both."""
    config = config_of(BOTH, 300, 300)
    config.policy.model_name = TEACHER
    config.distillation.update(hard_labels=True, lambda_=0.0)
    config.policy.optimizer.learning_rate = 1e-3
    return config


def run_config(method: str, seed: int, output: Path) -> ConfigDict:
    config, row = config_of(NEW, UPDATES, EVERY, seed), METHODS[method]
    start, teacher = (str(output / name / "student") for name in MODELS)
    config.policy.model_name, config.distillation.teacher_model_path = start, teacher
    if row.rehearses:
        config.data.subset, config.distillation.teacher_model_path = BOTH, ""
        config.teacher.precision = "bfloat16"  # the default: those below stand in its place
        config.teachers = {
            name: dict(model=model, precision="float32", prompts=(f"task={name}",))
            for name, model in ((NEW, teacher), (OLD, start))
        }
    config.update_from_flattened_dict(row.overrides)
    return config


def perform_all(output: Path) -> None:
    """A killed call is repeated with the same command."""
    import jax

    import distill
    from benchmarks.evidence.held_out import HeldOut

    for name, config in ((START, start_config()), (GENERALIST, teacher_config())):
        if not (output / name / "student").exists():
            distill.train(config, output / name)
    config = config_of(BOTH, UPDATES, EVERY)
    config.data.validation.split, config.data.validation.max_samples = "test", PROBLEMS
    held_out, rows = HeldOut(config), []
    for name in MODELS:
        measure = functools.partial(_at, 0, output / name / "student", held_out)
        path = output / "rows" / f"{name}.json"
        rows.append(
            kept_row(path, lambda name=name, measure=measure: dict(method=name, curve=[measure()]))
        )
    for seed in range(SEEDS):
        for method in METHODS:
            make = functools.partial(_perform, method, seed, output, held_out)
            rows.append(kept_row(output / "rows" / f"{method}-seed{seed}.json", make))
            last = {task: rows[-1]["curve"][-1][task].count("1") for task in (OLD, NEW)}
            print(f"{method}, seed {seed}: {last} of {PROBLEMS}", flush=True)
            jax.clear_caches()  # of programs that no other run will call
    write_rows(ROWS, rows)


def _perform(method: str, seed: int, output: Path, held_out: HeldOut) -> Row:
    import distill
    from distill.build.export import export_saved
    from distill.build.session import open_session
    from distill.config.parse import parse_config

    folder, config = output / f"{method}-seed{seed}", run_config(method, seed, output)
    if not (folder / "student").exists():
        distill.train(config, folder)
    with open_session(parse_config(config), folder) as session:
        for step in POINTS:
            export_saved(session, folder / f"at{step}", str(step))
    curve = [_at(step, folder / f"at{step}", held_out) for step in POINTS]
    return dict(method=method, seed=seed, curve=curve)


def _at(step: int, model: Path, held_out: HeldOut) -> Row:
    """Which old and new problems a model solves greedily, the same in both conventions."""
    right = {OLD: "", NEW: ""}
    for example, said in held_out.responses(model, greedy=True):
        right[example.columns["task"]] += str(int(held_out.is_correct(example, said)))
    return dict(step=step, **right)


class Curves:
    """Runs of a method by seed, with their students on the way; all begin with the start."""

    def __init__(self, rows: Sequence[Row], method: str):
        (start,) = (row["curve"][0] for row in rows if row["method"] == START)
        self.by_seed = {
            row["seed"]: [start, *row["curve"]] for row in rows if row["method"] == method
        }
        self.steps = [at["step"] for at in next(iter(self.by_seed.values()))]

    def cell(self, task: str, point: int = -1) -> Cell:
        return Cell({seed: dict(right=curve[point][task]) for seed, curve in self.by_seed.items()})

    def resampled(self, task: str) -> np.ndarray:
        """[1 + resamples, steps], mean accuracies of all, then of each resample."""
        points = range(len(self.steps))
        right_tsp = np.stack([self.cell(task, point).right() for point in points])
        seeds, problems = (resampled(size) for size in right_tsp.shape[1:])
        drawn = np.einsum("rs,tsp,rp->rt", seeds, right_tsp, problems, optimize=True)
        return np.concatenate([right_tsp.mean(axis=(1, 2))[None], drawn])

    def old_where_learned(self) -> Estimate | None:
        """Accuracy on old problems where that on new ones is LEARNED, between the points.

        None where the mean of all never gets there.
        """
        found = [
            interpolate(old, new)
            for old, new in zip(self.resampled(OLD), self.resampled(NEW), strict=True)
        ]
        if np.isnan(found[0]):
            return None
        return Estimate(found[0], *map(float, np.nanquantile(found[1:], (0.025, 0.975))))


def interpolate(old: np.ndarray, new: np.ndarray) -> float:
    """The old accuracy where the new one first is LEARNED; NaN if it never is."""
    there = np.flatnonzero(new >= LEARNED)
    if not len(there):
        return float("nan")
    at = int(there[0])
    if not at:
        return float(old[0])
    part = (LEARNED - new[at - 1]) / (new[at] - new[at - 1])
    return float(old[at - 1] + part * (old[at] - old[at - 1]))


def make_table(rows: Sequence[Row]) -> Table:
    header = "", "new", "old", f"old above {METHODS[REFERENCE].title.split()[0]}"
    table: Table = [(*header, f"old where new is {LEARNED:.0%}")]
    for name, title in MODELS.items():
        (at,) = (row["curve"][0] for row in rows if row["method"] == name)
        cells = (Cell({0: dict(right=at[task])}) for task in (NEW, OLD))
        table.append((title, *(interval(estimate(cell.right())) for cell in cells), "-", "-"))
    reference = Curves(rows, REFERENCE).cell(OLD)
    for name, method in METHODS.items():
        curves = Curves(rows, name)
        new, old, learned = curves.cell(NEW), curves.cell(OLD), curves.old_where_learned()
        table.append(
            (
                method.title,
                *(interval(estimate(cell.right())) for cell in (new, old)),
                "-" if name == REFERENCE else points(gain(old, reference)),
                interval(learned) if learned else "not reached",
            )
        )
    return table


def situations(rows: Sequence[Row]) -> Table:
    """What is left of the old skill."""
    reference, table = Curves(rows, REFERENCE).cell(OLD), []
    texts = {
        "on": "a student that learns something new must not forget: own responses?",
        "rehearse": "a student that learns something new must not forget: rehearsal?",
    }
    for name, text in texts.items():
        titles = METHODS[name].title, METHODS[REFERENCE].title
        table.append(situation(text, (Curves(rows, name).cell(OLD), reference), titles, None))
    return table


def main() -> None:
    perform_all(Path(output_flag.value).absolute())


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    cli.run(main)
