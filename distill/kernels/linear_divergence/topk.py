"""Divergence from a teacher known by its k likeliest tokens: a server's answer, or cached scores.

The vocabulary is seen as those k tokens and one bucket with all others, for both models: sum of
f(log p, log q) over k + 1 outcomes. Merging outcomes never increases a divergence, so the value is
a lower bound of the full one, exact on the support and with the tail counted; dropping the tail
instead would be no divergence at all (it can be negative).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence.sweeps import MASKED, exists, log_sum_exp, weighted
from distill.kernels.linear_divergence.token_losses import (
    DivergenceTerm,
    TermSum,
    terms_and_slopes,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """Per token: distinct ids int32 (t, k), those below 0 absent, and log-probabilities (t, k)."""

    ids_tk: jax.Array
    log_probs_tk: jax.Array

    @property
    def present_tk(self) -> jax.Array:
        return self.ids_tk >= 0

    def log_tail_t(self, vocab_size: int) -> jax.Array:
        """Log of what the k tokens leave: MASKED where they leave nothing."""
        mass_t = jnp.sum(jnp.where(self.present_tk, jnp.exp(self.log_probs_tk), 0.0), axis=-1)
        # Where no token is left, what is missing from 1 is rounding.
        leaves_some_t = (mass_t < 1.0) & (jnp.sum(self.present_tk, axis=-1) < vocab_size)
        return jnp.where(leaves_some_t, jnp.log1p(-mass_t), MASKED)

    def log_prob_t(self, targets_t: jax.Array, vocab_size: int) -> jax.Array:
        """The targets' log-probabilities, the whole tail's where they are not listed."""
        is_target_tk = self.present_tk & (self.ids_tk == targets_t[:, None])
        listed_t = jnp.sum(jnp.where(is_target_tk, self.log_probs_tk, 0.0), axis=-1)
        return jnp.where(is_target_tk.any(axis=-1), listed_t, self.log_tail_t(vocab_size))

    def gradient(self, divergence: DivergenceTerm, block, weights_c):
        """Values (c,) and weights_c * dvalue_c/dlogits_s, float32, over this shard's columns.

        With r the slopes and R their sum, the derivative by the logit of v is r_v - q_v R on the
        support, and r_tail q_v / q_tail - q_v R in the tail.
        """
        outcomes = _outcomes(divergence, block, self)
        (terms_ck, terms_tail_c), (slopes_ck, slope_tail_c), tail_cv, log_tail_q_c = outcomes
        slope_sum_c = jnp.sum(slopes_ck, axis=-1) + slope_tail_c
        # tail_cv is log q there: minus the tail's, the log-share of the tail.
        gradient_cv = slope_tail_c[:, None] * jnp.exp(tail_cv - log_tail_q_c[:, None])
        gradient_cv -= jnp.exp(block.log_q(block.logits.student_cv)) * slope_sum_c[:, None]
        rows_c1 = jnp.arange(slopes_ck.shape[0])[:, None]
        gradient_cv = gradient_cv.at[rows_c1, _columns(block, self)].add(slopes_ck, mode="drop")
        exists_cv = exists(block.logits.student_cv, block.logits.num_columns)
        gradient_cv = jnp.where(exists_cv, gradient_cv, 0.0)
        divergence_c = jnp.sum(terms_ck, axis=-1) + terms_tail_c
        return divergence_c, weighted(gradient_cv, weights_c / block.temperature)


def _outcomes(divergence, block, teacher: TopK):
    """Terms and slopes, each of (support (c, k), tail (c,)); log q, MASKED on the support, (c, v);
    the student's log-mass of the tail (c,)."""
    columns_ck = _columns(block, teacher)
    logits_ck = jnp.take_along_axis(
        block.logits.student_cv, columns_ck, axis=1, mode="fill", fill_value=0.0
    )
    log_q_ck = block.log_q(block.sum(logits_ck))

    log_q_cv = block.log_q(block.logits.student_cv)
    exists_cv = exists(block.logits.student_cv, block.logits.num_columns)
    tail_cv = jnp.where(exists_cv, log_q_cv, MASKED)
    rows_c1 = jnp.arange(tail_cv.shape[0])[:, None]
    tail_cv = tail_cv.at[rows_c1, columns_ck].set(MASKED, mode="drop")
    log_tail_q_c = log_sum_exp(tail_cv, block.vocab_axes)

    # The tail as one more column.
    log_p_cn = jnp.concatenate(
        [teacher.log_probs_tk, teacher.log_tail_t(block.vocab_size)[:, None]], axis=1
    )
    log_q_cn = jnp.concatenate([log_q_ck, log_tail_q_c[:, None]], axis=1)
    never_cn = jnp.zeros(log_q_cn.shape, bool)
    loss = TermSum.of(divergence)
    (terms_cn,), (slopes_cn,) = terms_and_slopes(loss, log_p_cn, log_q_cn, never_cn)
    terms, slopes = (
        (jnp.where(teacher.present_tk, x_cn[:, :-1], 0.0), x_cn[:, -1])
        for x_cn in (terms_cn, slopes_cn)
    )
    return terms, slopes, tail_cv, log_tail_q_c


def _columns(block, teacher: TopK):
    """This shard's columns of the support, (c, k); one past the end for ids that lie elsewhere."""
    columns_ck = teacher.ids_tk - block.first_column
    here_ck = teacher.present_tk & (0 <= columns_ck) & (columns_ck < block.logits.num_columns)
    return jnp.where(here_ck, columns_ck, block.logits.student_cv.shape[1])
