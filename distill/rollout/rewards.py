"""Rewards of responses by a function of the user's own, and advantages in groups.

    @register_reward("short")
    def short(example, response):  # the text, without special tokens
        return -len(response) / 100

`reward.function=short` then rewards every response that the student samples. Built in are
`accuracy`, the verdict of the grader that evaluates, and `environment`: build/rewards.py asks each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from distill.base.errors import RunStopped
from distill.base.registry import Registry, describe, name_of
from distill.data.base import Example

RewardFunction = Callable[[Example, str], float]
ACCURACY, ENVIRONMENT = "accuracy", "environment"
_SPREAD = 1e-6  # below this, the rewards of a group are the same

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


def group_advantages(
    rewards_b: np.ndarray, num_generations: int, *, standardize: bool = False
) -> np.ndarray:
    """A reward less the mean of its group, the responses to one prompt, which follow each other.

    GRPO without its division (arXiv:2402.03300; Dr. GRPO, arXiv:2503.20783). The mean has the
    response's own reward, so the expected gradient is the policy gradient's times 1 - 1/g.
    `standardize` divides by the group's standard deviation, as GRPO does: this weighs prompts by
    how alike their rewards are, and is the gradient of another objective. float32 (b,).
    """
    rewards_gn = np.asarray(rewards_b, np.float64).reshape(-1, num_generations)
    advantages_gn = rewards_gn - rewards_gn.mean(axis=1, keepdims=True)
    if standardize:
        spread_g1 = rewards_gn.std(axis=1, keepdims=True)
        advantages_gn /= np.where(spread_g1 > _SPREAD, spread_g1, 1.0)
    return advantages_gn.reshape(-1).astype(np.float32)


def describe_rewards(rewards_b: np.ndarray, num_generations: int) -> dict[str, float]:
    """Metrics: mean, mean standard deviation in a group, share of groups without any spread."""
    rewards_gn = np.asarray(rewards_b, np.float64).reshape(-1, num_generations)
    spread_g = rewards_gn.std(axis=1)
    return {
        "reward/mean": float(rewards_gn.mean()),
        "reward/group_std": float(spread_g.mean()),
        "reward/groups_without_spread": float((spread_g <= _SPREAD).mean()),
    }
