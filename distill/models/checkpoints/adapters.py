"""LoRA adapters as PEFT has them: a base model, and two factors for some of its matrices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distill.base.errors import UserError
from distill.models.checkpoints.hub import ADAPTER, read_json
from distill.models.checkpoints.tensors import Index, Tensor, Virtual, read_header

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields that change what is added to the base: with these values, or absent, they change nothing.
_ONLY: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": ((), []),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base
}


@dataclasses.dataclass(frozen=True)
class Merged(Virtual):
    """base + scale * b @ a, in float32."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def file(self) -> Path:
        return self.a.file

    def read(self, index: Index) -> np.ndarray:
        rows, columns = index
        a = self.a.read((slice(None), columns)).astype(np.float32)
        b = self.b.read((rows, slice(None))).astype(np.float32)
        return self.main.read(index).astype(np.float32) + self.scale * (b @ a)


def merge_adapter(
    folder: Path, base: dict[str, Tensor], rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """The base's tensors with an adapter's folder merged into them.

    `rename` makes the base's keys of those of the adapted model.

    Raises:
      UserError: the adapter has parts that cannot be merged, or that the base has no place for.
    """
    config = read_json(folder / ADAPTER)
    scale_of = _scales(config, folder / ADAPTER)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}: save the adapter as safetensors")
    parts: dict[str, Tensor] = {
        rename(each.key.removeprefix(PREFIX)): each for each in read_header(path)
    }
    merged = dict(base)
    for key, part in parts.items():
        name, _, factor = key.partition(".lora_")
        other = parts.get(f"{name}.lora_B.weight")
        weight = f"{name}.weight"
        if factor == "A.weight" and other is not None and weight in base:
            rank, inputs = part.shape
            if (other.shape[0], inputs) != base[weight].shape or other.shape[1] != rank:
                raise UserError(
                    f"{path}: {key} {part.shape} and {other.shape} do not fit {weight} "
                    f"{base[weight].shape} of the base model"
                )
            merged[weight] = Merged(base[weight], part, other, scale_of(name))
        elif not factor and (key in base or key == "lm_head.weight"):  # modules_to_save
            merged[key] = part
        elif factor != "B.weight" or f"{name}.lora_A.weight" not in parts:
            raise UserError(
                f"{path}: {key} cannot be merged into the base model "
                f"{config.get('base_model_name_or_path')!r}: merge it with peft's "
                "merge_and_unload, and pass the folder that it saves"
            )
    return merged


def _scales(config: dict[str, Any], source: Path) -> Callable[[str], float]:
    """What a module's product is multiplied by, from its name."""
    for name, allowed in _ONLY.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            raise UserError(
                f"{source}: {name}={value!r} cannot be merged here: merge it with peft's "
                "merge_and_unload, and pass the folder that it saves"
            )

    def scale(module: str) -> float:
        rank, alpha = (
            next(
                (x for key, x in (config.get(pattern) or {}).items() if _names(key, module)),
                config.get(default),
            )
            for default, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
            raise UserError(f"{source}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    scale("")
    return scale


def _names(pattern: str, module: str) -> bool:
    """Whether a pattern of peft's means this module."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
