"""What is measured of every student of benchmarks/evidence.py, as numbers that add up over seeds.

Held-out problems are those of the test split, each distinct one once: level 1 has few.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.evidence_examination import Examination, examine
from benchmarks.evidence_methods import GENERATIONS, METHODS, POSITIONS, Run
from configs import arithmetic
from distill.build.session import Session
from distill.config.parse import parse_config
from distill.data.arithmetic import LEVELS, ArithmeticDataset
from distill.data.base import DatasetInterface, Example
from distill.evaluation.evaluator import Evaluator, decode_responses
from distill.models.checkpoints.hub import resolve_model
from distill.models.model import Model
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout

Row = dict[str, Any]


def training_numbers(folder: Path, run: Run, files: Sequence[Path]) -> Row:
    """Tokens and seconds of a run.

    Tokens are response tokens, EOS counted. The teacher's are those that it scored (every time
    again) and those that it generated; prompts are not counted. Seconds are of whole commands,
    start and compilation included, and medians of updates.
    """
    steps = [
        step
        for path in sorted(folder.glob("training*/metrics.jsonl"))
        for step in map(json.loads, path.read_text().splitlines())
        if "seconds/step" in step
    ]
    trained = sum(step["tokens"] for step in steps)
    sampled = sum(step["tokens"] * step["on_policy"] for step in steps)
    method = METHODS[run.method]
    # All of its own answers are to this run's problems; of the teacher's, a run may take a part.
    most = run.prompts if method.data == "teacher" else None
    generated = sum(_answer_tokens(path, most) for path in files)
    if method.data == "own":  # those that did not end are not in the files
        lines = sum(len(path.read_text().splitlines()) for path in files)
        longest = arithmetic.get_config().distillation.generate_strategy.max_length
        generated += (run.prompts * GENERATIONS - lines) * longest
    seconds = {kind: _seconds(folder, kind) for kind in ("wall", "cpu")}
    if method.data == "teacher":  # whose answers serve several runs, not all of them every run
        share = min(run.prompts / len(files[0].read_text().splitlines()), 1.0)
        seconds = {k: v + share * _seconds(files[0].parent, k) for k, v in seconds.items()}
    return {
        "sampled_tokens": sampled + (generated if method.data == "own" else 0),
        "teacher_scored": trained if method.has_teacher else 0,
        "teacher_generated": generated if method.data == "teacher" else 0,
        "seconds": seconds,
        "seconds_per_update": float(np.median([step["seconds/step"] for step in steps])),
    }


def _answer_tokens(path: Path, most: int | None) -> int:
    """Of the first answers: a character is a token, and each ends with an EOS."""
    answers = map(json.loads, path.read_text().splitlines()[:most])
    return sum(len(answer["response"]) + 1 for answer in answers)


def _seconds(folder: Path, kind: str) -> float:
    path = folder / "commands.jsonl"
    return sum(json.loads(line)[kind] for line in path.read_text().splitlines())


def evaluate_student(path: str) -> Row:
    """Everything that is measured of a student: the same problems and settings for all."""
    session, teacher_answers = _fixtures()
    evaluator, teacher = session.evaluator, session.teacher.model
    with jax.set_mesh(session.mesh):
        student = session.load_frozen(resolve_model(path), "float32")

        def rollout(sampling: SamplingParams) -> Rollout:
            return evaluator.respond(student.graph, student.params, sampling)

        greedy = rollout(evaluator.greedy)
        sampled = rollout(SamplingParams(max_length=evaluator.greedy.max_length))
        return {
            "greedy": _measure(evaluator, student, teacher, greedy),
            "sampled": _measure(evaluator, student, teacher, sampled),
            "on_teacher_answers": sums(
                examine(evaluator, student, teacher, teacher_answers), teacher_answers
            ),
        }


@functools.cache
def _fixtures() -> tuple[Session, Rollout]:
    """A session that evaluates on distinct problems, and its teacher's greedy answers."""
    values = arithmetic.get_config()
    values.data.validation.split, values.data.validation.max_samples = "test", 2000
    session = Session(parse_config(values))
    session.validation = DistinctProblems()
    with jax.set_mesh(session.mesh):
        teacher, evaluator = session.load_teacher().model, session.evaluator
        answers = evaluator.respond(teacher.graph, teacher.params, evaluator.greedy)
    return session, answers


