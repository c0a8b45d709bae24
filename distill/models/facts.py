"""What a decoder is made of, read from a Hugging Face config.json.

The rule for reading: a field that could change the numbers is either understood or refused by name.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distill.base.errors import UserError
from distill.kernels.attention import AttentionSpec
from distill.models.families import FAMILIES
from distill.models.fields import READERS, brief, positive, required, shortest_period, size
from distill.models.rope import Rope, Rotary, read_ropes

# Fields that become part of ModelConfig, read one by one below.
_READ = frozenset(
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads head_dim rms_norm_eps max_position_embeddings "
    "tie_word_embeddings rope_theta rope_scaling rope_parameters layer_types "
    "original_max_position_embeddings".split()
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
    "clip_qkv": None,
    "n_group": 1,
    "topk_group": 1,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}

# Ends the names of layers without experts, where others have some.
_DENSE = "_dense"

# Fields that do not change what the weights compute: bookkeeping of transformers' PretrainedConfig
# (versions 4 and 5), token ids, default sampling options, initialisation.
_HARMLESS = frozenset(
    "name_or_path attn_implementation "
    "transformers_version dtype torch_dtype use_bfloat16 torchscript tf_legacy_loss return_dict "
    "output_hidden_states output_attentions output_scores return_dict_in_generate use_cache "
    "initializer_range chunk_size_feed_forward is_decoder cross_attention_hidden_size "
    "tie_encoder_decoder tokenizer_class prefix task_specific_params finetuning_task problem_type "
    "id2label label2id num_labels bos_token_id eos_token_id pad_token_id sep_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens "
    "begin_suppress_tokens bad_words_ids max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences "
    "cache_implementation remove_invalid_values exponential_decay_length_penalty unsloth_fixed "
    "unsloth_version is_llama_config transformers.js_config".split()
)


@dataclass(frozen=True)
class Recurrent:
    """Sizes of a recurrent layer.

    Attributes:
      key_heads, value_heads, key_width, value_width: of its states.
      taps: of the convolution before.
      joined: its projections are stored joined, key head by key head.
    """

    key_heads: int = 0
    value_heads: int = 0
    key_width: int = 0
    value_width: int = 0
    taps: int = 0
    joined: bool = False

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width


@dataclass(frozen=True)
class Experts:
    """Feed-forwards of which a router picks a few for every token.

    Attributes:
      number: how many there are.
      per_token: how many of them a token passes.
      width: of each, as `ffn_width`.
      scores: of the experts: the 'softmax' or the 'sigmoid' of what the router gives.
      normalized: the scores of a token's experts are divided by their sum,
      scale: and multiplied by this.
      correction: experts are picked by their scores plus a learned number for each.
      bias: router and experts have biases.
      shared_width: of a further one that every token passes; 0: there is none.
      shared_gate: it is multiplied by a sigmoid of the token.
    """

    number: int = 0
    per_token: int = 0
    width: int = 0
    scores: str = "softmax"
    normalized: bool = False
    scale: float = 1.0
    correction: bool = False
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class LayerKind:
    """What tells the layers of one decoder apart: those with attention, and recurrent ones.

    Attributes:
      attention: what it computes.
      rotary: of its queries and keys; None: they have no positions.
      num_kv_heads, head_width: of attention.
      recurrent: sizes, in place of all of those.
      experts: in place of the feed-forward; see `moe`.
    """

    attention: AttentionSpec | None = None
    rotary: Rotary | None = None
    num_kv_heads: int = 0
    head_width: int = 0
    recurrent: Recurrent | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of one decoder; hashable, so it can be a static argument of jit.

    Attributes:
      tied: the output head is the transposed embedding.
      qkv_bias: the query, key and value projections have a bias.
      qk_norm: queries and keys pass an RMSNorm over each 'head', over 'all' heads, or none.
      rope: rotary embedding of the layers.
      max_positions: longest sequence, in tokens, that the weights were made for and whose length
        changes no frequencies.
      pattern: kinds of the layers, repeated over the depth: 'full' attention, 'sliding' attention
        to `window` tokens, 'unrotated', full without rotary embedding, or 'recurrent'.
      sliding_rope: that of sliding layers, where they have their own.
      interleaved_rope: rotary embeddings pair neighbouring channels; see `Rotary`.
      attention_scale: of scores; None: 1 / sqrt(head_width).
      attention_soft_cap: see `AttentionSpec`.
      sinks: every layer has a learned score per query head; see `AttentionSpec`.
      output_gate: what attention results in is multiplied by a sigmoid of its input's projection.
      recurrent: sizes of recurrent layers.
      activation: of the feed-forward's gate, as named in `mlp.ACTIVATIONS`.
      gated: the feed-forward has a gate; else it activates what its first projection gives.
      swiglu_limit, swiglu_alpha: of gpt-oss' gate, in place of that; see `mlp.gate`.
      experts: in place of the feed-forward, in layers for which `mixtures` is true.
      mixtures: repeated over the depth.
      o_bias, mlp_bias: those projections have a bias.
      norms: each of attention and feed-forward has an RMSNorm 'before', 'after' or 'both'.
      norm_offset: RMSNorms multiply by their weight plus this.
      embedding_scale: the embedding's rows are multiplied by this,
      residual_scale: what a layer adds to the residual stream by this,
      logit_scale: and logits by this.
      logit_soft_cap: logits are capped to plus and minus this by a hyperbolic tangent.
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
    qk_norm: str | None
    rms_eps: float
    rope: Rope
    max_positions: int
    pattern: tuple[str, ...] = ("full",)
    window: int | None = None
    sliding_rope: Rope | None = None
    interleaved_rope: bool = False
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    sinks: bool = False
    output_gate: bool = False
    recurrent: Recurrent | None = None
    activation: str = "silu"
    gated: bool = True
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    experts: Experts | None = None
    mixtures: tuple[bool, ...] = (True,)
    o_bias: bool = False
    mlp_bias: bool = False
    norms: str = "before"
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of every layer, by its name."""
        names: Iterator[str] = itertools.cycle(self.pattern)
        if self.experts and not all(self.mixtures):
            mixtures = itertools.cycle(self.mixtures)
            names = (x if mixture else x + _DENSE for x, mixture in zip(names, mixtures))  # noqa: B905
        return tuple(itertools.islice(names, self.num_layers))

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Of every layer, its kind and its number among those of that kind."""
        layers = self.layers
        return tuple((kind, layers[:i].count(kind)) for i, kind in enumerate(layers))

    @property
    def kinds(self) -> dict[str, LayerKind]:
        """The kinds of its layers by name, in the order in which they first come."""
        return {name: self._kind(name) for name in dict.fromkeys(self.layers)}

    def _kind(self, layer: str) -> LayerKind:
        name = layer.removesuffix(_DENSE)
        experts = self.experts if name == layer else None
        if name == "recurrent":
            return LayerKind(recurrent=self.recurrent, experts=experts)
        attention = AttentionSpec(
            scale=self.head_width**-0.5 if self.attention_scale is None else self.attention_scale,
            window=self.window if name == "sliding" else None,
            soft_cap=self.attention_soft_cap,
            sinks=self.sinks,
        )
        rope = (self.sliding_rope if name == "sliding" else None) or self.rope
        rotary = Rotary(int(self.head_width * rope.fraction), rope, self.interleaved_rope)
        sizes = self.num_kv_heads, self.head_width
        return LayerKind(
            attention, None if name == "unrotated" else rotary, *sizes, experts=experts
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str) -> ModelConfig:
        """Reads a parsed config.json of a model of one of the families.

        Args:
          config: the parsed file; both the `rope_theta`/`rope_scaling` style and the
            `rope_parameters` style of transformers 5 are understood.
          source: where it came from, named in errors.

        Raises:
          UserError: a field is missing, has a wrong type, or asks for something this decoder does
            not compute.
        """
        family = _family(config, source)
        row = FAMILIES[family]
        _check_supported(config, family, source)
        for name in row.required:
            required(config, name, source)
        partial = "partial_rotary_factor" in row.fields
        rope, sliding_rope = read_ropes(config, row.defaults, partial, source)
        config = {**row.defaults, **config}
        facts: dict[str, Any] = dict(
            family=family,
            vocab_size=size(config, "vocab_size", source),
            num_layers=size(config, "num_hidden_layers", source),
            model_width=size(config, "hidden_size", source),
            num_heads=size(config, "num_attention_heads", source),
            num_kv_heads=size(config, "num_key_value_heads", source),
            head_width=_head_width(config, source),
            ffn_width=size(config, "intermediate_size", source),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=False,
            qk_norm=None,
            rms_eps=positive(config, "rms_norm_eps", source),
            rope=rope,
            sliding_rope=sliding_rope,
            max_positions=size(config, "max_position_embeddings", source),
            window=None,
        )
        facts |= {name: fact for name, fact in row.facts.items() if not callable(fact)}
        if row.layer_types is not None and config.get("layer_types") is None:
            config["layer_types"] = row.layer_types(config, source)
        for name in row.fields:
            if config.get(name) is not None and name in READERS:
                fact, read = READERS[name]
                facts[fact] = read(config, name, source)
        facts |= {name: make(facts) for name, make in row.facts.items() if callable(make)}
        for part, make in {"recurrent": Recurrent, "experts": Experts}.items():
            own = [fact for fact in facts if fact.startswith(f"{part}.")]
            if own:
                facts[part] = make(**{fact.partition(".")[2]: facts.pop(fact) for fact in own})
        return _checked(cls(**facts), source)


def _checked(model: ModelConfig, source: str) -> ModelConfig:
    """The model, if its facts fit each other, without those that have no effect."""
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"{source}: num_attention_heads={model.num_heads} is not a multiple of "
            f"num_key_value_heads={model.num_kv_heads}"
        )
    if (experts := model.experts) and not 0 < experts.per_token <= experts.number:
        raise UserError(
            f"{source}: {experts.per_token} experts of {experts.number} for each token: the fields "
            "num_experts_per_tok and num_experts, or num_local_experts, say how many"
        )
    if "sliding" not in model.pattern:
        model = dataclasses.replace(model, window=None, sliding_rope=None)
    elif model.window is None:
        raise UserError(f"{source}: the required field sliding_window is missing")
    elif model.window >= model.max_positions and model.sliding_rope is None:
        kinds = ["full" if kind == "sliding" else kind for kind in model.pattern]
        model = dataclasses.replace(model, window=None, pattern=shortest_period(kinds))
    if (sizes := model.recurrent) and sizes.value_heads % sizes.key_heads:
        raise UserError(
            f"{source}: linear_num_value_heads={sizes.value_heads} is not a multiple of "
            f"linear_num_key_heads={sizes.key_heads}"
        )
    ropes = [rope for rope in (model.rope, model.sliding_rope) if rope is not None]
    for rope in ropes:
        rope.check(model.head_width, source)
    # Beyond them frequencies would depend on a sequence's length.
    limits = [rope.positions for rope in ropes if rope.positions is not None]
    return dataclasses.replace(model, max_positions=min([model.max_positions, *limits]))


def _family(config: dict[str, Any], source: str) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{source}: model_type={brief(family)} is not supported, only {', '.join(FAMILIES)}; "
            "choose a model of one of these families"
        )
    architectures, known = config.get("architectures"), FAMILIES[family].architecture
    if architectures and architectures != [known]:
        raise UserError(
            f"{source}: architectures={brief(architectures)} is not supported, "
            f"model_type {family!r} must be [{known!r}]"
        )
    return family


def _check_supported(config: dict[str, Any], family: str, source: str) -> None:
    row = FAMILIES[family]
    for name, only in _ONLY.items():
        value = config.get(name)
        if name in row.fields or name in row.ignored:
            continue
        if value is not None and value != only:
            raise UserError(f"{source}: {name}={brief(value)} is not supported, only {only!r}")
    known = {*_READ, *_ONLY, *_HARMLESS, *row.fields, *row.ignored}
    for name, value in config.items():
        if name not in known and value and not name.startswith("_"):
            raise UserError(
                f"{source}: {name}={brief(value)} is a field unknown for {family} that may change "
                "what the model computes; remove it from config.json if it does not"
            )
    ends = config.get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise UserError(f"{source}: eos_token_id={brief(ends)} must be an id or a list of ids")
    layer_types, num_layers = config.get("layer_types"), config.get("num_hidden_layers")
    if "layer_types" in row.fields or layer_types is None or type(num_layers) is not int:
        return
    if layer_types != ["full_attention"] * num_layers:
        raise UserError(
            f"{source}: layer_types={brief(layer_types)} is not supported, "
            f"only 'full_attention' in each of the {num_layers} layers"
        )


def _head_width(config: dict[str, Any], source: str) -> int:
    """`head_dim`, by default hidden_size / heads."""
    if config.get("head_dim") is not None:
        return size(config, "head_dim", source)
    width, heads = size(config, "hidden_size", source), config["num_attention_heads"]
    if width % heads:
        raise UserError(
            f"{source}: hidden_size={width} is not a multiple of num_attention_heads={heads}, "
            "and head_dim is not given"
        )
    return width // heads
