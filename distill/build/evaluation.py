"""Evaluates the models of a session, outside of a run."""

from __future__ import annotations

from typing import Any

from distill.base.errors import UserError
from distill.base.status import busy
from distill.build.session import Session


def evaluate_models(session: Session) -> dict[str, dict[str, Any]]:
    """Evaluations of the student and of teachers on the mesh, by role.

    Raises:
      UserError: there are no held-out prompts.
    """
    if session.validation is None:
        raise UserError("data.validation.max_samples=0 leaves nothing to evaluate: raise it")
    evaluator = session.evaluator
    print(f"validation data: {evaluator.summary()}")
    teachers = {name: teacher.model for name, teacher in session.load_teachers().items()}
    with busy("loading the student"):
        student = session.load_frozen(session.student_folder, session.config.policy.precision)
    with busy("evaluating the student"):
        results = {"student": evaluator(student, *teachers.values())[0].to_dict()}
    for number, (name, model) in enumerate(teachers.items()):
        role, own = f"teacher/{name}" if name else "teacher", evaluator.of_teacher(number)
        if model and len(own.prompts):
            with busy(f"evaluating the {role}"):
                results[role] = own(model, model)[0].to_dict()
    return results