class DistinctProblems(DatasetInterface):
    """The test split of the arithmetic without repeated problems."""

    def __init__(self):
        self._source = ArithmeticDataset("test")
        firsts: dict[str, int] = {}
        for i in range(len(self._source)):
            firsts.setdefault(self._source[i].prompt, i)
        self._rows = list(firsts.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        return self._source[self._rows[i]]

    def level(self, i: int) -> int:
        return self._source.level(self._rows[i])

    def is_correct(self, example: Example, response: str) -> bool:
        return self._source.is_correct(example, response)


def _measure(evaluator: Evaluator, model: Model, teacher: Model, rollout: Rollout) -> Row:
    examination = examine(evaluator, model, teacher, rollout)
    right_b = np.array(evaluator.grade(decode_responses(evaluator.vocabulary.tokenizer, rollout)))
    levels_b = np.array([evaluator.dataset.level(int(row)) for row in evaluator.prompts.rows])
    return {
        **accuracies(right_b, levels_b),
        **positions(examination, rollout.lengths_b),
        **departures(examination, rollout.lengths_b, right_b),
        **sums(examination, rollout),
    }


def sums(examination: Examination, rollout: Rollout) -> Row:
    """Over all tokens."""
    return {
        "tokens": int(rollout.lengths_b.sum()),
        "truncated": int((~rollout.stopped_b).sum()),
        "forward_kl": float(examination.forward_kl_br.sum()),
        "reverse_kl": float(examination.reverse_kl_br.sum()),
        "overlap": float(examination.overlap_br.sum()),
    }


def accuracies(right_b: np.ndarray, levels_b: np.ndarray) -> Row:
    """Right answers and all answers, by level."""
    levels = range(1, LEVELS + 1)
    return {
        "right": [int(right_b[levels_b == level].sum()) for level in levels],
        "count": [int((levels_b == level).sum()) for level in levels],
    }


def positions(examination: Examination, lengths_b: np.ndarray) -> Row:
    """Tokens and the teacher's negative log-probability of them, by position."""
    valid_br = np.arange(examination.forward_kl_br.shape[1]) < lengths_b[:, None]
    return {
        "position_tokens": _by_position(valid_br),
        "position_surprise": _by_position(-examination.teacher_log_prob_br * valid_br),
    }


def _by_position(values_br: np.ndarray) -> list[float]:
    return [float(x) for x in np.add.reduceat(values_br.sum(axis=0, dtype=float), POSITIONS)]


def departures(examination: Examination, lengths_b: np.ndarray, right_b: np.ndarray) -> Row:
    """Where answers first leave the teacher's choices, and what becomes of them.

    Returns:
      'kept' (answers that had not departed when a position began, by position of its beginning),
      'departed' and 'departed_right' (first departures there, and how many of these answers are
      right all the same), and forward KL and tokens up to the first departure and after it.
    """
    first_b = examination.first_departure_b()
    end_b = np.where(first_b < 0, lengths_b, first_b + 1)
    group_b = np.searchsorted(POSITIONS, first_b, side="right") - 1
    departs_b = first_b >= 0
    after_br = np.arange(examination.forward_kl_br.shape[1]) >= end_b[:, None]
    after_kl = float(examination.forward_kl_br[after_br].sum())
    groups = range(len(POSITIONS))
    return {
        "kept": [int((end_b > start).sum()) for start in POSITIONS],
        "departed": [int((departs_b & (group_b == g)).sum()) for g in groups],
        "departed_right": [int((departs_b & right_b & (group_b == g)).sum()) for g in groups],
        "before_kl": float(examination.forward_kl_br.sum()) - after_kl,
        "before_tokens": int(end_b.sum()),
        "after_kl": after_kl,
        "after_tokens": int((lengths_b - end_b).sum()),
    }
