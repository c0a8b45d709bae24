"""Mistakes that can be mended: a teacher that redoes a wrong line, and a student that slips.

    python -m benchmarks.evidence.mending --output=runs/mending
    python -m benchmarks.evidence --report

The first command trains a teacher and the students that are missing, and writes
docs/results/mending.json. The second makes the page of that.

The task is the built-in arithmetic of two to four operations, at temperature 1. A wrong line may be
written once more, rightly: only the last result is graded. The data's responses have no wrong line.
The teacher is the built-in one after it has learned to go on behind lines the last of which is
often wrong. A slip is a line that is not the right next one; it is mended when one of the next
BACK lines is.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from benchmarks.evidence.mending_task import TASK, WITH_SLIPS, Mending
from benchmarks.evidence.report import (
    DOCS,
    Cell,
    Row,
    Table,
    estimate,
    gain,
    interval,
    kept_row,
    percent,
    points,
    situation,
    write_rows,
)
from benchmarks.evidence.runs import STUDENT, TEACHER, Overrides, task_config
from distill.config import cli

ROWS = DOCS / "results/mending.json"
LONGEST, UPDATES, PROBLEMS, SEEDS, BACK = 50, 400, 512, 3, 2


@dataclasses.dataclass(frozen=True)
class Lines:
    """How many lines a response has up to its last right one or slip, and what they are."""

    steps: int = 0
    slips: int = 0
    mended: int = 0


def read_lines(problem: str, response: str) -> Lines:
    """Follows a response line by line, up to a slip that is not mended."""
    first, *operations = re.findall(r"^\d+|[-+*]\d", problem)
    lines, total, at, steps, slips, mended = response.split("\n"), int(first), 0, 0, 0, 0
    for operation in operations:
        result = eval(f"{total}{operation}")
        right = f"{total}{operation}={result}"
        following = lines[at : at + 1 + BACK]
        if not following:
            break  # ended too early, or cut off
        steps += 1
        if following[0] != right:
            slips += 1
            if right not in following:
                break
            mended += 1
        at, total = at + following.index(right) + 1, result
    return Lines(steps, slips, mended)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: overrides of the config, and whether its teacher mends."""

    title: str
    overrides: Overrides
    mends: bool = True
    teacher_samples: bool = False


OFF, ON, ON_REVERSE = "off", "on", "on_reverse"
METHODS = {
    OFF: Method("off-policy, forward KL", {"distillation.lambda_": 0.0}),
    ON: Method("on-policy, forward KL", {}),
    ON_REVERSE: Method("on-policy, reverse KL", {"distillation.kl_type": "reverse"}),
    "mix": Method("half of the batches each", {"distillation.lambda_": 0.5}),
    "off_samples": Method(
        "off-policy, the teacher's samples", {"distillation.lambda_": 0.0}, teacher_samples=True
    ),
    "on_plain": Method("on-policy, a teacher that never mends", {}, mends=False),
}


BASE, MENDING, PLAIN = "base", "teacher", "plain_teacher"
MODELS = {
    BASE: "student as it comes",
    MENDING: "the teacher, which mends",
    PLAIN: "the built-in teacher, which does not",
}


def teacher_config() -> ConfigDict:
    config = task_config(TASK, LONGEST, UPDATES, 0)
    config.data.name = WITH_SLIPS
    config.policy.model_name = TEACHER
    config.distillation.generate_strategy.max_length = 31  # nothing is sampled; prompts are longer
    config.distillation.update(hard_labels=True, lambda_=0.0, max_steps=1200)
    config.policy.optimizer.learning_rate = 1e-3
    return config


def run_config(method: str, seed: int, output: Path) -> ConfigDict:
    from distill.generate import generate

    config, row = task_config(TASK, LONGEST, UPDATES, seed), METHODS[method]
    if row.mends:
        config.distillation.teacher_model_path = str(output / "teacher/student")
    config.update_from_flattened_dict(row.overrides)
    if row.teacher_samples:
        path = output / f"samples-seed{seed}.jsonl"
        if not path.exists():
            generate(config, config.distillation.teacher_model_path, path)
        config.data.name, config.data.split, config.data.path = "jsonl", "all", str(path)
    return config


def perform_all(output: Path) -> None:
    """A killed call is repeated with the same command."""
    import jax

    import distill

    teacher = output / "teacher/student"
    if not teacher.exists():
        distill.train(teacher_config(), teacher.parent)
    models = {BASE: STUDENT, MENDING: str(teacher), PLAIN: TEACHER}
    rows = [_row(name, 0, model, output) for name, model in models.items()]
    for seed in range(SEEDS):
        for method in METHODS:
            student = output / f"{method}-seed{seed}/student"
            if not student.exists():
                distill.train(run_config(method, seed, output), student.parent)
            rows.append(_row(method, seed, str(student), output))
            jax.clear_caches()  # of programs that no other run will call
    write_rows(ROWS, rows)


def _row(method: str, seed: int, model: str, output: Path) -> Row:
    path = output / "rows" / f"{method}-seed{seed}.json"
    row = kept_row(path, lambda: measure(model, path.with_suffix(".jsonl")))
    print(f"{method}, seed {seed}: {row['right'].count('1')} of {PROBLEMS}", flush=True)
    return dict(method=method, seed=seed, **row)


def measure(model: str, path: Path) -> Row:
    """What a model does with the held-out problems, at temperature 1; responses go to `path`."""
    from distill.generate import generate

    config = task_config(TASK, LONGEST, UPDATES, 0)
    config.data.split, config.data.max_samples = "test", PROBLEMS
    generate(config, model, path)
    said = {row["prompt"]: row["response"] for row in map(json.loads, path.open())}
    problems = Mending("test", 0, PROBLEMS)
    examples = [problems[i] for i in range(len(problems))]
    right = [problems.is_correct(x, said[x.prompt]) for x in examples]
    lines = [read_lines(x.prompt, said[x.prompt]) for x in examples]
    slips = sum(x.slips for x in lines)
    return dict(
        right="".join(str(int(each)) for each in right),
        slips=slips / sum(x.steps for x in lines),
        mended=sum(x.mended for x in lines) / max(1, slips),
    )


def _cells(rows: Sequence[Row]) -> dict[str, Cell]:
    """Students by method, and the models that they come from."""
    return {
        name: Cell({row["seed"]: row for row in rows if row["method"] == name})
        for name in (*MODELS, *METHODS)
    }


def situations(rows: Sequence[Row]) -> Table:
    cells, off = _cells(rows), METHODS[OFF].title
    base = cells[BASE].rows[0]
    return [
        situation(
            f"the teacher mends mistakes that the student cannot see: {title}, sampled",
            (cells[name], cells[OFF]),
            (title, off),
            base,
        )
        for name, title in ((name, METHODS[name].title) for name in (ON, ON_REVERSE))
    ]


def make_table(rows: Sequence[Row]) -> Table:
    header = "", "seeds", "accuracy, sampled", "above off-policy", "lines that slip", "slips mended"
    cells = _cells(rows)
    table: Table = [header]
    for name, cell in cells.items():
        method = METHODS.get(name)
        compared = method and name != OFF
        table.append(
            (
                method.title if method else MODELS[name],
                str(len(cell.rows)) if method else "-",
                interval(estimate(cell.right())),
                points(gain(cell, cells[OFF])) if compared else "-",
                percent(cell.mean("slips")),
                percent(cell.mean("mended")),
            )
        )
    return table


def main() -> None:
    perform_all(Path(output_flag.value).absolute())


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    cli.run(main)
