"""Experts on several devices: tokens go to the devices of their experts, and sums come back.

Under shard_map, with a device's own tokens and experts. No token is dropped: a device has room for
all tokens of its group, and multiplies only those that picked its experts. There are two ways:

- gathered: every device gets all tokens, and sums are scattered;
- routed: a token is sent once to each device that has one of its experts (ragged all-to-all, and
  where a platform lacks it, an all-to-all of all the room).

`is_routed` chooses the one that sends less. Shape suffixes, beside those of moe.py: n devices of
a group; r its tokens, n times t.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill.kernels.platform import platform

# Of each row of x_rd, the sum of its experts that are here; other picks are no number of one.
SumHere = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# A routed exchange is irregular, and passes more links: it has to send at most this share.
LARGEST_SHARE = 0.5


def copies(devices: int, per_token: int) -> float:
    """How many of the devices a token goes to if it picks experts evenly."""
    return devices * (1 - (1 - 1 / devices) ** per_token)


def is_routed(devices: int, per_token: int) -> bool:
    return copies(devices, per_token) <= LARGEST_SHARE * devices


def sent(devices: int, per_token: int) -> float:
    """Rows that a device sends for each of its tokens; as many come back."""
    spread = copies(devices, per_token) if is_routed(devices, per_token) else devices
    return spread * (devices - 1) / devices


def sum_over_devices(
    x_td: jax.Array,
    scores_tc: jax.Array,
    picked_tc: jax.Array,
    sum_here: SumHere,
    *,
    axis: str,
    number: int,
) -> jax.Array:
    """y_td of a device's own tokens.

    Args:
      x_td, scores_tc, picked_tc: of the tokens, and the numbers of their experts.
      sum_here: of this device's experts, which it numbers from 0.
      axis: of the mesh, over which experts are cut.
      number: experts of each device.
    """
    devices = jax.lax.axis_size(axis)
    exchange = _routed if is_routed(devices, picked_tc.shape[1]) else _gathered
    here_ntc = jax.lax.all_gather(picked_tc, axis) - jax.lax.axis_index(axis) * number
    scores_ntc = jax.lax.all_gather(scores_tc, axis)
    return exchange(x_td, scores_ntc, here_ntc, picked_tc // number, sum_here, axis, number)


def _gathered(x_td, scores_ntc, here_ntc, device_tc, sum_here, axis, number) -> jax.Array:
    x_ntd = jax.lax.all_gather(x_td, axis)
    y_rd = sum_here(*map(_flat, (x_ntd, scores_ntc, here_ntc)))
    return jax.lax.psum_scatter(y_rd, axis, scatter_dimension=0, tiled=True)


def _routed(x_td, scores_ntc, here_ntc, device_tc, sum_here, axis, number) -> jax.Array:
    devices, num_tokens = len(here_ntc), len(x_td)
    # Whether a token goes to each device; and of all tokens, whether one comes here.
    to_nt = jnp.any(device_tc == jnp.arange(devices)[:, None, None], axis=-1)
    from_nt = jnp.any((here_ntc >= 0) & (here_ntc < number), axis=-1)
    # What is sent stands first.
    to_order_nt, from_order_nt = (jnp.argsort(~x, axis=1, stable=True) for x in (to_nt, from_nt))
    to_n, from_n = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (to_nt, from_nt))
    x_ntd = _permute(jnp.broadcast_to(x_td, (devices, *x_td.shape)), to_order_nt)
    x_ntd = _swap(x_ntd, to_n, from_n, axis)
    came_nt1 = (jnp.arange(num_tokens) < from_n[:, None])[..., None]
    here_ntc = jnp.where(came_nt1, _permute(here_ntc, from_order_nt), number)
    scores_ntc = _permute(scores_ntc, from_order_nt)
    y_rd = sum_here(*map(_flat, (x_ntd, scores_ntc, here_ntc)))
    y_ntd = _swap(y_rd.reshape(x_ntd.shape), from_n, to_n, axis)
    y_ntd = _permute(y_ntd, jnp.argsort(to_order_nt, axis=1))
    y_ntd = jnp.where(to_nt[..., None], y_ntd, 0).astype(jnp.float32)
    return jnp.sum(y_ntd, axis=0).astype(x_td.dtype)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _permute(x_ntd: jax.Array, order_nt: jax.Array) -> jax.Array:
    def permute(x_td, order_t):
        return x_td.at[order_t].get(unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(permute)(x_ntd, order_nt)


def _swap(x_ntd: jax.Array, to_n: jax.Array, from_n: jax.Array, axis: str) -> jax.Array:
    """The first to_n rows for each device, for the first from_n of each; the rest means nothing."""
    if platform() == "cpu":  # which has no ragged one
        return jax.lax.all_to_all(x_ntd, axis, 0, 0, tiled=True)
    devices, num_tokens, _ = x_ntd.shape
    rows, own = _flat(x_ntd), jax.lax.axis_index(axis)
    swapped = jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows),
        input_offsets=jnp.arange(devices, dtype=jnp.int32) * num_tokens,
        send_sizes=to_n,
        output_offsets=jnp.full(devices, own * num_tokens, jnp.int32),
        recv_sizes=from_n,
        axis_name=axis,
    )
    return swapped.reshape(x_ntd.shape)
