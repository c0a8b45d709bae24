"""Which Hugging Face key holds which parameter, and in which layout: one table for all families."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx

from distill.models.facts import ModelConfig
from distill.models.families import FAMILIES


class Weight(NamedTuple):
    """One row of a key table.

    Attributes:
      path: our parameter, as in the nnx State.
      key: the Hugging Face key; '{layer}' and '{expert}' count through the leading axes of a
        stacked parameter, in this order, and '{gate|up}' names the entries of such an axis.
      axes: 'ours -> theirs' for one of its tensors, a letter per axis (the shape suffixes of
        transformer.py); letters written together are merged into one axis there.
      layers: numbers of the layers that a stack of one kind's layers holds; (): of all.
      parts: paths of the parameters that lie in each tensor, one behind the other along its first
        axis, where it has several.
    """

    path: str
    key: str
    axes: str
    layers: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def stacked(self) -> tuple[str, ...]:
        """What the parameter's leading axes count."""
        return tuple(re.findall(r"{([\w|]+)}", self.key))

    @property
    def ours(self) -> str:
        return self.axes.partition(" -> ")[0]

    @property
    def theirs(self) -> list[str]:
        """Their axes, each as the letters of ours that are merged into it."""
        return self.axes.partition(" -> ")[2].split()

    def tensors(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index and key of every tensor that a parameter of this shape is made of."""
        for index in itertools.product(*map(range, shape[: len(self.stacked)])):
            counted: dict[str, int | str] = {}
            for name, i in zip(self.stacked, index, strict=True):
                counted[name] = name.split("|")[i] if "|" in name else i
                if name == "layer" and self.layers:
                    counted[name] = self.layers[i]
            yield index, self.key.format(**counted)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of one tensor, from ours of it."""
        size = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(size[axis] for axis in group) for group in self.theirs)


_BLOCK = "model.layers.{layer}."
_EXPERT = _BLOCK + "mlp.experts.{expert}."
_STATE = _BLOCK + "linear_attn."
_MODEL = (
    Weight("embedding", "model.embed_tokens.weight", "vd -> v d"),
    Weight("layers/attention_norm", _BLOCK + "input_layernorm.weight", "d -> d"),
    Weight("layers/ffn_norm", _BLOCK + "post_attention_layernorm.weight", "d -> d"),
    Weight("final_norm", "model.norm.weight", "d -> d"),
    Weight("output_head", "lm_head.weight", "dv -> v d"),
)
_ATTENTION = (
    Weight("layers/q_proj", _BLOCK + "self_attn.q_proj.weight", "dnh -> nh d"),
    Weight("layers/k_proj", _BLOCK + "self_attn.k_proj.weight", "dkh -> kh d"),
    Weight("layers/v_proj", _BLOCK + "self_attn.v_proj.weight", "dkh -> kh d"),
    Weight("layers/o_proj", _BLOCK + "self_attn.o_proj.weight", "nhd -> d nh"),
    Weight("layers/q_bias", _BLOCK + "self_attn.q_proj.bias", "nh -> nh"),
    Weight("layers/k_bias", _BLOCK + "self_attn.k_proj.bias", "kh -> kh"),
    Weight("layers/v_bias", _BLOCK + "self_attn.v_proj.bias", "kh -> kh"),
    Weight("layers/o_bias", _BLOCK + "self_attn.o_proj.bias", "d -> d"),
    Weight("layers/q_norm", _BLOCK + "self_attn.q_norm.weight", "h -> h"),
    Weight("layers/k_norm", _BLOCK + "self_attn.k_norm.weight", "h -> h"),
    Weight("layers/sinks", _BLOCK + "self_attn.sinks", "n -> n"),
)
_RECURRENCE = (
    Weight("layers/taps", _STATE + "conv1d.weight", "zow -> z o w"),
    Weight("layers/step_bias", _STATE + "dt_bias", "j -> j"),
    Weight("layers/decay_bias", _STATE + "A_log", "j -> j"),
    Weight("layers/state_norm", _STATE + "norm.weight", "y -> y"),
    Weight("layers/state_proj", _STATE + "out_proj.weight", "jyd -> d jy"),
    Weight("layers/qkv_proj", _STATE + "in_proj_qkv.weight", "dz -> z d"),
    Weight("layers/z_proj", _STATE + "in_proj_z.weight", "djy -> jy d"),
    Weight("layers/b_proj", _STATE + "in_proj_b.weight", "dj -> j d"),
    Weight("layers/a_proj", _STATE + "in_proj_a.weight", "dj -> j d"),
    Weight("layers/qkvz_proj", _STATE + "in_proj_qkvz.weight", "dio -> io d"),
    Weight("layers/ba_proj", _STATE + "in_proj_ba.weight", "dio -> io d"),
)
_FEED_FORWARD = (
    Weight("layers/gate_proj", _BLOCK + "mlp.gate_proj.weight", "df -> f d"),
    Weight("layers/up_proj", _BLOCK + "mlp.up_proj.weight", "df -> f d"),
    Weight("layers/down_proj", _BLOCK + "mlp.down_proj.weight", "fd -> d f"),
    Weight("layers/gate_bias", _BLOCK + "mlp.gate_proj.bias", "f -> f"),
    Weight("layers/up_bias", _BLOCK + "mlp.up_proj.bias", "f -> f"),
    Weight("layers/down_bias", _BLOCK + "mlp.down_proj.bias", "d -> d"),
)
_EXPERTS = (
    Weight("layers/router", _BLOCK + "mlp.gate.weight", "de -> e d"),
    Weight("layers/router_correction", _BLOCK + "mlp.gate.e_score_correction_bias", "e -> e"),
    Weight("layers/expert_gate_up_proj", _EXPERT + "{gate|up}_proj.weight", "df -> f d"),
    Weight("layers/expert_down_proj", _EXPERT + "down_proj.weight", "fd -> d f"),
    Weight("layers/shared_gate_proj", _BLOCK + "mlp.shared_expert.gate_proj.weight", "df -> f d"),
    Weight("layers/shared_up_proj", _BLOCK + "mlp.shared_expert.up_proj.weight", "df -> f d"),
    Weight("layers/shared_down_proj", _BLOCK + "mlp.shared_expert.down_proj.weight", "fd -> d f"),
    Weight("layers/shared_gate", _BLOCK + "mlp.shared_expert_gate.weight", "de -> e d"),
)
# Where there is a norm behind attention, it has the key that the feed-forward's has elsewhere.
_NORMS_AFTER = (
    Weight("layers/ffn_norm", _BLOCK + "pre_feedforward_layernorm.weight", "d -> d"),
    Weight("layers/attention_out_norm", _BLOCK + "post_attention_layernorm.weight", "d -> d"),
    Weight("layers/ffn_out_norm", _BLOCK + "post_feedforward_layernorm.weight", "d -> d"),
)
_NORMS_OVER_HEADS = (
    Weight("layers/q_norm", _BLOCK + "self_attn.q_norm.weight", "nh -> nh"),
    Weight("layers/k_norm", _BLOCK + "self_attn.k_norm.weight", "kh -> kh"),
)


