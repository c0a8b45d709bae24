"""The table of families: what their models have in common, and what their config.json may say.

A family is a row here and nothing else: no other code asks for a family's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from distill.models.fields import size


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
      keys: Hugging Face keys of parameters, where `checkpoints.keys` has another or none, with axes
        where these differ.
      fused: parameters that lie in one tensor one behind the other, by its key.
    """

    architecture: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer_types: Callable[[dict[str, Any], str], list[str]] | None = None
    keys: Mapping[str, str | tuple[str, str]] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _full_every(
    period: int, name: str = "sliding_window_pattern", others: str = _SLIDING
) -> Callable[[dict[str, Any], str], list[str]]:
    """Of so many layers the last has full attention; config.json may give another number."""

    def layer_types(config: dict[str, Any], source: str) -> list[str]:
        if others == _SLIDING and config["sliding_window"] is None:
            return [_FULL] * config["num_hidden_layers"]
        every = size({name: period} | config, name, source)
        numbers = range(1, config["num_hidden_layers"] + 1)
        return [others if number % every else _FULL for number in numbers]

    return layer_types


def _full_first(config: dict[str, Any], source: str) -> list[str]:
    """Qwen's: `max_window_layers` before those with a window."""
    slides = config["use_sliding_window"] and config["sliding_window"] is not None
    first = config["max_window_layers"] if slides else config["num_hidden_layers"]
    first = first and size({"max_window_layers": first}, "max_window_layers", source)
    return [_FULL if layer < first else _SLIDING for layer in range(config["num_hidden_layers"])]


def _all_sliding(config: dict[str, Any], _: str) -> list[str]:
    return [_SLIDING if config["sliding_window"] else _FULL] * config["num_hidden_layers"]


def _full_without_positions(facts: dict[str, Any]) -> tuple[str, ...]:
    """EXAONE's pattern: beside layers with a window, full attention isn't rotated."""
    full = "unrotated" if facts["window"] else "full"
    return tuple(full if kind == "full" else kind for kind in facts["pattern"])


