"""Attention block by block in plain XLA: what FlashAttention does, without its kernels.

No scores outlive their block: the forward pass keeps a running maximum and sum per query (Milakov
and Gimelshein, arXiv:1805.02867), the backward pass computes the scores again (Dao et al.,
arXiv:2205.14135). Blocks above the diagonal, beyond the window, or of other segments only are never
entered: the bounds of the inner loops are computed from the segments.

i: query block, j: key block, c: position in it, g: query heads of a key-value head, r: positions of
keys, of which queries have the last.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from distill.kernels.attention.spec import AttentionSpec

# What the backward pass needs beside its inputs, by the name that a checkpoint policy keeps it by.
RESIDUALS = "attention_residuals"

# Positions per block: large enough for efficient products, small enough to skip much.
BLOCK = 256


def blockwise_attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_ids_bs: jax.Array | None,
    sinks_n: jax.Array | None = None,
    *,
    spec: AttentionSpec,
    block: int = BLOCK,
) -> jax.Array:
    """attended_btnh; see api.attention."""
    batch, length, num_heads, width = q_btnh.shape
    size = min(block, length)
    padded = -(-length // size) * size
    num_keys, num_kv_heads = k_bskh.shape[1:3]
    if segment_ids_bs is None:
        segment_ids_bs = jnp.zeros((batch, num_keys), jnp.int32)
    # Keys before the queries fill whole blocks.
    before, behind = -(num_keys - length) % size, padded - length

    def pad(x, before):
        return jnp.pad(x, [(0, 0), (before, behind)] + [(0, 0)] * (x.ndim - 2))

    # The filling is the row's last segment, which nobody before it sees, and one before the first.
    ids_br = jnp.pad(segment_ids_bs, ((0, 0), (0, behind)), mode="edge")
    ids_br = jnp.pad(ids_br, ((0, 0), (before, 0)), constant_values=-1)
    q_btkgh = pad(q_btnh, 0).reshape(batch, padded, num_kv_heads, -1, width)
    q_bkgth, k_bkrh, v_bkrh = (
        q_btkgh.transpose(0, 2, 3, 1, 4),
        pad(k_bskh, before).swapaxes(1, 2),
        pad(v_bskh, before).swapaxes(1, 2),
    )
    sinks_kg = None
    if sinks_n is not None:
        sinks_kg = sinks_n.astype(jnp.float32).reshape(num_kv_heads, -1)
    attended_bkgth = _attend(q_bkgth, k_bkrh, v_bkrh, ids_br, sinks_kg, spec, size)
    attended_btkgh = attended_bkgth.transpose(0, 3, 1, 2, 4)[:, :length]
    return attended_btkgh.reshape(batch, length, num_heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q_bkgth, k_bkrh, v_bkrh, ids_br, sinks_kg, spec: AttentionSpec, size: int) -> jax.Array:
    return _forward(q_bkgth, k_bkrh, v_bkrh, ids_br, sinks_kg, spec, size)[0]


def _forward(q_bkgth, k_bkrh, v_bkrh, ids_br, sinks_kg, spec: AttentionSpec, size: int):
    length, width = q_bkgth.shape[-2:]
    num_blocks, before = ids_br.shape[1] // size, (ids_br.shape[1] - length) // size
    first_i, _ = _bounds(ids_br, spec.window, size)

    def query_block(_, i):
        q_bkgch = _slice(q_bkgth, i - before, size)

        def key_block(j, state):
            highest_bkgc, sum_bkgc, values_bkgch = state
            scores_bkgcs = _scores(q_bkgch, _slice(k_bkrh, j, size), ids_br, i, j, spec)
            new_bkgc = jnp.maximum(highest_bkgc, scores_bkgcs.max(axis=-1))
            # Rows of which nothing has been seen yet have no maximum.
            safe_bkgc = jnp.where(jnp.isfinite(new_bkgc), new_bkgc, 0.0)
            weights_bkgcs = jnp.exp(scores_bkgcs - safe_bkgc[..., None])
            shrink_bkgc = jnp.exp(highest_bkgc - safe_bkgc)
            added_bkgch = _product("bkgcs,bksh->bkgch", weights_bkgcs, _slice(v_bkrh, j, size))
            sum_bkgc = sum_bkgc * shrink_bkgc + weights_bkgcs.sum(axis=-1)
            return new_bkgc, sum_bkgc, values_bkgch * shrink_bkgc[..., None] + added_bkgch

        rows = jnp.zeros(q_bkgch.shape[:-1], jnp.float32)
        start = rows - jnp.inf, rows, jnp.zeros((*rows.shape, width), jnp.float32)
        if sinks_kg is not None:
            start = rows + sinks_kg[..., None], rows + 1.0, start[2]
        highest, total, values = _loop(first_i[i], i + 1, key_block, start, num_blocks)
        return None, ((values / total[..., None]).astype(q_bkgth.dtype), highest + jnp.log(total))

    blocks = jnp.arange(before, num_blocks)
    _, (attended_ibkgch, log_sum_ibkgc) = jax.lax.scan(query_block, None, blocks)
    attended_bkgth = checkpoint_name(_join(attended_ibkgch, q_bkgth.shape), RESIDUALS)
    log_sum_bkgt = _join(log_sum_ibkgc, q_bkgth.shape[:-1], axis=-1)
    log_sum_bkgt = checkpoint_name(log_sum_bkgt, RESIDUALS)
    saved = q_bkgth, k_bkrh, v_bkrh, ids_br, sinks_kg, attended_bkgth, log_sum_bkgt
    return attended_bkgth, saved


def _backward(spec: AttentionSpec, size: int, saved, gradient_bkgth):
    q_bkgth, k_bkrh, v_bkrh, ids_br, sinks_kg, attended_bkgth, log_sum_bkgt = saved
    num_blocks, before = ids_br.shape[1] // size, (ids_br.shape[1] - q_bkgth.shape[-2]) // size
    _, last_j = _bounds(ids_br, spec.window, size)
    # sum_s p_s dp_s, which the softmax's gradient subtracts
    inner_bkgt = jnp.sum(
        gradient_bkgth.astype(jnp.float32) * attended_bkgth.astype(jnp.float32), axis=-1
    )

    def key_block(q_gradient_bkgth, j):
        k_bksh, v_bksh = _slice(k_bkrh, j, size), _slice(v_bkrh, j, size)

        def query_block(i, state):
            q_gradient_bkgth, k_gradient_bksh, v_gradient_bksh = state
            q_bkgch, gradient_bkgch = _slice(q_bkgth, i, size), _slice(gradient_bkgth, i, size)
            log_sum_bkgc = _slice(log_sum_bkgt, i, size, axis=-1)
            scores_bkgcs = _scores(q_bkgch, k_bksh, ids_br, before + i, j, spec)
            weights_bkgcs = jnp.exp(scores_bkgcs - log_sum_bkgc[..., None])
            v_gradient_bksh += _product("bkgcs,bkgch->bksh", weights_bkgcs, gradient_bkgch)
            slope_bkgcs = _product("bkgch,bksh->bkgcs", gradient_bkgch, v_bksh)
            slope_bkgcs -= _slice(inner_bkgt, i, size, axis=-1)[..., None]
            slope_bkgcs *= weights_bkgcs * spec.scale
            if spec.soft_cap is not None:  # where there is no attention, the weight is 0
                bounded_bkgcs = jnp.where(jnp.isfinite(scores_bkgcs), scores_bkgcs, 0.0)
                slope_bkgcs *= 1 - jnp.square(bounded_bkgcs / spec.soft_cap)
            k_gradient_bksh += _product("bkgcs,bkgch->bksh", slope_bkgcs, q_bkgch)
            here_bkgch = _slice(q_gradient_bkgth, i, size)
            here_bkgch += _product("bkgcs,bksh->bkgch", slope_bkgcs, k_bksh)
            q_gradient_bkgth = jax.lax.dynamic_update_slice_in_dim(
                q_gradient_bkgth, here_bkgch, i * size, axis=-2
            )
            return q_gradient_bkgth, k_gradient_bksh, v_gradient_bksh

        zeros = jnp.zeros(k_bksh.shape, jnp.float32)
        start = q_gradient_bkgth, zeros, zeros
        q_gradient_bkgth, k_gradient, v_gradient = _loop(
            jnp.maximum(j - before, 0), last_j[j] + 1 - before, query_block, start, num_blocks
        )
        return q_gradient_bkgth, (k_gradient.astype(k_bkrh.dtype), v_gradient.astype(v_bkrh.dtype))

    q_gradient_bkgth, key_value_gradients = jax.lax.scan(
        key_block,
        jnp.zeros(q_bkgth.shape, jnp.float32),
        jnp.arange(num_blocks),
    )
    k_gradient_bkrh, v_gradient_bkrh = (_join(x, k_bkrh.shape) for x in key_value_gradients)
    sinks_gradient_kg = None
    if sinks_kg is not None:
        weights_bkgt = jnp.exp(sinks_kg[..., None] - log_sum_bkgt)
        sinks_gradient_kg = -jnp.sum(weights_bkgt * inner_bkgt, axis=(0, 3))
    q_gradient_bkgth = q_gradient_bkgth.astype(q_bkgth.dtype)
    return q_gradient_bkgth, k_gradient_bkrh, v_gradient_bkrh, None, sinks_gradient_kg


_attend.defvjp(_forward, _backward)


def cap_scores(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """c tanh(scores / c) (Gemma 2, arXiv:2408.00118), or the scores where c is None."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _scores(q_bkgch, k_bksh, ids_br, i, j, spec: AttentionSpec):
    """Scaled scores of a query block and a key block, -inf where there is no attention."""
    size = k_bksh.shape[-2]
    scores_bkgcs = _product("bkgch,bksh->bkgcs", q_bkgch, k_bksh) * spec.scale
    scores_bkgcs = cap_scores(scores_bkgcs, spec.soft_cap)
    offset_cs = (i - j) * size + jnp.arange(size)[:, None] - jnp.arange(size)
    allowed_bcs = (
        _slice(ids_br, i, size, axis=1)[:, :, None] == (_slice(ids_br, j, size, axis=1)[:, None, :])
    )
    allowed_bcs &= offset_cs >= 0
    if spec.window is not None:
        allowed_bcs &= offset_cs < spec.window
    return jnp.where(allowed_bcs[:, None, None], scores_bkgcs, -jnp.inf)


