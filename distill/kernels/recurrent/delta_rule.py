"""The gated delta rule (2412.06464), chunk by chunk and token by token.

A head's state is a matrix S from keys to values. A token with query q, key k (both of length 1),
value v, decay a and rate c makes

    S <- a S + k (c (v - (a S)^T k))^T,    o = S^T q / sqrt(width of q).

Shapes: i key heads, j value heads, a multiple of i (heads next to each other share one key), x key
width, y value width, c and s positions in a chunk. States are in float32, or wider with the inputs.

Within a chunk the corrections c (v - ...) solve a triangular system. A chunk takes a few products
of matrices in place of as many updates as it has tokens (2406.06484).

Where the mesh cuts positions, no device waits for the state before its own. Of a state S, a
device's tokens make A S + B, and they read S^T r: A and r come as further columns of the values.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from distill.base.sharding import dividing, mesh_axes, num_shards, partition_spec
from distill.kernels.platform import platform

CHUNK = 64  # tokens
NORM_EPS = 1e-6  # of transformers' l2norm


def gated_delta_rule(
    q_btix: jax.Array,
    k_btix: jax.Array,
    v_btjy: jax.Array,
    log_decay_btj: jax.Array,
    rate_btj: jax.Array,
    segment_ids_bt: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """out_btjy in v's dtype, and the state_bjxy after the last token.

    Rows, positions and heads are cut over the devices of the current mesh, where it divides them.
    The backward pass keeps no more than the arguments, and while it works one state per chunk.

    Args:
      q_btix, k_btix: queries and keys of any length.
      v_btjy: values.
      log_decay_btj: at most 0.
      rate_btj: from 0 to 1; a token with 0 and no decay changes nothing.
      segment_ids_bt: the state begins anew where it changes.
      chunk: tokens that are computed at once.
    """
    # What the mesh does not divide is whole on its devices.
    rows, positions = dividing("batch", len(q_btix)), dividing("position", q_btix.shape[1])
    rule = _of_positions if positions and num_shards("position") > 1 else _of_rows
    local = jax.checkpoint(functools.partial(rule, chunk=chunk), prevent_cse=False)
    arrays = q_btix, k_btix, v_btjy, log_decay_btj, rate_btj, segment_ids_bt
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays)
    heads = dividing("act_heads", q_btix.shape[2])
    of_heads = partition_spec((rows, positions, heads, None))
    of_numbers, ids = partition_spec((rows, positions, heads)), partition_spec((rows, positions))
    return jax.shard_map(
        local,
        in_specs=(of_heads, of_heads, of_heads, of_numbers, of_numbers, ids),
        out_specs=(of_heads, partition_spec((rows, heads, None, None))),
        check_vma=False,
    )(*arrays)


def delta_rule_step(
    q_bix: jax.Array,
    k_bix: jax.Array,
    v_bjy: jax.Array,
    log_decay_bj: jax.Array,
    rate_bj: jax.Array,
    state_bjxy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """out_bjy of one token, and the state after it."""
    q_bjx, k_bjx = _per_head(q_bix, k_bix, v_bjy.shape[1])
    state_bjxy = state_bjxy * jnp.exp(log_decay_bj)[..., None, None]
    # Sums, no products of matrices: those would be rounded on TPUs.
    known_bjy = jnp.sum(state_bjxy * k_bjx[..., None], axis=-2)
    correction_bjy = rate_bj[..., None] * (v_bjy - known_bjy)
    state_bjxy = state_bjxy + k_bjx[..., None] * correction_bjy[:, :, None]
    return jnp.sum(state_bjxy * q_bjx[..., None], axis=-2).astype(v_bjy.dtype), state_bjxy


def flops_per_token(key_width: int, value_width: int, chunk: int = CHUNK) -> int:
    """Operations of `gated_delta_rule` for one token and value head: two per multiplication."""
    of_state = 3 * key_width * value_width  # read by key and by query, and written
    return 2 * of_state + 2 * chunk * (key_width + value_width)  # the causal half of four squares


def _per_head(q_ix: jax.Array, k_ix: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """Normalised queries, scaled, and keys, for every value head; (..., i, x) to (..., j, x)."""

    def make(x, scale):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x * (scale * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS))
        return jnp.repeat(x, num_heads // x.shape[-2], axis=-2)

    return make(q_ix, q_ix.shape[-1] ** -0.5), make(k_ix, 1.0)


def _of_rows(q_btix, k_btix, v_btjy, log_decay_btj, rate_btj, segment_ids_bt, *, chunk: int):
    """The rule for whole rows."""
    batch, length, num_heads, value_width = v_btjy.shape
    if segment_ids_bt is None:
        segment_ids_bt = jnp.zeros((batch, length), jnp.int32)
    dtype = jnp.promote_types(v_btjy.dtype, jnp.float32)
    state_bjxy = jnp.zeros((batch, num_heads, q_btix.shape[-1], value_width), dtype)
    arrays = q_btix, k_btix, v_btjy, log_decay_btj, rate_btj, segment_ids_bt
    return _chunked(state_bjxy, segment_ids_bt[:, 0], *arrays, chunk=chunk)


def _of_positions(q_btix, k_btix, v_btjy, log_decay_btj, rate_btj, segment_ids_bt, *, chunk: int):
    """The rule for a device's positions of rows that go on before and behind them."""
    (axis,), number = mesh_axes("position"), num_shards("position")
    batch, length, num_heads, width = v_btjy.shape
    if segment_ids_bt is None:
        segment_ids_bt = jnp.zeros((batch, length), jnp.int32)
    # The segment that goes on from the device before; -1 where there is none.
    to_next = [(device, device + 1) for device in range(number - 1)]
    segment_b = jax.lax.ppermute(segment_ids_bt[:, -1] + 1, axis, to_next) - 1
    dtype, key_width = jnp.promote_types(v_btjy.dtype, jnp.float32), q_btix.shape[-1]
    # Of values that are 0, from an identity: how the state before is changed, and how it is read.
    wide_btjy = jnp.pad(v_btjy.astype(dtype), [(0, 0)] * 3 + [(0, key_width)])
    start_xy = jnp.pad(jnp.eye(key_width, dtype=dtype), ((0, 0), (width, 0)))
    start_bjxy = jnp.broadcast_to(start_xy, (batch, num_heads, *start_xy.shape))
    arrays = q_btix, k_btix, wide_btjy, log_decay_btj, rate_btj, segment_ids_bt
    wide_btjy, state_bjxy = _chunked(start_bjxy, segment_b, *arrays, chunk=chunk)
    added_pbjxy, changes_pbjxx = jnp.split(jax.lax.all_gather(state_bjxy, axis), [width], axis=-1)
    # Before the positions of each device, and after all.
    states = [jnp.zeros_like(added_pbjxy[0])]
    with jax.default_matmul_precision("highest"):
        for added_bjxy, change_bjxx in zip(added_pbjxy, changes_pbjxx, strict=True):
            states.append(change_bjxx @ states[-1] + added_bjxy)
        before_bjxy = jnp.stack(states)[jax.lax.axis_index(axis)]
        out_btjy, read_btjx = jnp.split(wide_btjy, [width], axis=-1)
        out_btjy += jnp.einsum("btjx,bjxy->btjy", read_btjx, before_bjxy)
    return out_btjy.astype(v_btjy.dtype), states[-1]


