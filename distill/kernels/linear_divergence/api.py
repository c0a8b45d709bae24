"""Losses from hidden states and output heads, without ever holding all logits.

Shapes: hidden (T, D) and head (D, V) in the compute dtype, student and teacher each with its own D
and V; `vocab_size` is the shared vocabulary, at most either V (further columns are padding and
ignored); weights float32 (T,), targets int (T,). Gradients reach hidden_s and head_s only.
`implementation`: `reference`, `chunked`, or None for the best that runs here; one that cannot run
is a ValueError. `chunk` is the number of tokens, over all devices, whose logits exist at once; None
fits a memory budget, and `reference` has no use for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence import chunked, reference
from distill.kernels.linear_divergence.token_losses import (
    CrossEntropyLoss,
    CustomLoss,
    DivergenceLoss,
    TokenLoss,
    TokenValues,
    tempered_log_probs,
)

IMPLEMENTATIONS = ("reference", "chunked")


def linear_divergence(
    hidden_s: jax.Array,
    head_s: jax.Array,
    hidden_t: jax.Array,
    head_t: jax.Array,
    weights: jax.Array,
    *,
    divergence,
    temperature: float = 1.0,
    vocab_size: int,
    targets: jax.Array | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, TokenValues]:
    """sum_t weights_t * D_t, D_t = sum_v divergence(log p, log q), and the values per token.

    `divergence` is a hashable pointwise function of (log_p, log_q); `temperature` divides the
    logits of both models. Raises ValueError for an implementation that cannot run here.
    """
    token_loss = DivergenceLoss(divergence, temperature)
    rows = (hidden_s, head_s, hidden_t, head_t, targets, weights)
    return _linear_token_loss(token_loss, *rows, vocab_size, implementation, chunk)


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_size: int,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, TokenValues]:
    """sum_t -weights_t * log q_t(target_t), and the values per token, cross-entropy among them."""
    rows = (hidden, head, None, None, targets, weights)
    return _linear_token_loss(CrossEntropyLoss(), *rows, vocab_size, implementation, chunk)


def linear_loss(
    hidden_s: jax.Array,
    head_s: jax.Array,
    hidden_t: jax.Array,
    head_t: jax.Array,
    weights: jax.Array,
    *,
    loss_fn,
    targets: jax.Array,
    temperature: float = 1.0,
    vocab_size: int,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, TokenValues]:
    """Like `linear_divergence` for any loss_fn(log_p_cv, log_q_cv, targets_c) -> loss_c, hashable.

    It sees a chunk of tokens at a time, so the loss of a token may depend on that token's row only.
    """
    token_loss = CustomLoss(loss_fn, temperature)
    rows = (hidden_s, head_s, hidden_t, head_t, targets, weights)
    return _linear_token_loss(token_loss, *rows, vocab_size, implementation, chunk)


def per_token_divergences(
    hidden_s: jax.Array,
    head_s: jax.Array,
    hidden_t: jax.Array,
    head_t: jax.Array,
    *,
    divergences: tuple,
    temperature: float,
    vocab_size: int,
    chunk: int | None = None,
) -> jax.Array:
    """Several divergences of the same logits, float32 (len(divergences), T); for evaluation."""

    def chunk_divergences(logits_s_cv, logits_t_cv, _):
        log_p_cv, log_q_cv = tempered_log_probs(logits_s_cv, logits_t_cv, temperature)
        return jnp.stack([jnp.sum(f(log_p_cv, log_q_cv), axis=-1) for f in divergences], axis=-1)

    head_s, head_t = (_shared_columns(head, vocab_size) for head in (head_s, head_t))
    return chunked.map_logits(chunk_divergences, chunk, hidden_s, head_s, hidden_t, head_t, None).T


def resolve_implementation(implementation: str | None) -> str:
    """The implementation that will run; ValueError when the one asked for cannot."""
    if implementation is None:
        return "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} cannot run on {jax.default_backend()}: "
            f"choose one of {', '.join(IMPLEMENTATIONS)}, or None"
        )
    return implementation


def _linear_token_loss(
    token_loss: TokenLoss,
    hidden_s,
    head_s,
    hidden_t,
    head_t,
    targets,
    weights,
    vocab_size: int,
    implementation: str | None,
    chunk: int | None,
) -> tuple[jax.Array, TokenValues]:
    head_s, head_t = (_shared_columns(head, vocab_size) for head in (head_s, head_t))
    rows = (hidden_s, head_s, hidden_t, head_t, targets, weights)
    if resolve_implementation(implementation) == "reference":
        return reference.linear_token_loss(token_loss, *rows)
    loss, values = chunked.linear_token_loss(token_loss, chunk, *rows)
    return loss, jax.lax.stop_gradient(values)


def _shared_columns(head: jax.Array | None, vocab_size: int) -> jax.Array | None:
    if head is None or head.shape[1] == vocab_size:
        return head
    if head.shape[1] < vocab_size:
        raise ValueError(f"vocab_size={vocab_size} exceeds a head of {head.shape[1]} columns")
    return head[:, :vocab_size]