def _bounds(ids_bt, window: int | None, size: int):
    """The first key block of every query block, and the last query block of every key block."""
    length = ids_bt.shape[1]
    positions = jnp.arange(length)
    changes_bt = jnp.pad(ids_bt[:, 1:] != ids_bt[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first_bt = jax.lax.cummax(jnp.where(changes_bt, positions, 0), axis=1)
    ends_bt = jnp.pad(changes_bt[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last_bt = jax.lax.cummin(jnp.where(ends_bt, positions, length - 1), axis=1, reverse=True)
    if window is not None:
        first_bt = jnp.maximum(first_bt, positions - (window - 1))
        last_bt = jnp.minimum(last_bt, positions + (window - 1))
    first_i = first_bt.min(axis=0).reshape(-1, size).min(axis=1) // size
    last_j = last_bt.max(axis=0).reshape(-1, size).max(axis=1) // size
    return first_i, last_j


def _loop(first, end, block, start, num_blocks: int):
    """`fori_loop` over blocks. A single block has one turn, as XLA cannot see from the bounds."""
    return block(0, start) if num_blocks == 1 else jax.lax.fori_loop(first, end, block, start)


def _product(subscripts: str, x, y):
    """Operands in the dtype of the inputs, the sum in float32."""
    return jnp.einsum(subscripts, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _slice(x, block, size: int, axis: int = -2):
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=axis % x.ndim)


def _join(blocks_ix, shape: tuple[int, ...], axis: int = -2):
    """Blocks (i, ..., c, ...) as one array, whose axis of positions is `axis`."""
    return jnp.moveaxis(blocks_ix, 0, axis % len(shape)).reshape(shape)
