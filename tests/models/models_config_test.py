"""Reading config.json: what is understood, and that everything else is refused by name."""

import dataclasses

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from distill.base.errors import UserError
from distill.models.facts import ModelConfig
from distill.models.published import published
from distill.models.rope import Linear, Llama3, Rope

# As published, fields that do not matter included.
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
PUBLISHED = {"qwen2": QWEN2_5, "qwen3": QWEN3, "llama": LLAMA3}


def read(config):
    return ModelConfig.from_hf(config, "here/config.json")


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def with_rope_parameters(config):
    """The same config as transformers 5 writes it."""
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {})}
    return without(config, "rope_theta", "rope_scaling") | {
        "rope_parameters": {**rope, "rope_theta": config["rope_theta"]},
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
    }


def test_published_qwen2_5():
    assert read(QWEN2_5) == ModelConfig(
        family="qwen2",
        vocab_size=151936,
        num_layers=28,
        model_width=1536,
        num_heads=12,
        num_kv_heads=2,
        head_width=128,
        ffn_width=8960,
        tied=True,
        qkv_bias=True,
        qk_norm=None,
        rms_eps=1e-6,
        rope=Rope(1e6),
        max_positions=32768,
    )


def test_published_qwen3_has_its_own_head_width():
    config = read(QWEN3)
    assert config.head_width == 128 != config.model_width // config.num_heads
    assert config.qk_norm and not config.qkv_bias and config.rope.scaling is None


def test_published_llama3():
    config = read(LLAMA3)
    assert config.rope == Rope(5e5, Llama3(32.0, 1.0, 4.0, 8192))
    assert not config.qk_norm and not config.qkv_bias


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "Qwen/Qwen3.5-35B-A3B",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "openai/gpt-oss-120b",
    ],
)
def test_published_mixtures_have_the_shapes_of_their_classes(name):
    """But for positions, and the width of a feed-forward that no layer has."""
    known = published()[name].config
    defaults = AutoConfig.for_model(known.family).to_dict()
    found = ModelConfig.from_hf(defaults, "transformers")
    own = dict(max_positions=1)
    if known.recurrent:
        own |= dict(rope=Rope(1.0), ffn_width=1)
    assert dataclasses.replace(found, **own) == dataclasses.replace(known, **own)


@pytest.mark.parametrize("family", PUBLISHED)
def test_both_styles_of_rope_mean_the_same(family):
    config = PUBLISHED[family]
    assert read(with_rope_parameters(config)) == read(config)


def test_defaults_of_absent_fields():
    assert not read(without(QWEN2_5, "tie_word_embeddings")).tied
    assert read(without(LLAMA3, "head_dim")).head_width == 64
    assert read(without(QWEN2_5, "architectures")).family == "qwen2"


def test_falsy_unknown_fields_are_harmless():
    fields = {"use_mrope": False, "novelty": None, "_secret": 1, "is_llama_config": True}
    fields |= {"transformers.js_config": {"dtype": "q4"}, "eos_token_id": [1, 2]}
    assert read(QWEN2_5 | fields) == read(QWEN2_5)


GEMMA3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def test_text_of_gemma3_needs_no_more_than_its_container_says():
    config = read(GEMMA3_4B)
    assert (config.num_heads, config.num_kv_heads, config.head_width) == (8, 4, 256)
    assert config.layers.count("full") == 5 and config.pattern == ("sliding",) * 5 + ("full",)
    assert config.rope == Rope(1e6, Linear(8.0)) and config.sliding_rope == Rope(1e4)
    assert config.tied and config.max_positions == 131072 and config.attention_scale == 1 / 16


def test_a_window_that_no_sequence_reaches_is_none():
    mistral = without(LLAMA3, "rope_scaling", "pretraining_tp") | {"model_type": "mistral"}
    mistral |= {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 4096}
    assert read(mistral) == read(mistral | {"sliding_window": None})
    assert read(mistral | {"sliding_window": 4095}).pattern == ("sliding",)


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize(
    "field",
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads rms_norm_eps max_position_embeddings rope_theta".split(),
)
def test_missing_field_is_named(family, field):
    if (family, field) == ("llama", "rope_theta"):
        assert read(without(LLAMA3, field)).rope.theta == 1e4  # Llama 2's, as in transformers
        return
    with pytest.raises(UserError, match=f"here/config.json: the required field {field} is missing"):
        read(without(PUBLISHED[family], field))


