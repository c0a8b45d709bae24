"""Slots of a model's cache: inserting, appending and moving rows, whatever its layers remember.

A cache is a tree of `models.cache.LayerCache`, donated from call to call. Slots are laid out
(parts, slots): a part (p) is what one group of devices holds of the batch. Every operation works
within a part, so none moves anything between devices. c: slot, w: slot, one of the first few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.base.sharding import constrain, num_shards, partition_spec
from distill.models.cache import LayerCache, empty_cache, ring_positions
from distill.models.facts import ModelConfig

Cache = Any  # a tree of LayerCache


def map_arrays(function: Callable[..., Any], cache: Cache, *others: Cache) -> Cache:
    """`function(array, axes, *arrays of others)` of each array of a cache."""
    return jax.tree.map(
        lambda layer, *rest: layer.map(function, *rest),
        cache,
        *others,
        is_leaf=lambda x: isinstance(x, LayerCache),
    )


def make_cache(
    config: ModelConfig, parts: int, slots: int, size: int, dtype: jnp.dtype, int8: bool
) -> Cache:
    """An empty cache on the current mesh."""
    return _constrain(empty_cache(config, parts, slots, size, dtype, int8))


def shard_bytes(cache: Cache) -> float:
    """Bytes on each device of the current mesh."""

    def of_array(array, axes):
        shards = math.prod(num_shards(name) for name in axes.names if name is not None)
        return array.size * array.dtype.itemsize / shards

    return sum(jax.tree.leaves(map_arrays(of_array, cache)))


def partition_specs(cache: Cache) -> Cache:
    """Mesh axes that hold the cache."""
    return map_arrays(lambda _, axes: partition_spec(axes.names), cache)


def insert(
    cache: Cache, new: Cache, source_pm: jax.Array, slot_pm: jax.Array, lengths_pm: jax.Array
) -> Cache:
    """Copies rows source_pm of `new`, of lengths_pm tokens, to slots slot_pm of the same part.

    Slots that do not exist are skipped: they fill up an insertion of fewer than m rows.
    """

    def one(i, array, axes, new_array):
        slot_p, row = slot_pm[:, i], _rows(new_array, source_pm[:, i])
        # A write beyond the last slot would hit the last one: there, what it holds is written.
        held = _rows(array, slot_p)
        if axes.position is not None:
            size = min(new_array.shape[axes.position], array.shape[axes.position])
            held = jax.lax.slice_in_dim(held, 0, size, axis=axes.position)
            if size < new_array.shape[axes.position]:
                row = _into_ring(held, row, axes.position, 0 * slot_p, lengths_pm[:, i])
        exists_p = (slot_p < array.shape[2]).reshape(-1, *[1] * (array.ndim - 2))
        return _write(array, jnp.where(exists_p, row, held), slot_p, ())

    return _for_each(source_pm.shape[1], one, cache, new)


def append(cache: Cache, tail: Cache, lengths_pw: jax.Array, count_pw: jax.Array) -> Cache:
    """Writes tails of count_pw tokens behind the lengths_pw tokens of each part's first w slots.

    What has no positions takes the place of what was there. What stands in a tail from its count on
    means nothing; where nothing is in its place, it may be written, too.
    """

    def one(slot, array, axes, new_array):
        slots_p, start_p = jnp.full(lengths_pw.shape[0], slot), lengths_pw[:, slot]
        row = _rows(new_array, slots_p)
        if axes.ring:
            row = _into_ring(_rows(array, slots_p), row, axes.position, start_p, count_pw[:, slot])
        at = () if axes.ring or axes.position is None else ((axes.position, start_p),)
        return _write(array, row, slots_p, at)

    return _for_each(lengths_pw.shape[1], one, cache, tail)


def move(cache: Cache, source_mp: jax.Array, target_mp: jax.Array, count) -> Cache:
    """Copies, one after the other, `count` slots of each part onto others."""

    def one(i, array, _):
        return _write(array, _rows(array, source_mp[i]), target_mp[i], ())

    return _for_each(count, one, cache)


def _for_each(count, function, cache: Cache, *others: Cache) -> Cache:
    """Applies `function(i, array, axes, *arrays of others)` for one i after the other, in place.

    One slot after the other: a scatter would do it at once, but XLA transposes the whole cache for
    it and back.
    """

    def body(i, cache):
        return map_arrays(lambda *arrays: function(i, *arrays), cache, *others)

    return _constrain(jax.lax.fori_loop(0, count, body, cache))


def _into_ring(
    row: jax.Array, tail: jax.Array, axis: int, start_p: jax.Array, count_p: jax.Array
) -> jax.Array:
    """One slot's ring of each part, after count_p tokens of the tail from positions start_p on."""
    size, room = row.shape[axis], tail.shape[axis]
    position_ps = ring_positions(start_p + count_p, jnp.arange(size), size)
    shape = [1] * row.ndim
    shape[1], shape[axis] = position_ps.shape
    index = (position_ps - start_p[:, None]).reshape(shape)
    new = jnp.take_along_axis(tail, jnp.clip(index, 0, room - 1), axis=axis)
    return jnp.where(index >= 0, new, row)


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


def _constrain(cache: Cache) -> Cache:
    return map_arrays(lambda array, axes: constrain(array, *axes.names), cache)