def _chunked(
    state_bjxy, segment_b, q_btix, k_btix, v_btjy, log_decay_btj, rate_btj, segment_ids_bt, *, chunk
):
    """Chunk by chunk, from a state that belongs to a segment."""
    batch, length, num_heads, value_width = v_btjy.shape
    chunk = min(chunk, length)
    padding = -length % chunk

    def cut(x, mode="constant"):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    chunks = (
        *map(cut, (q_btix, k_btix, v_btjy, log_decay_btj, rate_btj)),
        cut(segment_ids_bt, "edge"),
    )
    step = jax.checkpoint(_one_chunk, prevent_cse=False)
    with jax.default_matmul_precision("highest"):
        (state_bjxy, _), out = jax.lax.scan(step, (state_bjxy, segment_b), chunks)
    out_btjy = jnp.moveaxis(out, 0, 1).reshape(batch, -1, num_heads, value_width)
    return out_btjy[:, :length], state_bjxy


def _one_chunk(carry, chunk):
    """The chunk's out_bcjy from the state before it and that state's segment."""
    state_bjxy, segment_b = carry
    q_bcix, k_bcix, v_bcjy, log_decay_bcj, rate_bcj, segment_bc = chunk
    dtype, size = state_bjxy.dtype, v_bcjy.shape[1]
    q_bcjx, k_bcjx = _per_head(q_bcix, k_bcix, v_bcjy.shape[2])
    rate_bjc = rate_bcj.astype(dtype).transpose(0, 2, 1)
    # Logs of the decay from the chunk's beginning to each position, that position's included.
    total_bjc = jnp.cumsum(log_decay_bcj.astype(dtype), axis=1).transpose(0, 2, 1)

    def decay(log, seen):
        return jnp.exp(jnp.where(seen, log, -jnp.inf))

    sees_bcs = jnp.tril(jnp.ones((size, size), bool)) & (
        segment_bc[:, :, None] == segment_bc[:, None, :]
    )
    decay_bjcs = decay(total_bjc[..., None] - total_bjc[:, :, None], sees_bcs[:, None])
    from_state_bjc = decay(total_bjc, (segment_bc == segment_b[:, None])[:, None])
    # What the state before the chunk and the tokens before it in the chunk know of its value.
    known_bjcy = from_state_bjc[..., None] * jnp.einsum("bcjx,bjxy->bjcy", k_bcjx, state_bjxy)
    products_bjcs = jnp.einsum("bcjx,bsjx->bjcs", k_bcjx, k_bcjx) * decay_bjcs
    correction_bjcy = _solve(
        rate_bjc[..., None] * products_bjcs,
        rate_bjc[..., None] * (v_bcjy.astype(dtype).transpose(0, 2, 1, 3) - known_bjcy),
    )
    out_bjcy = from_state_bjc[..., None] * jnp.einsum("bcjx,bjxy->bjcy", q_bcjx, state_bjxy)
    scores_bjcs = jnp.einsum("bcjx,bsjx->bjcs", q_bcjx, k_bcjx) * decay_bjcs
    out_bjcy += jnp.einsum("bjcs,bjsy->bjcy", scores_bjcs, correction_bjcy)
    kept_bjc = decay_bjcs[:, :, -1]
    state_bjxy = from_state_bjc[:, :, -1, None, None] * state_bjxy + jnp.einsum(
        "bjc,bcjx,bjcy->bjxy", kept_bjc, k_bcjx, correction_bjcy
    )
    out_bcjy = out_bjcy.transpose(0, 2, 1, 3).astype(v_bcjy.dtype)
    return (state_bjxy, segment_bc[:, -1]), out_bcjy


