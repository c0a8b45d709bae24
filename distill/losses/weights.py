"""How much a token counts: the average over the batch, and weights that depend on both models.

A weight is a function of `TokenStatistics` (kernels/linear_divergence/token_losses.py) and of the
tokens' columns by name, float32 (tokens,) each, that returns what a token's loss is multiplied by:

    @register_weight("certain_teacher", teacher_entropy=True)
    def certain_teacher(statistics, columns):
        return jnp.exp(-statistics.teacher_entropy)

It is evaluated in the fused pass, before the gradients are made, and no gradient goes through it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.base.errors import UserError
from distill.base.registry import Registry, describe, name_of
from distill.kernels.linear_divergence import TokenStatistics
from distill.kernels.linear_divergence.token_losses import TokenWeight

_WEIGHTS = Registry("distillation.objective.weights", "distill.losses.weights.register_weight")


def token_weights(mask_bt: jax.Array, num_valid_tokens: jax.Array | int) -> jax.Array:
    """mask / number of valid tokens over all hosts and microbatches, float32 (b, t)."""
    return mask_bt.astype(jnp.float32) / jnp.maximum(num_valid_tokens, 1)


def register_weight(name: str, *, teacher_entropy: bool = False):
    """Decorator: makes a weight available in `distillation.objective.weights`.

    With `teacher_entropy` it can read that, which costs a sum over the vocabulary. UserError when
    the name is taken.
    """

    def entry(weight: Any) -> TokenWeight:
        weight.teacher_entropy = teacher_entropy
        return weight

    return _WEIGHTS.register(name, entry, takes=("statistics", "columns"))


def get_weight(name: str) -> TokenWeight:
    """The weight registered under `name`; UserError when there is none, or it cannot run."""
    weight = _WEIGHTS.get(name)
    check_tokenwise(f"distillation.objective.weights={name}", weight)
    return weight


def check_tokenwise(what: str, function: TokenWeight) -> None:
    """Raises UserError unless a function of statistics and columns gives a number per token."""

    def call(value):
        statistics = TokenStatistics(*[value] * len(dataclasses.fields(TokenStatistics)))
        # Which columns a batch has is known later: here are any.
        columns = collections.defaultdict(lambda: jnp.zeros(3), sampled=value > 0)
        return function(statistics, columns)

    if problem := per_token_problem(call, jax.ShapeDtypeStruct((3,), jnp.float32)):
        raise UserError(
            f"{what}: {name_of(function)} {problem}; it must return a number per token, of "
            "(statistics, columns), computed with jax.numpy"
        )


def per_token_problem(function: Callable, *shapes: jax.ShapeDtypeStruct) -> str:
    """Why a function does not give a number for each of 3 tokens; '' if it does."""
    try:
        shape = jax.eval_shape(function, *shapes).shape
    except Exception as error:  # whatever the user's code raises
        return f"fails: {describe(error)}"
    return "" if shape == (3,) else f"makes an array of shape {shape} of 3 tokens"


@register_weight("advantage")
def advantage(statistics: TokenStatistics, columns) -> jax.Array:
    """The tokens' column of that name."""
    return columns["advantage"]


@dataclasses.dataclass(frozen=True)
class UnsureTeacher:
    """1 where the teacher's entropy is above a threshold in nats, else 0.

    Entropy-aware OPD (arXiv:2603.07079): the reverse KL everywhere, and the forward KL on top where
    the teacher is unsure.
    """

    threshold: float
    teacher_entropy = True

    def __call__(self, statistics: TokenStatistics, columns) -> jax.Array:
        assert statistics.teacher_entropy is not None  # it was asked for
        return jnp.where(statistics.teacher_entropy > self.threshold, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class WrittenBy:
    """1 for tokens that the student sampled, or for all others; else 0."""

    student: bool

    def __call__(self, statistics: TokenStatistics, columns) -> jax.Array:
        return jnp.where(columns["sampled"] == self.student, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class CutAlike:
    """`weight`, or 1, where a teacher with another tokenizer cuts the same token; else 0."""

    weight: TokenWeight | None = None

    def __call__(self, statistics: TokenStatistics, columns) -> jax.Array:
        weight = 1.0 if self.weight is None else self.weight(statistics, columns)
        return jnp.where(columns["span"] == 0, weight, 0.0)


@dataclasses.dataclass(frozen=True)
class TruncatedImportance:
    """min(clip, q_now(token) / q_sampler(token)) for sampled tokens, 1 for others.

    Weighs what stale weights sampled as if today's had, token by token: Ionides, "Truncated
    Importance Sampling" (2008); the truncated rho of IMPALA (arXiv:1802.01561); between a sampler
    and a trainer: Yao et al. (2025, fengyao.notion.site/off-policy-rl).
    """

    clip: float

    def __call__(self, statistics: TokenStatistics, columns) -> jax.Array:
        ratios = jnp.exp(statistics.log_prob_s - columns["log_prob"])
        return jnp.where(columns["sampled"], jnp.minimum(ratios, self.clip), 1.0)
