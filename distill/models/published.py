"""Shapes of published models, for plans on machines that have none of their files.

The facts of each config.json on the Hugging Face hub, which torchtune's model builders repeat
(github.com/pytorch/torchtune, torchtune/models/{qwen2_5,qwen3,llama3_1,llama3_2}). Heads have more
rows than the tokenizers have ids.
"""

from __future__ import annotations

import dataclasses

from distill.models.facts import ModelConfig, RopeScaling

QWEN2_5_IDS, QWEN3_IDS, LLAMA3_IDS = 151665, 151669, 128256


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's shape and the number of ids that its tokenizer has in use."""

    config: ModelConfig
    vocab_size: int


def published(hub_id: str) -> Published | None:
    """The model of that hub id; None if it is not in the table."""
    return PUBLISHED.get(hub_id)


def _qwen2_5(layers, width, heads, kv_heads, ffn, positions, *, small=False, eps=1e-6) -> Published:
    config = ModelConfig(
        family="qwen2",
        vocab_size=151936 if small else 152064,
        num_layers=layers,
        model_width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=width // heads,
        ffn_width=ffn,
        tied=small,
        qkv_bias=True,
        qk_norm=False,
        rms_eps=eps,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=positions,
    )
    return Published(config, QWEN2_5_IDS)


def _qwen3(layers, width, heads, ffn, positions, *, tied=False) -> Published:
    config = ModelConfig(
        family="qwen3",
        vocab_size=151936,
        num_layers=layers,
        model_width=width,
        num_heads=heads,
        num_kv_heads=8,
        head_width=128,
        ffn_width=ffn,
        tied=tied,
        qkv_bias=False,
        qk_norm=True,
        rms_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=positions,
    )
    return Published(config, QWEN3_IDS)


def _llama3(layers, width, heads, ffn, *, factor=8.0, tied=False) -> Published:
    config = ModelConfig(
        family="llama",
        vocab_size=LLAMA3_IDS,
        num_layers=layers,
        model_width=width,
        num_heads=heads,
        num_kv_heads=8,
        head_width=width // heads,
        ffn_width=ffn,
        tied=tied,
        qkv_bias=False,
        qk_norm=False,
        rms_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
        max_positions=131072,
    )
    return Published(config, LLAMA3_IDS)


# Base and instruct models differ in what they were trained for: positions, and an epsilon.
_SHORT, _LONG = 32768, 131072
_QWEN2_5 = {  # layers, width, heads, key and value heads, feed-forward width
    "0.5B": (24, 896, 14, 2, 4864),
    "1.5B": (28, 1536, 12, 2, 8960),
    "3B": (36, 2048, 16, 2, 11008),
    "7B": (28, 3584, 28, 4, 18944),
    "14B": (48, 5120, 40, 8, 13824),
    "32B": (64, 5120, 40, 8, 27648),
    "72B": (80, 8192, 64, 8, 29568),
}
_QWEN3 = {  # layers, width, heads, feed-forward width
    "0.6B": (28, 1024, 16, 3072),
    "1.7B": (28, 2048, 16, 6144),
    "4B": (36, 2560, 32, 9728),
    "8B": (36, 4096, 32, 12288),
    "14B": (40, 5120, 40, 17408),
    "32B": (64, 5120, 64, 25600),
}
_LLAMA3_1 = {"8B": (32, 4096, 32, 14336), "70B": (80, 8192, 64, 28672)}
_LLAMA3_2 = {"1B": (16, 2048, 32, 8192), "3B": (28, 3072, 24, 8192)}

PUBLISHED = (
    {
        f"Qwen/Qwen2.5-{size}-Instruct": _qwen2_5(
            *shape, _SHORT, small=size in ("0.5B", "1.5B", "3B")
        )
        for size, shape in _QWEN2_5.items()
    }
    | {
        f"Qwen/Qwen2.5-{size}": _qwen2_5(
            *shape,
            _SHORT if size in ("0.5B", "3B") else _LONG,
            small=size in ("0.5B", "1.5B", "3B"),
            eps=1e-5 if size in ("14B", "32B", "72B") else 1e-6,
        )
        for size, shape in _QWEN2_5.items()
    }
    | {
        f"Qwen/Qwen3-{size}": _qwen3(*shape, 40960, tied=size in ("0.6B", "1.7B", "4B"))
        for size, shape in _QWEN3.items()
    }
    | {
        f"Qwen/Qwen3-{size}-Base": _qwen3(*shape, _SHORT, tied=size in ("0.6B", "1.7B", "4B"))
        for size, shape in _QWEN3.items()
        if size != "32B"
    }
    | {
        f"meta-llama/Llama-3.1-{size}{kind}": _llama3(*shape)
        for size, shape in _LLAMA3_1.items()
        for kind in ("", "-Instruct")
    }
    | {
        f"meta-llama/Llama-3.2-{size}{kind}": _llama3(*shape, factor=32.0, tied=True)
        for size, shape in _LLAMA3_2.items()
        for kind in ("", "-Instruct")
    }
)