def test_qwen3_requires_head_dim():
    with pytest.raises(UserError, match="the required field head_dim is missing"):
        read(without(QWEN3, "head_dim"))


UNSUPPORTED = [
    ("qwen2", "model_type", "bert"),
    ("qwen2", "model_type", ["qwen2"]),
    ("qwen2", "architectures", 5),
    ("qwen2", "eos_token_id", "</s>"),
    ("qwen2", "eos_token_id", [1, None]),
    ("qwen2", "num_hidden_layers", 10**12),
    ("qwen2", "model_type", None),
    ("qwen2", "architectures", ["Qwen2ForSequenceClassification"]),
    ("llama", "hidden_act", "gelu"),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "pretraining_tp", 2),
    ("llama", "sliding_window", 4096),
    ("qwen3", "attention_bias", True),
    ("qwen3", "attention_dropout", 0.1),
    ("qwen3", "partial_rotary_factor", 0.5),
    ("llama", "use_sliding_window", True),
    ("llama", "layer_types", ["full_attention"] * 15 + ["sliding_attention"]),
    ("qwen2", "layer_types", ["full_attention"]),
    ("qwen2", "quantization_config", {"quant_method": "awq"}),
    ("qwen2", "auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
    ("qwen2", "logit_scale", 2.0),
    ("qwen2", "vocab_size", "151936"),
    ("qwen2", "num_hidden_layers", 0),
    ("qwen2", "num_hidden_layers", True),
    ("qwen2", "num_key_value_heads", 5),
    ("qwen2", "hidden_size", 1537),
    ("qwen3", "head_dim", 63),
    ("qwen2", "rms_norm_eps", -1e-6),
    ("qwen2", "rope_theta", "1e6"),
    ("qwen2", "rope_scaling", "llama3"),
]


@pytest.mark.parametrize(("family", "field", "value"), UNSUPPORTED)
def test_unsupported_value_is_named(family, field, value):
    with pytest.raises(UserError) as error:
        read(PUBLISHED[family] | {field: value})
    message = str(error.value)
    assert message.startswith("here/config.json: ") and "\n" not in message
    assert f"{field}={value!r}"[:60] in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_type": "yarn", "factor": "4"}, "factor='4' must be a positive number"),
        ({"type": "linear"}, "required field factor is missing"),
        ({"type": ["linear"]}, "rope_type=['linear'] is not supported"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "required field long_factor is missing"),
        ({"type": "mrope", "mrope_section": [16]}, "rope_type='mrope' is not supported"),
        ({"rope_type": "default", "factor": 2.0}, "factor=2.0 is unknown"),
        ({"rope_type": "llama3", "factor": 8.0}, "required field low_freq_factor is missing"),
        (LLAMA3["rope_scaling"] | {"attention_factor": 2.0}, "attention_factor=2.0 is unknown"),
        (LLAMA3["rope_scaling"] | {"low_freq_factor": 4.0}, "must be less than high_freq_factor"),
        (LLAMA3["rope_scaling"] | {"factor": 0}, "factor=0 must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_theta": 10.0}, "rope_theta=10.0 contradicts rope_theta=500000.0"),
    ],
)
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_unsupported_rope_is_named(style, change, expected):
    config = without(LLAMA3, "rope_scaling") | {style: change}
    with pytest.raises(UserError) as error:
        read(config)
    assert str(error.value).startswith(f"here/config.json: {style}: ")
    assert expected in str(error.value)


def test_two_ropes_are_refused():
    both = LLAMA3 | {"rope_parameters": {"rope_type": "default"}}
    with pytest.raises(UserError, match="rope_parameters and rope_scaling are both given"):
        read(both)


def test_how_many_experts_all_tokens_share_must_be_said():
    """GLM's default in transformers is one, and none would be read."""
    config = CONFIG_MAPPING["glm4_moe"]().to_dict() | dict(head_dim=64)
    experts = read(config).experts
    assert experts.shared_width == experts.width
    with pytest.raises(UserError, match="the required field n_shared_experts is missing"):
        read(without(config, "n_shared_experts"))
