"""The definition: full logits, several [T, V] arrays, ordinary automatic differentiation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence.head import Head
from distill.kernels.linear_divergence.loop import Tokens
from distill.kernels.linear_divergence.shared import SharedOutcomes
from distill.kernels.linear_divergence.sweeps import MASKED
from distill.kernels.linear_divergence.token_losses import (
    DivergenceTerm,
    RowLoss,
    TokenStatistics,
    TokenValues,
    term_weights,
    weighted_sum,
)
from distill.kernels.linear_divergence.topk import TopK


def linear_token_loss(
    loss, tokens: Tokens, head_s: Head, head_t: Head | None, vocab_size: int, shared=None
) -> tuple[jax.Array, TokenValues]:
    """The sum of the weighted losses and the values per token; differentiable by the student's two.

    All entries of a token without weight are 0.
    """
    logits_s_tv = head_s.cut(vocab_size).logits(tokens.hidden_s_td)
    teacher_t, head_t = jax.lax.stop_gradient((tokens.teacher_t, head_t))
    targets_t, temperature = tokens.targets_t, loss.temperature
    log_q_tv = jax.nn.log_softmax(logits_s_tv / temperature)
    log_prob_s = _at(jax.nn.log_softmax(logits_s_tv), targets_t)
    log_prob_t, known, log_p_tv = jnp.zeros_like(log_prob_s), [], None
    is_target_tv = jnp.arange(vocab_size) == targets_t[:, None]
    if isinstance(teacher_t, TopK):
        log_prob_t = teacher_t.log_prob_t(targets_t, vocab_size)
    elif shared is not None:
        assert head_t is not None
        placed = shared.head(head_t)
        logits_t_tv = Head(placed.weights_dv, head_t.soft_cap).logits(teacher_t)
        teacher_t = placed.outcomes(logits_t_tv, targets_t, temperature, ())
        log_prob_t = teacher_t.log_prob_c
    elif head_t is not None:
        logits_t_tv = head_t.cut(vocab_size).logits(teacher_t)
        log_prob_t = _at(jax.nn.log_softmax(logits_t_tv), targets_t)
        log_p_tv = jax.nn.log_softmax(logits_t_tv / temperature)
        p_tv, q_tv, log_ratio_tv = jnp.exp(log_p_tv), jnp.exp(log_q_tv), log_p_tv - log_q_tv
        known = [p_tv * log_ratio_tv, -q_tv * log_ratio_tv, -p_tv * log_p_tv]
    terms: tuple[jax.Array, ...]
    by_outcomes: dict[type, Any] = {TopK: _top_k, SharedOutcomes: _shared}
    if isinstance(loss, RowLoss):
        terms = (loss.values(logits_s_tv, logits_t_tv, targets_t),)
    else:
        terms = tuple(
            by_outcomes[type(teacher_t)](term.function, log_q_tv, teacher_t)
            if type(teacher_t) in by_outcomes and isinstance(term.function, DivergenceTerm)
            else jnp.sum(term.function(log_p_tv, log_q_tv, is_target_tv), axis=-1)
            for term in loss.terms
        )
    statistics = TokenStatistics(log_prob_s, log_prob_t, *(jnp.sum(x_tv, -1) for x_tv in known))
    weights_t, columns, statistics = jax.lax.stop_gradient(
        (tokens.weights_t, tokens.columns, statistics)
    )
    weights = term_weights(loss, weights_t, statistics, columns)
    # Where a token has no weight, its gradient must not even be infinite times 0.
    values = jax.tree.map(
        lambda x_t: jnp.where(weights_t != 0, x_t, 0.0), TokenValues(terms, log_prob_s, log_prob_t)
    )
    return jnp.sum(weighted_sum(weights, values.terms)), jax.lax.stop_gradient(values)


def _top_k(divergence: DivergenceTerm, log_q_tv, teacher: TopK):
    """The divergence over the k tokens and the bucket of all others."""
    vocabulary = jnp.arange(log_q_tv.shape[1])
    listed_tkv = teacher.ids_tk[:, :, None] == vocabulary
    log_q_tail_t = jax.nn.logsumexp(log_q_tv, axis=-1, where=~listed_tkv.any(axis=1))
    log_q_tail_t = jnp.maximum(log_q_tail_t, MASKED)  # finite without any
    log_tail_t = teacher.log_tail_t(log_q_tv.shape[1])
    terms_tk = divergence(teacher.log_probs_tk, _at_ids(log_q_tv, teacher.ids_tk), False)
    terms_tail_t = divergence(log_tail_t, log_q_tail_t, False)
    return jnp.sum(jnp.where(teacher.present_tk, terms_tk, 0.0), axis=-1) + terms_tail_t


def _shared(divergence: DivergenceTerm, log_q_tv, teacher: SharedOutcomes):
    """The divergence over the shared ids and the bucket of all others."""
    width = min(log_q_tv.shape[1], teacher.log_p_cv.shape[1])
    is_shared_1v = teacher.is_shared_1v[:, :width]
    log_rest_q_t = jax.nn.logsumexp(log_q_tv, axis=-1, where=~is_shared_1v)
    log_rest_q_t = jnp.maximum(log_rest_q_t, MASKED)  # finite without any
    terms_tv = divergence(teacher.log_p_cv[:, :width], log_q_tv, False)
    rest_t = divergence(teacher.log_rest_c, log_rest_q_t, False)
    return jnp.sum(jnp.where(is_shared_1v, terms_tv, 0.0), axis=-1) + rest_t


def _at(log_probs_tv, targets_t):
    return _at_ids(log_probs_tv, targets_t[:, None])[:, 0]


def _at_ids(log_probs_tv, ids_tk):
    """Entries of each row, 0 where an id is negative."""
    picked_tk = jnp.take_along_axis(log_probs_tv, jnp.maximum(ids_tk, 0), axis=1)
    return jnp.where(ids_tk >= 0, picked_tk, 0.0)
