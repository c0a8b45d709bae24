"""What layers remember of a row's tokens while it is sampled: one class per kind of layer.

A model's cache is a tree of these. Their arrays begin with the same axes: layers (l), parts of the
mesh (p), slots (c). What follows is the kind's own, and `axes` says what it is, so that those who
copy, cut, shard or count a cache know no kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from distill.base.sharding import round_up
from distill.kernels.attention import AttentionSpec
from distill.models.facts import LayerKind, ModelConfig

RING_MULTIPLE = 32

# What a layer carries through a decode loop: k_bkht and v_bkth of the loop's steps, or a recurrent
# layer's state_bjxy and tail_bwz.
Tail = tuple[jax.Array, jax.Array]


class Axes(NamedTuple):
    """Of one array of a cache.

    Attributes:
      names: logical axes, which say how it is sharded.
      position: the axis of positions; None: a state, which the next token replaces.
      ring: position p lies at p modulo the axis' size, in place of the one so far before it.
    """

    names: tuple[str | None, ...]
    position: int | None = None
    ring: bool = False


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Base of the classes, which are dataclasses of arrays; an array may be None."""

    def axes(self) -> dict[str, Axes]:
        """Of each array by its name."""
        raise NotImplementedError

    def tail(self, width: int, steps: int, dtype: jnp.dtype) -> Tail:
        """Before a loop of decode steps of each part's first `width` slots; all layers' stacked."""
        raise NotImplementedError

    def map(self, function: Callable[..., Any], *others: LayerCache) -> Self:
        """`function(array, axes, *arrays of others)` of each array there is."""
        made = {
            name: function(array, axes, *(getattr(other, name) for other in others))
            for name, axes in self.axes().items()
            if (array := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **made)


_HEADS = "layers", "batch", None, "act_kv_heads"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache(LayerCache):
    """Keys and values, optionally as 8-bit integers.

    Attributes:
      k_lpckhs, v_lpcksh: in the model's dtype, or int8.
      k_scale_lpcks, v_scale_lpcks: float32 step of the 8-bit integers, one per token and head.
      ring: of sliding attention, the window and no more; see `Axes`.
    """

    k_lpckhs: jax.Array
    v_lpcksh: jax.Array
    k_scale_lpcks: jax.Array | None = None
    v_scale_lpcks: jax.Array | None = None
    ring: bool = dataclasses.field(default=False, metadata={"static": True})

    def axes(self) -> dict[str, Axes]:
        return {
            "k_lpckhs": Axes((*_HEADS, None, "position"), 5, self.ring),
            "v_lpcksh": Axes((*_HEADS, "position", None), 4, self.ring),
            "k_scale_lpcks": Axes((*_HEADS, "position"), 4, self.ring),
            "v_scale_lpcks": Axes((*_HEADS, "position"), 4, self.ring),
        }

    def tail(self, width: int, steps: int, dtype: jnp.dtype) -> Tail:
        layers, parts, _, heads, _, head_width = self.v_lpcksh.shape
        shapes = (head_width, steps), (steps, head_width)
        k, v = (jnp.zeros((layers, parts * width, heads, *shape), dtype) for shape in shapes)
        return k, v

    @classmethod
    def encode(cls, k_lpckhs: jax.Array, v_lpcksh: jax.Array, int8: bool) -> AttentionCache:
        """Keys and values in the form in which they are kept."""
        if not int8:
            return cls(k_lpckhs, v_lpcksh)
        k, k_scale = _to_int8(k_lpckhs, axis=-2)
        v, v_scale = _to_int8(v_lpcksh, axis=-1)
        return cls(k, v, k_scale, v_scale)

    @property
    def size(self) -> int:
        """Positions that there is room for."""
        return self.v_lpcksh.shape[4]

    def read(self, layer, width: int, size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """k_bkhs and v_bksh of a layer: of each part's first `width` slots, `size` positions."""

        def cut(array, axes):
            start, shape = [layer, *[0] * (array.ndim - 1)], list(array.shape)
            shape[0], shape[2], shape[axes.position] = 1, width, size
            rows = jax.lax.dynamic_slice(array, start, shape)[0]
            return rows.reshape(-1, *rows.shape[2:])

        part = self.map(cut)
        if part.k_scale_lpcks is None or part.v_scale_lpcks is None:
            return part.k_lpckhs, part.v_lpcksh
        k_bkhs = part.k_lpckhs * part.k_scale_lpcks[:, :, None, :]
        v_bksh = part.v_lpcksh * part.v_scale_lpcks[:, :, :, None]
        return k_bkhs.astype(dtype), v_bksh.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCache(LayerCache):
    """States, in float32, and the last inputs of the convolution."""

    state_lpcjxy: jax.Array
    tail_lpcwz: jax.Array

    def axes(self) -> dict[str, Axes]:
        return {
            "state_lpcjxy": Axes(("layers", "batch", None, "act_heads", None, None)),
            "tail_lpcwz": Axes(("layers", "batch", None, None, None)),
        }

    def tail(self, width: int, steps: int, dtype: jnp.dtype) -> Tail:
        def first(x: jax.Array) -> jax.Array:
            return x[:, :, :width].reshape(len(x), -1, *x.shape[3:])

        return first(self.state_lpcjxy), first(self.tail_lpcwz)


def ring_positions(lengths: jax.Array, index_s: jax.Array, size: int) -> jax.Array:
    """Which position lies at an index of a ring, (..., s); negative where none does.

    Args:
      lengths: tokens of each row.
      index_s: indices.
      size: of the ring; rows that are no longer than it lie as if it were none.
    """
    last = lengths[..., None] - 1
    return last - (last - index_s) % size


def ring_size(spec: AttentionSpec, size: int) -> int:
    """Positions that a layer keeps of rows of at most `size`; fewer than all in a ring only."""
    if spec.window is None:
        return size
    return min(size, round_up(spec.window, RING_MULTIPLE))


def empty_cache(
    config: ModelConfig, parts: int, slots: int, size: int, dtype: jnp.dtype, int8: bool
) -> dict[str, LayerCache]:
    """For `slots` slots of `size` tokens in each part: a stack for each kind of layer."""

    def make(name: str, kind: LayerKind) -> LayerCache:
        slots_of = config.layers.count(name), parts, slots
        if sizes := kind.recurrent:
            state = sizes.value_heads, sizes.key_width, sizes.value_width
            return RecurrentCache(
                jnp.zeros((*slots_of, *state), jnp.float32),
                jnp.zeros((*slots_of, sizes.taps - 1, sizes.channels), dtype),
            )
        assert kind.attention is not None
        kept = ring_size(kind.attention, size)
        leading = *slots_of, kind.num_kv_heads
        k_lpckhs = jnp.zeros((*leading, kind.head_width, kept), dtype)
        v_lpcksh = jnp.zeros((*leading, kept, kind.head_width), dtype)
        empty = AttentionCache.encode(k_lpckhs, v_lpcksh, int8)
        return dataclasses.replace(empty, ring=kept < size)

    return {name: make(name, kind) for name, kind in config.kinds.items()}


def new_cache(
    config: ModelConfig, parts: int, tails: dict[str, Tail], int8: bool
) -> dict[str, LayerCache]:
    """What layers keep of some tokens, from stacked tails by kind; b: parts and slots."""

    def make(kind: LayerKind, tail: Tail) -> LayerCache:
        first, second = (x.reshape(len(x), parts, -1, *x.shape[2:]) for x in tail)
        if kind.recurrent:
            return RecurrentCache(first, second)
        return AttentionCache.encode(first, second, int8)

    return {name: make(kind, tails[name]) for name, kind in config.kinds.items()}


def _to_int8(values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Rounds to 255 steps between plus and minus the largest magnitude along `axis`."""
    values = values.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=axis)
    scale = jnp.where(largest == 0, 1.0, largest) / 127
    steps = jnp.round(values / jnp.expand_dims(scale, axis)).astype(jnp.int8)
    return steps, scale
