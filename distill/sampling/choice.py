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

from distill.errors import UserError

# Below this, float32 logits divided by the temperature come near overflow.
MIN_TEMPERATURE = 1e-6


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

    Args:
      seed, step: scalars.
      prompt_index_b: position of each row's prompt in the dataset.
      generation_index_b: which of the answers to that prompt the row is.

    Returns:
      keys_b, an array of typed PRNG keys.
    """

    def row_key(prompt_index, generation_index):
        key = jax.random.fold_in(step_key, prompt_index)
        return jax.random.fold_in(key, generation_index)

    step_key = jax.random.fold_in(jax.random.key(_uint32(seed)), _uint32(step))
    return jax.vmap(row_key)(_uint32(prompt_index_b), _uint32(generation_index_b))


def _uint32(x: ArrayLike) -> jax.Array:
    # numpy wraps 64-bit integers; jnp.asarray would refuse a large Python int
    return jnp.asarray(x if isinstance(x, jax.Array) else np.asarray(x).astype(np.uint32)).astype(
        jnp.uint32
    )


def choose(
    logits_bv: jax.Array, keys_b: jax.Array, params: SamplingParams, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token per row by the Gumbel-max trick, each row with its own key.

    Args:
      logits_bv: float32. Ids from `vocab_size` on are padding rows of the output head: they are
        never chosen and carry no probability.
      keys_b: PRNG keys; unused when greedy.
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
    scores_bv = _truncate(logits_bv / params.temperature, params, vocab_size)
    tokens_b = jax.vmap(jax.random.categorical)(keys_b, scores_bv).astype(jnp.int32)
    return tokens_b, _log_prob(logits_bv, tokens_b), _log_prob(scores_bv, tokens_b)


def _log_prob(scores_bv: jax.Array, tokens_b: jax.Array) -> jax.Array:
    chosen_b = jnp.take_along_axis(scores_bv, tokens_b[:, None], axis=-1)[:, 0]
    return chosen_b - jax.nn.logsumexp(scores_bv, axis=-1)


def _truncate(scores_bv: jax.Array, params: SamplingParams, vocab_size: int) -> jax.Array:
    """Sets the scores of excluded tokens to -inf; a truncation that is off costs nothing."""
    if 0 < params.top_k < vocab_size:
        smallest_kept_b1 = jax.lax.top_k(scores_bv, params.top_k)[0][:, -1:]
        scores_bv = jnp.where(scores_bv >= smallest_kept_b1, scores_bv, -jnp.inf)
    if params.top_p < 1:
        scores_bv = jnp.where(_in_nucleus(scores_bv, params.top_p), scores_bv, -jnp.inf)
    if params.min_p > 0:
        best_b1 = jnp.max(scores_bv, axis=-1, keepdims=True)
        scores_bv = jnp.where(scores_bv >= best_b1 + math.log(params.min_p), scores_bv, -jnp.inf)
    return scores_bv


def _in_nucleus(scores_bv: jax.Array, top_p: float) -> jax.Array:
    """True for the smallest set whose probability reaches top_p (Holtzman et al. 2020).

    Among tied tokens those of lower id come first. The likeliest token is always inside.
    """
    order_bv = jnp.argsort(scores_bv, axis=-1, descending=True)
    probs_bv = jax.nn.softmax(jnp.take_along_axis(scores_bv, order_bv, axis=-1), axis=-1)
    # a token is needed if the more likely ones fall short of top_p
    before_bv = jnp.cumsum(probs_bv, axis=-1) - probs_bv
    needed_bv = (before_bv < top_p).at[:, 0].set(True)
    return jnp.put_along_axis(jnp.zeros_like(needed_bv), order_bv, needed_bv, -1, inplace=False)
