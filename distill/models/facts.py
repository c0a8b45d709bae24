"""What a decoder is made of, read from a Hugging Face config.json.

The rule for reading: a field that could change the numbers is either understood or refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.base.errors import UserError
from distill.kernels.attention import AttentionSpec

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Fields that become part of ModelConfig, read one by one below.
_READ = frozenset(
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads head_dim rms_norm_eps max_position_embeddings "
    "tie_word_embeddings rope_theta rope_scaling rope_parameters layer_types".split()
)

# Fields with one supported value (null counts as it): the decoder has no code for the others.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "pretraining_tp": 1,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}

# Fields that do not change what the weights compute: bookkeeping of transformers' PretrainedConfig
# (versions 4 and 5), token ids, default sampling options, initialisation.
_HARMLESS = frozenset(
    "_name_or_path name_or_path _commit_hash _attn_implementation_autoset attn_implementation "
    "transformers_version dtype torch_dtype use_bfloat16 torchscript tf_legacy_loss return_dict "
    "output_hidden_states output_attentions output_scores return_dict_in_generate use_cache "
    "initializer_range chunk_size_feed_forward is_decoder cross_attention_hidden_size "
    "tie_encoder_decoder tokenizer_class prefix task_specific_params finetuning_task problem_type "
    "id2label label2id num_labels bos_token_id eos_token_id pad_token_id sep_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens "
    "begin_suppress_tokens bad_words_ids max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences "
    "remove_invalid_values exponential_decay_length_penalty unsloth_fixed unsloth_version".split()
)

# Read by transformers only when use_sliding_window is true, which _ONLY refuses.
_HARMLESS_QWEN = frozenset({"sliding_window", "max_window_layers"})


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`); lengths are in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of one decoder; hashable, so it can be a static argument of jit.

    Attributes:
      tied: the output head is the transposed embedding.
      qkv_bias: the query, key and value projections have a bias (Qwen2).
      qk_norm: queries and keys pass an RMSNorm over the head width (Qwen3).
      max_positions: longest sequence the weights were made for, in tokens.
    """

    family: str
    vocab_size: int
    num_layers: int
    model_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int

    @property
    def attention(self) -> AttentionSpec:
        """What every layer's attention computes."""
        return AttentionSpec(scale=self.head_width**-0.5)

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str) -> ModelConfig:
        """Reads a parsed config.json of a Qwen2, Qwen3 or Llama 3 model.

        Args:
          config: the parsed file; both the `rope_theta`/`rope_scaling` style and the
            `rope_parameters` style of transformers 5 are understood.
          source: where it came from, named in errors.

        Raises:
          UserError: a field is missing, has a wrong type, or asks for something this decoder does
            not compute.
        """
        family = _family(config, source)
        _check_supported(config, family, source)
        width, heads = (
            _size(config, key, source) for key in ("hidden_size", "num_attention_heads")
        )
        kv_heads = _size(config, "num_key_value_heads", source)
        if heads % kv_heads:
            raise UserError(
                f"{source}: num_attention_heads={heads} is not a multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        theta, scaling = _rope(config, source)
        model = cls(
            family=family,
            vocab_size=_size(config, "vocab_size", source),
            num_layers=_size(config, "num_hidden_layers", source),
            model_width=_size(config, "hidden_size", source),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_width=_head_width(config, family, source),
            ffn_width=_size(config, "intermediate_size", source),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            rms_eps=_positive(config, "rms_norm_eps", source),
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=_size(config, "max_position_embeddings", source),
        )
        _check_layer_types(config, model.num_layers, source)
        return model


def _family(config: dict[str, Any], source: str) -> str:
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"{source}: model_type={family!r} is not supported, only {', '.join(ARCHITECTURES)}; "
            "choose a model of these families (Qwen2.5, Qwen3, Llama 3)"
        )
    architectures = config.get("architectures")
    if architectures and list(architectures) != [ARCHITECTURES[family]]:
        raise UserError(
            f"{source}: architectures={architectures!r} is not supported, "
            f"model_type {family!r} must be ['{ARCHITECTURES[family]}']"
        )
    return family


