"""The losses: what is computed for a token once the logits of both models are there.

A pointwise loss is a sum over the vocabulary of f(log p, log q, is_target), teacher p and student
q; this is the kind that runs fused (sweeps.py). A row loss sees whole rows at once. Instances are
frozen and hashable: static arguments. All arithmetic is float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenValues:
    """Numbers per token beside the loss, float32, without gradient.

    `divergence` is the loss of the token before weighting; `log_prob_s` and `log_prob_t` are the
    student's and teacher's log-probability of the target at temperature 1 over the shared
    vocabulary, zeros without targets or without a teacher.
    """

    divergence: jax.Array
    log_prob_s: jax.Array
    log_prob_t: jax.Array


class PointwiseLoss(Protocol):
    """A sum over the vocabulary of `terms`; the logits of both models divided by `temperature`."""

    temperature: float

    def terms(self, log_p, log_q, is_target) -> jax.Array:
        """f, elementwise; log_p is None for a loss without a teacher."""

    def sums(self, statistics) -> tuple[jax.Array, jax.Array] | None:
        """(sum_v f, sum_v df/dlog_q) per token if `sweeps.Statistics` suffice, else None."""


@dataclasses.dataclass(frozen=True)
class DivergenceLoss:
    """sum_v f(log p, log q).

    A divergence that is a KL(p||q) + b KL(q||p) may say so in an attribute `kl_weights = (a, b)`:
    it is spared a sweep.
    """

    divergence: Callable[[jax.Array, jax.Array], jax.Array]
    temperature: float

    def terms(self, log_p, log_q, is_target):
        del is_target
        return self.divergence(log_p, log_q)

    def sums(self, statistics):
        weights = getattr(self.divergence, "kl_weights", None)
        if weights is None:
            return None
        forward_weight, reverse_weight = weights
        log_ratio = jnp.log(statistics.sum_s) - jnp.log(statistics.sum_t)
        forward = statistics.cross_forward / statistics.sum_t + log_ratio
        reverse = statistics.cross_reverse / statistics.sum_s - log_ratio
        # df/dlog_q is -p for the forward and q (log q - log p + 1) for the reverse KL.
        divergence = forward_weight * forward + reverse_weight * reverse
        return divergence, reverse_weight * (reverse + 1.0) - forward_weight


@dataclasses.dataclass(frozen=True)
class CrossEntropyLoss:
    """-log q of the target; there is no teacher."""

    temperature: float = 1.0

    def terms(self, log_p, log_q, is_target):
        del log_p
        return jnp.where(is_target, -log_q, 0.0)

    def sums(self, statistics):
        log_q_c = statistics.target_s - statistics.max_s - jnp.log(statistics.sum_s)
        return -log_q_c, jnp.full_like(log_q_c, -1.0)


@dataclasses.dataclass(frozen=True)
class RowLoss:
    """A user's loss_fn(log_p_tv, log_q_tv, targets_t) -> loss_t, differentiated by jax.vjp."""

    loss_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    temperature: float

    def values(self, logits_s_tv, logits_t_tv, targets_t):
        """Loss of each token, (t,), from float32 logits (t, v) at temperature 1."""
        log_p_tv = jax.nn.log_softmax(logits_t_tv / self.temperature)
        log_q_tv = jax.nn.log_softmax(logits_s_tv / self.temperature)
        losses_t = self.loss_fn(log_p_tv, log_q_tv, targets_t)
        if losses_t.shape != targets_t.shape:
            raise ValueError(
                f"a distillation loss returns one number per token, shape {targets_t.shape}; "
                f"{self.loss_fn} returned {losses_t.shape}"
            )
        return losses_t.astype(jnp.float32)


def terms_and_slopes(loss: PointwiseLoss, log_p, log_q, is_target):
    """f and df/dlog_q, elementwise."""
    return jax.jvp(
        lambda log_q: loss.terms(log_p, log_q, is_target), (log_q,), (jnp.ones_like(log_q),)
    )


# Operations that keep an array's shape and yet mix its entries.
_MIXING = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev", "gather"}
_MIXING |= {"dot_general", "scan", "while", "fft"}


def check_pointwise(divergence: Callable) -> None:
    """ValueError unless `divergence` is a function of two arrays that works entry by entry."""
    if not callable(divergence) or getattr(divergence, "__hash__", None) is None:
        raise ValueError(f"divergence={divergence!r} is not a hashable function of (log_p, log_q)")
    _check_entries_are_separate(divergence)


@functools.lru_cache(maxsize=256)
def _check_entries_are_separate(divergence: Callable) -> None:
    name = getattr(divergence, "__name__", repr(divergence))
    array = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    program = jax.make_jaxpr(divergence)(array, array)
    shapes = [output.shape for output in program.out_avals]
    if shapes != [array.shape]:
        problem = f"of two arrays of shape {array.shape} it made {shapes}"
    elif mixing := _first_mixing(program.jaxpr, array.shape):
        problem = f"it uses {mixing}, which is not elementwise"
    else:
        return
    raise ValueError(
        f"divergence {name} is not pointwise: {problem}; losses of whole rows are for linear_loss"
    )


def _first_mixing(jaxpr, shape: tuple[int, ...]) -> str | None:
    """Name of the first operation that is not elementwise on arrays of this shape."""
    for equation in jaxpr.eqns:
        parameters = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        inner = [getattr(x, "jaxpr", x) for x in parameters]
        inner = [program for program in inner if hasattr(program, "eqns")]
        for program in inner:
            if mixing := _first_mixing(program, shape):
                return mixing
        reads = any(variable.aval.shape == shape for variable in equation.invars)
        keeps = all(variable.aval.shape == shape for variable in equation.outvars)
        name = equation.primitive.name
        if reads and not inner and (not keeps or name in _MIXING):
            return name
    return None
