"""The definition: full logits, several [T, V] arrays, ordinary automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence.loop import Tokens
from distill.kernels.linear_divergence.sweeps import MASKED
from distill.kernels.linear_divergence.token_losses import RowLoss, TokenValues
from distill.kernels.linear_divergence.topk import TopK


def linear_token_loss(
    loss, tokens: Tokens, head_s_dv: jax.Array, head_t_dv: jax.Array | None, vocab_size: int
) -> tuple[jax.Array, TokenValues]:
    """sum_t weights_t * loss_t and the values per token; differentiable by the student's two."""
    values = token_values(loss, tokens, head_s_dv, head_t_dv, vocab_size)
    scalar = jnp.sum(jax.lax.stop_gradient(tokens.weights_t) * values.divergence)
    return scalar, jax.lax.stop_gradient(values)


def token_values(loss, tokens: Tokens, head_s_dv, head_t_dv, vocab_size: int) -> TokenValues:
    """The values per token, (T,) each, 0 where there is no weight."""
    logits_s_tv = _logits(tokens.hidden_s_td, head_s_dv, vocab_size)
    teacher_t, head_t_dv = jax.lax.stop_gradient((tokens.teacher_t, head_t_dv))
    targets_t = tokens.targets_t
    if isinstance(teacher_t, TopK):
        losses_t, log_prob_t = _top_k(loss, logits_s_tv, teacher_t, targets_t)
    else:
        logits_t_tv = None if head_t_dv is None else _logits(teacher_t, head_t_dv, vocab_size)
        losses_t = _losses(loss, logits_s_tv, logits_t_tv, targets_t)
        log_prob_t = jnp.zeros_like(losses_t)
        if logits_t_tv is not None:
            log_prob_t = _at(jax.nn.log_softmax(logits_t_tv), targets_t)
    values = TokenValues(losses_t, _at(jax.nn.log_softmax(logits_s_tv), targets_t), log_prob_t)
    # Where a token has no weight, its gradient must not even be infinite times 0.
    return jax.tree.map(lambda x_t: jnp.where(tokens.weights_t != 0, x_t, 0.0), values)


def _losses(loss, logits_s_tv, logits_t_tv, targets_t):
    if isinstance(loss, RowLoss):
        return loss.values(logits_s_tv, logits_t_tv, targets_t)
    log_p_tv = None
    if logits_t_tv is not None:
        log_p_tv = jax.nn.log_softmax(logits_t_tv / loss.temperature)
    log_q_tv = jax.nn.log_softmax(logits_s_tv / loss.temperature)
    is_target_tv = jnp.arange(log_q_tv.shape[1]) == targets_t[:, None]
    return jnp.sum(loss.terms(log_p_tv, log_q_tv, is_target_tv), axis=-1)


def _top_k(loss, logits_s_tv, teacher: TopK, targets_t):
    """Losses over the k tokens and the bucket of all others, and the targets' log-probabilities."""
    log_q_tv = jax.nn.log_softmax(logits_s_tv / loss.temperature)
    vocabulary = jnp.arange(log_q_tv.shape[1])
    listed_tkv = teacher.ids_tk[:, :, None] == vocabulary
    log_q_tail_t = jax.nn.logsumexp(log_q_tv, axis=-1, where=~listed_tkv.any(axis=1))
    log_q_tail_t = jnp.maximum(log_q_tail_t, MASKED)  # finite without any
    log_tail_t = teacher.log_tail_t(log_q_tv.shape[1])
    log_q_tk = _at_ids(log_q_tv, teacher.ids_tk)
    terms_tk = loss.terms(teacher.log_probs_tk, log_q_tk, False)
    terms_tail_t = loss.terms(log_tail_t, log_q_tail_t, False)
    losses_t = jnp.sum(jnp.where(teacher.present_tk, terms_tk, 0.0), axis=-1) + terms_tail_t
    is_target_tk = teacher.present_tk & (teacher.ids_tk == targets_t[:, None])
    listed_t = jnp.sum(jnp.where(is_target_tk, teacher.log_probs_tk, 0.0), axis=-1)
    return losses_t, jnp.where(is_target_tk.any(axis=-1), listed_t, log_tail_t)


def _logits(hidden_td, head_dv, vocab_size: int):
    """Logits of the shared vocabulary, in float32 whatever the dtype of the two operands."""
    return jnp.einsum(
        "td,dv->tv", hidden_td, head_dv[:, :vocab_size], preferred_element_type=jnp.float32
    )


def _at(log_probs_tv, targets_t):
    return _at_ids(log_probs_tv, targets_t[:, None])[:, 0]


def _at_ids(log_probs_tv, ids_tk):
    """Entries of each row, 0 where an id is negative."""
    picked_tk = jnp.take_along_axis(log_probs_tv, jnp.maximum(ids_tk, 0), axis=1)
    return jnp.where(ids_tk >= 0, picked_tk, 0.0)
