"""The feed-forward of a layer: an MLP, of nearly all families a gated one (2002.05202)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import constrain
from distill.models.facts import ModelConfig
from distill.models.primitives import INIT_STD, Layer, ParamMaker

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def parameters(config: ModelConfig, make: ParamMaker) -> dict[str, nnx.Param]:
    """All layers' parameters by name."""
    d, f = config.model_width, config.ffn_width
    params = gated_parameters(config, make, "", f)
    if not config.gated:
        del params["gate_proj"]
    if config.mlp_bias:
        params["gate_bias"] = make.filled(0.0, ("mlp",), f)
        params["up_bias"] = make.filled(0.0, ("mlp",), f)
        params["down_bias"] = make.filled(0.0, (None,), d)
    return params


def gated_parameters(
    config: ModelConfig, make: ParamMaker, prefix: str, f: int
) -> dict[str, nnx.Param]:
    """The matrices of one of width f, whose names begin with `prefix`."""
    d = config.model_width
    return {
        f"{prefix}gate_proj": make.normal(INIT_STD, embed=d, mlp=f),
        f"{prefix}up_proj": make.normal(INIT_STD, embed=d, mlp=f),
        f"{prefix}down_proj": make.residual(mlp=f, embed=d),
    }


def gated(layer: Layer, x_btd: jax.Array, prefix: str = "") -> jax.Array:
    """What the feed-forward adds to the residual stream, before any norm or scale.

    Of the matrices whose names begin with `prefix`, and their biases where they have some.
    """

    def project(name: str, x: jax.Array) -> jax.Array:
        projected = layer.project(f"{prefix}{name}_proj", x)
        bias = f"{prefix}{name}_bias"
        return projected + layer.weight(bias) if layer.has(bias) else projected

    x_btd = constrain(x_btd, "mlp_batch", "position", "act_embed")
    if layer.has(f"{prefix}gate_proj"):
        inner_btf = gate(layer.config, project("gate", x_btd), project("up", x_btd))
    else:
        inner_btf = ACTIVATIONS[layer.config.activation](project("up", x_btd))
    return project("down", constrain(inner_btf, "mlp_batch", "position", "act_mlp"))


def gate(config: ModelConfig, gate_f: jax.Array, up_f: jax.Array) -> jax.Array:
    """What the last projection takes."""
    if config.swiglu_limit is None:
        return ACTIVATIONS[config.activation](gate_f) * up_f
    gate_f = jnp.minimum(gate_f, config.swiglu_limit)
    up_f = jnp.clip(up_f, -config.swiglu_limit, config.swiglu_limit)
    return gate_f * jax.nn.sigmoid(config.swiglu_alpha * gate_f) * (up_f + 1)
