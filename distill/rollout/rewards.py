"""Rewards of responses by a function of the user's own, found by name.

    @register_reward("short")
    def short(example, response):  # the text, without special tokens
        return -len(response) / 100

`reward.function=short` then rewards every response that the student samples. Built in are
`accuracy`, the verdict of the grader that evaluates, and `environment`: build/rewards.py asks each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from distill.base.errors import RunStopped
from distill.base.registry import Registry, describe, name_of
from distill.data.base import Example

RewardFunction = Callable[[Example, str], float]
ACCURACY, ENVIRONMENT = "accuracy", "environment"

_REWARDS = Registry(
    "reward.function",
    "distill.rollout.rewards.register_reward",
    dict.fromkeys((ACCURACY, ENVIRONMENT), "distill.rollout"),
)


def register_reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: makes f(example, response) -> number available as `reward.function=name`.

    UserError when the name is taken.
    """
    return _REWARDS.register(name, takes=("example", "response"))


def get_reward(name: str) -> RewardFunction | None:
    """What was registered under `name`; None for '' and what is built in; UserError for no name."""
    return None if name in ("", ACCURACY, ENVIRONMENT) else _REWARDS.get(name)


def ask_each(
    function: RewardFunction, examples: Sequence[Example], responses: Sequence[str]
) -> list[float]:
    """A finite number for each response.

    Raises:
      RunStopped: the function fails, or what it returns is none.
    """
    return [_ask(function, *pair) for pair in zip(examples, responses, strict=True)]


def _ask(function: RewardFunction, example: Example, response: str) -> float:
    where, takes = f"{name_of(function)} on example {example.id}", "it takes (example, response)"
    try:
        reward = function(example, response)
    except Exception as error:  # whatever the user's code raises
        raise RunStopped(
            f"{where} fails: {describe(error)}; {takes} and returns a number"
        ) from error
    try:
        number = float(reward)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RunStopped(f"{where} returns {reward!r}: {takes} and returns a finite number")
    return number
