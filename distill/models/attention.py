"""Self-attention of a layer: its parameters, and what comes before and after the scores.

Scores, masks and sums are `kernels.attention`'s in training and prefill, `decoding`'s after that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import constrain
from distill.models.facts import LayerKind, ModelConfig
from distill.models.primitives import INIT_STD, Layer, ParamMaker
from distill.models.rope import Rotary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, float32, one per pair of rotated channels."""

    cos_bth: jax.Array
    sin_bth: jax.Array
    interleaved: bool = field(metadata={"static": True})


def parameters(config: ModelConfig, kind: LayerKind, make: ParamMaker) -> dict[str, nnx.Param]:
    """Parameters of the layers of a kind by name."""
    d, h = config.model_width, kind.head_width
    n, k = config.num_heads, kind.num_kv_heads
    params = {
        # The gate's channels of a head lie behind its query's.
        "q_proj": make.normal(INIT_STD, embed=d, heads=n, head_width=h * (1 + config.output_gate)),
        "k_proj": make.normal(INIT_STD, embed=d, kv_heads=k, head_width=h),
        "v_proj": make.normal(INIT_STD, embed=d, kv_heads=k, head_width=h),
        "o_proj": make.residual(heads=n, head_width=h, embed=d),
    }
    if config.qkv_bias:
        params["q_bias"] = make.filled(0.0, ("heads", "head_width"), n, h)
        params["k_bias"] = make.filled(0.0, ("kv_heads", "head_width"), k, h)
        params["v_bias"] = make.filled(0.0, ("kv_heads", "head_width"), k, h)
    if config.o_bias:
        params["o_bias"] = make.filled(0.0, (None,), d)
    if config.qk_norm == "head":
        params["q_norm"] = make.filled(1.0 - config.norm_offset, (None,), h)
        params["k_norm"] = make.filled(1.0 - config.norm_offset, (None,), h)
    elif config.qk_norm == "all":
        axes = ("heads", "head_width"), ("kv_heads", "head_width")
        params["q_norm"] = make.filled(1.0 - config.norm_offset, axes[0], n, h)
        params["k_norm"] = make.filled(1.0 - config.norm_offset, axes[1], k, h)
    if config.sinks:
        params["sinks"] = make.filled(0.0, ("heads",), n)
    return params


def query_key_value(
    layer: Layer, x_btd: jax.Array, rotation: Rotation | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Projected, normalised and rotated inputs of the scores; no rotation leaves them.

    Last comes gate_btnh, which `output` takes, where the model has one.
    """
    config, gate_btnh = layer.config, None
    q_btnh = layer.project("q_proj", x_btd)
    if config.output_gate:
        q_btnh, gate_btnh = jnp.split(q_btnh, 2, axis=-1)
    k_btkh = layer.project("k_proj", x_btd)
    v_btkh = layer.project("v_proj", x_btd)
    if config.qkv_bias:
        q_btnh = q_btnh + layer.weight("q_bias")
        k_btkh = k_btkh + layer.weight("k_bias")
        v_btkh = v_btkh + layer.weight("v_bias")
    if config.qk_norm:
        q_btnh = layer.normalize("q_norm", q_btnh)
        k_btkh = layer.normalize("k_norm", k_btkh)
    return (
        constrain(rotate(q_btnh, rotation), "batch", "position", "act_heads", None),
        constrain(rotate(k_btkh, rotation), "batch", "position", "act_kv_heads", None),
        constrain(v_btkh, "batch", "position", "act_kv_heads", None),
        gate_btnh,
    )


def output(layer: Layer, attended_btnh: jax.Array, gate_btnh: jax.Array | None) -> jax.Array:
    """What attention adds to the residual stream, before any norm or scale."""
    if gate_btnh is not None:
        attended_btnh = attended_btnh * jax.nn.sigmoid(gate_btnh)
    out_btd = layer.project("o_proj", attended_btnh)
    return out_btd + layer.weight("o_bias") if layer.config.o_bias else out_btd


def rotate(x_btnh: jax.Array, rotation: Rotation | None) -> jax.Array:
    """Rotary embedding of queries or keys; channels of a head that have no angle stay."""
    if rotation is None:
        return x_btnh
    width = 2 * rotation.cos_bth.shape[-1]
    rest = [] if width == x_btnh.shape[-1] else [x_btnh[..., width:].astype(jnp.float32)]
    rotated_btnh = x_btnh[..., :width].astype(jnp.float32)
    cos, sin = rotation.cos_bth[:, :, None], rotation.sin_bth[:, :, None]
    if rotation.interleaved:
        first, second = rotated_btnh[..., ::2], rotated_btnh[..., 1::2]
    else:
        first, second = jnp.split(rotated_btnh, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if rotation.interleaved:
        rotated = [jnp.stack(rotated, axis=-1).reshape(rotated_btnh.shape)]
    return jnp.concatenate(rotated + rest, axis=-1).astype(x_btnh.dtype)


def make_rotations(config: ModelConfig, positions_bt: jax.Array) -> dict[str, Rotation | None]:
    """Rotary angles of the given positions, for each kind of layer."""
    positions_bt1 = positions_bt[:, :, None].astype(jnp.float32)

    def make(rotary: Rotary) -> Rotation:
        frequencies_h, factor = rotary.frequencies()
        angles_bth = positions_bt1 * frequencies_h
        cos_bth, sin_bth = (turn(angles_bth) * factor for turn in (jnp.cos, jnp.sin))
        return Rotation(cos_bth, sin_bth, rotary.interleaved)

    rotaries = {name: kind.rotary for name, kind in config.kinds.items()}
    made = {rotary: None if rotary is None else make(rotary) for rotary in rotaries.values()}
    return {name: made[rotary] for name, rotary in rotaries.items()}
