"""The one decoder: Qwen2, Qwen3 and Llama 3 differ only by facts in ModelConfig.

Shape suffixes, used in the whole project:
  b batch          t query position   s key position     d model width    n query heads
  k kv heads       h head width       f ffn width        v vocabulary     l layers

All layers live in one `Block` whose parameters have a leading 'layers' axis; the forward pass scans
over it, so compile time does not grow with depth. Parameters keep `param_dtype` (float32 masters)
and are cast to `dtype` where they are used; norms, rotary embeddings and softmax run in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base.sharding import constrain, in_device_memory
from distill.kernels.attention import RESIDUALS, attention
from distill.models.facts import ModelConfig
from distill.models.quantization import dequantize

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    ),
}

_INIT_STD = 0.02


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, float32, one per pair of head channels."""

    cos_bth: jax.Array
    sin_bth: jax.Array


class Block(nnx.Module):
    """All decoder layers at once: attention and gated feed-forward, each behind an RMSNorm.

    Constructed with stacked parameters; the methods are called on a copy that holds one layer's.
    """

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = dtype
        layers, d, f = config.num_layers, config.model_width, config.ffn_width
        n, k, h = config.num_heads, config.num_kv_heads, config.head_width
        # Each layer adds two terms to the residual stream; this keeps its variance from growing.
        residual_std = _INIT_STD / math.sqrt(2 * layers)

        def normal(std: float, **axes: int) -> nnx.Param:
            shape = (layers, *axes.values())
            return _normal(rngs, shape, std, param_dtype, ("layers", *axes))

        def filled(value: float, axis_names: tuple[str | None, ...], *shape: int) -> nnx.Param:
            full = jnp.full((layers, *shape), value, param_dtype)
            return nnx.Param(full, logical_axes=("layers", *axis_names))

        self.attention_norm = filled(1.0, (None,), d)
        self.q_proj = normal(_INIT_STD, embed=d, heads=n, head_width=h)
        self.k_proj = normal(_INIT_STD, embed=d, kv_heads=k, head_width=h)
        self.v_proj = normal(_INIT_STD, embed=d, kv_heads=k, head_width=h)
        self.o_proj = normal(residual_std, heads=n, head_width=h, embed=d)
        if config.qkv_bias:
            self.q_bias = filled(0.0, ("heads", "head_width"), n, h)
            self.k_bias = filled(0.0, ("kv_heads", "head_width"), k, h)
            self.v_bias = filled(0.0, ("kv_heads", "head_width"), k, h)
        if config.qk_norm:
            self.q_norm = filled(1.0, (None,), h)
            self.k_norm = filled(1.0, (None,), h)
        self.ffn_norm = filled(1.0, (None,), d)
        self.gate_proj = normal(_INIT_STD, embed=d, ffn=f)
        self.up_proj = normal(_INIT_STD, embed=d, ffn=f)
        self.down_proj = normal(residual_std, ffn=f, embed=d)

    def __call__(
        self, x_btd: jax.Array, rotation: Rotation, segment_ids_bt: jax.Array | None
    ) -> jax.Array:
        """One layer of the training form."""
        heads = self.query_key_value(x_btd, rotation)
        return self.finish(x_btd, attention(*heads, self.config.attention, segment_ids_bt))

    def query_key_value(
        self, x_btd: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalised, projected and rotated inputs of attention."""
        x_btd = rms_norm(x_btd, self.attention_norm[...], self.config.rms_eps)
        q_btnh = _project(x_btd, self._cast(self.q_proj))
        k_btkh = _project(x_btd, self._cast(self.k_proj))
        v_btkh = _project(x_btd, self._cast(self.v_proj))
        if self.config.qkv_bias:
            q_btnh = q_btnh + self._cast(self.q_bias)
            k_btkh = k_btkh + self._cast(self.k_bias)
            v_btkh = v_btkh + self._cast(self.v_bias)
        if self.config.qk_norm:
            q_btnh = rms_norm(q_btnh, self.q_norm[...], self.config.rms_eps)
            k_btkh = rms_norm(k_btkh, self.k_norm[...], self.config.rms_eps)
        return (
            constrain(rotate(q_btnh, rotation), "batch", "position", "act_heads", None),
            constrain(rotate(k_btkh, rotation), "batch", "position", "act_kv_heads", None),
            constrain(v_btkh, "batch", "position", "act_kv_heads", None),
        )

    def finish(self, x_btd: jax.Array, attended_btnh: jax.Array) -> jax.Array:
        """Adds the attention output and then the feed-forward output to the residual stream."""
        x_btd = x_btd + _project(attended_btnh, self._cast(self.o_proj))
        x_btd = _constrain_residual(x_btd)
        y_btd = rms_norm(x_btd, self.ffn_norm[...], self.config.rms_eps)
        gate_btf = _project(y_btd, self._cast(self.gate_proj))
        up_btf = _project(y_btd, self._cast(self.up_proj))
        gated_btf = constrain(jax.nn.silu(gate_btf) * up_btf, "batch", "position", "act_ffn")
        x_btd = x_btd + _project(gated_btf, self._cast(self.down_proj))
        return _constrain_residual(x_btd)

    def _cast(self, param: nnx.Param) -> jax.Array:
        return dequantize(in_device_memory(param.get_value()), self.dtype)


class Transformer(nnx.Module):
    """Decoder-only language model.

    Args:
      config: sizes and variants.
      dtype: what activations and the cache are computed in.
      param_dtype: what parameters are stored in.
      remat: what the backward pass recomputes: 'none', 'full' (each layer from its input) or
        'dots' (all but the matrix products and, without cuDNN, attention).
      rngs: source of the initial parameters.

    Raises:
      ValueError: unknown `remat`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat={remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        d, v = config.model_width, config.vocab_size
        self.embedding = _normal(rngs, (v, d), _INIT_STD, param_dtype, ("vocab", "embed"))
        self.layers = Block(config, self.dtype, param_dtype, rngs)
        self.final_norm = nnx.Param(jnp.ones(d, param_dtype), logical_axes=(None,))
        if not config.tied:
            self.output_head = _normal(rngs, (d, v), _INIT_STD, param_dtype, ("embed", "vocab"))

    def __call__(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array | None = None,
        segment_ids_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, hidden_btd in `dtype`.

        Args:
          tokens_bt: token ids.
          positions_bt: rotary positions; default 0, 1, 2, ... in every row.
          segment_ids_bt: a token attends to tokens of its own segment at its own index or before.
            Default: every row is one segment; padding behind its end then changes nothing before.
        """
        batch, length = tokens_bt.shape
        if positions_bt is None:
            positions_bt = jnp.broadcast_to(jnp.arange(length), (batch, length))
        rotation = make_rotation(self.config, positions_bt)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x_btd, layer_state):
            return nnx.merge(graphdef, layer_state)(x_btd, rotation, segment_ids_bt), None

        if self.remat != "none":
            # Inside scan nothing can be merged across iterations, so no barrier is needed.
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x_btd, _ = jax.lax.scan(layer, self.embed(tokens_bt), stacked)
        return self.normalize(x_btd)

    def head(self) -> jax.Array:
        """The output head w_dv in `dtype`; the transposed embedding when tied."""
        w_dv = self.embedding[...].T if self.config.tied else self.output_head[...]
        return w_dv.astype(self.dtype)

    def logits(self, hidden_btd: jax.Array, w_dv: jax.Array | None = None) -> jax.Array:
        """Scores of the next token, logits_btv in float32; `w_dv` is `head()` if not given."""
        w_dv = self.head() if w_dv is None else w_dv
        logits_btv = jnp.einsum("btd,dv->btv", hidden_btd, w_dv, preferred_element_type=jnp.float32)
        return constrain(logits_btv, "batch", "position", "act_vocab")

    def embed(self, tokens_bt: jax.Array) -> jax.Array:
        """The residual stream before the first layer, x_btd in `dtype`."""
        # Tokens are sharded by what may also shard the table's width, so gather the width first.
        table_vd = constrain(self.embedding[...], "vocab", None)
        tokens_bt = constrain(tokens_bt, "batch", "position")
        # Cast after the lookup: its gradient adds up many tokens, which bfloat16 would lose.
        return _constrain_residual(jnp.take(table_vd, tokens_bt, axis=0).astype(self.dtype))

    def normalize(self, x_btd: jax.Array) -> jax.Array:
        """Hidden states from the residual stream after the last layer."""
        return rms_norm(x_btd, self.final_norm[...], self.config.rms_eps)


def _project(x: jax.Array, w: jax.Array) -> jax.Array:
    """x (b, t, inputs...) times w (inputs..., outputs...), as one product of two matrices.

    The same as an einsum, but the gradient of w contracts over one merged token axis: with b and t
    apart, XLA's CPU backend takes three times as long for it.
    """
    num_inputs = x.ndim - 2
    inputs, outputs = w.shape[:num_inputs], w.shape[num_inputs:]
    product = x.reshape(-1, math.prod(inputs)) @ w.reshape(math.prod(inputs), -1)
    return product.reshape(*x.shape[:2], *outputs)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype (1910.07467)."""
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(x_btnh: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotary embedding of queries or keys; channel i is paired with i + h/2 (2104.09864)."""
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation.cos_bth[:, :, None], rotation.sin_bth[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each channel pair, float32, shape (head_width / 2,).

    Llama 3.1 slows a pair down by `factor` if it turns less than low_freq_factor times in the
    original context, not at all above high_freq_factor turns, and interpolates linearly between
    (transformers, modeling_rope_utils._compute_llama3_parameters).
    """
    exponents = np.arange(0, config.head_width, 2) / config.head_width
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_positions * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


def make_rotation(config: ModelConfig, positions_bt: jax.Array) -> Rotation:
    """Rotary angles of the given positions."""
    angles_bth = positions_bt[:, :, None].astype(jnp.float32) * rope_frequencies(config)
    return Rotation(cos_bth=jnp.cos(angles_bth), sin_bth=jnp.sin(angles_bth))


def _normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    std: float,
    dtype: jnp.dtype,
    logical_axes: tuple[str, ...],
) -> nnx.Param:
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=logical_axes)


def _constrain_residual(x_btd: jax.Array) -> jax.Array:
    return constrain(x_btd, "batch", "position", "act_embed")
