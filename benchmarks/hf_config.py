"""config.json of models that were made here, for benchmarks and tests: of a ModelConfig's facts."""

from __future__ import annotations

import dataclasses
from typing import Any

from distill.models.facts import ModelConfig
from distill.models.families import FAMILIES
from distill.models.rope import SCALINGS, Rope


def rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling is None:
        return None
    kind = next(kind for kind, made in SCALINGS.items() if type(rope.scaling) is made)
    return {"rope_type": kind, **dataclasses.asdict(rope.scaling)}


def hf_config_dict(
    config: ModelConfig, *, eos_token_id: int | list[int] | None, pad_token_id: int | None
) -> dict[str, Any]:
    """A config.json for a model that was not imported; the inverse of ModelConfig.from_hf.

    Raises:
      ValueError: the model has facts that are not written here.
    """
    written = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config.rope),
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": "float32",
    }
    if ModelConfig.from_hf(written, "this function") != config:
        raise ValueError(f"config.json of {config} cannot be written")
    return written
