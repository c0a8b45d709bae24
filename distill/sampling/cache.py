"""Keys and values of the engine's slots, donated from call to call; optionally as 8-bit integers.

Slots are laid out (parts, slots): a part is what one group of devices holds of the batch. Every
operation works within a part, so none moves keys and values between devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from distill.base.sharding import constrain, partition_spec
from distill.models.decoding import KeysAndValues
from distill.models.facts import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """What all slots hold (p: part, c: slot, s: position).

    Attributes:
      k_lpckhs, v_lpcksh: in the model's dtype, or int8.
      k_scale_lpcks, v_scale_lpcks: float32 step of the 8-bit integers, one per token and head.
    """

    k_lpckhs: jax.Array
    v_lpcksh: jax.Array
    k_scale_lpcks: jax.Array | None = None
    v_scale_lpcks: jax.Array | None = None

    def map(self, function: Callable[..., jax.Array], *others: SlotCache) -> SlotCache:
        """`function(array, position axis, *arrays of others)` of each array there is."""
        axes = SlotCache(k_lpckhs=5, v_lpcksh=4, k_scale_lpcks=4, v_scale_lpcks=4)

        def apply(name):
            arrays = [getattr(cache, name) for cache in (self, *others)]
            if arrays[0] is None:
                return None
            return function(arrays[0], getattr(axes, name), *arrays[1:])

        return SlotCache(*(apply(field.name) for field in dataclasses.fields(self)))

    @property
    def num_bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def bytes_per_token(config: ModelConfig, dtype: jnp.dtype, int8: bool) -> int:
    """Bytes of one token's keys and values in all layers."""
    per_head = config.head_width + 4 if int8 else config.head_width * np.dtype(dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * per_head


def empty_cache(
    config: ModelConfig, parts: int, slots: int, size: int, dtype: jnp.dtype, int8: bool
) -> SlotCache:
    """`slots` slots of `size` tokens in each part."""
    layers, heads, width = config.num_layers, config.num_kv_heads, config.head_width
    k_lpckhs = jnp.zeros((layers, parts, slots, heads, width, size), dtype)
    v_lpcksh = jnp.zeros((layers, parts, slots, heads, size, width), dtype)
    return _constrain(encode(k_lpckhs, v_lpcksh, int8))


def partition_specs(cache: SlotCache) -> SlotCache:
    """Mesh axes that hold the cache."""
    return cache.map(lambda array, _: partition_spec(_logical_axes(array)))


def encode(k_lpckhs: jax.Array, v_lpcksh: jax.Array, int8: bool) -> SlotCache:
    """Keys and values in the form in which they are kept."""
    if not int8:
        return SlotCache(k_lpckhs, v_lpcksh)
    k, k_scale = _to_int8(k_lpckhs, axis=-2)
    v, v_scale = _to_int8(v_lpcksh, axis=-1)
    return SlotCache(k, v, k_scale, v_scale)


def read(cache: SlotCache, layer, width: int, size: int, dtype: jnp.dtype) -> KeysAndValues:
    """k_bkhs and v_bksh of a layer: of the first `width` slots of each part, `size` positions."""

    def cut(array, axis):
        start, shape = [layer, *[0] * (array.ndim - 1)], list(array.shape)
        shape[0], shape[2], shape[axis] = 1, width, size
        rows = jax.lax.dynamic_slice(array, start, shape)[0]
        return rows.reshape(-1, *rows.shape[2:])

    part = cache.map(cut)
    if part.k_scale_lpcks is None:
        return part.k_lpckhs, part.v_lpcksh
    k_bkhs = part.k_lpckhs * part.k_scale_lpcks[:, :, None, :]
    v_bksh = part.v_lpcksh * part.v_scale_lpcks[:, :, :, None]
    return k_bkhs.astype(dtype), v_bksh.astype(dtype)


def insert(cache: SlotCache, new: SlotCache, source_pm: jax.Array, slot_pm: jax.Array) -> SlotCache:
    """Copies rows source_pm of `new`, from position 0 on, to slots slot_pm of the same part.

    Slots that do not exist are skipped: they fill up an insertion of fewer than m rows.
    """

    def one(i, array, axis, new_array):
        slot_p = slot_pm[:, i]
        # A write beyond the last slot would hit the last one: there, what it holds is written.
        held = jax.lax.slice_in_dim(_rows(array, slot_p), 0, new_array.shape[axis], axis=axis)
        exists_p = (slot_p < array.shape[2]).reshape(-1, *[1] * (array.ndim - 2))
        row = jnp.where(exists_p, _rows(new_array, source_pm[:, i]), held)
        return _write(array, row, slot_p, ())

    return _for_each(source_pm.shape[1], one, cache, new)


def append(cache: SlotCache, tail: SlotCache, lengths_pw: jax.Array) -> SlotCache:
    """Writes a tail behind the lengths_pw tokens of each part's first w slots."""

    def one(slot, array, axis, new_array):
        slots_p = jnp.full(lengths_pw.shape[0], slot)
        return _write(array, _rows(new_array, slots_p), slots_p, ((axis, lengths_pw[:, slot]),))

    return _for_each(lengths_pw.shape[1], one, cache, tail)


def move(cache: SlotCache, source_mp: jax.Array, target_mp: jax.Array, count) -> SlotCache:
    """Copies, one after the other, `count` slots of each part onto others."""

    def one(i, array, _):
        return _write(array, _rows(array, source_mp[i]), target_mp[i], ())

    return _for_each(count, one, cache)


def _for_each(count, function, cache: SlotCache, *others: SlotCache) -> SlotCache:
    """Applies `function(i, array, position axis, *arrays of others)` for i in turn, in place.

    One slot after the other: a scatter would do it at once, but XLA transposes the whole cache for
    it and back.
    """

    def body(i, cache):
        return cache.map(lambda array, axis, *rest: function(i, array, axis, *rest), *others)

    return _constrain(jax.lax.fori_loop(0, count, body, cache))


def _rows(array: jax.Array, slot_p: jax.Array) -> jax.Array:
    """One slot of each part, (l, p, 1, ...)."""
    return jax.vmap(
        lambda part_lc, slot: jax.lax.dynamic_slice_in_dim(part_lc, slot, 1, axis=1), (1, 0), 1
    )(array, slot_p)


def _write(array: jax.Array, row: jax.Array, slot_p: jax.Array, at: tuple) -> jax.Array:
    """Puts a row of each part into a slot, from position 0 or from `at` = ((axis, start_p),) on."""

    def of_part(part_lc, part_row, slot, *starts):
        start = [0] * part_lc.ndim
        start[1] = slot
        for (axis, _), position in zip(at, starts, strict=True):
            start[axis - 1] = position  # without the axis of parts
        return jax.lax.dynamic_update_slice(part_lc, part_row, start)

    starts = [start_p for _, start_p in at]
    return jax.vmap(of_part, (1, 1, 0, *[0] * len(at)), 1)(array, row, slot_p, *starts)


def _to_int8(values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Rounds to 255 steps between plus and minus the largest magnitude along `axis`."""
    values = values.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=axis)
    scale = jnp.where(largest == 0, 1.0, largest) / 127
    steps = jnp.round(values / jnp.expand_dims(scale, axis)).astype(jnp.int8)
    return steps, scale


def _constrain(cache: SlotCache) -> SlotCache:
    return cache.map(lambda array, _: constrain(array, *_logical_axes(array)))


def _logical_axes(array: jax.Array) -> tuple[str | None, ...]:
    return "layers", "batch", None, "act_kv_heads", *[None] * (array.ndim - 4)
