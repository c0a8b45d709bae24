"""The definition: full logits, several [T, V] arrays, ordinary automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence.token_losses import (
    TokenLoss,
    TokenValues,
    output_logits,
    token_values,
)


def linear_token_loss(
    token_loss: TokenLoss,
    hidden_s_td: jax.Array,
    head_s_dv: jax.Array,
    hidden_t_td: jax.Array | None,
    head_t_dv: jax.Array | None,
    targets_t: jax.Array | None,
    weights_t: jax.Array,
) -> tuple[jax.Array, TokenValues]:
    """sum_t weights_t * loss_t and the values per token; differentiable by the student's two."""
    logits_s_tv = output_logits(hidden_s_td, head_s_dv)
    logits_t_tv = None
    if hidden_t_td is not None:
        logits_t_tv = jax.lax.stop_gradient(output_logits(hidden_t_td, head_t_dv))
    losses_t = token_loss.values(logits_s_tv, logits_t_tv, targets_t)
    loss = jnp.sum(jax.lax.stop_gradient(weights_t) * losses_t)
    values = token_values(losses_t, logits_s_tv, logits_t_tv, targets_t)
    return loss, jax.lax.stop_gradient(values)
