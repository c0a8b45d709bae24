"""Single fields of a config.json: how each is read, and the error that names it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.base.errors import UserError

# Of any size, but for the number of layers, which are looked at one by one.
_LARGEST, _MOST_LAYERS = 2**31 - 1, 10_000


def size(config: dict[str, Any], name: str, source: str) -> int:
    value = required(config, name, source)
    largest = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
    if type(value) is not int or not 1 <= value <= largest:
        raise UserError(
            f"{source}: {name}={brief(value)} must be a positive integer of at most {largest}"
        )
    return value


def positive(config: dict[str, Any], name: str, source: str) -> float:
    value = required(config, name, source)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise UserError(f"{source}: {name}={brief(value)} must be a positive number")
    return float(value)


def required(config: dict[str, Any], name: str, source: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"{source}: the required field {name} is missing")
    return config[name]


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _pattern(config: dict[str, Any], name: str, source: str) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives a kind for every layer."""
    types, num_layers = config[name], size(config, "num_hidden_layers", source)
    known = {"full_attention": "full", "sliding_attention": "sliding"}
    known |= {"linear_attention": "recurrent"} if "linear_num_key_heads" in config else {}
    fits = isinstance(types, list) and len(types) == num_layers
    if not fits or not all(each in known for each in types):
        raise UserError(
            f"{source}: {name}={brief(types)} is not supported, only {' or '.join(known)} for "
            f"each of the {num_layers} layers"
        )
    return shortest_period([known[each] for each in types])


def shortest_period(kinds: list[Any]) -> tuple[Any, ...]:
    """What gives the list when it is repeated, the last time perhaps in part."""
    period = next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p])
    return tuple(kinds[:period])


def _mixtures(config: dict[str, Any], name: str, source: str) -> tuple[bool, ...]:
    """Which layers have experts: each `decoder_sparse_step`-th that is not in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    if type(step) is not int or not isinstance(dense, list):
        raise UserError(
            f"{source}: decoder_sparse_step={brief(step)} must be a number of layers, and "
            f"mlp_only_layers={brief(dense)} a list of numbers of layers"
        )
    layers = range(size(config, "num_hidden_layers", source))
    return shortest_period([i not in dense and (i + 1) % step == 0 for i in layers])


def _window(config: dict[str, Any], name: str, source: str) -> int | None:
    return size(config, name, source) if config.get("use_sliding_window", True) else None


def flag(config: dict[str, Any], name: str, source: str) -> bool:
    if type(config[name]) is not bool:
        raise UserError(f"{source}: {name}={brief(config[name])} must be true or false")
    return config[name]


def _rotated_layers(config: dict[str, Any], name: str, source: str) -> tuple[str, ...]:
    """SmolLM3's list of 1 for layers with rotary embedding and 0 for others, as a pattern."""
    numbers, num_layers = config[name], size(config, "num_hidden_layers", source)
    if not isinstance(numbers, list) or len(numbers) < num_layers or {*numbers} - {0, 1}:
        raise UserError(
            f"{source}: {name}={brief(numbers)} must be 0 or 1 for each of the {num_layers} layers"
        )
    return shortest_period(["full" if each else "unrotated" for each in numbers[:num_layers]])


def _one_of(*choices: str):
    def read(config: dict[str, Any], name: str, source: str) -> str:
        if config[name] not in choices:
            raise UserError(
                f"{source}: {name}={brief(config[name])} is not supported, only "
                f"{' or '.join(choices)}"
            )
        return config[name]

    return read


def _power(exponent: float):
    return lambda config, name, source: positive(config, name, source) ** exponent


def _first_dense(config: dict[str, Any], name: str, source: str) -> tuple[bool, ...]:
    dense, num_layers = config[name], size(config, "num_hidden_layers", source)
    if type(dense) is not int or not 0 <= dense < num_layers:
        raise UserError(
            f"{source}: {name}={brief(dense)} must be a number of layers below {num_layers}"
        )
    return shortest_period([layer >= dense for layer in range(num_layers)])


def _shared_width(config: dict[str, Any], name: str, source: str) -> int:
    return size(config, name, source) * size(config, "moe_intermediate_size", source)


def _head_norm(config: dict[str, Any], name: str, source: str) -> str | None:
    return "head" if flag(config, name, source) else None


_activation = _one_of("silu", "gelu", "gelu_pytorch_tanh", "relu2")

# Fields of config.json that some families have: the fact that each is, and how it is read.
READERS: dict[str, tuple[str, Callable[[dict[str, Any], str, str], Any]]] = {
    "hidden_act": ("activation", _activation),
    "hidden_activation": ("activation", _activation),
    "layer_types": ("pattern", _pattern),
    "no_rope_layers": ("pattern", _rotated_layers),
    "sliding_window": ("window", _window),
    "attention_bias": ("qkv_bias", flag),
    "attention_out_bias": ("o_bias", flag),
    "mlp_bias": ("mlp_bias", flag),
    "query_pre_attn_scalar": ("attention_scale", _power(-0.5)),
    "attention_multiplier": ("attention_scale", positive),
    "attn_logit_softcapping": ("attention_soft_cap", positive),
    "embedding_multiplier": ("embedding_scale", positive),
    "residual_multiplier": ("residual_scale", positive),
    "logits_scaling": ("logit_scale", _power(-1)),
    "final_logit_softcapping": ("logit_soft_cap", positive),
    "attn_output_gate": ("output_gate", flag),
    "linear_num_key_heads": ("recurrent.key_heads", size),
    "linear_num_value_heads": ("recurrent.value_heads", size),
    "linear_key_head_dim": ("recurrent.key_width", size),
    "linear_value_head_dim": ("recurrent.value_width", size),
    "linear_conv_kernel_dim": ("recurrent.taps", size),
    "qkv_bias": ("qkv_bias", flag),
    "use_qk_norm": ("qk_norm", _head_norm),
    "n_routed_experts": ("experts.number", size),
    "n_shared_experts": ("experts.shared_width", _shared_width),
    "routed_scaling_factor": ("experts.scale", positive),
    "first_k_dense_replace": ("mixtures", _first_dense),
    "num_experts": ("experts.number", size),
    "num_local_experts": ("experts.number", size),
    "num_experts_per_tok": ("experts.per_token", size),
    "moe_intermediate_size": ("experts.width", size),
    "norm_topk_prob": ("experts.normalized", flag),
    "decoder_sparse_step": ("mixtures", _mixtures),
    "mlp_only_layers": ("mixtures", _mixtures),
    "shared_expert_intermediate_size": ("experts.shared_width", size),
    "swiglu_limit": ("swiglu_limit", positive),
    "swiglu_alpha": ("swiglu_alpha", positive),
}
