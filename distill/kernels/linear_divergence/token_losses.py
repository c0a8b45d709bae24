"""What is computed for a block of tokens once the logits of both models are there.

A token loss gives `values` (one loss per token) and `values_and_gradients` (also its derivative by
the student's logits). Every implementation evaluates these: the reference differentiates `values`,
the others use the gradients. All arithmetic is float32; instances are frozen: static arguments.
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


class TokenLoss(Protocol):
    """Shapes: logits_s_tv and logits_t_tv float32 (t, v) at temperature 1, targets_t int (t,)."""

    def values(self, logits_s_tv, logits_t_tv, targets_t) -> jax.Array:
        """Loss of each token, float32 (t,)."""

    def values_and_gradients(self, logits_s_tv, logits_t_tv, targets_t):
        """Loss of each token and its derivative by the student's logits, (t,) and (t, v)."""


@dataclasses.dataclass(frozen=True)
class DivergenceLoss:
    """sum_v f(log p, log q) with both models' logits divided by the temperature."""

    divergence: Callable[[jax.Array, jax.Array], jax.Array]
    temperature: float

    def values(self, logits_s_tv, logits_t_tv, targets_t):
        log_p_tv, log_q_tv = tempered_log_probs(logits_s_tv, logits_t_tv, self.temperature)
        return jnp.sum(self.divergence(log_p_tv, log_q_tv), axis=-1)

    def values_and_gradients(self, logits_s_tv, logits_t_tv, targets_t):
        log_p_tv, log_q_tv = tempered_log_probs(logits_s_tv, logits_t_tv, self.temperature)
        terms_tv, slope_tv = jax.jvp(
            functools.partial(self.divergence, log_p_tv), (log_q_tv,), (jnp.ones_like(log_q_tv),)
        )
        # dD/ds_v = r_v - q_v sum_w r_w: the chain rule through log q = s - logsumexp(s).
        mean_slope_t1 = jnp.sum(slope_tv, axis=-1, keepdims=True)
        gradient_tv = (slope_tv - jnp.exp(log_q_tv) * mean_slope_t1) / self.temperature
        return jnp.sum(terms_tv, axis=-1), gradient_tv


@dataclasses.dataclass(frozen=True)
class CrossEntropyLoss:
    """-log q of the target; the teacher is not consulted."""

    def values(self, logits_s_tv, logits_t_tv, targets_t):
        return -target_log_probs(logits_s_tv, targets_t)

    def values_and_gradients(self, logits_s_tv, logits_t_tv, targets_t):
        is_target_tv = _is_target(logits_s_tv, targets_t)
        gradient_tv = jax.nn.softmax(logits_s_tv) - is_target_tv.astype(jnp.float32)
        return self.values(logits_s_tv, logits_t_tv, targets_t), gradient_tv


@dataclasses.dataclass(frozen=True)
class CustomLoss:
    """A user's loss_fn(log_p_tv, log_q_tv, targets_t) -> loss_t, differentiated by jax.vjp."""

    loss_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    temperature: float

    def values(self, logits_s_tv, logits_t_tv, targets_t):
        log_p_tv, log_q_tv = tempered_log_probs(logits_s_tv, logits_t_tv, self.temperature)
        losses_t = self.loss_fn(log_p_tv, log_q_tv, targets_t)
        if losses_t.shape != targets_t.shape:
            raise ValueError(
                f"a distillation loss returns one number per token, shape {targets_t.shape}; "
                f"{self.loss_fn} returned {losses_t.shape}"
            )
        return losses_t.astype(jnp.float32)

    def values_and_gradients(self, logits_s_tv, logits_t_tv, targets_t):
        losses_t, pull_back = jax.vjp(
            lambda logits_tv: self.values(logits_tv, logits_t_tv, targets_t), logits_s_tv
        )
        (gradient_tv,) = pull_back(jnp.ones_like(losses_t))
        return losses_t, gradient_tv


def output_logits(hidden_td: jax.Array, head_dv: jax.Array) -> jax.Array:
    """Logits in float32 whatever the compute dtype of the two operands."""
    return jnp.einsum("td,dv->tv", hidden_td, head_dv, preferred_element_type=jnp.float32)


def tempered_log_probs(logits_s_tv, logits_t_tv, temperature: float):
    """(log_p_tv of the teacher, log_q_tv of the student)."""
    return (
        jax.nn.log_softmax(logits_t_tv / temperature),
        jax.nn.log_softmax(logits_s_tv / temperature),
    )


def target_log_probs(logits_tv: jax.Array, targets_t: jax.Array) -> jax.Array:
    """log softmax(logits)[target] per token, float32 (t,)."""
    # A masked sum, not a gather: it fuses with the other sweeps and works on a sharded vocabulary.
    target_logits_t = jnp.sum(jnp.where(_is_target(logits_tv, targets_t), logits_tv, 0.0), axis=-1)
    return target_logits_t - jax.nn.logsumexp(logits_tv, axis=-1)


def token_values(losses_t, logits_s_tv, logits_t_tv, targets_t) -> TokenValues:
    """The losses with the targets' log-probabilities beside them; zeros where there are none."""
    zeros_t = jnp.zeros_like(losses_t)
    return TokenValues(
        divergence=losses_t,
        log_prob_s=zeros_t if targets_t is None else target_log_probs(logits_s_tv, targets_t),
        log_prob_t=zeros_t
        if targets_t is None or logits_t_tv is None
        else target_log_probs(logits_t_tv, targets_t),
    )


def _is_target(logits_tv: jax.Array, targets_t: jax.Array) -> jax.Array:
    vocabulary_tv = jax.lax.broadcasted_iota(targets_t.dtype, logits_tv.shape, 1)
    return vocabulary_tv == targets_t[:, None]
