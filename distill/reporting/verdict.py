"""Did the run help, and what do its own numbers say of why not?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Of more responses that the limit cuts off, the rise is named.
_RISE = 0.1

Numbers = Mapping[str, Any]


def verdict(results: Mapping[str, Numbers]) -> str:
    """One to three sentences on evaluations by role; '' where accuracy cannot be compared."""
    base, student = results.get("base", {}), results.get("student", {})
    if base.get("accuracy") is None or student.get("accuracy") is None:
        return ""
    return " ".join(_sentences(base, student, results.get("teacher", {})))


def _sentences(base: Numbers, student: Numbers, teacher: Numbers) -> Iterator[str]:
    change = f"{base['accuracy']:.1%} before, {student['accuracy']:.1%} after"
    better = student["accuracy_low"] > base["accuracy_high"]
    if better:
        yield f"The run helped: {change}, and the intervals lie apart."
    elif student["accuracy_high"] < base["accuracy_low"]:
        yield f"The run did harm: {change}, and the intervals lie apart."
    else:
        yield f"{student['examples']} prompts show no difference: {change}."
    if student["truncated"] - base["truncated"] > _RISE:
        yield (
            f"{student['truncated']:.0%} of the responses run into the length limit, before "
            f"{base['truncated']:.0%}: mix in fixed data (distillation.lambda_) or export an "
            "earlier checkpoint."
        )
    if better:
        return
    if (teacher.get("accuracy") or 1.0) <= base["accuracy_high"]:
        yield f"The teacher itself solves {teacher['accuracy']:.1%}."
    before, after = (numbers.get("forward_kl") for numbers in (base, student))
    if before is not None and after is not None:
        went = "fell" if after < before else "rose"
        yield f"The forward KL to the teacher {went} from {before:.3f} to {after:.3f}."