_HYBRID: dict[str, Any] = dict(
    fields=("layer_types", "partial_rotary_factor", "attn_output_gate")
    + ("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim")
    + ("linear_key_head_dim", "linear_value_head_dim"),
    required=("head_dim", "linear_num_key_heads", "linear_num_value_heads")
    + ("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    ignored=("full_attention_interval", "mamba_ssm_dtype", "mlp_only_layers")
    + ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
    defaults={"partial_rotary_factor": 0.25},
    layer_types=_full_every(4, "full_attention_interval", "linear_attention"),
)
_HYBRID_FACTS = {"qk_norm": "head", "norm_offset": 1.0, "output_gate": True}

_QWEN: dict[str, Any] = dict(
    fields=("layer_types", "sliding_window"),
    ignored=("max_window_layers", "use_sliding_window"),
    defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    layer_types=_full_first,
)
_WINDOWED: dict[str, Any] = dict(
    fields=("layer_types", "sliding_window"),
    defaults={"sliding_window": 4096, "rope_theta": 1e4},
    layer_types=_all_sliding,
)
_GEMMA: dict[str, Any] = {
    "norm_offset": 1.0,
    "embedding_scale": lambda facts: facts["model_width"] ** 0.5,
}
# What Gemma 2 and 3 name; hidden_act is only read by older code than transformers'.
_GEMMA_FIELDS = ("hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping") + (
    ("final_logit_softcapping", "layer_types", "sliding_window")
)
_GEMMA_DEFAULTS = {
    "vocab_size": 256000,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
}
_GATE_UP: dict[str, tuple[str, ...]] = {
    "model.layers.{layer}.mlp.gate_up_proj.weight": ("layers/gate_proj", "layers/up_proj"),
}
_QKV: dict[str, tuple[str, ...]] = {
    "model.layers.{layer}.self_attn.qkv_proj.weight": tuple(f"layers/{x}_proj" for x in "qkv"),
}
_DROPOUT = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop")
_GLM: dict[str, Any] = dict(
    fields=("attention_bias", "partial_rotary_factor"),
    defaults={
        "head_dim": 128,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e4,
    },
    fused=_GATE_UP,
)

# Of training with a loss of the router's own, which is not there.
_ROUTER_LOSS = ("router_aux_loss_coef", "output_router_logits")
_EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok")
_OF_QWEN = ("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
_SHARED = ("moe_intermediate_size", "shared_expert_intermediate_size")
_AS_WIDE = {"experts.width": lambda facts: facts["ffn_width"]}
_BLOCK_SPARSE = "model.layers.{layer}.block_sparse_moe."
_MLP = "model.layers.{layer}.mlp."
_DEEPSEEK: dict[str, Any] = dict(  # its router, and its names for what is in Qwen's, too
    fields=("num_local_experts", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
    + ("moe_intermediate_size", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace"),
    required=("head_dim", "moe_intermediate_size", "n_shared_experts"),
    keys={
        f"layers/shared_{name}_proj": f"{_MLP}shared_experts.{name}_proj.weight"
        for name in ("gate", "up", "down")
    },
)
_SIGMOID_ROUTER = {"experts.scores": "sigmoid", "experts.correction": True}

FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, **_QWEN),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": "head"}, required=("head_dim",), **_QWEN),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", _HYBRID_FACTS, **_HYBRID),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        _HYBRID_FACTS | {"experts.normalized": True, "experts.shared_gate": True},
        **_HYBRID
        | {
            "fields": (*_HYBRID["fields"], *_EXPERTS, "moe_intermediate_size")
            + ("shared_expert_intermediate_size",),
            "required": (*_HYBRID["required"], *_SHARED),
            "ignored": (*_HYBRID["ignored"], *_ROUTER_LOSS),
            # No layer is without experts.
            "defaults": _HYBRID["defaults"] | {"intermediate_size": 1},
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        _HYBRID_FACTS | {"recurrent.joined": True, "experts.shared_gate": True},
        **_HYBRID
        | {
            "fields": (*_HYBRID["fields"], *_EXPERTS, *_OF_QWEN)
            + ("shared_expert_intermediate_size",),
            "required": (*_HYBRID["required"], *_SHARED),
            "ignored": (*_HYBRID["ignored"], *_ROUTER_LOSS),
            "defaults": _HYBRID["defaults"] | {"norm_topk_prob": True},
        },
    ),
    "llama": Family("LlamaForCausalLM", defaults={"rope_theta": 1e4}),
    "arcee": Family(
        "ArceeForCausalLM",
        {"gated": False},
        fields=("hidden_act",),
        defaults={"hidden_act": "relu2", "rope_theta": 1e4},
    ),
    # Loaded as ministral by transformers if it has layer_types.
    "mistral": Family("MistralForCausalLM", **_WINDOWED),
    "ministral": Family("MinistralForCausalLM", required=("head_dim",), **_WINDOWED),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        required=("head_dim", "rope_parameters"),
        **(_WINDOWED | {"defaults": {"sliding_window": None}}),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        fields=("no_rope_layers",),
        required=("no_rope_layers",),
        ignored=("no_rope_layer_interval", "max_window_layers"),
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        fields=("layer_types", "sliding_window", "partial_rotary_factor"),
        # Its code on the hub was the first; transformers never runs it.
        ignored=("auto_map", "full_attn_mod", "interpolate_factor", *_DROPOUT),
        defaults={"sliding_window": None, "rope_theta": 1e4},
        layer_types=_all_sliding,
        fused=_QKV | _GATE_UP,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"norms": "after", "qk_norm": "all"}, defaults={"rope_theta": 1e4}
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {"norms": "after", "qk_norm": "all"},
        fields=("layer_types", "sliding_window"),
        defaults={"sliding_window": 4096, "rope_theta": 5e5, "rope_local_base_freq": 5e5},
        layer_types=_full_every(4),
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        {"norms": "after", "qk_norm": "head", "pattern": _full_without_positions},
        fields=("layer_types", "sliding_window"),
        ignored=("sliding_window_pattern",),
        defaults={"sliding_window": 4096, "rope_theta": 1e4},
        layer_types=_full_every(4),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        fields=("attention_multiplier", "embedding_multiplier")
        + ("residual_multiplier", "logits_scaling"),
        defaults={"attention_multiplier": 1.0, "rope_theta": 1e4},
    ),
    "glm": Family("GlmForCausalLM", {"interleaved_rope": True}, **_GLM),
    "glm4": Family(
        "Glm4ForCausalLM",
        {"interleaved_rope": True, "norms": "both"},
        keys={
            "layers/ffn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
            "layers/attention_out_norm": "model.layers.{layer}.post_self_attn_layernorm.weight",
            "layers/ffn_out_norm": "model.layers.{layer}.post_mlp_layernorm.weight",
        },
        **_GLM,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        # The first files say gelu and mean its approximation.
        _GEMMA | {"activation": "gelu_pytorch_tanh"},
        ignored=("hidden_act", "hidden_activation"),
        defaults={"head_dim": 256, "rope_theta": 1e4, "tie_word_embeddings": True},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA | {"norms": "both"},
        fields=_GEMMA_FIELDS,
        ignored=("hidden_act",),
        defaults=_GEMMA_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"max_position_embeddings": 8192},
        layer_types=_full_every(2),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"norms": "both", "qk_norm": "head"},
        fields=(*_GEMMA_FIELDS, "rope_local_base_freq"),
        ignored=("hidden_act", "sliding_window_pattern"),
        defaults=_GEMMA_DEFAULTS
        | {"vocab_size": 262208, "max_position_embeddings": 131072}
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        layer_types=_full_every(6),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        fields=("attention_bias", "attention_out_bias", "mlp_bias"),
        ignored=_DROPOUT,
        defaults={"attention_bias": True, "head_dim": 128, "rope_theta": 1e4},
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        {"interleaved_rope": True},
        defaults={"rope_theta": 5e5, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "helium": Family(
        "HeliumForCausalLM",
        {"interleaved_rope": True},
        defaults={"rope_theta": 1e5, "head_dim": 128},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {"qkv_bias": True, "experts.shared_gate": True},
        fields=("qkv_bias", *_EXPERTS, *_OF_QWEN, "shared_expert_intermediate_size"),
        required=_SHARED,
        ignored=("sliding_window", "max_window_layers", *_ROUTER_LOSS),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": "head"},
        fields=(*_EXPERTS, *_OF_QWEN),
        required=("head_dim", "moe_intermediate_size"),
        ignored=("sliding_window", "max_window_layers", *_ROUTER_LOSS),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"experts.normalized": True} | _AS_WIDE,
        fields=_EXPERTS,
        ignored=(*_ROUTER_LOSS, "router_jitter_noise"),
        keys={
            "layers/router": _BLOCK_SPARSE + "gate.weight",
            "layers/expert_gate_up_proj": _BLOCK_SPARSE + "experts.{expert}.{w1|w3}.weight",
            "layers/expert_down_proj": _BLOCK_SPARSE + "experts.{expert}.w2.weight",
        },
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            "sinks": True,
            "o_bias": lambda facts: facts["qkv_bias"],
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "experts.normalized": True,
            "experts.bias": True,
        }
        | _AS_WIDE,
        fields=(*_EXPERTS, "swiglu_limit", "swiglu_alpha", "attention_bias")
        + ("layer_types", "sliding_window"),
        required=("head_dim",),
        ignored=(*_ROUTER_LOSS, "experts_per_token", "initial_context_length"),
        defaults={"rope_theta": 1.5e5, "sliding_window": 128, "attention_bias": True},
        layer_types=_full_every(2),
        keys={
            "layers/router": _MLP + "router.weight",
            "layers/router_bias": (_MLP + "router.bias", "e -> e"),
            "layers/expert_gate_up_proj": (_MLP + "experts.gate_up_proj", "ecdf -> e d fc"),
            "layers/expert_gate_up_bias": (_MLP + "experts.gate_up_proj_bias", "ecf -> e fc"),
            "layers/expert_down_proj": (_MLP + "experts.down_proj", "efd -> e f d"),
            "layers/expert_down_bias": (_MLP + "experts.down_proj_bias", "ed -> e d"),
        },
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        {"experts.normalized": True} | _AS_WIDE,
        fields=(*_EXPERTS, "attention_multiplier", "embedding_multiplier", "residual_multiplier")
        + ("logits_scaling",),
        ignored=_ROUTER_LOSS,
        defaults={"attention_multiplier": 1.0},
        keys={
            "layers/router": _BLOCK_SPARSE + "router.layer.weight",
            "layers/expert_gate_up_proj": (_BLOCK_SPARSE + "input_linear.weight", "ecdf -> e cf d"),
            "layers/expert_down_proj": (_BLOCK_SPARSE + "output_linear.weight", "efd -> e d f"),
        },
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        _SIGMOID_ROUTER | {"experts.normalized": True},
        **_DEEPSEEK
        | {
            "fields": (*_DEEPSEEK["fields"], "use_qk_norm", "attention_bias")
            + ("partial_rotary_factor",),
            "ignored": (*_ROUTER_LOSS, "num_nextn_predict_layers"),
            "defaults": {"partial_rotary_factor": 0.5, "first_k_dense_replace": 1},
        },
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        _SIGMOID_ROUTER | {"qk_norm": "head"},
        **_DEEPSEEK
        | {
            "fields": (*_DEEPSEEK["fields"], "layer_types", "sliding_window"),
            "ignored": (*_ROUTER_LOSS, "max_window_layers"),
            "defaults": {
                "sliding_window": 4096,
                "max_window_layers": 62,
                "use_sliding_window": True,
            },
            "layer_types": _full_first,
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {"qk_norm": "all"} | _AS_WIDE,
        fields=(*_EXPERTS, "norm_topk_prob"),
        ignored=_ROUTER_LOSS,
    ),
}
