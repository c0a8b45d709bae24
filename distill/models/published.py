"""Shapes of published models, for plans on machines that have none of their files.

Meant to be those of each config.json on the Hugging Face hub, and compared with:

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

from typing import NamedTuple

from distill.models.facts import ModelConfig


class Published(NamedTuple):
    """A model's shape and the number of ids that its tokenizer has in use."""

    config: ModelConfig
    vocab_size: int


_SHAPE_KEYS = (
    "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size"
).split()
_QWEN2_5 = {
    "0.5B": (24, 896, 14, 2, 4864),
    "1.5B": (28, 1536, 12, 2, 8960),
    "3B": (36, 2048, 16, 2, 11008),
    "7B": (28, 3584, 28, 4, 18944),
    "14B": (48, 5120, 40, 8, 13824),
    "32B": (64, 5120, 40, 8, 27648),
    "72B": (80, 8192, 64, 8, 29568),
}
_QWEN3 = {
    "0.6B": (28, 1024, 16, 8, 3072),
    "1.7B": (28, 2048, 16, 8, 6144),
    "4B": (36, 2560, 32, 8, 9728),
    "8B": (36, 4096, 32, 8, 12288),
    "14B": (40, 5120, 40, 8, 17408),
    "32B": (64, 5120, 64, 8, 25600),
}
# And heads of the recurrent layers' values.
_QWEN3_5 = {
    "0.8B": (24, 1024, 8, 2, 3584, 16),
    "4B": (32, 2560, 16, 4, 9216, 32),
    "9B": (32, 4096, 16, 4, 12288, 32),
    "27B": (64, 5120, 24, 4, 17408, 48),
}
_LLAMA3 = {
    "3.1-8B": (32, 4096, 32, 8, 14336),
    "3.1-70B": (80, 8192, 64, 8, 28672),
    "3.2-1B": (16, 2048, 32, 8, 8192),
    "3.2-3B": (28, 3072, 24, 8, 8192),
}
_SMALL = ("0.5B", "1.5B", "3B", "0.6B", "1.7B", "4B")  # of Qwen's: the head is the embedding


def _qwen2_5(size: str, *, base: bool) -> Published:
    """Base and instruct models differ in positions, and in an epsilon."""
    facts = {
        "model_type": "qwen2",
        "vocab_size": 151936 if size in _SMALL else 152064,
        "tie_word_embeddings": size in _SMALL,
        "rms_norm_eps": 1e-5 if base and size in ("14B", "32B", "72B") else 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072 if base and size not in ("0.5B", "3B") else 32768,
    }
    return _published(_QWEN2_5[size], facts, 151665)


def _qwen3(size: str, *, base: bool) -> Published:
    facts = {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "head_dim": 128,
        "tie_word_embeddings": size in _SMALL,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768 if base else 40960,
    }
    return _published(_QWEN3[size], facts, 151669)


_HYBRID = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e7,
    "max_position_embeddings": 262144,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def _qwen3_5(size: str) -> Published:
    """The text decoder."""
    *shape, value_heads = _QWEN3_5[size]
    facts = {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "tie_word_embeddings": size in ("0.8B", "4B"),
        "linear_num_value_heads": value_heads,
        **_HYBRID,
    }
    return _published(tuple(shape), facts, 248077)


def _hybrid_mixture(
    model_type: str, vocab_size: int, value_heads: int, experts: int, picked: int, width: int
) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "linear_num_value_heads": value_heads,
        "num_experts": experts,
        "num_experts_per_tok": picked,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        **_HYBRID,
    }


def _llama3(size: str) -> Published:
    small = size.startswith("3.2")
    rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    rope |= {"original_max_position_embeddings": 8192, "factor": 32.0 if small else 8.0}
    facts = {
        "model_type": "llama",
        "vocab_size": 128256,
        "tie_word_embeddings": small,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": rope,
        "max_position_embeddings": 131072,
    }
    return _published(_LLAMA3[size], facts, 128256)