def _check_supported(config: dict[str, Any], family: str, source: str) -> None:
    for name, only in _ONLY.items():
        value = config.get(name)
        if value is not None and value != only:
            raise UserError(f"{source}: {name}={_brief(value)} is not supported, only {only!r}")
    known = _READ | _ONLY.keys() | _HARMLESS
    if family != "llama":
        known |= _HARMLESS_QWEN
    for name, value in config.items():
        if name not in known and value:
            raise UserError(
                f"{source}: {name}={_brief(value)} is a field unknown for {family} that may change "
                "what the model computes; remove it from config.json if it does not"
            )


def _check_layer_types(config: dict[str, Any], num_layers: int, source: str) -> None:
    layer_types = config.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * num_layers:
        raise UserError(
            f"{source}: layer_types={_brief(layer_types)} is not supported, "
            f"only 'full_attention' in each of the {num_layers} layers"
        )


def _head_width(config: dict[str, Any], family: str, source: str) -> int:
    """`head_dim`, which only Qwen3 requires; the others default to hidden_size / heads."""
    if config.get("head_dim") is not None or family == "qwen3":
        head_width = _size(config, "head_dim", source)
    else:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        if width % heads:
            raise UserError(
                f"{source}: hidden_size={width} is not a multiple of num_attention_heads={heads}, "
                "and head_dim is not given"
            )
        head_width = width // heads
    if head_width % 2:
        raise UserError(
            f"{source}: head_dim={head_width} must be even, rotary embeddings pair its halves"
        )
    return head_width


def _rope(config: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling, from either style of config.json."""
    style = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    if style == "rope_parameters" and config.get("rope_scaling") is not None:
        raise UserError(f"{source}: rope_parameters and rope_scaling are both given; remove one")
    rope = config.get(style) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: {style}={_brief(rope)} must be an object")
    where = f"{source}: {style}"
    rope = dict(rope)
    theta = _positive(rope, "rope_theta", where) if "rope_theta" in rope else None
    if "rope_theta" in config or theta is None:
        outer_theta = _positive(config, "rope_theta", source)
        if theta not in (None, outer_theta):
            raise UserError(f"{where}: rope_theta={theta} contradicts rope_theta={outer_theta}")
        theta = outer_theta
    # Written under both names by some versions of transformers; 'type' is the older one.
    kind = rope.get("rope_type", rope.get("type")) or "default"
    _check_rope(rope, kind, where)
    if kind == "default":
        return theta, None
    scaling = RopeScaling(
        factor=_positive(rope, "factor", where),
        low_freq_factor=_positive(rope, "low_freq_factor", where),
        high_freq_factor=_positive(rope, "high_freq_factor", where),
        original_max_positions=_size(rope, "original_max_position_embeddings", where),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"{where}: low_freq_factor={scaling.low_freq_factor} must be less than "
            f"high_freq_factor={scaling.high_freq_factor}"
        )
    return theta, scaling


def _check_rope(rope: dict[str, Any], kind: str, where: str) -> None:
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type={kind!r} is not supported, only 'default' or 'llama3'")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{where}: partial_rotary_factor={_brief(rope['partial_rotary_factor'])} "
            "is not supported, only 1"
        )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "llama3":
        known |= {"factor", "low_freq_factor", "high_freq_factor"}
        known |= {"original_max_position_embeddings"}
    for name, value in rope.items():
        if name not in known and value:
            raise UserError(
                f"{where}: {name}={_brief(value)} is unknown for rope_type {kind!r}, "
                f"only {', '.join(sorted(known))}"
            )


def _size(config: dict[str, Any], name: str, source: str) -> int:
    value = _required(config, name, source)
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {name}={_brief(value)} must be a positive integer")
    return value


def _positive(config: dict[str, Any], name: str, source: str) -> float:
    value = _required(config, name, source)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise UserError(f"{source}: {name}={_brief(value)} must be a positive number")
    return float(value)


def _required(config: dict[str, Any], name: str, source: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"{source}: the required field {name} is missing")
    return config[name]


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
