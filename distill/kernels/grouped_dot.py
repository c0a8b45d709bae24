"""Products of sorted rows with the matrices of their group, as experts multiply their tokens.

Shapes: rows x_mk, sorted by group; w_gpkn, p matrices for each group, or w_gkn, one; sizes_g, how
many rows each group has, together all of them. The result y_mpn, or y_mn, is in x's dtype.

`implementation`:
  ragged     `jax.lax.ragged_dot`: the definition, and a kernel on TPUs. Elsewhere XLA masks, and
             takes time and memory for all rows in every group.
  blockwise  plain XLA, block after block of a group's rows.
  batched    plain XLA, the first rows of all groups at once, and the rest block after block. Reads
             all matrices, and copies none: for few rows, as in decoding.
  None       the better one here.
The gradient of w is always `blockwise`: XLA has no kernel for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.kernels.platform import platform

SMALLEST_BLOCK, LARGEST_BLOCK = 4, 512
# Rows for each group, on average, of which `batched` is the faster on CPUs.
FEW_ROWS = 1, 16


def grouped_dot(
    x_mk: jax.Array, w_gpkn: jax.Array, sizes_g: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """y_mpn, differentiable in x_mk and w_gpkn; ValueError for an unknown implementation."""
    if implementation is None:
        implementation = _better(len(x_mk), len(w_gpkn))
    if implementation not in _FORWARD:
        raise ValueError(
            f"grouped_dot {implementation!r} is unknown: choose {', '.join(_FORWARD)}, or None"
        )
    if w_gpkn.ndim == 3:
        return _grouped_dot(implementation, x_mk, w_gpkn[:, None], sizes_g)[:, 0]
    return _grouped_dot(implementation, x_mk, w_gpkn, sizes_g)


def _better(num_rows: int, num_groups: int) -> str:
    if platform() == "tpu":
        return "ragged"
    fewest, most = FEW_ROWS
    return "batched" if fewest * num_groups <= num_rows <= most * num_groups else "blockwise"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(implementation: str, x_mk, w_gpkn, sizes_g):
    return _FORWARD[implementation](x_mk, w_gpkn, sizes_g)


def _forward(implementation: str, x_mk, w_gpkn, sizes_g):
    return _grouped_dot(implementation, x_mk, w_gpkn, sizes_g), (x_mk, w_gpkn, sizes_g)


def _backward(implementation: str, saved, dy_mpn):
    x_mk, w_gpkn, sizes_g = saved
    groups, _, width, _ = w_gpkn.shape
    w_g1nk = w_gpkn.swapaxes(2, 3).reshape(groups, 1, -1, width)
    dx_m1k = _FORWARD[implementation](dy_mpn.reshape(len(x_mk), -1), w_g1nk, sizes_g)
    return dx_m1k[:, 0], _outer_products(x_mk, dy_mpn, sizes_g).astype(w_gpkn.dtype), None


_grouped_dot.defvjp(_forward, _backward)


def _ragged(x_mk: jax.Array, w_gpkn: jax.Array, sizes_g: jax.Array) -> jax.Array:
    each = [jax.lax.ragged_dot(x_mk, w_gpkn[:, p], sizes_g) for p in range(w_gpkn.shape[1])]
    return jnp.stack(each, axis=1)


def _batched(x_mk: jax.Array, w_gpkn: jax.Array, sizes_g: jax.Array) -> jax.Array:
    num_rows, (groups, matrices, _, outputs) = len(x_mk), w_gpkn.shape
    size = 2 * _block_size(num_rows, groups)  # mostly enough
    first_g = jnp.cumsum(sizes_g) - sizes_g
    x_gbk = x_mk.at[first_g[:, None] + jnp.arange(size)].get(mode="clip")
    x_gpbk = jnp.broadcast_to(x_gbk[:, None], (groups, matrices, *x_gbk.shape[1:]))
    y_gbpn = (x_gpbk @ w_gpkn).swapaxes(1, 2)
    group_m = jnp.repeat(jnp.arange(groups), sizes_g, total_repeat_length=num_rows)
    place_m = jnp.minimum(jnp.arange(num_rows) - first_g[group_m], size - 1)  # in its group
    y_mpn = y_gbpn.reshape(-1, matrices, outputs)[group_m * size + place_m]
    add_rest = functools.partial(_add_blocks, x_mk, w_gpkn, sizes_g, skipped=size)
    return jax.lax.cond(jnp.max(sizes_g) > size, add_rest, lambda y_mpn: y_mpn, y_mpn)


def _blockwise(x_mk: jax.Array, w_gpkn: jax.Array, sizes_g: jax.Array) -> jax.Array:
    empty = jnp.zeros((len(x_mk), w_gpkn.shape[1], w_gpkn.shape[3]), x_mk.dtype)
    return _add_blocks(x_mk, w_gpkn, sizes_g, empty)


def _add_blocks(x_mk, w_gpkn, sizes_g, y_mpn: jax.Array, skipped: int = 0) -> jax.Array:
    """y_mpn with the products of all rows but the first `skipped` of each group."""

    def multiply(y_mpn, group, start, size, inside_b1):
        x_bk, y_bpn = (jax.lax.dynamic_slice_in_dim(each, start, size) for each in (x_mk, y_mpn))
        # One matrix at a time: together, XLA for CPUs would first copy them side by side.
        new_bpn = jnp.stack([x_bk @ w_gpkn[group, p] for p in range(w_gpkn.shape[1])], axis=1)
        y_bpn = jnp.where(inside_b1[:, None], new_bpn, y_bpn)
        return jax.lax.dynamic_update_slice_in_dim(y_mpn, y_bpn, start, axis=0)

    return _over_blocks(multiply, y_mpn, sizes_g, len(x_mk), skipped)


def _outer_products(x_mk: jax.Array, dy_mpn: jax.Array, sizes_g: jax.Array) -> jax.Array:
    """dw_gpkn in float32: the products of each group's rows."""

    def multiply(dw_gpkn, group, start, size, inside_b1):
        x_bk, dy_bpn = (jax.lax.dynamic_slice_in_dim(each, start, size) for each in (x_mk, dy_mpn))
        x_kb, dy_pbn = jnp.where(inside_b1, x_bk, 0).T, dy_bpn.swapaxes(0, 1)
        return dw_gpkn.at[group].add(jnp.matmul(x_kb, dy_pbn, preferred_element_type=jnp.float32))

    _, matrices, outputs = dy_mpn.shape
    shape = len(sizes_g), matrices, x_mk.shape[1], outputs
    return _over_blocks(multiply, jnp.zeros(shape, jnp.float32), sizes_g, len(x_mk))


