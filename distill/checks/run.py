"""Runs the checks before the first step, and says what they found."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from distill.base.errors import UserError
from distill.checks.checks import CHECKS, Problem, Subject


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check; `problem` is None if it passed."""

    check: str
    detail: str
    problem: str | None
    seconds: float


def preflight(subject: Subject, say: Callable[[str], None]) -> list[Finding]:
    """Runs all checks and says what they found.

    Raises:
      UserError: the first problem.
    """
    findings = []
    for name, check in CHECKS.items():
        start = time.perf_counter()
        detail, problem = "", None
        try:
            detail = check(subject)
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
