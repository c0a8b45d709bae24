"""Tokens with weight to the front, so that the loss's walk over chunks ends behind them.

On every device by itself, where the mesh divides them: no token crosses devices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill.base.sharding import dividing, partition_spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """A permutation of every device's tokens.

    Attributes:
      source_t: where the tokens of the new order were, counted on their device.
      place_t: where they are now, its inverse.
    """

    source_t: jax.Array
    place_t: jax.Array

    def apply(self, tree):
        """Arrays (T, ...) in the new order; differentiable."""
        return jax.tree.map(lambda x: _permuted(x, self.source_t, self.place_t), tree)

    def undo(self, tree):
        return jax.tree.map(lambda x: _permuted(x, self.place_t, self.source_t), tree)


def weighted_first(weights_t: jax.Array) -> Order:
    """The order in which the tokens with weight come first, among themselves as they were."""

    def local(weights_t):
        source_t = jnp.argsort(weights_t == 0, stable=True)
        return Order(source_t, jnp.argsort(source_t))

    return _on_token_shards(local, weights_t)


@jax.custom_vjp
def _permuted(x, source_t, place_t):
    return _on_token_shards(lambda x, source_t: x[source_t], x, source_t)


def _permuted_forward(x, source_t, place_t):
    return _permuted(x, source_t, place_t), (source_t, place_t)


def _permuted_backward(order, gradient):
    source_t, place_t = order
    # Not left to differentiation: that would add up what a permutation only moves.
    return _permuted(gradient, place_t, source_t), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def _on_token_shards(local, *arrays):
    # A permutation of all tokens where the mesh does not divide them, which costs more.
    if dividing("token", len(arrays[0])) is None or jax.sharding.get_abstract_mesh().empty:
        return local(*arrays)
    tokens = partition_spec(("token",))
    return jax.shard_map(local, in_specs=tokens, out_specs=tokens, check_vma=False)(*arrays)
