"""Runs the checks before the first step, and says what they found."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from distill.base.errors import UserError
from distill.build.session import Session
from distill.checks import Problem
from distill.checks.layout import check_layout, check_memory
from distill.checks.numbers import check_numbers, check_weights
from distill.checks.teacher import check_teacher
from distill.checks.texts import (
    check_end,
    check_overlap,
    check_template,
    check_tokenizers,
    check_view,
)
from distill.step import TrainState

TEXT_CHECKS: dict[str, Callable[[Session], str]] = {
    "tokenizers": check_tokenizers,
    "template": check_template,
    "view": check_view,
    "end of responses": check_end,
    "held-out prompts": check_overlap,
}
STATE_CHECKS: dict[str, Callable[[Session, TrainState], str]] = {
    "weights": check_weights,
    "layout": check_layout,
    "memory": check_memory,
    "numbers": check_numbers,
    "teacher": check_teacher,
}


def preflight(session: Session, state: TrainState, say: Callable[[str], None]) -> dict[str, str]:
    """Runs all checks, says what they found, and returns it by name.

    The session's teacher is loaded and its backend started. A check returns what it saw, in words,
    or raises `Problem`.

    Raises:
      UserError: the first problem.
    """
    started = time.perf_counter()
    checks = {name: functools.partial(check, session) for name, check in TEXT_CHECKS.items()}
    checks |= {
        name: functools.partial(check, session, state) for name, check in STATE_CHECKS.items()
    }
    found, problems = {}, []
    for name, check in checks.items():
        try:
            found[name] = check()
        except Problem as problem:
            problems.append(f"preflight: {name}: {problem}")
        say(problems[-1] if name not in found else f"preflight: {name}: {found[name]}")
    if problems:
        raise UserError(f"{problems[0]} (--config.preflight=False skips the checks)")
    say(f"preflight: {len(found)} checks passed in {time.perf_counter() - started:.1f} s")
    return found