def key_table(config: ModelConfig) -> dict[str, Weight]:
    """The rows by path, also of parameters that a model lacks: see `mapped_params`."""
    all_rows = (*_MODEL, *_ATTENTION, *_RECURRENCE, *_FEED_FORWARD, *_EXPERTS)
    rows = {weight.path: weight for weight in all_rows}
    if config.norms != "before":
        rows |= {weight.path: weight for weight in _NORMS_AFTER}
    if config.qk_norm == "all":
        rows |= {weight.path: weight for weight in _NORMS_OVER_HEADS}
    for path, theirs in FAMILIES[config.family].keys.items():
        key, axes = (theirs, rows[path].axes) if isinstance(theirs, str) else theirs
        rows[path] = Weight(path, key, axes)
    for key, parts in FAMILIES[config.family].fused.items():
        rows |= {path: rows[path]._replace(key=key, parts=parts) for path in parts}
    table = {path: row for path, row in rows.items() if "layer" not in row.stacked}
    in_layers = [row for path, row in rows.items() if path not in table]
    for kind in config.kinds:
        layers = tuple(i for i, other in enumerate(config.layers) if other == kind)
        own = in_layers
        if len(config.kinds) > 1:
            own = [_moved(row, f"layers/{kind}/", layers) for row in in_layers]
        table |= {row.path: row for row in own}
    return table


def _moved(row: Weight, prefix: str, layers: tuple[int, ...]) -> Weight:
    """The row for the stack of one kind's layers."""
    path, *parts = (each.replace("layers/", prefix, 1) for each in (row.path, *row.parts))
    return row._replace(path=path, parts=tuple(parts), layers=layers)


def mapped_params(config: ModelConfig, params: nnx.State) -> dict[str, tuple[Weight, Any]]:
    """The row and the value of each parameter, by path.

    Raises:
      ValueError: a parameter has no row, or not each of a tensor's has the tensor's key.
    """
    values = {
        "/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(params)
    }
    table = key_table(config)
    if odd := sorted(values.keys() - table.keys()):
        raise ValueError(
            f"{config.family}: no Hugging Face key is known for {odd[0]}: see the key table"
        )
    mapped = {path: (row, values[path]) for path, row in table.items() if path in values}
    paths: dict[tuple[str, tuple[int, ...]], list[str]] = collections.defaultdict(list)
    for path, (row, _) in mapped.items():
        paths[row.key, row.layers].append(path)
    for row, _ in mapped.values():
        if sorted(paths[row.key, row.layers]) != sorted(row.parts or (row.path,)):
            raise ValueError(f"{config.family}: more than one parameter is mapped to {row.key}")
    return mapped


def fused_rows(mapped: dict[str, tuple[Weight, Any]], path: str) -> tuple[int, int]:
    """The first row of a parameter in its tensors, and how many these have of all parameters."""
    sizes, (weight, _) = {}, mapped[path]
    for part in weight.parts or (path,):
        each, array = mapped[part]
        sizes[part] = each.hf_shape(array.shape[len(each.stacked) :])[0]
    before = list(sizes).index(path)
    return sum(list(sizes.values())[:before]), sum(sizes.values())
