"""What attention and feed-forward are made of: parameters, products, norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import merge_tokens, split_tokens
from distill.models.facts import LayerKind, ModelConfig

INIT_STD = 0.02


class Layer(Protocol):
    """One layer's weights, as attention and feed-forward use them; by their names."""

    config: ModelConfig
    kind: LayerKind

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """x (b, t, inputs...) times a matrix (inputs..., outputs...)."""

    def has(self, name: str) -> bool:
        """Whether it has a weight of the name."""

    def weight(self, name: str) -> jax.Array:
        """Any weight, in the dtype of the computation."""

    def exact(self, name: str) -> jax.Array:
        """A small weight, in float32."""

    def normalize(self, name: str, x: jax.Array) -> jax.Array:
        """RMSNorm over the axes that the norm's weight has."""


@dataclass
class ParamMaker:
    """Initial parameters of the layers of a kind at once, with a leading 'layers' axis.

    Attributes:
      num_layers: of the kind.
      depth: layers of all kinds.
    """

    num_layers: int
    depth: int
    dtype: jnp.dtype
    rngs: nnx.Rngs

    def normal(self, std: float, **axes: int) -> nnx.Param:
        """Gaussian; `axes` are the sizes by logical axis."""
        shape = (self.num_layers, *axes.values())
        return normal(self.rngs, shape, std, self.dtype, ("layers", *axes))

    def residual(self, **axes: int) -> nnx.Param:
        """`normal`, for what is added to the residual stream: twice by each layer.

        The smaller deviation keeps the stream's variance from growing with depth.
        """
        return self.normal(INIT_STD / math.sqrt(2 * self.depth), **axes)

    def filled(self, value: float, logical_axes: Sequence[str | None], *shape: int) -> nnx.Param:
        full = jnp.full((self.num_layers, *shape), value, self.dtype)
        return nnx.Param(full, logical_axes=("layers", *logical_axes))


def normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    std: float,
    dtype: jnp.dtype,
    logical_axes: tuple[str, ...],
) -> nnx.Param:
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=logical_axes)


def matrix_axes(logical_axes: Sequence[str | None]) -> tuple[int, int] | None:
    """How many axes of a parameter count matrices, and how many more are a matrix's inputs.

    None for what is no matrix of the layers, and for routers. The stream ('embed', of experts
    'expert_embed'), or the rank of an adapter, is one side of every matrix.
    """
    leading = sum(axis in ("layers", "expert", "gate_up") for axis in logical_axes)
    inner = logical_axes[leading:]
    if "layers" not in logical_axes or "router" in inner or len(inner) < 2:
        return None
    sides = ("embed", "expert_embed", "rank")
    if inner[0] in sides:
        return leading, 1
    return (leading, len(inner) - 1) if inner[-1] in sides else None


def project(x: jax.Array, w: jax.Array) -> jax.Array:
    """x (b, t, inputs...) times w (inputs..., outputs...), as one product of two matrices.

    The same as an einsum, but the gradient of w contracts over one merged token axis: with b and t
    apart, XLA's CPU backend takes three times as long for it.
    """
    num_inputs = x.ndim - 2
    inputs, outputs = w.shape[:num_inputs], w.shape[num_inputs:]
    x_nx = merge_tokens(x.reshape(*x.shape[:2], -1))
    product = x_nx @ w.reshape(math.prod(inputs), -1)
    return split_tokens(product, x.shape[:2]).reshape(*x.shape[:2], *outputs)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (scale + offset) over scale's axes, in float32, in x's dtype (1910.07467)."""
    x_f32, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=axes, keepdims=True) + eps)
    scale_f32 = scale.astype(jnp.float32) + offset if offset else scale.astype(jnp.float32)
    return (x_f32 * inverse_rms * scale_f32).astype(x.dtype)
