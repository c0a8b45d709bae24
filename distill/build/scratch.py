"""Models of random weights: the beginning of a recipe that trains toy models from nothing."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from transformers import PreTrainedTokenizerBase

from distill.base.errors import UserError
from distill.data.arithmetic import CHARACTERS
from distill.data.base import DatasetInterface
from distill.data.tokenizer import (
    character_tokenizer,
    load_tokenizer,
    train_bpe_tokenizer,
    vocabulary_size,
)
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.hub import read_json, tokenizer_folder
from distill.models.facts import ModelConfig
from distill.models.transformer import Transformer

_LONGEST_TEXT = 10_000  # characters of an example that a tokenizer learns from


def make_tokenizer(name: str, dataset: DatasetInterface) -> PreTrainedTokenizerBase:
    """characters:arithmetic, bpe:SIZE learned from the dataset, or that of a folder or hub id."""
    kind, _, argument = name.partition(":")
    if (kind, argument) == ("characters", "arithmetic"):
        return character_tokenizer(CHARACTERS)
    if kind == "bpe":
        if not argument.isdigit() or int(argument) < 300:
            raise UserError(
                f"--tokenizer={name}: write bpe:SIZE with at least 300 entries (256 bytes, special "
                "tokens and merges)"
            )
        examples = (dataset[i] for i in range(len(dataset)))
        texts = (f"{example.prompt}\n{example.response or ''}" for example in examples)
        # A word without end would take hours: their number of steps is quadratic in its length.
        return train_bpe_tokenizer((text[:_LONGEST_TEXT] for text in texts), int(argument))
    return load_tokenizer(tokenizer_folder(name))


def make_random_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_layers: int,
    model_width: int,
    num_heads: int,
    num_kv_heads: int,
    max_positions: int,
    vocab_size: int = 0,
    seed: int = 0,
) -> None:
    """Writes a Hugging Face folder in Qwen2's layout, with random weights in float32.

    The feed-forward layer is four times as wide as the model, embedding and head are tied; 0 rows
    of vocabulary: as many as the tokenizer has ids.

    Raises:
      UserError: the sizes do not go together.
    """
    if model_width % num_heads or num_heads % num_kv_heads:
        raise UserError(
            f"--width={model_width} must be a multiple of --heads={num_heads}, and that of "
            f"--kv_heads={num_kv_heads}"
        )
    hf_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": _rows(tokenizer, vocab_size),
        "hidden_size": model_width,
        "intermediate_size": 4 * model_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    }
    _write(folder, tokenizer, hf_config, "these sizes", seed)


def make_random_model_like(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    like: Path,
    *,
    vocab_size: int = 0,
    seed: int = 0,
) -> None:
    """`make_random_model` of any family, with all other sizes from a config.json."""
    hf_config = read_json(like) | {"vocab_size": _rows(tokenizer, vocab_size)}
    _write(folder, tokenizer, hf_config, str(like), seed)


def _rows(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Rows of an embedding."""
    size = vocabulary_size(tokenizer)
    if 0 < vocab_size < size:
        raise UserError(
            f"--vocab_size={vocab_size} is smaller than the tokenizer's {size} ids: raise it, or 0 "
            "takes that number"
        )
    return vocab_size or size


def _write(folder: Path, tokenizer, hf_config: dict, source: str, seed: int) -> None:
    hf_config |= dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = ModelConfig.from_hf(hf_config, source)
    dtypes = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    params = nnx.state(Transformer(config, rngs=nnx.Rngs(seed), **dtypes), nnx.Param)
    export_model(folder, params, config, hf_config, tokenizer, jnp.float32)
