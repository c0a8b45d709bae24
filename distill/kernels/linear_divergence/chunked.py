"""Plain XLA, chunk of tokens by chunk of tokens: no array of [T, V] on any platform.

Gradients are made in the forward pass, where a chunk's logits exist anyway; recomputing them in a
backward pass would run the teacher's head twice. That is possible because the differentiable result
is one scalar: the backward pass only multiplies by its cotangent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence.token_losses import (
    TokenLoss,
    TokenValues,
    output_logits,
    token_values,
)
from distill.sharding import constrain, partition_spec

# Per device. About four float32 blocks (tokens of a chunk, vocabulary) are alive at once: two
# log-softmaxes, the slope, the gradient. Heads and head gradient pass through memory once per
# chunk, so a chunk wants the few hundred tokens that hide this behind the matrix products: at
# V=151936 this budget gives 441.
BUDGET_BYTES = 1 << 30
LIVE_BLOCKS = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_token_loss(
    token_loss: TokenLoss,
    chunk: int | None,
    hidden_s_td: jax.Array,
    head_s_dv: jax.Array,
    hidden_t_td: jax.Array | None,
    head_t_dv: jax.Array | None,
    targets_t: jax.Array | None,
    weights_t: jax.Array,
) -> tuple[jax.Array, TokenValues]:
    """sum_t weights_t * loss_t and the values per token; differentiable by the student's two.

    Without differentiation this forward-only body runs; with it, `_forward_with_gradients` does.
    """

    def chunk_values(logits_s_cv, logits_t_cv, targets_c):
        losses_c = token_loss.values(logits_s_cv, logits_t_cv, targets_c)
        return token_values(losses_c, logits_s_cv, logits_t_cv, targets_c)

    values = map_logits(
        chunk_values, chunk, hidden_s_td, head_s_dv, hidden_t_td, head_t_dv, targets_t
    )
    return jnp.sum(weights_t * values.divergence), values


def _forward_with_gradients(
    token_loss, chunk, hidden_s_td, head_s_dv, hidden_t_td, head_t_dv, targets_t, weights_t
):
    head_s_dv, head_t_dv = _gather_head(head_s_dv), _gather_head(head_t_dv)
    # One partial sum of the head's gradient per token shard, summed once after the loop: a plain
    # (d, v) accumulator would make the compiler reduce over the shards in every chunk.
    groups = _num_shards("token")

    def chunk_step(head_gradient_gdv, rows):
        hidden_s_cd, hidden_t_cd, targets_c, weights_c = rows
        logits_s_cv = _chunk_logits(hidden_s_cd, head_s_dv)
        logits_t_cv = _chunk_logits(hidden_t_cd, head_t_dv)
        losses_c, gradient_cv = token_loss.values_and_gradients(logits_s_cv, logits_t_cv, targets_c)
        values = token_values(losses_c, logits_s_cv, logits_t_cv, targets_c)
        gradient_cv = (weights_c[:, None] * gradient_cv).astype(hidden_s_cd.dtype)
        head_gradient_gdv += jnp.einsum(
            "gcd,gcv->gdv",
            hidden_s_cd.reshape(groups, -1, hidden_s_cd.shape[1]),
            gradient_cv.reshape(groups, -1, gradient_cv.shape[1]),
            preferred_element_type=jnp.float32,
        )
        hidden_gradient_cd = jnp.einsum(
            "cv,dv->cd", gradient_cv, head_s_dv, preferred_element_type=jnp.float32
        )
        head_gradient_gdv = constrain(head_gradient_gdv, "token", None, "act_vocab")
        return head_gradient_gdv, (values, hidden_gradient_cd.astype(hidden_s_cd.dtype))

    zeros_gdv = jnp.zeros((groups, *head_s_dv.shape), jnp.float32)
    head_gradient_gdv, (values, hidden_gradient_td) = _scan_chunks(
        chunk_step,
        constrain(zeros_gdv, "token", None, "act_vocab"),
        (hidden_s_td, hidden_t_td, targets_t, weights_t),
        _chunk_size(chunk, hidden_s_td.shape[0], head_s_dv.shape[1]),
    )
    head_gradient_dv = jnp.sum(head_gradient_gdv, axis=0).astype(head_s_dv.dtype)
    loss = jnp.sum(weights_t * values.divergence)
    return (loss, values), (hidden_gradient_td, head_gradient_dv)


def _backward(token_loss, chunk, gradients, cotangents):
    loss_cotangent, _ = cotangents
    hidden_gradient_td, head_gradient_dv = (
        (loss_cotangent * gradient).astype(gradient.dtype) for gradient in gradients
    )
    # None is a zero cotangent: teacher, targets and weights are constants of the loss.
    return hidden_gradient_td, head_gradient_dv, None, None, None, None


linear_token_loss.defvjp(_forward_with_gradients, _backward)


def map_logits(
    function: Callable, chunk: int | None, hidden_s_td, head_s_dv, hidden_t_td, head_t_dv, targets_t
):
    """function(logits_s_cv, logits_t_cv, targets_c) of every chunk, results joined along tokens.

    The forward-only path. `function` returns a pytree of arrays with tokens first.
    """
    head_s_dv, head_t_dv = _gather_head(head_s_dv), _gather_head(head_t_dv)

    def chunk_step(carry, rows):
        hidden_s_cd, hidden_t_cd, targets_c = rows
        logits_s_cv = _chunk_logits(hidden_s_cd, head_s_dv)
        logits_t_cv = _chunk_logits(hidden_t_cd, head_t_dv)
        return carry, function(logits_s_cv, logits_t_cv, targets_c)

    chunk = _chunk_size(chunk, hidden_s_td.shape[0], head_s_dv.shape[1])
    _, outputs = _scan_chunks(chunk_step, None, (hidden_s_td, hidden_t_td, targets_t), chunk)
    return outputs


def _scan_chunks(chunk_step: Callable, carry, rows, chunk: int):
    """lax.scan of `chunk_step` over chunks of a pytree of (T, ...) arrays, outputs joined likewise.

    A ragged end is filled with zeros (weights of zero among them) and cut off the outputs.
    """
    num_tokens = jax.tree.leaves(rows)[0].shape[0]
    num_chunks = -(-num_tokens // chunk)

    def split(x):
        # Strided, not contiguous: token t is in chunk t % num_chunks. Tokens are sharded in
        # contiguous runs, so this way every chunk has rows on all devices and none has to move.
        x = jnp.pad(x, [(0, chunk * num_chunks - num_tokens)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(chunk, num_chunks, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "token", *[None] * (x.ndim - 2))

    def join(x):
        x = x.swapaxes(0, 1).reshape(chunk * num_chunks, *x.shape[2:])[:num_tokens]
        return constrain(x, "token", *[None] * (x.ndim - 1))

    carry, outputs = jax.lax.scan(chunk_step, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(join, outputs)


def _chunk_logits(hidden_cd: jax.Array | None, head_dv: jax.Array | None) -> jax.Array | None:
    if hidden_cd is None:
        return None
    return constrain(output_logits(hidden_cd, head_dv), "token", "act_vocab")


def _gather_head(head_dv: jax.Array | None) -> jax.Array | None:
    """Whole in d, so that it is gathered once and not in every chunk."""
    return None if head_dv is None else constrain(head_dv, None, "act_vocab")


def _chunk_size(chunk: int | None, num_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk over all devices: as asked, or as many as the budget allows."""
    groups = _num_shards("token")
    if chunk is not None:
        return -(-min(chunk, num_tokens) // groups) * groups
    block_bytes_per_token = 4 * LIVE_BLOCKS * -(-vocab_size // _num_shards("act_vocab"))
    largest = max(1, BUDGET_BYTES // block_bytes_per_token) * groups
    fewest_chunks = -(-num_tokens // largest)
    # Up to twice the fewest chunks to avoid a ragged end, which moves rows between devices.
    for num_chunks in range(fewest_chunks, 2 * fewest_chunks + 1):
        if num_tokens % (num_chunks * groups) == 0:
            return num_tokens // num_chunks
    return -(-num_tokens // (fewest_chunks * groups)) * groups


def _num_shards(logical_axis: str) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    mesh_axes = partition_spec((logical_axis,))[0]
    if mesh.empty or mesh_axes is None:
        return 1
    mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return math.prod(mesh.shape[axis] for axis in mesh_axes)
