"""Shapes of published models, for plans on machines that have none of their files.

assets/published.json has fields of each config.json on the Hugging Face hub, of models that share
most of them together; `ids` are those that the tokenizer has in use. It was compared with:

  torchtune's builders        Qwen2.5, Qwen3, Llama
  slime's scripts             Qwen3's mixtures, Qwen3.5, Qwen3-Next
  litgpt's table              Gemma 3 from 1B on, Mistral 7B, Mixtral, Phi-4, SmolLM2, OLMo 2 (7B,
                              13B)
  copies of the hub's files   Granite 3.3, Mistral Nemo and Small, gpt-oss-20b, SmolLM3; sizes of
                              Gemma 3 270M, OLMo 2 1B and Qwen3.5-122B-A10B
  transformers' defaults      gpt-oss-120b, Qwen3.5 9B and 35B-A3B

Of OLMo 2 32B, OLMoE and Qwen3.5-397B-A17B, only the number of weights was. A file is read instead
where there is one. Heads may have more rows than the tokenizers have ids.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

from distill.models.checkpoints.hub import ASSETS
from distill.models.facts import ModelConfig

_SHAPE = (  # of a model, in this order
    "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size"
).split()


class Published(NamedTuple):
    """A model's shape and the number of ids that its tokenizer has in use."""

    config: ModelConfig
    vocab_size: int


@functools.cache
def published() -> dict[str, Published]:
    """By name on the hub."""
    models = {}
    for alike in json.loads((ASSETS / "published.json").read_text(encoding="utf-8")):
        for name, own in alike["models"].items():
            shape = dict(zip(_SHAPE, own.pop("shape"), strict=True))
            config = ModelConfig.from_hf(alike["facts"] | own | shape, "published.json")
            models[name] = Published(config, alike["ids"])
    return models
