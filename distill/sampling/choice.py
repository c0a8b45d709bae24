"""Token choice: logits to tokens with their log-probabilities. Pure functions, one row per request.

Truncation has the order and meaning of Hugging Face transformers' logits warpers: temperature,
then top-k, then top-p, then min-p, each on the distribution that the one before left over.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill.base.errors import UserError

# Below this, float32 logits divided by the temperature come near overflow.
MIN_TEMPERATURE = 1e-6

_LEAST = float(np.finfo(np.float32).tiny)

# Tokens per block of the two-stage draw: about the root of a large vocabulary.
_BLOCK = 128

# Named: a flag may change the default generator, and responses must not depend on it.
KEY_IMPL = "threefry2x32"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. The defaults sample the model's own distribution.

    Attributes:
      max_length: tokens a response may have at most, its EOS included.
      greedy: take the most likely token; temperature and truncation then play no part.
      temperature: divides the logits before truncation and sampling.
      top_k: keep the k most likely tokens (and any tied with the last of them); 0 is off.
      top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 is off.
      min_p: keep tokens at least this fraction as likely as the likeliest; 0 is off.

    Raises:
      UserError: a value is outside its range.
    """

    max_length: int
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        temperature_in_range = MIN_TEMPERATURE <= self.temperature < math.inf
        self._require("max_length", _is_int(self.max_length, 1), "a whole number from 1")
        self._require("greedy", isinstance(self.greedy, bool), "True or False")
        self._require(
            "temperature",
            temperature_in_range,
            f"a finite number from {MIN_TEMPERATURE:g}; for temperature 0 choose greedy decoding",
        )
        self._require("top_k", _is_int(self.top_k, 0), "a whole number from 1, or 0 for off")
        self._require("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1 (1 is off)")
        self._require("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1 (0 is off)")

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise UserError(f"sampling {name}={getattr(self, name)!r}: must be {allowed}")


def _is_int(value, smallest: int) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and value >= smallest


def row_keys(
    seed: ArrayLike, step: ArrayLike, prompt_index_b: ArrayLike, generation_index_b: ArrayLike
) -> jax.Array:
    """Random keys that identify requests, so a request's tokens depend on nothing else.

    The token at response position i uses `fold_in(row_key, i)`: neither the batch a request shares
    nor its row matters. Integers of any width are taken modulo 2**32.

    Returns:
      keys_b, an array of typed PRNG keys.
    """

    def row_key(prompt_index, generation_index):
        key = jax.random.fold_in(step_key, prompt_index)
        return jax.random.fold_in(key, generation_index)

    seed_key = jax.random.key(_uint32(seed), impl=KEY_IMPL)
    step_key = jax.random.fold_in(seed_key, _uint32(step))
    return jax.vmap(row_key)(_uint32(prompt_index_b), _uint32(generation_index_b))


def uniforms(keys_b: jax.Array, position: ArrayLike) -> jax.Array:
    """The random numbers behind each row's token at a response position.

    uniform_b2 in [0, 1), from the keys of `row_keys`; the position is a scalar, or one per row.
    """

    def of_row(key, position):
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))

    return jax.vmap(of_row)(keys_b, jnp.broadcast_to(position, keys_b.shape))


def _uint32(x: ArrayLike) -> jax.Array:
    # numpy wraps 64-bit integers; jnp.asarray would refuse a large Python int
    return jnp.asarray(x if isinstance(x, jax.Array) else np.asarray(x).astype(np.uint32)).astype(
        jnp.uint32
    )


