"""Runs the checks before the first step, and says what they found."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

from distill.base.errors import UserError
from distill.build.session import Session
from distill.checks.layout import check_layout, check_memory
from distill.checks.numbers import check_numbers
from distill.checks.problem import Problem
from distill.checks.texts import check_end, check_template, check_tokenizers
from distill.step import TrainState

TEXT_CHECKS: dict[str, Callable[[Session], str]] = {
    "tokenizers": check_tokenizers,
    "template": check_template,
    "end of responses": check_end,
}
STATE_CHECKS: dict[str, Callable[[Session, TrainState], str]] = {
    "layout": check_layout,
    "memory": check_memory,
    "numbers": check_numbers,
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check; `problem` is None if it passed."""

    check: str
    detail: str
    problem: str | None
    seconds: float


def preflight(session: Session, state: TrainState, say: Callable[[str], None]) -> list[Finding]:
    """Runs all checks and says what they found.

    A check returns what it saw, in words, or raises `Problem`.

    Args:
      session: of a run that is about to begin or to go on: teacher loaded, backend started.
      state: the student.
      say: takes each line.

    Raises:
      UserError: the first problem.
    """
    checks = {name: functools.partial(check, session) for name, check in TEXT_CHECKS.items()} | {
        name: functools.partial(check, session, state) for name, check in STATE_CHECKS.items()
    }
    findings = []
    for name, check in checks.items():
        start = time.perf_counter()
        detail, problem = "", None
        try:
            detail = check()
        except Problem as error:
            problem = str(error)
        findings.append(Finding(name, detail, problem, time.perf_counter() - start))
    seconds = sum(finding.seconds for finding in findings)
    for finding in findings:
        say(f"preflight: {finding.check}: {finding.problem or finding.detail}")
    failed = [finding for finding in findings if finding.problem]
    if failed:
        raise UserError(
            f"preflight: {failed[0].check}: {failed[0].problem} "
            "(--config.preflight=False skips the checks)"
        )
    say(f"preflight: {len(findings)} checks passed in {seconds:.1f} s")
    return findings