# Mixtures of experts: a shape, the ids in use, and the other fields.
_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1.5e5,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
}
_MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
_MIXTURES = {
    "Qwen/Qwen3-30B-A3B": (
        (48, 2048, 32, 4, 6144),
        _QWEN3_MOE | {"moe_intermediate_size": 768},
        151669,
    ),
    "Qwen/Qwen3-235B-A22B": (
        (94, 4096, 64, 4, 12288),
        _QWEN3_MOE | {"moe_intermediate_size": 1536},
        151669,
    ),
    "Qwen/Qwen3.5-35B-A3B": (
        (40, 2048, 16, 2, 512),
        _hybrid_mixture("qwen3_5_moe_text", 248320, 32, 256, 8, 512),
        248077,
    ),
    "Qwen/Qwen3.5-122B-A10B": (
        (48, 3072, 32, 2, 1024),
        _hybrid_mixture("qwen3_5_moe_text", 248320, 64, 256, 8, 1024),
        248077,
    ),
    "Qwen/Qwen3.5-397B-A17B": (
        (60, 4096, 32, 2, 1024),
        _hybrid_mixture("qwen3_5_moe_text", 248320, 64, 512, 10, 1024),
        248077,
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        (48, 2048, 16, 2, 5120),
        _hybrid_mixture("qwen3_next", 151936, 32, 512, 10, 512),
        151669,
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ((32, 4096, 32, 8, 14336), _MIXTRAL, 32000),
    "allenai/OLMoE-1B-7B-0924-Instruct": ((16, 2048, 16, 16, 1024), _OLMOE, 50280),
    "openai/gpt-oss-20b": ((24, 2880, 64, 8, 2880), _GPT_OSS | {"num_local_experts": 32}, 200019),
    "openai/gpt-oss-120b": ((36, 2880, 64, 8, 2880), _GPT_OSS | {"num_local_experts": 128}, 200019),
}


def _published(shape: tuple[int, ...], facts: dict, vocab_size: int) -> Published:
    config = facts | dict(zip(_SHAPE_KEYS, shape, strict=True))
    return Published(ModelConfig.from_hf(config, "this table"), vocab_size)


# The facts of dense models whose sizes share most of them; ids in use are those of the row.
_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "query_pre_attn_scalar": 256,
}
_GEMMA3_SMALL = _GEMMA3 | {
    "vocab_size": 262144,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
_PHI4 = {
    "model_type": "phi3",
    "vocab_size": 100352,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "max_position_embeddings": 16384,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_SMOLLM3 = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
    "no_rope_layers": [1, 1, 1, 0] * 9,
}
_OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "max_position_embeddings": 4096,
}
_GRANITE = {
    "model_type": "granite",
    "vocab_size": 49159,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
_GRANITE_2B = _GRANITE | {"attention_multiplier": 0.015625, "logits_scaling": 8.0}
_GRANITE_8B = _GRANITE | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0}
_MISTRAL_7B = _MISTRAL | {"vocab_size": 32768}
_NEMO = _MISTRAL | {"max_position_embeddings": 1024000}
_GEMMA3_27B = _GEMMA3 | {"query_pre_attn_scalar": 168, "head_dim": 128}
_DENSE: dict[str, tuple[tuple[int, ...], dict, int]] = {
    "google/gemma-3-270m-it": ((18, 640, 4, 1, 2048), _GEMMA3_SMALL, 262144),
    "google/gemma-3-1b-it": ((26, 1152, 4, 1, 6912), _GEMMA3_SMALL, 262144),
    "google/gemma-3-4b-it": ((34, 2560, 8, 4, 10240), _GEMMA3, 262145),
    "google/gemma-3-12b-it": ((48, 3840, 16, 8, 15360), _GEMMA3, 262145),
    "google/gemma-3-27b-it": ((62, 5376, 32, 16, 21504), _GEMMA3_27B, 262145),
    "mistralai/Mistral-7B-Instruct-v0.3": ((32, 4096, 32, 8, 14336), _MISTRAL_7B, 32768),
    "mistralai/Mistral-Nemo-Instruct-2407": ((40, 5120, 32, 8, 14336), _NEMO, 131072),
    "mistralai/Mistral-Small-24B-Instruct-2501": (
        (40, 5120, 32, 8, 32768),
        _MISTRAL | {"rope_theta": 1e8},
        131072,
    ),
    "microsoft/phi-4": ((40, 5120, 40, 10, 17920), _PHI4, 100352),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ((30, 576, 9, 3, 1536), _SMOLLM2, 49152),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ((32, 960, 15, 5, 2560), _SMOLLM2, 49152),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        (24, 2048, 32, 32, 8192),
        _SMOLLM2 | {"rope_theta": 130000.0},
        49152,
    ),
    "HuggingFaceTB/SmolLM3-3B": ((36, 2048, 16, 4, 11008), _SMOLLM3, 128256),
    "allenai/OLMo-2-0425-1B-Instruct": ((16, 2048, 16, 16, 8192), _OLMO2, 100278),
    "allenai/OLMo-2-1124-7B-Instruct": ((32, 4096, 32, 32, 11008), _OLMO2, 100278),
    "allenai/OLMo-2-1124-13B-Instruct": ((40, 5120, 40, 40, 13824), _OLMO2, 100278),
    "allenai/OLMo-2-0325-32B-Instruct": ((64, 5120, 40, 8, 27648), _OLMO2, 100278),
    "ibm-granite/granite-3.3-2b-instruct": ((40, 2048, 32, 8, 8192), _GRANITE_2B, 49159),
    "ibm-granite/granite-3.3-8b-instruct": ((40, 4096, 32, 8, 12800), _GRANITE_8B, 49159),
}

PUBLISHED = {
    **{f"Qwen/Qwen2.5-{size}-Instruct": _qwen2_5(size, base=False) for size in _QWEN2_5},
    **{f"Qwen/Qwen2.5-{size}": _qwen2_5(size, base=True) for size in _QWEN2_5},
    **{f"Qwen/Qwen3-{size}": _qwen3(size, base=False) for size in _QWEN3},
    **{f"Qwen/Qwen3-{size}-Base": _qwen3(size, base=True) for size in _QWEN3 if size != "32B"},
    **{f"Qwen/Qwen3.5-{size}": _qwen3_5(size) for size in _QWEN3_5},
    **{f"meta-llama/Llama-{size}": _llama3(size) for size in _LLAMA3},
    **{f"meta-llama/Llama-{size}-Instruct": _llama3(size) for size in _LLAMA3},
    **{name: _published(*row) for name, row in (_DENSE | _MIXTURES).items()},
}
