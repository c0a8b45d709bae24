"""The jitted decode loop: prefill the prompts, then one token per row and turn until all stop.

Everything stays on the device; the loop ends as soon as every row has emitted an EOS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import constrain
from distill.models.transformer import KVCache, Transformer, init_cache
from distill.sampling.choice import SamplingParams, choose, uniforms
from distill.sampling.request import Rollout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Carry of the decode loop, before the token at response position `position` is chosen.

    Attributes:
      position: int32 scalar, the same for all rows: tokens chosen so far.
      token_b: the last token chosen in each row; not yet in the cache.
      cache: keys and values of the prompt and of all chosen tokens but the last.
      rollout: what has been sampled; final for rows that have stopped.
    """

    position: jax.Array
    token_b: jax.Array
    cache: KVCache
    rollout: Rollout


def make_generate(
    graphdef: nnx.GraphDef,
    params: SamplingParams,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    vocab_size: int,
) -> Callable[..., Rollout]:
    """Builds the jitted `generate(model_params, prompts_bp, prompt_lengths_b, keys_b) -> Rollout`.

    It compiles once per shape of the prompts. Prompts are right-padded and have at least one token
    each; `keys_b` come from `choice.row_keys`.

    Args:
      graphdef: one half of `nnx.split(model, nnx.Param)`; model_params are the other.
      params: sampling parameters.
      eos_ids: any of these ends a response.
      pad_id: fills responses after their end.
      vocab_size: number of real tokens; ids from there on are never chosen.
    """

    @jax.jit
    def generate(model_params, prompts_bp, prompt_lengths_b, keys_b) -> Rollout:
        state = decode(
            nnx.merge(graphdef, model_params),
            prompts_bp,
            prompt_lengths_b,
            keys_b,
            params,
            eos_ids=eos_ids,
            pad_id=pad_id,
            vocab_size=vocab_size,
        )
        return state.rollout

    return generate


def decode(
    model: Transformer,
    prompts_bp: jax.Array,
    prompt_lengths_b: jax.Array,
    keys_b: jax.Array,
    params: SamplingParams,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    vocab_size: int,
) -> DecodeState:
    """What `make_generate` compiles; the state it returns also tells how many turns were needed."""

    def choose_next(state: DecodeState, hidden_bd: jax.Array) -> DecodeState:
        logits_bv = model.logits(hidden_bd[:, None])[:, 0]
        uniform_b2 = uniforms(keys_b, state.position)
        return _append(state, *choose(logits_bv, uniform_b2, params, vocab_size), eos_ids)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.position < params.max_length) & ~jnp.all(state.rollout.stopped_b)

    def turn(state: DecodeState) -> DecodeState:
        running_b = (~state.rollout.stopped_b).astype(jnp.int32)
        hidden_b1d, cache = model.extend(state.token_b[:, None], running_b, state.cache)
        return choose_next(dataclasses.replace(state, cache=cache), hidden_b1d[:, 0])

    batch, prompt_size = prompts_bp.shape
    prompts_bp = constrain(prompts_bp, "batch", "position")
    cache = init_cache(model.config, batch, prompt_size + params.max_length, model.dtype)
    hidden_bpd, cache = model.extend(prompts_bp, prompt_lengths_b, cache)
    # the head sees one position per row, never [b, p, v] logits
    last_b11 = (prompt_lengths_b - 1)[:, None, None]
    hidden_bd = jnp.take_along_axis(hidden_bpd, last_b11, axis=1)[:, 0]
    state = DecodeState(
        position=jnp.zeros((), jnp.int32),
        token_b=jnp.zeros((batch,), jnp.int32),
        cache=cache,
        rollout=_empty_rollout(batch, params.max_length, pad_id),
    )
    return jax.lax.while_loop(unfinished, turn, choose_next(state, hidden_bd))


def _empty_rollout(batch: int, max_length: int, pad_id: int) -> Rollout:
    return Rollout(
        tokens_br=jnp.full((batch, max_length), pad_id, jnp.int32),
        lengths_b=jnp.zeros((batch,), jnp.int32),
        log_probs_br=jnp.zeros((batch, max_length), jnp.float32),
        sampled_log_probs_br=jnp.zeros((batch, max_length), jnp.float32),
        stopped_b=jnp.zeros((batch,), bool),
    )


def _append(
    state: DecodeState,
    token_b: jax.Array,
    log_prob_b: jax.Array,
    sampled_log_prob_b: jax.Array,
    eos_ids: tuple[int, ...],
) -> DecodeState:
    """Writes the chosen tokens at `state.position`; rows that have stopped stay as they are."""

    def write(values_br, new_b):
        column_b = jnp.where(running_b, new_b, values_br[:, state.position])
        return values_br.at[:, state.position].set(column_b)

    rollout = state.rollout
    running_b = ~rollout.stopped_b
    return dataclasses.replace(
        state,
        position=state.position + 1,
        token_b=constrain(token_b, "batch"),
        rollout=Rollout(
            tokens_br=write(rollout.tokens_br, token_b),
            lengths_b=rollout.lengths_b + running_b,
            log_probs_br=write(rollout.log_probs_br, log_prob_b),
            sampled_log_probs_br=write(rollout.sampled_log_probs_br, sampled_log_prob_b),
            stopped_b=rollout.stopped_b | jnp.isin(token_b, jnp.asarray(eos_ids, jnp.int32)),
        ),
    )
