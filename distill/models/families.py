"""The table of families: what their models have in common, and what their config.json may say.

A family is a row here and nothing else: no other code asks for a family's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
      architecture: the one name that `architectures` in config.json may have.
      facts: fields of `ModelConfig` that all models of the family share; a function makes one from
        the facts of the model so far.
      fields: fields of config.json, beside those of all families, that make facts; see
        `fields.READERS`. What no row names is refused.
      required: fields of config.json that have no default in this family.
      ignored: fields of config.json that change nothing in this family.
      keys: Hugging Face keys of parameters, where they are not Llama's; see `checkpoints.keys`.
    """

    architecture: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Read by transformers only when use_sliding_window is true, which is refused.
_NO_WINDOW = ("sliding_window", "max_window_layers")

FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, ignored=_NO_WINDOW),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"qk_norm": "head"}, required=("head_dim",), ignored=_NO_WINDOW
    ),
    "llama": Family("LlamaForCausalLM"),
}
