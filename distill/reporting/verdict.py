"""Did the run help, and what do its own numbers say of why not?

A difference of two accuracies counts where their 95% intervals lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# Of more responses that the limit cuts off, and of longer ones, the rise is named.
_RISE, _GROWTH = 0.1, 1.3
_RARELY = 0.005  # of the tokens: a student that leaves the path no more often has little to learn

Numbers = Mapping[str, Any]


def verdict(
    results: Mapping[str, Numbers],
    departures: Numbers | None = None,
    probe: Numbers | None = None,
    reference: Numbers | None = None,
) -> str:
    """A few sentences on evaluations by role; '' where accuracy cannot be compared.

    Args:
      departures: of the student's responses, see `evaluation.diagnosis`.
      probe: what `distill.preflight --probe` found.
      reference: the student of another run, such as one on fixed data.
    """
    base, student = results.get("base", {}), results.get("student", {})
    if base.get("accuracy") is None or student.get("accuracy") is None:
        return ""
    sentences = list(_sentences(base, student, results.get("teacher", {})))
    if reference and reference.get("accuracy") is not None:
        sentences.insert(1, _compared(student, reference))
    if departures and not _is_better(student, base):
        sentences += _departed(departures, probe)
    return " ".join(sentences)


def _is_better(one: Numbers, other: Numbers) -> bool:
    return one["accuracy_low"] > other["accuracy_high"]


def _compared(student: Numbers, reference: Numbers) -> str:
    points = 100 * (student["accuracy"] - reference["accuracy"])
    apart = _is_better(student, reference) or _is_better(reference, student)
    return (
        f"The reference run ends at {reference['accuracy']:.1%}: this one is "
        f"{abs(points):.1f} points {'above' if points >= 0 else 'below'}, and the intervals "
        f"{'lie apart' if apart else 'overlap'}."
    )


def _departed(departures: Numbers, probe: Numbers | None) -> Iterator[str]:
    """Whether the student comes back to the teacher's path, and whether the teacher would."""
    left, back, right = (departures[name] for name in ("tokens", "back", "right"))
    if left is None or left < _RARELY:
        yield "The student hardly leaves the teacher's path: there is little left to learn from it."
        return
    came = "" if back is None else f" and comes back in {back:.0%}"
    leaves = f"The student leaves the path at {left:.1%} of tokens{came}"
    if probe and None not in (probe["student"], probe["teacher_from_student"]):
        does, helps = "does not recover either", "won't help"
        if probe["recovers"]:
            does, helps = "does recover", "can help"
        yield (
            f"{leaves}: the teacher {does}, and solves {probe['teacher_from_student']:.0%} from "
            f"the student's half-way states, so more on-policy data {helps}."
        )
        return
    yield f"{leaves}; `python -m distill.preflight --probe` says whether the teacher would."
    if right is not None and departures["right_otherwise"] is not None:
        yield (
            f"Of the responses that leave it {right:.0%} are right, of the others "
            f"{departures['right_otherwise']:.0%}."
        )


def _sentences(base: Numbers, student: Numbers, teacher: Numbers) -> Iterator[str]:
    change = f"{base['accuracy']:.1%} before, {student['accuracy']:.1%} after"
    better = _is_better(student, base)
    if better:
        yield f"The run helped: {change}, and the intervals lie apart."
    elif _is_better(base, student):
        yield f"The run did harm: {change}, and the intervals lie apart."
    else:
        yield f"{student['examples']} prompts show no difference: {change}."
    if student["truncated"] - base["truncated"] > _RISE:
        yield (
            f"{student['truncated']:.0%} of the responses run into the length limit, before "
            f"{base['truncated']:.0%}: mix in fixed data (distillation.lambda_) or export an "
            "earlier checkpoint."
        )
    elif (student["mean_length"] or 0.0) > _GROWTH * (base["mean_length"] or math.inf):
        yield (
            f"Responses grew from {base['mean_length']:.0f} to {student['mean_length']:.0f} tokens."
        )
    if better:
        return
    if (teacher.get("accuracy") or 1.0) <= base["accuracy_high"]:
        yield f"The teacher itself solves {teacher['accuracy']:.1%}."
    before, after = (numbers.get("forward_kl") for numbers in (base, student))
    if before is not None and after is not None:
        went = "fell" if after < before else "rose"
        yield f"The forward KL to the teacher {went} from {before:.3f} to {after:.3f}."
