"""Rotary embeddings (2104.09864): what config.json says of them, and the frequencies.

A scaling stretches a model's positions beyond those that it was first trained for. Its fields have
the names that they have in config.json; `stretch` gives what transformers' modeling_rope_utils
computes. Frequencies never depend on a sequence's length: its first keys are cached before it is
known. A model whose frequencies would change at some length has so many positions here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.base.errors import UserError
from distill.models.fields import brief, flag, positive, required, size

Stretched = tuple[np.ndarray, float]  # frequencies, and the factor of cosines and sines


@dataclass(frozen=True)
class Scaling:
    """Base of the scalings."""

    @property
    def positions(self) -> int | None:
        """Up to which frequencies are the same for all lengths; None: everywhere."""
        return None

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> Stretched:
        """From the frequencies of channel pairs without it, which are powers of 1 / theta."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Scaling):
    """Positions are divided by the factor."""

    factor: float

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> Stretched:
        return frequencies_h / self.factor, 1.0


@dataclass(frozen=True)
class Dynamic(Scaling):
    """Begins beyond the model's positions, where the base grows with a sequence's length."""

    factor: float

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> Stretched:
        return frequencies_h, 1.0


@dataclass(frozen=True)
class Llama3(Scaling):
    """Slows down the pairs that turn seldom within the original positions."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> Stretched:
        turns_h = self.original_max_position_embeddings * frequencies_h / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        keep_h = np.clip((turns_h - low) / (high - low), 0, 1)
        return frequencies_h * (keep_h + (1 - keep_h) / self.factor), 1.0


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN (2309.00071); Ministral 3's beta scales queries beyond the original positions."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    llama_4_scaling_beta: float | None = None

    @property
    def positions(self) -> int | None:
        plain = self.llama_4_scaling_beta is None
        return None if plain else self.original_max_position_embeddings

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> Stretched:
        half, length = len(frequencies_h), self.original_max_position_embeddings

        def pair_of(turns: float) -> float:
            """The pair that turns so often within the original positions."""
            return half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        high += 0.001 * (low == high)
        slow_h = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        return frequencies_h * (1 - slow_h + slow_h / self.factor), self._attention_factor()

    def _attention_factor(self) -> float:
        def growth(weight: float) -> float:
            return 1 + 0.1 * weight * math.log(max(self.factor, 1.0))

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return growth(1.0)
        return growth(self.mscale) / growth(self.mscale_all_dim)


@dataclass(frozen=True)
class LongRope(Scaling):
    """LongRoPE (2402.13753); sequences beyond the original positions have the long factors."""

    factor: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None

    @property
    def positions(self) -> int | None:
        return self.original_max_position_embeddings

    def stretch(self, frequencies_h: np.ndarray, theta: float) -> Stretched:
        factor = self.attention_factor
        if factor is None:
            growth = math.log(max(self.factor, 1.0))
            factor = math.sqrt(1 + growth / math.log(self.original_max_position_embeddings))
        return frequencies_h / np.array(self.short_factor), factor


SCALINGS: dict[str, type[Scaling]] = {
    "linear": Linear,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "longrope": LongRope,
    "llama3": Llama3,
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of layers, whatever the width of their heads.

    Attributes:
      theta: base of the frequencies.
      scaling: of the frequencies.
      fraction: of a head's channels that are rotated.
    """

    theta: float
    scaling: Scaling | None = None
    fraction: float = 1.0

    @property
    def positions(self) -> int | None:
        """Up to which frequencies are the same for all lengths; None: everywhere."""
        return None if self.scaling is None else self.scaling.positions

    def check(self, head_width: int, source: str) -> None:
        """Raises UserError unless heads of this width can be rotated so."""
        rotated = head_width * self.fraction
        if rotated % 2 or not 2 <= rotated <= head_width:
            raise UserError(
                f"{source}: head_dim={head_width} must be even, rotary embeddings pair its halves"
                f"{'' if rotated == head_width else f', here of {rotated:g} channels'}"
            )
        factors = self.scaling.short_factor if isinstance(self.scaling, LongRope) else ()
        if factors and len(factors) != rotated // 2:
            raise UserError(
                f"{source}: short_factor has {len(factors)} numbers, the {rotated:g} rotated "
                f"channels of a head call for {rotated / 2:g}"
            )


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of the first `width` channels of every head.

    Channel i is paired with i + width / 2; interleaved, 2i is with 2i + 1.
    """

    width: int
    rope: Rope
    interleaved: bool

    def frequencies(self) -> Stretched:
        """Radians per position of each pair, float32, and the factor of cosines and sines."""
        theta, scaling = self.rope.theta, self.rope.scaling
        frequencies_h = theta ** -(np.arange(0, self.width, 2) / self.width)
        if scaling is None:
            return frequencies_h.astype(np.float32), 1.0
        frequencies_h, factor = scaling.stretch(frequencies_h, theta)
        return frequencies_h.astype(np.float32), factor


def read_ropes(
    config: dict[str, Any], defaults: Mapping[str, Any], partial: bool, source: str
) -> tuple[Rope, Rope | None]:
    """Rotary embeddings of a model, and of its sliding layers where they have their own.

    Args:
      config: as written, in the style of `rope_theta` and `rope_scaling`, or of the
        `rope_parameters` of transformers 5, which may be given by type of layer.
      defaults: of the family's fields.
      partial: whether the family has models that rotate a part of their heads.
      source: named in errors.
    """
    style = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    if style == "rope_parameters" and config.get("rope_scaling") is not None:
        raise UserError(f"{source}: rope_parameters and rope_scaling are both given; remove one")
    rope = config.get(style) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: {style}={brief(rope)} must be an object")
    filled = {**defaults, **config}

    def read(rope: dict[str, Any], where: str) -> Rope:
        name = "partial_rotary_factor"
        fractions = [each[name] for each in (rope, filled) if each.get(name) is not None]
        fraction = positive({name: fractions[0]}, name, where) if fractions else 1.0
        if fraction != 1 and not partial:
            raise UserError(f"{where}: {name}={brief(fraction)} is not supported, only 1")
        return Rope(positive(rope, "rope_theta", where), _scaling(rope, filled, where), fraction)

    local = filled.get("rope_local_base_freq")
    if rope.keys() & {"full_attention", "sliding_attention"}:
        full, sliding = (
            read(_of_type(rope, name, theta, f"{source}: {style}"), f"{source}: {style}.{name}")
            for name, theta in (
                ("full_attention", filled.get("rope_theta")),
                ("sliding_attention", local or filled.get("rope_theta")),
            )
        )
    elif rope and local is not None and style == "rope_parameters":
        raise UserError(f"{source}: {style}={brief(rope)} must have an entry for each layer type")
    else:
        theta = _theta(rope, config, filled, style, source)
        full = sliding = read(rope | {"rope_theta": theta}, f"{source}: {style}")
        if local is not None:
            theta = positive(filled, "rope_local_base_freq", source)
            sliding = Rope(theta, None, full.fraction)
    return full, None if sliding == full else sliding


def _of_type(rope: dict[str, Any], name: str, theta: Any, where: str) -> dict[str, Any]:
    """The entry of one type of layer."""
    if odd := rope.keys() - {"full_attention", "sliding_attention"}:
        raise UserError(f"{where}: {sorted(odd)[0]} is not supported beside entries of layer types")
    entry = required(rope, name, where)
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {name}={brief(entry)} must be an object")
    return {"rope_theta": theta} | entry


def _theta(
    rope: dict[str, Any], config: dict[str, Any], filled: dict[str, Any], style: str, source: str
) -> float:
    """`rope_theta`, which stands beside the scaling or in it."""
    where = f"{source}: {style}"
    inner = positive(rope, "rope_theta", where) if "rope_theta" in rope else None
    if inner is not None and config.get("rope_theta") is None:
        return inner
    outer = positive(filled, "rope_theta", source)
    if inner not in (None, outer):
        raise UserError(f"{where}: rope_theta={inner} contradicts rope_theta={outer}")
    return outer


def _scaling(rope: dict[str, Any], config: dict[str, Any], where: str) -> Scaling | None:
    # Written under both names by some versions of transformers; 'type' is the older one.
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if not isinstance(kind, str) or kind not in {"default", *SCALINGS}:
        raise UserError(
            f"{where}: rope_type={brief(kind)} is not supported, only default, "
            f"{', '.join(SCALINGS)}"
        )
    fields = () if kind == "default" else dataclasses.fields(SCALINGS[kind])
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    # Positions of images have three numbers; those of text have one three times.
    known |= {"mrope_section", "mrope_interleaved"}
    known |= {field.name for field in fields}
    for name, value in rope.items():
        if name not in known and value and value != config.get(name):
            raise UserError(
                f"{where}: {name}={brief(value)} is unknown for rope_type {kind!r}, "
                f"only {', '.join(sorted(known))}"
            )
    if kind == "default":
        return None
    rope = _with_lengths(rope, config, kind, where)
    values = {field.name: _value(rope, field, where) for field in fields}
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise UserError(
            f"{where}: low_freq_factor={values['low_freq_factor']} must be less than "
            f"high_freq_factor={values['high_freq_factor']}"
        )
    return SCALINGS[kind](**values)


def _with_lengths(
    rope: dict[str, Any], config: dict[str, Any], kind: str, where: str
) -> dict[str, Any]:
    """With the original length and its ratio to the model's, where they stand elsewhere."""
    original = "original_max_position_embeddings"
    candidates = (*(x.get(original) for x in (config, rope)), config.get("max_position_embeddings"))
    rope = rope | {original: next((each for each in candidates if each is not None), None)}
    if kind in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = size(config, "max_position_embeddings", where) / size(
            rope, original, where
        )
    return rope


def _numbers(rope: dict[str, Any], name: str, where: str) -> tuple[float, ...]:
    numbers = required(rope, name, where)
    if not isinstance(numbers, list | tuple) or not numbers:
        raise UserError(f"{where}: {name}={brief(numbers)} must be a list of numbers")
    return tuple(positive({name: each}, name, where) for each in numbers)


# How a scaling's fields are read, by type.
_TYPES: dict[str, Callable[[dict[str, Any], str, str], Any]] = {
    "float": positive,
    "float | None": positive,
    "int": size,
    "bool": flag,
    "tuple[float, ...]": _numbers,
}


def _value(rope: dict[str, Any], field: dataclasses.Field, where: str) -> Any:
    if rope.get(field.name) is None and field.default is not dataclasses.MISSING:
        return field.default
    return _TYPES[str(field.type)](rope, field.name, where)
