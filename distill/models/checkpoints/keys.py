"""Which Hugging Face key holds which parameter, and in which layout: one table per family."""

from __future__ import annotations

import math
from typing import NamedTuple

from distill.models.facts import ModelConfig


class Weight(NamedTuple):
    """One row of a key table.

    Attributes:
      path: our parameter, as in the nnx State.
      key: the Hugging Face key; '{layer}' counts through the leading axis of a stacked parameter.
      axes: 'ours -> theirs' for one layer, a letter per axis (the shape suffixes of
        transformer.py); letters written together are merged into one axis there.
    """

    path: str
    key: str
    axes: str

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.key

    @property
    def ours(self) -> str:
        return self.axes.partition(" -> ")[0]

    @property
    def theirs(self) -> list[str]:
        """Their axes, each as the letters of ours that are merged into it."""
        return self.axes.partition(" -> ")[2].split()

    def keys(self, num_layers: int) -> list[str]:
        return [self.key.format(layer=i) for i in range(num_layers if self.stacked else 1)]

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of one layer, from ours."""
        size = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(size[axis] for axis in group) for group in self.theirs)


_BLOCK = "model.layers.{layer}."
_LLAMA = (
    Weight("embedding", "model.embed_tokens.weight", "vd -> v d"),
    Weight("layers/attention_norm", _BLOCK + "input_layernorm.weight", "d -> d"),
    Weight("layers/q_proj", _BLOCK + "self_attn.q_proj.weight", "dnh -> nh d"),
    Weight("layers/k_proj", _BLOCK + "self_attn.k_proj.weight", "dkh -> kh d"),
    Weight("layers/v_proj", _BLOCK + "self_attn.v_proj.weight", "dkh -> kh d"),
    Weight("layers/o_proj", _BLOCK + "self_attn.o_proj.weight", "nhd -> d nh"),
    Weight("layers/ffn_norm", _BLOCK + "post_attention_layernorm.weight", "d -> d"),
    Weight("layers/gate_proj", _BLOCK + "mlp.gate_proj.weight", "df -> f d"),
    Weight("layers/up_proj", _BLOCK + "mlp.up_proj.weight", "df -> f d"),
    Weight("layers/down_proj", _BLOCK + "mlp.down_proj.weight", "fd -> d f"),
    Weight("final_norm", "model.norm.weight", "d -> d"),
    Weight("output_head", "lm_head.weight", "dv -> v d"),
)
_QWEN2 = (
    *_LLAMA,
    Weight("layers/q_bias", _BLOCK + "self_attn.q_proj.bias", "nh -> nh"),
    Weight("layers/k_bias", _BLOCK + "self_attn.k_proj.bias", "kh -> kh"),
    Weight("layers/v_bias", _BLOCK + "self_attn.v_proj.bias", "kh -> kh"),
)
_QWEN3 = (
    *_LLAMA,
    Weight("layers/q_norm", _BLOCK + "self_attn.q_norm.weight", "h -> h"),
    Weight("layers/k_norm", _BLOCK + "self_attn.k_norm.weight", "h -> h"),
)
_TABLES = {"llama": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}


def key_table(config: ModelConfig) -> dict[str, Weight]:
    """The rows of this model's family, by the path of our parameter."""
    rows = {weight.path: weight for weight in _TABLES[config.family]}
    if config.tied:
        del rows["output_head"]
    return rows
