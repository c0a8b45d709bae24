"""The keys that a device's queries can reach, where the positions of a row are cut over devices.

With grouped queries, keys and values are a small part of what a layer makes of a token: those of
full attention are gathered, layer by layer, and those of a window are fetched from the devices just
before. They stand in the order of the row and end with the device's own: how far queries lie behind
the first key is the same everywhere, so that kernels know it when they are compiled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill.base.sharding import mesh_axes, num_shards


def keys_in_reach(
    k_btkh: jax.Array, v_btkh: jax.Array, segment_ids_bt: jax.Array | None, window: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """k_bskh, v_bskh and segment_ids_bs; the segment of what lies before a row's beginning is -1.

    For a device, within shard_map. Every one sends to the next, so often as a key has to go; the
    gradients come back in the same way.
    """
    (axis,), number = mesh_axes("position"), num_shards("position")
    batch, length = k_btkh.shape[:2]
    if segment_ids_bt is None:
        segment_ids_bt = jnp.zeros((batch, length), jnp.int32)
    reach = (number - 1) * length
    if window is not None:
        reach = min(window - 1, reach)
    to_next = [(device, device + 1) for device in range(number - 1)]
    # The first receives zeros: no segment has that number here.
    pieces = [(k_btkh, v_btkh, segment_ids_bt + 1)]
    for distance in range(0, reach, length):
        size = min(length, reach - distance)
        sent = (x[:, length - size :] for x in pieces[0])
        pieces.insert(0, tuple(jax.lax.ppermute(x, axis, to_next) for x in sent))
    k_bskh, v_bskh, number_bs = (jnp.concatenate(x, axis=1) for x in zip(*pieces, strict=True))
    return k_bskh, v_bskh, number_bs - 1
