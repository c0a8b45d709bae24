"""The feed-forward of a layer: a gated MLP (GLU variants, 2002.05202)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx

from distill.base.sharding import constrain
from distill.models.facts import ModelConfig
from distill.models.primitives import INIT_STD, Layer, ParamMaker

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def parameters(config: ModelConfig, make: ParamMaker) -> dict[str, nnx.Param]:
    """All layers' parameters by name."""
    d, f = config.model_width, config.ffn_width
    params = {
        "gate_proj": make.normal(INIT_STD, embed=d, ffn=f),
        "up_proj": make.normal(INIT_STD, embed=d, ffn=f),
        "down_proj": make.residual(ffn=f, embed=d),
    }
    if config.mlp_bias:
        params["gate_bias"] = make.filled(0.0, ("ffn",), f)
        params["up_bias"] = make.filled(0.0, ("ffn",), f)
        params["down_bias"] = make.filled(0.0, (None,), d)
    return params


def output(layer: Layer, x_btd: jax.Array) -> jax.Array:
    """What the feed-forward adds to the residual stream, before any norm or scale."""
    gate_btf = _project(layer, "gate", x_btd)
    up_btf = _project(layer, "up", x_btd)
    gated_btf = ACTIVATIONS[layer.config.activation](gate_btf) * up_btf
    return _project(layer, "down", constrain(gated_btf, "batch", "position", "act_ffn"))


def _project(layer: Layer, name: str, x: jax.Array) -> jax.Array:
    projected = layer.project(f"{name}_proj", x)
    return projected + layer.weight(f"{name}_bias") if layer.config.mlp_bias else projected
