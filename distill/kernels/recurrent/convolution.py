"""A causal convolution of a few taps, each channel by itself, with SiLU behind it.

z: channel, w: tap; the last tap is the newest token's. Sums are in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_convolution(
    x_btz: jax.Array, taps_zw: jax.Array, segment_ids_bt: jax.Array | None = None
) -> jax.Array:
    """The activated convolution in x's dtype; before a row or segment begins there are zeros."""
    size, length = taps_zw.shape[1], x_btz.shape[1]
    wide_btz = jnp.pad(x_btz, ((0, 0), (size - 1, 0), (0, 0)))
    sum_btz = jnp.zeros((), jnp.float32)
    for tap in range(size):
        seen_btz = wide_btz[:, tap : tap + length]
        if segment_ids_bt is not None:
            before = size - 1 - tap
            of_row_bt = jnp.pad(segment_ids_bt, ((0, 0), (before, 0)), constant_values=-1)
            same_bt = of_row_bt[:, :length] == segment_ids_bt
            seen_btz = jnp.where(same_bt[:, :, None], seen_btz, 0)
        sum_btz += seen_btz.astype(jnp.float32) * taps_zw[:, tap].astype(jnp.float32)
    return jax.nn.silu(sum_btz).astype(x_btz.dtype)


def convolution_step(x_bz: jax.Array, taps_zw: jax.Array, tail_bwz: jax.Array):
    """Of one more token: `causal_convolution` there, and the newest inputs for the next one.

    Args:
      x_bz: the token's input.
      taps_zw: w taps.
      tail_bwz: the w - 1 inputs before it, zeros before the row's beginning.
    """
    seen_bwz = jnp.concatenate([tail_bwz, x_bz[:, None]], axis=1)
    sum_bz = jnp.sum(seen_bwz.astype(jnp.float32) * taps_zw.T.astype(jnp.float32), axis=1)
    return jax.nn.silu(sum_bz).astype(x_bz.dtype), seen_bwz[:, 1:]
