"""Evaluates the models of a session, outside of a run."""

from __future__ import annotations

from typing import Any

from distill.base.errors import UserError
from distill.base.status import busy
from distill.build.session import Session


def evaluate_models(session: Session) -> dict[str, dict[str, Any]]:
    """Evaluations of the student and of a teacher on the mesh, by role.

    Raises:
      UserError: there are no held-out prompts.
    """
    if session.validation is None:
        raise UserError("data.validation.max_samples=0 leaves nothing to evaluate: raise it")
    evaluator = session.evaluator
    print(f"validation data: {evaluator.summary()}")
    teacher = session.load_teacher().model
    with busy("loading the student"):
        student = session.load_frozen(session.student_folder, session.config.policy.precision)
    models = {"student": student, "teacher": teacher} if teacher else {"student": student}
    results = {}
    for role, model in models.items():
        with busy(f"evaluating the {role}"):
            results[role] = evaluator(model, teacher)[0].to_dict()
    return results
