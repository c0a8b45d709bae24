"""A model folder as it was found: its config.json, and which of its tensors are the decoder's."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.base.errors import UserError
from distill.models.checkpoints.adapters import merge_adapter
from distill.models.checkpoints.hub import CONFIG, base_folder, read_json, resolve_model
from distill.models.checkpoints.tensors import (
    Tensor,
    find_tensors,
    has_weights,
    is_readable,
    split_experts,
)
from distill.models.facts import ModelConfig
from distill.models.families import FAMILIES

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Rows of two matrices that are compared at a time.
_ROWS = 4096


class Container(NamedTuple):
    """A multimodal model around a text decoder, whose config.json is its `text_config`.

    Attributes:
      architecture: the one name that `architectures` may have.
      tied: whether the head is the embedding where config.json says nothing.
    """

    architecture: str
    tied: bool


# By `model_type`. A container is a row here and nothing else.
CONTAINERS = {
    "gemma3": Container("Gemma3ForConditionalGeneration", tied=True),
    "mistral3": Container("Mistral3ForConditionalGeneration", tied=True),
    "qwen3_5": Container("Qwen3_5ForConditionalGeneration", tied=False),
    "qwen3_5_moe": Container("Qwen3_5MoeForConditionalGeneration", tied=False),
}
# A decoder's keys in containers, before and since transformers 4.52: (theirs, a text model's).
_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a model was loaded from.

    Attributes:
      folder: of the model; of the base where it is an adapter.
      config: of the decoder.
      hf_config: config.json as it is exported: of weights that are not quantised.
      text_config: the decoder's part of it, that of a text model.
      tensors: the decoder's by the keys of a text model.
      names: their keys in the files.
      others: what a container has besides, by their keys.
      quantization: as config.json has it.
    """

    folder: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    text_config: dict[str, Any]
    tensors: dict[str, Tensor]
    names: dict[str, str]
    others: dict[str, Tensor]
    quantization: dict[str, Any] | None

    def name(self, key: str) -> str:
        """The key of a tensor in the container's files, be it there or not."""
        if key in self.names or not self.others:
            return self.names.get(key, key)
        if key.startswith("model."):  # of an expert, in one tensor with others there
            prefix = self.names[EMBEDDING].removesuffix(EMBEDDING.removeprefix("model."))
            return prefix + key.removeprefix("model.")
        # Only an untied head is new: beside what the embedding stands below.
        nested = self.names[EMBEDDING].startswith("language_model.")
        return f"language_model.{key}" if nested else key


def open_source(path_or_id: str | Path) -> Source:
    """A model's folder with the headers of its weights.

    Raises:
      UserError: no such model, one that the decoder does not support, or no readable weights.
    """
    folder = resolve_model(path_or_id)
    base = base_folder(folder)
    hf_config, text_config, quantization = _read_config(base / CONFIG)
    config = ModelConfig.from_hf(text_config, str(base / CONFIG))
    tensors = find_tensors(base, quantization)
    names, others = {key: key for key in tensors}, {}
    if hf_config is not text_config:
        names = {name: key for key in tensors if (name := _text_key(key))}
        others = {key: tensors[key] for key in tensors.keys() - set(names.values())}
        tensors = {name: tensors[key] for name, key in names.items()}
    if "layers/expert_gate_up_proj" not in FAMILIES[config.family].keys:
        tensors = split_experts(tensors)
    if folder != base:
        plain = hf_config is text_config
        tensors = merge_adapter(
            folder, tensors, lambda key: key if plain else _text_key(key) or key
        )
    if config.tied and _has_own_head(tensors):
        config = dataclasses.replace(config, tied=False)
        hf_config = hf_config | {"tie_word_embeddings": False}
        text_config = text_config | {"tie_word_embeddings": False}
    return Source(base, config, hf_config, text_config, tensors, names, others, quantization)


def load_model_config(path_or_id: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of a model, parsed and as a text model's config.json would have it.

    Raises:
      UserError: no such model, or one that the decoder does not support.
    """
    folder = base_folder(resolve_model(path_or_id))
    _, text_config, _ = _read_config(folder / CONFIG)
    config = ModelConfig.from_hf(text_config, str(folder / CONFIG))
    if config.tied and has_weights(folder):
        source = open_source(path_or_id)  # the weights may say otherwise
        return source.config, source.text_config
    return config, text_config


def read_text_config(path: Path) -> dict[str, Any]:
    """What a config.json says of the text decoder, for `ModelConfig.from_hf`."""
    return _read_config(path)[1]


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """config.json and its decoder's part, both without the quantisation, and that."""
    hf_config = read_json(path)
    container = CONTAINERS.get(str(hf_config.get("model_type")))
    text_config = hf_config.get("text_config") if container else hf_config
    if not isinstance(text_config, dict):
        raise UserError(f"{path}: text_config={text_config!r} must be an object")
    quantization = hf_config.get("quantization_config") or text_config.get("quantization_config")
    if not isinstance(quantization, dict) or not is_readable(quantization):
        quantization = None
    else:
        hf_config, text_config = map(_unquantised, (hf_config, text_config))
    if container is None:
        return hf_config, hf_config, quantization
    architectures = hf_config.get("architectures") or [container.architecture]
    if architectures != [container.architecture]:
        raise UserError(
            f"{path}: architectures={architectures!r} is not supported, model_type "
            f"{hf_config['model_type']!r} must be [{container.architecture!r}]"
        )
    tied = hf_config.get("tie_word_embeddings", container.tied)
    text_config = text_config | {"tie_word_embeddings": tied}
    if (family := FAMILIES.get(str(text_config.get("model_type")))) is not None:
        text_config["architectures"] = [family.architecture]
    return hf_config, text_config, quantization


def _unquantised(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "quantization_config"}


def _text_key(key: str) -> str | None:
    for theirs, ours in _PREFIXES:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return None


def _has_own_head(tensors: dict[str, Tensor]) -> bool:
    """Whether there is a head that differs from the embedding: as transformers, it is kept then."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return False
    return head.shape != embedding.shape or _differ(head, embedding, head.file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _differ(one: Tensor, other: Tensor, written_at: int) -> bool:
    """Whether two matrices differ, read once for all that ask; `written_at` tells new files."""
    rows = one.shape[0]
    for start in range(0, rows, _ROWS):
        index = slice(start, min(start + _ROWS, rows)), slice(None)
        if not np.array_equal(one.read(index), other.read(index)):
            return True
    return False
