"""The table of families: what their models have in common, and what their config.json may say.

A family is a row here and nothing else: no other code asks for a family's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
      architecture: the one name that `architectures` in config.json may have.
      facts: fields of `ModelConfig` that all models of the family share; a function makes one from
        the facts of a model once `fields` have been read.
      fields: fields of config.json, beside those of all families, that make facts; see
        `fields.READERS`. What no row names is refused.
      required: fields of config.json that have no default in this family.
      ignored: fields of config.json that change nothing in this family.
      defaults: of fields that config.json may leave out, as transformers has them.
      layer_types: makes the default of that field from the others.
      keys: Hugging Face keys of parameters, where they are not Llama's; see `checkpoints.keys`.
    """

    architecture: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer_types: Callable[[dict[str, Any]], list[str]] | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _full_every(period: int) -> Callable[[dict[str, Any]], list[str]]:
    """Of so many layers the last has full attention; config.json may give another number."""

    def layer_types(config: dict[str, Any]) -> list[str]:
        every = config.get("sliding_window_pattern", period)
        return [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ]

    return layer_types


def _full_first(config: dict[str, Any]) -> list[str]:
    """Qwen's: `max_window_layers` before those with a window."""
    slides = config["use_sliding_window"] and config["sliding_window"] is not None
    return [
        "sliding_attention" if slides and layer >= config["max_window_layers"] else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def _sliding_if_windowed(config: dict[str, Any]) -> list[str]:
    kind = "full_attention" if config["sliding_window"] is None else "sliding_attention"
    return [kind] * config["num_hidden_layers"]


_QWEN: dict[str, Any] = dict(
    fields=("layer_types", "sliding_window"),
    ignored=("max_window_layers", "use_sliding_window"),
    defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    layer_types=_full_first,
)

FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, **_QWEN),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": "head"}, required=("head_dim",), **_QWEN),
    "llama": Family("LlamaForCausalLM", defaults={"rope_theta": 1e4}),
}