def _block_size(num_rows: int, groups: int) -> int:
    """A power of two of at most the rows that a group has on average."""
    even = num_rows // groups
    return min(num_rows, LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << even.bit_length() >> 1))


def _over_blocks(
    multiply: Callable[..., Any], result: Any, sizes_g: jax.Array, num_rows: int, skipped: int = 0
):
    """`multiply` for every block of rows, and for every group that has rows in it.

    The first `skipped` rows of each group are in none.

    It gets the result so far, the group, the block's first row and size, and which of its rows are
    of the group.
    """
    size = _block_size(num_rows, len(sizes_g))
    # A group's blocks begin at its first row: most groups have one.
    blocks_g, ends_g = -(-jnp.maximum(sizes_g - skipped, 0) // size), jnp.cumsum(sizes_g)
    most = num_rows // size + len(sizes_g)
    group_i = jnp.repeat(jnp.arange(len(sizes_g)), blocks_g, total_repeat_length=most)
    earlier_i = jnp.arange(most) - (jnp.cumsum(blocks_g) - blocks_g)[group_i]  # of the group
    first_i = (ends_g - sizes_g + skipped)[group_i] + earlier_i * size
    stop_i = ends_g[group_i]

    def step(i, result):
        start = jnp.minimum(first_i[i], num_rows - size)
        row_b1 = (start + jnp.arange(size))[:, None]
        inside_b1 = (row_b1 >= first_i[i]) & (row_b1 < stop_i[i])
        return multiply(result, group_i[i], start, size, inside_b1)

    return jax.lax.fori_loop(0, jnp.sum(blocks_g), step, result)


_FORWARD: dict[str, Callable[..., jax.Array]] = {
    "ragged": _ragged,
    "blockwise": _blockwise,
    "batched": _batched,
}