def choose(
    logits_bv: jax.Array, uniform_b2: jax.Array | None, params: SamplingParams, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token per row, each row with its own random numbers.

    Args:
      logits_bv: float32. Ids from `vocab_size` on are padding rows of the output head: they are
        never chosen and carry no probability.
      uniform_b2: from `uniforms`; not read when greedy.
      params: static.
      vocab_size: static, number of real tokens.

    Returns:
      tokens_b: int32.
      log_probs_b: log-probability under the model's own distribution (temperature 1, untruncated).
      sampled_log_probs_b: log-probability under the distribution the token was drawn from; 0 when
        greedy, where the choice is certain.
    """
    if vocab_size < logits_bv.shape[-1]:
        real_v = jnp.arange(logits_bv.shape[-1]) < vocab_size
        logits_bv = jnp.where(real_v, logits_bv, -jnp.inf)
    if params.greedy:
        tokens_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        return tokens_b, _log_prob(logits_bv, tokens_b), jnp.zeros(tokens_b.shape, jnp.float32)
    assert uniform_b2 is not None
    scores_bv = logits_bv if params.temperature == 1 else logits_bv / params.temperature
    scores_bv = _truncate(scores_bv, params, vocab_size)
    tokens_b, sampled_log_probs_b = _draw(scores_bv, uniform_b2)
    if scores_bv is logits_bv:  # tokens were drawn from the model's own distribution
        return tokens_b, sampled_log_probs_b, sampled_log_probs_b
    return tokens_b, _log_prob(logits_bv, tokens_b), sampled_log_probs_b


def _log_prob(scores_bv: jax.Array, tokens_b: jax.Array) -> jax.Array:
    return _at(scores_bv, tokens_b) - jax.nn.logsumexp(scores_bv, axis=-1)


def _at(scores_bv: jax.Array, tokens_b: jax.Array) -> jax.Array:
    return jnp.take_along_axis(scores_bv, tokens_b[:, None], axis=-1)[:, 0]


def _draw(scores_bv: jax.Array, uniform_b2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens and their log-probabilities, by inverse-CDF sampling in two stages.

    A block of the vocabulary, then a token inside it: two random numbers per row instead of one per
    token of the vocabulary (Gumbel-max), and sums over at most V / _BLOCK and _BLOCK numbers, so
    that rare tokens keep their probability in float32. The blocks' sums normalise, too: no other
    pass over the vocabulary.
    """
    highest_b = jnp.max(scores_bv, axis=-1)
    mass_bv = jnp.exp(scores_bv - highest_b[:, None])
    padding = -mass_bv.shape[-1] % _BLOCK
    mass_bnk = jnp.pad(mass_bv, ((0, 0), (0, padding))).reshape(len(mass_bv), -1, _BLOCK)
    mass_bn = mass_bnk.sum(axis=-1)
    block_b = _inverse_cdf(mass_bn, uniform_b2[:, 0])
    inside_bk = jnp.take_along_axis(mass_bnk, block_b[:, None, None], axis=1)[:, 0]
    tokens_b = block_b * _BLOCK + _inverse_cdf(inside_bk, uniform_b2[:, 1])
    log_probs_b = (_at(scores_bv, tokens_b) - highest_b) - jnp.log(mass_bn.sum(axis=-1))
    return tokens_b, log_probs_b


def _inverse_cdf(mass_bn: jax.Array, uniform_b: jax.Array) -> jax.Array:
    """Index n with probability proportional to its mass, int32; never one without mass."""
    # By rounding, sums may differ where nothing is added: what has no mass is no choice.
    cumulated_bn = jnp.where(mass_bn > 0, jnp.cumsum(mass_bn, axis=-1), 0.0)
    total_b = jnp.max(cumulated_bn, axis=-1)
    # Rounded up to the total, no index would be above the threshold.
    threshold_b = jnp.minimum(uniform_b * total_b, jnp.nextafter(total_b, 0.0))
    return jnp.argmax(cumulated_bn > threshold_b[:, None], axis=-1).astype(jnp.int32)


def _truncate(scores_bv: jax.Array, params: SamplingParams, vocab_size: int) -> jax.Array:
    """Sets the scores of excluded tokens to -inf; with all off, it returns the same array."""
    if 0 < params.top_k < vocab_size:
        scores_bv = jnp.where(_in_top_k(scores_bv, params.top_k), scores_bv, -jnp.inf)
    if params.top_p < 1:
        scores_bv = jnp.where(_in_nucleus(scores_bv, params.top_p), scores_bv, -jnp.inf)
    if params.min_p > 0:
        best_b1 = jnp.max(scores_bv, axis=-1, keepdims=True)
        scores_bv = jnp.where(scores_bv >= best_b1 + math.log(params.min_p), scores_bv, -jnp.inf)
    return scores_bv


def _in_top_k(scores_bv: jax.Array, top_k: int) -> jax.Array:
    """True for the k largest, and for those tied with the last of them."""
    order_bv = _order(scores_bv)
    ones_bv = jnp.ones(scores_bv.shape, jnp.float32)
    return order_bv >= _smallest_kept(order_bv, ones_bv, float(top_k))[:, None]


def _in_nucleus(scores_bv: jax.Array, top_p: float) -> jax.Array:
    """True for the smallest set whose probability reaches top_p (Holtzman et al. 2020).

    Among tied tokens those of lower id come first. The likeliest token is always inside.
    """
    top_p = max(top_p, _LEAST)  # what float32 rounds to 0 would keep nothing
    probs_bv = jax.nn.softmax(scores_bv, axis=-1)
    order_bv = _order(scores_bv)
    smallest_b1 = _smallest_kept(order_bv, probs_bv, top_p)[:, None]
    above_bv, tied_bv = order_bv > smallest_b1, order_bv == smallest_b1
    missing_b1 = top_p - jnp.sum(probs_bv, axis=-1, where=above_bv, keepdims=True)
    before_bv = jnp.cumsum(jnp.where(tied_bv, probs_bv, 0.0), axis=-1) - probs_bv
    return above_bv | (tied_bv & (before_bv < missing_b1))


def _order(scores_bv: jax.Array) -> jax.Array:
    """int32 in the order of the float32 scores: bit patterns, negative ones mirrored."""
    # Adding zero makes -0.0 and 0.0 one number.
    bits_bv = jax.lax.bitcast_convert_type(scores_bv + 0.0, jnp.int32)
    return jnp.where(bits_bv < 0, jnp.int32(-(2**31)) - bits_bv - 1, bits_bv)


def _smallest_kept(order_bv: jax.Array, mass_bv: jax.Array, target: float) -> jax.Array:
    """The largest order of which the tokens from there up have a mass of at least `target`.

    Found bit by bit: 32 sums over the vocabulary, where sorting it would take many more passes.
    Where all tokens together miss the target, which rounding can do, the smallest of all int32.
    """

    def set_bit(i, kept_b):
        candidate_b = kept_b + jnp.left_shift(jnp.int32(1), 31 - i)  # wraps to 0 at the sign
        mass_b = jnp.sum(mass_bv, axis=-1, where=order_bv >= candidate_b[:, None])
        return jnp.where(mass_b >= target, candidate_b, kept_b)

    lowest_b = jnp.full(order_bv.shape[0], -(2**31), jnp.int32)
    return jax.lax.fori_loop(0, 32, set_bit, lowest_b)
