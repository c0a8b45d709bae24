"""Reads a run's folder, finished or not, and says what of it cannot be read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.base.errors import UserError
from distill.evaluation.diagnosis import CLASSES
from distill.evaluation.recorder import FOLDER
from distill.reporting.facts import FACTS

PROBE = "probe.json"  # what `distill.preflight --probe` found
METRICS, RESULTS, STUDENT, CHECKPOINTS = "metrics.jsonl", "results.json", "student", "checkpoints"

Points = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """As `evaluation.diagnosis.diagnose` makes it, but for names that the report does not show."""

    means: dict[str, float | None]
    positions: dict[str, list[float | None]]
    classes: dict[str, dict[str, float | None]]
    prompts: list[tuple[str, float | None]]
    half: float | None
    departures: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a report knows of a run.

    Attributes:
      name: of its folder.
      step: updates made, as far as the folder tells.
      series: by name of the metric, (step, value) in the order of the steps.
      results: evaluations by role, as in results.json; the last ones so far of an unfinished run.
      rollouts: by role, as `RolloutRecorder` writes them.
      diagnoses: by role, of the responses that were rolled out.
      probe: by teacher, as `checks.probe` writes it; {} if it was not made.
      config, environment: as in run.json; {} if that is not there.
      notes: one line for each thing that is missing or damaged.
    """

    name: str
    step: int
    series: dict[str, Points]
    results: dict[str, dict[str, Any]]
    rollouts: dict[str, dict[str, Any]]
    diagnoses: dict[str, Diagnosis]
    probe: dict[str, dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...]


def read_run(workdir: Path) -> Run:
    """What is there of the run in `workdir`.

    Raises:
      UserError: there is no folder, or no run in it.
    """
    if not workdir.is_dir():
        raise UserError(
            f"there is no folder {workdir}: pass the --workdir of a run, finished or not"
        )
    if not (workdir / METRICS).is_file():
        raise UserError(
            f"{workdir} holds no run: there is no {METRICS} in it; pass the --workdir of a run "
            "that has begun to train"
        )
    notes: list[str] = []
    series = _read_series(workdir / METRICS, notes)
    facts = _read_json(workdir / FACTS, notes)
    results = _read_json(workdir / RESULTS, notes) if (workdir / RESULTS).exists() else {}
    rollouts, diagnoses = {}, {}
    for path in sorted((workdir / FOLDER).glob("*.json")):
        record = _read_json(path, notes)
        if _are_rollouts(record):
            rollouts[path.stem] = record
            if diagnosis := _diagnosis(record.pop("diagnosis", None)):
                diagnoses[path.stem] = diagnosis
        elif record:
            notes.append(f"{path.name} is damaged and left out.")
    run = Run(
        name=workdir.resolve().name,
        step=_last_step(workdir, series),
        series=series,
        results=_numbers(results) or _evaluations(series),
        rollouts=rollouts,
        diagnoses=diagnoses,
        probe=_probes(_read_json(workdir / PROBE, notes)) if (workdir / PROBE).exists() else {},
        config=_section(facts, "config"),
        environment=_section(facts, "environment"),
        notes=tuple(notes),
    )
    return dataclasses.replace(run, notes=(*_progress_notes(workdir, run), *run.notes))


def _read_series(path: Path, notes: list[str]) -> dict[str, Points]:
    """Numbers by metric and step: what a killed run has logged twice counts once."""
    series: dict[str, dict[int, float]] = defaultdict(dict)
    damaged = 0
    for line in path.read_bytes().splitlines():
        fields = _parse(line) or {}
        step = fields.pop("step", None)
        if not isinstance(step, int) or isinstance(step, bool):
            damaged += 1
            continue
        for name, value in fields.items():
            if _is_number(value):
                series[name][step] = float(value)
    if damaged:
        notes.append(f"{damaged} of the lines in {path.name} cannot be read and are left out.")
    return {name: sorted(points.items()) for name, points in series.items()}


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        fields = _parse(path.read_bytes())
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror}).")
        return {}
    if fields is None:
        notes.append(f"{path.name} is damaged and left out.")
    return fields or {}


def _are_rollouts(record: dict[str, Any]) -> bool:
    """Whether it has what the page shows of `RolloutRecorder` writes."""
    of_tokens = ["tokens", "ids", "log_q"]
    if record.get("has_teacher"):
        of_tokens += ["log_p", "divergence", "top"]
    responses = record.get("responses")
    return (
        isinstance(responses, list)
        and isinstance(record.get("texts"), dict)
        and isinstance(record.get("responses_in_all"), int)
        and all(
            isinstance(response, dict) and _is_response(response, of_tokens)
            for response in responses
        )
    )


