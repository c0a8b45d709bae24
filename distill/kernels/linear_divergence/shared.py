"""Divergence from a teacher with another tokenizer: over the strings that both have, and the rest.

All other ids of a model are one outcome, the bucket: sum of f(log p, log q) over the shared ids and
the bucket. Merging outcomes never increases a divergence, so the value is a lower bound of that
over any common refinement. The teacher's columns are put in the places of the student's ids, so
that the student's head and its gradient stay as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill.kernels.linear_divergence.head import Head
from distill.kernels.linear_divergence.sweeps import MASKED, exists, log_sum_exp, weighted
from distill.kernels.linear_divergence.token_losses import (
    DivergenceTerm,
    TermSum,
    terms_and_slopes,
)

_REST, _SHARED = 1, 2  # what a place has of the teacher's; 0: nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedIds:
    """Which id of the teacher stands in which place, the student's ids being the first places.

    Attributes:
      teacher_v: int32 (v,), at a shared id the teacher's of the same string; any other of its ids
        stands somewhere else, and -1 where there is none.
      shared_v: bool (v,).
      size_t: ids that the teacher has in use.
    """

    teacher_v: Any
    shared_v: Any
    size_t: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of_pairs(cls, pairs_v: np.ndarray, size_t: int) -> SharedIds:
        """From the teacher's id for each of the student's, each once, -1 where there is none."""
        places = np.full(max(len(pairs_v), size_t), -1, np.int32)
        places[: len(pairs_v)] = pairs_v
        shared_v = places >= 0
        rest = np.setdiff1d(np.arange(size_t, dtype=np.int32), pairs_v)
        places[np.flatnonzero(~shared_v)[: len(rest)]] = rest
        return cls(places, shared_v, size_t)

    def head(self, head_t: Head) -> SharedHead:
        """The teacher's head with its columns in their places."""
        # Constants of the program by now: which teacher ids there are is known before it.
        weights_dv = jnp.take(head_t.weights_dv, jnp.maximum(self.teacher_v, 0), axis=1)
        kind_v = jnp.where(self.shared_v, _SHARED, jnp.where(self.teacher_v >= 0, _REST, 0))
        return SharedHead(weights_dv, kind_v[None].astype(jnp.int8))


class SharedHead(NamedTuple):
    """A teacher's head (d, v) in the student's places, and what each place has of it (1, v)."""

    weights_dv: jax.Array
    kind_1v: jax.Array

    def outcomes(
        self, logits_cv: jax.Array, targets_c: jax.Array, temperature: float, vocab_axes
    ) -> SharedOutcomes:
        """Of logits at temperature 1; `targets_c` count from this shard's first column."""
        is_there_1v, is_shared_1v = self.kind_1v > 0, self.kind_1v == _SHARED

        def normalized(temperature):
            masked_cv = jnp.where(is_there_1v, logits_cv / temperature, MASKED)
            return masked_cv - log_sum_exp(masked_cv, vocab_axes)[:, None]

        def rest(log_p_cv):
            masked_cv = jnp.where(is_there_1v & ~is_shared_1v, log_p_cv, MASKED)
            return jnp.maximum(log_sum_exp(masked_cv, vocab_axes), MASKED)

        plain_cv = normalized(1.0)
        column_1v = jnp.arange(logits_cv.shape[1])[None]
        is_target_cv = is_shared_1v & (column_1v == targets_c[:, None])
        # One is the target's place, or none is: then it is in the rest.
        found = jnp.stack(
            [jnp.where(is_target_cv, x, 0.0).sum(axis=1) for x in (plain_cv, is_target_cv)]
        )
        found = jax.lax.psum(found, vocab_axes) if vocab_axes else found
        log_prob_c = jnp.where(found[1] > 0, found[0], rest(plain_cv))
        log_p_cv = plain_cv if temperature == 1.0 else normalized(temperature)
        return SharedOutcomes(log_p_cv, rest(log_p_cv), log_prob_c, is_shared_1v)


@dataclasses.dataclass(frozen=True)
class SharedOutcomes:
    """What a teacher with other ids says of c tokens, over this shard's places.

    Attributes:
      log_p_cv, log_rest_c: at the loss's temperature, of the places and of the bucket.
      log_prob_c: of the target at temperature 1, of the bucket where it is not shared.
      is_shared_1v: which places count.
    """

    log_p_cv: jax.Array
    log_rest_c: jax.Array
    log_prob_c: jax.Array
    is_shared_1v: jax.Array

    def log_prob_t(self, targets_c: jax.Array, vocab_size: int) -> jax.Array:
        return self.log_prob_c

    def gradient(self, divergence: DivergenceTerm, block, weights_c):
        """Values (c,) and weights_c * dvalue_c/dlogits_s, float32, over this shard's columns.

        With r the slopes and R their sum, the derivative by the logit of v is r_v - q_v R where v
        is shared, and r_rest q_v / q_rest - q_v R elsewhere.
        """
        width = min(block.logits.student_cv.shape[1], self.log_p_cv.shape[1])
        exists_cv = exists(block.logits.student_cv[:, :width], block.logits.num_columns)
        log_q_cv = jnp.where(exists_cv, block.log_q(block.logits.student_cv[:, :width]), MASKED)
        is_shared_1v = self.is_shared_1v[:, :width]
        rest_cv = jnp.where(is_shared_1v, MASKED, log_q_cv)
        log_rest_q_c = jnp.maximum(log_sum_exp(rest_cv, block.vocab_axes), MASKED)

        def of_outcomes(log_p, log_q):
            never = jnp.zeros(log_q.shape, bool)
            (term,), (slope,) = terms_and_slopes(TermSum.of(divergence), log_p, log_q, never)
            return term, slope

        term_cv, slope_cv = of_outcomes(self.log_p_cv[:, :width], log_q_cv)
        term_cv, slope_cv = (jnp.where(is_shared_1v, x, 0.0) for x in (term_cv, slope_cv))
        term_rest_c, slope_rest_c = of_outcomes(self.log_rest_c, log_rest_q_c)
        value_c, slope_sum_c = block.sum((term_cv.sum(axis=1), slope_cv.sum(axis=1)))
        value_c, slope_sum_c = value_c + term_rest_c, slope_sum_c + slope_rest_c
        share_cv = jnp.where(is_shared_1v, 0.0, jnp.exp(rest_cv - log_rest_q_c[:, None]))
        gradient_cv = slope_cv + slope_rest_c[:, None] * share_cv
        gradient_cv -= jnp.exp(log_q_cv) * slope_sum_c[:, None]
        gradient_cv = jnp.where(exists_cv, gradient_cv, 0.0)
        padding = block.logits.student_cv.shape[1] - width
        gradient_cv = jnp.pad(gradient_cv, ((0, 0), (0, padding)))
        return value_c, weighted(gradient_cv, weights_c / block.temperature)
