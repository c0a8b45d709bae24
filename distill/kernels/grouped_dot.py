"""Products of sorted rows with the matrix of their group, as experts multiply their tokens.

Shapes: rows x_mk, sorted by group; w_gkn, a matrix for each group; sizes_g, how many rows each
group has, together all of them. The result y_mn is in x's dtype.

`implementation`: `ragged` (`jax.lax.ragged_dot`: the definition, and a kernel on TPUs; elsewhere
XLA masks, and takes time and memory for all rows in every group), `blockwise` (plain XLA, any
platform), or None for the better one here. The gradient of w is always `blockwise`: XLA has no
kernel for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.kernels.platform import platform

SMALLEST_BLOCK, LARGEST_BLOCK = 4, 512


def grouped_dot(
    x_mk: jax.Array, w_gkn: jax.Array, sizes_g: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """y_mn, differentiable in x_mk and w_gkn; ValueError for an unknown implementation."""
    if implementation is None:
        implementation = "ragged" if platform() == "tpu" else "blockwise"
    if implementation not in _FORWARD:
        raise ValueError(
            f"grouped_dot {implementation!r} is unknown: choose {' or '.join(_FORWARD)}, or None"
        )
    return _grouped_dot(implementation, x_mk, w_gkn, sizes_g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(implementation: str, x_mk, w_gkn, sizes_g):
    return _FORWARD[implementation](x_mk, w_gkn, sizes_g)


def _forward(implementation: str, x_mk, w_gkn, sizes_g):
    return _grouped_dot(implementation, x_mk, w_gkn, sizes_g), (x_mk, w_gkn, sizes_g)


def _backward(implementation: str, saved, dy_mn):
    x_mk, w_gkn, sizes_g = saved
    dx_mk = _FORWARD[implementation](dy_mn, w_gkn.swapaxes(1, 2), sizes_g)
    return dx_mk, _outer_products(x_mk, dy_mn, sizes_g).astype(w_gkn.dtype), None


_grouped_dot.defvjp(_forward, _backward)


def _blockwise(x_mk: jax.Array, w_gkn: jax.Array, sizes_g: jax.Array) -> jax.Array:
    def multiply(y_mn, group, start, size, inside_b1):
        x_bk, y_bn = (jax.lax.dynamic_slice_in_dim(each, start, size) for each in (x_mk, y_mn))
        y_bn = jnp.where(inside_b1, x_bk @ w_gkn[group], y_bn)
        return jax.lax.dynamic_update_slice_in_dim(y_mn, y_bn, start, axis=0)

    empty_mn = jnp.zeros((len(x_mk), w_gkn.shape[2]), x_mk.dtype)
    return _over_blocks(multiply, empty_mn, sizes_g, len(x_mk))


def _outer_products(x_mk: jax.Array, dy_mn: jax.Array, sizes_g: jax.Array) -> jax.Array:
    """dw_gkn in float32: the products of each group's rows."""

    def multiply(dw_gkn, group, start, size, inside_b1):
        x_bk, dy_bn = (jax.lax.dynamic_slice_in_dim(each, start, size) for each in (x_mk, dy_mn))
        x_bk = jnp.where(inside_b1, x_bk, 0)
        return dw_gkn.at[group].add(jnp.matmul(x_bk.T, dy_bn, preferred_element_type=jnp.float32))

    shape = len(sizes_g), x_mk.shape[1], dy_mn.shape[1]
    return _over_blocks(multiply, jnp.zeros(shape, jnp.float32), sizes_g, len(x_mk))


def _over_blocks(multiply: Callable[..., Any], result: Any, sizes_g: jax.Array, num_rows: int):
    """`multiply` for every block of rows, and for every group that has rows in it.

    It gets the result so far, the group, the block's first row and size, and which of its rows are
    of the group.
    """
    even = num_rows // len(sizes_g)
    size = min(num_rows, LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << even.bit_length()))
    # A group's blocks begin at its first row: most groups have one.
    blocks_g, ends_g = -(-sizes_g // size), jnp.cumsum(sizes_g)
    most = num_rows // size + len(sizes_g)
    group_i = jnp.repeat(jnp.arange(len(sizes_g)), blocks_g, total_repeat_length=most)
    earlier_i = jnp.arange(most) - (jnp.cumsum(blocks_g) - blocks_g)[group_i]  # of the group
    first_i = (ends_g - sizes_g)[group_i] + earlier_i * size
    stop_i = ends_g[group_i]

    def step(i, result):
        start = jnp.minimum(first_i[i], num_rows - size)
        row_b1 = (start + jnp.arange(size))[:, None]
        inside_b1 = (row_b1 >= first_i[i]) & (row_b1 < stop_i[i])
        return multiply(result, group_i[i], start, size, inside_b1)

    return jax.lax.fori_loop(0, jnp.sum(blocks_g), step, result)


_FORWARD: dict[str, Callable[..., jax.Array]] = {
    "ragged": jax.lax.ragged_dot,
    "blockwise": _blockwise,
}
