"""A recurrent layer's mixer: a short convolution, the gated delta rule, a gated norm (2412.06464).

What it remembers of a row is a state of one size, whatever the row's length, and its last inputs.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import constrain
from distill.kernels.recurrent import (
    causal_convolution,
    convolution_step,
    delta_rule_step,
    gated_delta_rule,
)
from distill.models.facts import ModelConfig, Recurrent
from distill.models.primitives import INIT_STD, Layer, ParamMaker, rms_norm

# state_bjxy, and the convolution's last inputs, tail_bwz.
Remembered = tuple[jax.Array, jax.Array]


def parameters(config: ModelConfig, sizes: Recurrent, make: ParamMaker) -> dict[str, nnx.Param]:
    """Parameters of the layers of a kind by name."""
    d, j, y, z = config.model_width, sizes.value_heads, sizes.value_width, sizes.channels
    if sizes.joined:
        key_heads = dict(embed=d, state_heads=sizes.key_heads)
        params = {
            "qkvz_proj": make.normal(INIT_STD, **key_heads, head_width=sum(_joined_widths(sizes))),
            "ba_proj": make.normal(INIT_STD, **key_heads, head_width=2 * j // sizes.key_heads),
        }
    else:
        params = {
            "qkv_proj": make.normal(INIT_STD, embed=d, state_channels=z),
            "z_proj": make.normal(INIT_STD, embed=d, state_heads=j, head_width=y),
            "b_proj": make.normal(INIT_STD, embed=d, state_heads=j),
            "a_proj": make.normal(INIT_STD, embed=d, state_heads=j),
        }
    # Names that end in 'bias' and 'norm' are those that weight decay leaves alone.
    return params | {
        "taps": make.filled(1 / sizes.taps, (None, None, None), z, 1, sizes.taps),
        "step_bias": make.filled(1.0, (None,), j),
        "decay_bias": make.filled(0.0, (None,), j),
        "state_norm": make.filled(1.0, (None,), y),
        "state_proj": make.residual(state_heads=j, head_width=y, embed=d),
    }


def output(
    layer: Layer,
    x_btd: jax.Array,
    segment_ids_bt: jax.Array | None = None,
    lengths_b: jax.Array | None = None,
) -> tuple[jax.Array, Remembered]:
    """What the layer adds to the residual stream, and what it remembers after lengths_b tokens."""
    inputs_btz, gate_btjy, rate_btj, log_decay_btj = _inputs(layer, x_btd)
    length, size = x_btd.shape[1], _sizes(layer).taps - 1
    if lengths_b is None:
        tail_bwz = inputs_btz[:, :0]  # of use to nobody
    else:
        # Padding behind a row's end changes no state.
        valid_bt1 = (jnp.arange(length) < lengths_b[:, None])[..., None]
        rate_btj, log_decay_btj = (x * valid_bt1 for x in (rate_btj, log_decay_btj))
        index_bw1 = (lengths_b[:, None] + jnp.arange(size))[..., None]
        wide_btz = jnp.pad(inputs_btz, ((0, 0), (size, 0), (0, 0)))
        tail_bwz = jnp.take_along_axis(wide_btz, index_bw1, axis=1)
    mixed_btz = causal_convolution(inputs_btz, _taps_zw(layer), segment_ids_bt)
    q_btix, k_btix, v_btjy = _heads(layer, mixed_btz)
    out_btjy, state_bjxy = gated_delta_rule(
        q_btix, k_btix, v_btjy, log_decay_btj, rate_btj, segment_ids_bt
    )
    return _project_out(layer, out_btjy, gate_btjy), (state_bjxy, tail_bwz)


def step(layer: Layer, x_b1d: jax.Array, remembered: Remembered) -> tuple[jax.Array, Remembered]:
    """`output` of one more token."""
    state_bjxy, tail_bwz = remembered
    inputs_b1z, gate_b1jy, rate_b1j, log_decay_b1j = _inputs(layer, x_b1d)
    mixed_bz, tail_bwz = convolution_step(inputs_b1z[:, 0], _taps_zw(layer), tail_bwz)
    q_bix, k_bix, v_bjy = (x[:, 0] for x in _heads(layer, mixed_bz[:, None]))
    out_bjy, state_bjxy = delta_rule_step(
        q_bix, k_bix, v_bjy, log_decay_b1j[:, 0], rate_b1j[:, 0], state_bjxy
    )
    return _project_out(layer, out_bjy[:, None], gate_b1jy), (state_bjxy, tail_bwz)


def _sizes(layer: Layer) -> Recurrent:
    assert layer.kind.recurrent is not None  # else it has attention
    return layer.kind.recurrent


def _inputs(layer: Layer, x_btd: jax.Array) -> tuple[jax.Array, ...]:
    """inputs_btz of the convolution, gate_btjy, and in float32 rate_btj and log_decay_btj."""
    inputs_btz, gate_btjy, b_btj, a_btj = (
        _split_joined(layer, x_btd)
        if _sizes(layer).joined
        else (layer.project(f"{name}_proj", x_btd) for name in ("qkv", "z", "b", "a"))
    )
    speed_btj = jax.nn.softplus(a_btj.astype(jnp.float32) + layer.exact("step_bias"))
    log_decay_btj = -jnp.exp(layer.exact("decay_bias")) * speed_btj
    return inputs_btz, gate_btjy, jax.nn.sigmoid(b_btj.astype(jnp.float32)), log_decay_btj


def _joined_widths(sizes: Recurrent) -> tuple[int, ...]:
    """What the joined projection gives for a key head: its query, key, values and their gates."""
    values = sizes.value_heads // sizes.key_heads * sizes.value_width
    return sizes.key_width, sizes.key_width, values, values


def _split_joined(layer: Layer, x_btd: jax.Array) -> tuple[jax.Array, ...]:
    """inputs_btz, gate_btjy, b_btj and a_btj."""
    sizes, rows = _sizes(layer), x_btd.shape[:2]
    ends = list(itertools.accumulate(_joined_widths(sizes)))[:-1]
    *parts, z_btio = jnp.split(layer.project("qkvz_proj", x_btd), ends, axis=-1)
    inputs_btz = jnp.concatenate([part.reshape(*rows, -1) for part in parts], axis=-1)
    b_btj, a_btj = (x.reshape(*rows, -1) for x in jnp.split(layer.project("ba_proj", x_btd), 2, -1))
    return inputs_btz, z_btio.reshape(*rows, sizes.value_heads, -1), b_btj, a_btj


def _taps_zw(layer: Layer) -> jax.Array:
    return layer.weight("taps")[:, 0]


def _heads(layer: Layer, mixed_btz: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_btix, k_btix and v_btjy."""
    sizes = _sizes(layer)
    width = sizes.key_heads * sizes.key_width

    def cut(x_btz: jax.Array, heads: int) -> jax.Array:
        x_btnh = x_btz.reshape(*x_btz.shape[:2], heads, -1)
        return constrain(x_btnh, "batch", "position", "act_heads", None)

    q_btz, k_btz, v_btz = jnp.split(mixed_btz, [width, 2 * width], axis=-1)
    return cut(q_btz, sizes.key_heads), cut(k_btz, sizes.key_heads), cut(v_btz, sizes.value_heads)


def _project_out(layer: Layer, out_btjy: jax.Array, gate_btjy: jax.Array) -> jax.Array:
    normed_btjy = rms_norm(
        out_btjy.astype(jnp.float32), layer.exact("state_norm"), layer.config.rms_eps
    )
    gated_btjy = normed_btjy * jax.nn.silu(gate_btjy.astype(jnp.float32))
    return layer.project("state_proj", gated_btjy.astype(out_btjy.dtype))