def _is_response(response: dict[str, Any], of_tokens: list[str]) -> bool:
    values = [response.get(name) for name in of_tokens]
    lengths = [len(value) for value in values if isinstance(value, list)]
    texts = [response.get(name) for name in ("id", "question", "prompt")]
    return (
        len(lengths) == len(values)
        and len(set(lengths)) == 1
        and all(isinstance(text, str) for text in texts)
        and {"correct", "expected", "stopped"} <= response.keys()
    )


# Numbers of a diagnosis and of a probe, by what their columns are called.
MEANS = {
    "overlap": "overlap",
    "teacher's mass": "mass_p",
    "student's mass": "mass_q",
    "teacher's entropy": "entropy_p",
    "student's entropy": "entropy_q",
    "teacher's perplexity": "surprise",
}
DEPARTURES = {
    "tokens that leave": "tokens",
    "responses that leave": "responses",
    "comes back": "back",
    "right after leaving": "right",
    "right otherwise": "right_otherwise",
}
PROBED = {
    "student": "student",
    "teacher from the student's half-way states": "teacher_from_student",
    "teacher": "teacher",
    "overlap": "overlap",
    "teacher's entropy": "entropy_p",
    "student's entropy": "entropy_q",
}


def _diagnosis(fields: Any) -> Diagnosis | None:
    """None where there is none, or not as it was written."""
    try:
        names = ("start", *MEANS.values(), "loss", "left")
        columns = {name: fields["positions"][name] for name in names}
        if len({len(column) for column in columns.values()}) != 1:
            return None
        largest = [(str(p["question"]), _number(p["loss"])) for p in fields["prompts"]["largest"]]
        return Diagnosis(
            means=_section_of(fields["means"], MEANS.values()),
            positions={name: list(map(_number, column)) for name, column in columns.items()},
            classes={n: _section_of(fields["classes"][n], ("tokens", "loss")) for n in CLASSES},
            prompts=largest,
            half=_number(fields["prompts"]["half"]),
            departures=_section_of(fields["departures"], DEPARTURES.values()),
        )
    except (KeyError, TypeError):
        return None


def _probes(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those that are as they were written."""
    return {
        name: _section_of(probe, PROBED.values())
        | dict(verdict=str(probe["verdict"]), recovers=probe["recovers"] is True)
        for name, probe in fields.items()
        if isinstance(probe, dict) and {*PROBED.values(), "verdict", "recovers"} <= probe.keys()
    }


def _section_of(fields: dict[str, Any], names: Iterable[str]) -> dict[str, float | None]:
    return {name: _number(fields[name]) for name in names}


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _parse(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _section(facts: dict[str, Any], name: str) -> dict[str, Any]:
    section = facts.get(name)
    return section if isinstance(section, dict) else {}


def _numbers(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Evaluations by role; None for what is no number."""
    return {
        role: {name: value if _is_number(value) else None for name, value in fields.items()}
        for role, fields in results.items()
        if isinstance(fields, dict)
    }


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300 and math.isfinite(value)


def _last_step(workdir: Path, series: dict[str, Points]) -> int:
    """By the checkpoints too: between two logged steps there are others."""
    names = [path.name for path in (workdir / CHECKPOINTS).glob("*")]
    saved = [int(name) for name in names if name.isascii() and name.isdecimal()]
    return max([*saved, *(points[-1][0] for points in series.values() if points)], default=0)


def _evaluations(series: dict[str, Points]) -> dict[str, dict[str, float]]:
    """The last evaluation of each model, from the log."""
    logged = (name for name in series if name.startswith("eval/"))
    last = {name.removeprefix("eval/"): series[name][-1][1] for name in logged}
    # One of several teachers is teacher/NAME; numbers of the user's own have two parts, too.
    roles = [each.removesuffix("/examples") for each in last if each.endswith("/examples")]
    results: dict[str, dict[str, float]] = {}
    for role in roles:
        if "/" not in role or role.startswith("teacher/"):
            fields = [name for name in last if name.startswith(f"{role}/")]
            results[role] = {name.removeprefix(f"{role}/"): last[name] for name in fields}
    return results


def _progress_notes(workdir: Path, run: Run) -> list[str]:
    max_steps = run.config.get("distillation.max_steps")
    if not isinstance(max_steps, int):
        return ["The config is unknown: this run was made before runs wrote it down."]
    if run.step < max_steps:
        return [f"Not finished: step {run.step} of {max_steps}. This is what there is so far."]
    if not (workdir / STUDENT).is_dir():
        return ["All steps are made, but the student is not exported yet: start the run again."]
    return []