def _solve(matrix_bjcs: jax.Array, right_bjcy: jax.Array) -> jax.Array:
    """Solves by a lower triangle with ones on the diagonal, whatever stands there and above.

    Not by LAPACK on CPUs: jaxlib 0.10's kernel waits, on a thread of XLA's pool, for work that it
    gives to that pool. Two at once on two cores wait for ever.
    """
    if platform() != "cpu":
        return jax.lax.linalg.triangular_solve(
            matrix_bjcs, right_bjcy, left_side=True, lower=True, unit_diagonal=True
        )
    size = right_bjcy.shape[2]
    below_bjcs = jnp.tril(matrix_bjcs, -1)

    def substitute(factors_bjcs, right_bjcy, backwards):
        def step(i, x_bjcy):
            c = size - 1 - i if backwards else i
            row_bj1s = jax.lax.dynamic_slice_in_dim(factors_bjcs, c, 1, axis=2)
            right_bj1y = jax.lax.dynamic_slice_in_dim(x_bjcy, c, 1, axis=2)
            # What is not solved yet has a factor of 0.
            solved_bj1y = right_bj1y - row_bj1s @ x_bjcy
            return jax.lax.dynamic_update_slice_in_dim(x_bjcy, solved_bj1y, c, axis=2)

        return jax.lax.fori_loop(0, size, step, right_bjcy)

    return jax.lax.custom_linear_solve(
        lambda x_bjcy: x_bjcy + below_bjcs @ x_bjcy,
        right_bjcy,
        lambda _, right: substitute(below_bjcs, right, backwards=False),
        lambda _, right: substitute(below_bjcs.swapaxes(2, 3), right, backwards=True),
    )
