"""Walking layers of several kinds with a program that does not grow with depth."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill.base.sharding import in_device_memory


class Stretch(NamedTuple):
    """Layers one after the other whose kinds repeat a period."""

    period: tuple[str, ...]
    repeats: int


def scan_layers(
    layer: Callable[[str, Any, Any], tuple[Any, Any]],
    carry: Any,
    stacks: Mapping[str, Any],
    layers: tuple[str, ...],
) -> tuple[Any, dict[str, Any]]:
    """`jax.lax.scan` over layers of several kinds.

    `layer` takes a kind, the carry and one layer's part of that kind's stack: arrays with a leading
    axis of its layers. `layers` are the kinds of all layers.

    Returns:
      The carry after the last layer, and for each kind its layers' second results, stacked.
    """
    if len(stacks) == 1:
        [(kind, stack)] = stacks.items()
        carry, results = jax.lax.scan(functools.partial(layer, kind), carry, stack)
        return carry, {kind: results}
    made: dict[str, list[Any]] = {kind: [] for kind in stacks}
    before: collections.Counter[str] = collections.Counter()
    for period, repeats in stretches(layers):
        counts = collections.Counter(period)

        def cut(x: jax.Array, start: int, count: int, repeats: int = repeats) -> jax.Array:
            return x[start : start + repeats * count].reshape(repeats, count, *x.shape[1:])

        periods = {
            kind: jax.tree.map(functools.partial(cut, start=before[kind], count=n), stacks[kind])
            for kind, n in counts.items()
        }
        walk = functools.partial(_walk_period, layer, period)
        carry, results = jax.lax.scan(walk, carry, periods)
        for kind, result in results.items():
            made[kind].append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result))
            before[kind] += repeats * counts[kind]
    return carry, {
        kind: jax.tree.map(lambda *x: jnp.concatenate(x), *parts) for kind, parts in made.items()
    }


def _walk_period(layer, period: tuple[str, ...], carry: Any, stacks: dict[str, Any]):
    stacks = in_device_memory(stacks)
    made: dict[str, list[Any]] = {kind: [] for kind in stacks}
    for kind in period:
        own = jax.tree.map(lambda x: x[len(made[kind])], stacks[kind])  # noqa: B023
        carry, result = layer(kind, carry, own)
        made[kind].append(result)
    return carry, {
        kind: jax.tree.map(lambda *x: jnp.stack(x), *each) for kind, each in made.items()
    }


@functools.cache
def stretches(layers: tuple[str, ...]) -> tuple[Stretch, ...]:
    """The layers as those stretches that hold the fewest layers, each period counted once.

    A period with what a depth leaves over is two stretches, first layers of another kind are one of
    their own, and layers without any order are as many as there are.
    """
    best: list[tuple[Stretch, ...]] = [()]  # of the last layers: of none, of one, ...

    def size(found: tuple[Stretch, ...]) -> tuple[int, int]:
        return sum(len(stretch.period) for stretch in found), len(found)

    for start in reversed(range(len(layers))):
        rest = layers[start:]
        best.append(
            min(
                (
                    (stretch, *best[len(rest) - stretch.repeats * len(stretch.period)])
                    for stretch in _beginnings(rest)
                ),
                key=size,
            )
        )
    return best[-1]


def _beginnings(layers: tuple[str, ...]) -> Iterator[Stretch]:
    """Every stretch with which the layers begin, of each period as often as it is repeated."""
    for length in range(1, len(layers) + 1):
        period, repeats = layers[:length], 1
        while layers[repeats * length : (repeats + 1) * length] == period:
            repeats += 1
        yield Stretch(period, repeats)
