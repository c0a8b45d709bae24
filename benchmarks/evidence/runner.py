"""Makes the runs that are missing, in one process, and writes a row for each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import distill
from benchmarks.evidence.runs import (
    METHODS,
    STUDENT,
    TEACHER,
    Run,
    common_config,
    config_of,
)
from distill.base.files import write_atomically
from distill.build.session import Session
from distill.config.parse import parse_config
from distill.evaluation.evaluator import Evaluation, Responses
from distill.generate import generate
from distill.models.checkpoints.hub import resolve_model

HELD_OUT = 512

Row = dict[str, Any]


def perform_all(runs: Iterable[Run], output: Path) -> None:
    """A killed call is repeated with the same command: its runs go on where they were."""
    (output / "rows").mkdir(parents=True, exist_ok=True)
    _write(output, "base", dict(method="base", **_measured(STUDENT)))
    for run in runs:
        if not (output / "rows" / f"{run.name}.json").exists():
            row = perform(run, output)
            _write(output, run.name, row)
            solved = f"{row['right'].count('1')} of {len(row['right'])}"
            print(f"{run.name}: {solved} in {row['seconds']:.0f} s", flush=True)
            jax.clear_caches()  # of programs that no other run will call


def _write(output: Path, name: str, row: Row) -> None:
    write_atomically(output / "rows" / f"{name}.json", json.dumps(row) + "\n")


def perform(run: Run, output: Path) -> Row:
    """Trains and measures a student; the row has its config, its numbers and its cost."""
    folder, student, best_step = output / "runs" / run.name, STUDENT, 0
    folder.mkdir(parents=True, exist_ok=True)
    with _timed(folder):
        for phase in range(len(METHODS[run.method].phases)):
            config, workdir = config_of(run, phase), folder / f"phase{phase}"
            config.policy.model_name = student
            if METHODS[run.method].teacher_samples:
                config.data.name, config.data.split = "jsonl", "all"
                config.data.path = str(_teacher_samples(run, output))
                config.data.max_samples = None
            if not (workdir / "student").exists():
                distill.train(config, workdir)
            # Of several phases, the best of the last one.
            best_step = phase * config.distillation.max_steps
            best_step += distill.export_checkpoint(config, workdir, workdir / "best")
            student = str(workdir / "student")
    return {
        **dataclasses.asdict(run),
        **_training_numbers(folder),
        **_measured(student),
        "best_step": best_step,
        "best": _measured(str(workdir / "best")),
    }


def _teacher_samples(run: Run, output: Path) -> Path:
    """The teacher's responses, sampled at temperature 1, several to each prompt of the run."""
    count = METHODS[run.method].teacher_samples
    path = output / "data" / f"{count}-to-{run.prompts}-seed{run.seed}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        config = common_config(run.seed)
        config.data.max_samples = run.prompts
        config.distillation.generate_strategy.num_generations = count
        generate(config, TEACHER, path)
    return path


@contextlib.contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Adds a line to seconds.jsonl, also where an error ends the run."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        spent = dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
        with (folder / "seconds.jsonl").open("a") as file:
            file.write(json.dumps(spent) + "\n")


def _training_numbers(folder: Path) -> Row:
    """Cost, and the evaluations on the way; tokens are of responses, EOS counted."""
    logs = [_lines(path) for path in sorted(folder.glob("phase*/metrics.jsonl"))]
    steps = [line for log in logs for line in log if "seconds/step" in line]
    spent = _lines(folder / "seconds.jsonl")
    return {
        "seconds": sum(line["wall"] for line in spent),
        "cpu_seconds": sum(line["cpu"] for line in spent),
        "seconds_per_update": float(np.median([line["seconds/step"] for line in steps])),
        "tokens": sum(line["tokens"] for line in steps),
        "sampled_tokens": sum(line["tokens"] * line["on_policy"] for line in steps),
        "curve": [_point(line) for log in logs for line in log if _STUDENT["accuracy"] in line],
    }


_STUDENT = {
    name: f"eval/student/{name}" for name in ("accuracy", "forward_kl", "reverse_kl", "truncated")
}


def _point(line: Row) -> Row:
    return {"step": line["step"], **{name: line.get(key) for name, key in _STUDENT.items()}}


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _measured(student: str) -> Row:
    """Greedy responses to the held-out problems, the same for all students."""
    evaluation, responses = _evaluate(student)
    return {
        "right": "".join(str(int(bool(each))) for each in responses.correct),
        "forward_kl": evaluation.forward_kl,
        "reverse_kl": evaluation.reverse_kl,
        "mean_length": evaluation.mean_length,
        "truncated": evaluation.truncated,
    }


def _evaluate(student: str) -> tuple[Evaluation, Responses]:
    session = _session()
    with jax.set_mesh(session.mesh):
        model = session.load_frozen(resolve_model(student), "float32")
        return session.evaluator(model, session.teachers[""].model)


@functools.cache
def _session() -> Session:
    """With the held-out problems and the teacher."""
    config = common_config(0)
    config.data.validation.split, config.data.validation.max_samples = "test", HELD_OUT
    session = Session(parse_config(config))
    with jax.set_mesh(session.mesh):
        session.load_teachers()
    return session
