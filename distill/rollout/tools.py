"""The built-in environments: a calculator that the student may call, and a second attempt."""

from __future__ import annotations

import re
from collections.abc import Callable

from distill.base.errors import UserError
from distill.base.worker import WorkerEnded, Workers
from distill.data.base import Example
from distill.rollout import calculator
from distill.rollout.environment import Environment, Reply, says

_SECONDS = 2.0  # for an expression, of which the limits of a calculator leave nothing slow
_TRY_AGAIN = "That is not right. Find the mistake and answer again."


class PythonTool(Environment):
    """Replies with the value of the arithmetic expression that a turn ends with."""

    def __init__(self, call: re.Pattern[str], evaluate: Callable[[str], str]):
        self._call, self._evaluate = call, evaluate

    def step(self, response: str) -> Reply:
        found = self._call.search(response)
        return Reply(says("tool", self._evaluate(found[1].strip()))) if found else Reply()


class SelfCheck(Environment):
    """Says once that a response is wrong; the reward is the verdict on the last.

    Where nothing says what is right, a response ends the dialogue without either.
    """

    def __init__(self, example: Example, is_right: Callable[[Example, str], bool | None]):
        self._example, self._is_right, self._attempts = example, is_right, 0

    def step(self, response: str) -> Reply:
        self._attempts += 1
        verdict = self._is_right(self._example, response)
        if verdict:
            return Reply(reward=1.0)
        if verdict is None or self._attempts > 1:
            return Reply()
        return Reply(says("user", _TRY_AGAIN))


class Calculator:
    """Evaluates expressions in a process of its own, which is replaced if it ends."""

    def __init__(self) -> None:
        self._workers = Workers(1, calculator.prepare_worker)
        self.stop = self._workers.stop

    def __call__(self, expression: str) -> str:
        """The value, or what is wrong with the expression."""
        try:
            return self._workers.submit(calculator.evaluate, expression, timeout=_SECONDS).result()
        except (TimeoutError, WorkerEnded, MemoryError):
            return "error: too large"


def compile_call(pattern: str) -> re.Pattern[str]:
    """UserError unless it is a regular expression with one group, the expression."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"environment.call={pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise UserError(
            f"environment.call={pattern!r} has {compiled.groups} groups: it must have one, which "
            "is the expression"
        )
    return compiled
