"""8-bit weights for a model that is not trained: the matrices of its layers, by qwix.

Every output channel of every layer has its own float32 scale. Only storage is in 8 bits: a layer's
matrix is made in the computation's dtype where it is used. Embedding, output head, norms and biases
stay as they are, since they are few and what they round away reaches every logit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from distill.models.checkpoints.keys import key_table
from distill.models.facts import ModelConfig


def quantize(config: ModelConfig, name: str, param: nnx.Variable) -> nnx.Variable:
    """A parameter whose value is a qwix.QArray if it is a matrix of the layers; else unchanged.

    Args:
      config: of the model.
      name: path of the parameter, as in the key table.
      param: in the devices' memory.
    """
    if not (channels := _channels(config, name)):
        return param
    value = param.get_value()
    return param.replace(_quantize(value, channels, value.sharding))


def _quantized_shape(config: ModelConfig, name: str, param: nnx.Variable) -> nnx.Variable:
    """`quantize` of the shape of a parameter, with its layout."""
    if not (channels := _channels(config, name)):
        return param
    value = param.get_value()
    quantized = jax.eval_shape(lambda x: _qwix_quantize(x, channels), value)
    steps = quantized.qvalue.update(sharding=value.sharding)
    scale = quantized.scale.update(sharding=_scale_layout(value.sharding, channels))
    return param.replace(qwix.QArray(steps, scale))


def quantized_shapes(config: ModelConfig, params: nnx.State) -> nnx.State:
    """Shapes of all parameters, the matrices among them in 8 bits."""
    return with_each(functools.partial(_quantized_shape, config), params)


def quantized(config: ModelConfig, params: nnx.State) -> nnx.State:
    """All parameters, the matrices among them in 8 bits; within a jitted function."""

    def of(name: str, param: nnx.Variable) -> nnx.Variable:
        channels = _channels(config, name)
        return param.replace(_qwix_quantize(param.get_value(), channels)) if channels else param

    return with_each(of, params)


def with_each(change: Callable[[str, nnx.Variable], nnx.Variable], params: nnx.State) -> nnx.State:
    """The parameters as `change` makes them of their paths and values."""
    return nnx.from_flat_state(
        [
            (path, change("/".join(map(str, path)), param))
            for path, param in nnx.to_flat_state(params)
        ]
    )


def _channels(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Axes of a stacked matrix that have a scale for each of their entries; () for the others."""
    weight = key_table(config)[name]
    if not weight.stacked or len(weight.theirs) < 2 or name.endswith("router"):
        return ()  # what is picked must not depend on rounding
    # The last axis of theirs is what a product sums over.
    leading = len(weight.stacked)
    inner = (i for i, axis in enumerate(weight.ours, leading) if axis not in weight.theirs[-1])
    return *range(leading), *inner


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(value: jax.Array, channels: tuple[int, ...], place: Sharding) -> qwix.QArray:
    quantized = _qwix_quantize(value, channels)
    layout = _scale_layout(place, channels)  # else the compiler's choice, which no plan knows
    steps = jax.lax.with_sharding_constraint(quantized.qvalue, place)
    return qwix.QArray(steps, jax.lax.with_sharding_constraint(quantized.scale, layout))


def _scale_layout(place: Sharding, channels: tuple[int, ...]) -> Sharding:
    """Of a matrix's scales: split as the matrix is, but for the axes that share a scale."""
    if not isinstance(place, NamedSharding):
        return place
    spec = [axes if i in channels else None for i, axes in enumerate(place.spec)]
    return NamedSharding(place.mesh, PartitionSpec(*spec), memory_kind=place.memory_kind)


def _qwix_quantize(value: jax.Array, channels: tuple[int, ...]) -> qwix.QArray:
    return qwix.quantize(value.astype(jnp.float32), jnp.int8, channelwise_axes=channels)


def without_scales(tree):
    """The tree with its 8-bit weights as their integers."""

    def is_quantized(x) -> bool:
        return isinstance(x, qwix.QArray)

    return jax.tree.map(lambda x: x.qvalue if is_quantized(x) else x, tree, is_leaf=is_quantized)


def dequantize(value: jax.Array | qwix.QArray, dtype: jnp.dtype) -> jax.Array:
    """The weights to compute with."""
    return (qwix.dequantize(value) if isinstance(value, qwix.QArray) else value).astype(dtype)
