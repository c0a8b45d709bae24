"""The engine's device programs: prefill, insert, decode, move. Pure functions of their arguments.

Only the cache lives on the device between calls; what else a slot is (its newest token, its length,
its key) is a few numbers that the host holds and passes in. p: part, c or w: slot, m: inserted row,
g: prefilled prompt, t: decode step of a call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import constrain, constrain_whole
from distill.models import routes
from distill.models.attention import make_rotations
from distill.models.cache import new_cache
from distill.models.decoding import (
    LoopWeights,
    decode_step,
    first_tails,
    make_walk,
    prefill,
    stack_tails,
)
from distill.models.transformer import Transformer
from distill.sampling import cache as caches
from distill.sampling.attention import Kernel, prefix_attention
from distill.sampling.cache import Cache
from distill.sampling.choice import KEY_IMPL, SamplingParams, choose, uniforms


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the programs are compiled for; any of `eos_ids` ends a response.

    `graphdef` is one half of `nnx.split(model, nnx.Param)`, the weights are the other. `attention`:
    see attention.py. `records_routes`: whether the picked experts are returned, too (`routes`).
    """

    graphdef: nnx.GraphDef
    eos_ids: tuple[int, ...]
    vocab_size: int
    int8: bool
    attention: str | Kernel | None = None
    records_routes: bool = False

    def merge(self, weights: nnx.State) -> Transformer:
        return nnx.merge(self.graphdef, weights)


# Of JAX in a program; on the host of numpy, or a shape.
_Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """What layers keep of prompts, the scores of what follows them, and the recorded routes."""

    cache: Cache
    lengths_pg: jax.Array
    logits_pgv: jax.Array
    picked_pgsm: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The responses in each part's first w slots.

    Attributes:
      token_pw: newest token, not in the cache yet.
      lengths_pw: tokens in the cache.
      made_pw: tokens of the response so far.
      limit_pw: tokens that the response may have.
      key_pw2: data of the row's random key.
      running_pw: False for slots that are idle or wait.
      given_pwt: tokens of dialogues that the next steps read instead of choosing; -1 where none is.
    """

    token_pw: _Array
    lengths_pw: _Array
    made_pw: _Array
    limit_pw: _Array
    key_pw2: _Array
    running_pw: _Array
    given_pwt: _Array = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Tokens of some decode steps, with their log-probabilities as `choose` gives them.

    `picked` are the experts, if they are recorded, of the tokens before: a prompt's last has them
    in its `Prefilled`.
    """

    token: _Array
    log_prob: _Array
    sampled_log_prob: _Array
    picked: _Array = None


def prefill_prompts(
    facts: ModelFacts, weights: nnx.State, tokens_pgs: jax.Array, lengths_pg: jax.Array
) -> Prefilled:
    """Prefills right-padded prompts."""
    model = facts.merge(weights)
    parts, prompts, size = tokens_pgs.shape
    tokens_bs = constrain(tokens_pgs.reshape(-1, size), "batch", "position")
    hidden_bsd, kept, picked_bsm = prefill(model, tokens_bs, lengths_pg.reshape(-1))
    # the head sees one position per prompt
    last_b11 = (lengths_pg.reshape(-1) - 1)[:, None, None]
    logits_bv = model.logits(jnp.take_along_axis(hidden_bsd, last_b11, axis=1))[:, 0]
    cache = new_cache(model.config, parts, kept, facts.int8)
    logits_pgv = logits_bv.reshape(parts, prompts, logits_bv.shape[-1])
    if picked_bsm is None or not facts.records_routes:
        return Prefilled(cache, lengths_pg, logits_pgv)
    picked_pgsm = picked_bsm.reshape(*tokens_pgs.shape, -1)
    return Prefilled(cache, lengths_pg, logits_pgv, constrain_whole(picked_pgsm))


def insert_rows(
    facts: ModelFacts,
    cache: Cache,
    prefilled: Prefilled,
    source_pm: jax.Array,
    slot_pm: jax.Array,
    key_pm2: jax.Array,
    params: SamplingParams,
) -> tuple[Cache, Chosen]:
    """Gives prompts source_pm of each part slots slot_pm, and chooses their first new tokens."""
    lengths_pm = jnp.take_along_axis(prefilled.lengths_pg, source_pm, axis=1)
    cache = caches.insert(cache, prefilled.cache, source_pm, slot_pm, lengths_pm)
    logits_pmv = jnp.take_along_axis(prefilled.logits_pgv, source_pm[:, :, None], axis=1)
    keys_b, logits_bv = _keys(key_pm2), logits_pmv.reshape(-1, logits_pmv.shape[-1])
    chosen = Chosen(*choose(logits_bv, uniforms(keys_b, 0), params, facts.vocab_size))
    return cache, constrain_whole(jax.tree.map(lambda x: x.reshape(source_pm.shape), chosen))


def decode_rows(
    facts: ModelFacts,
    weights: nnx.State,
    loop_weights: LoopWeights,
    cache: Cache,
    rows: Rows,
    stop_at: jax.Array,
    params: SamplingParams,
    size: int,
    steps: int,
) -> tuple[Cache, Chosen, jax.Array]:
    """Up to `steps` further tokens for every running row, which are the first w slots.

    Args:
      cache: donated; its slots have room for `steps` tokens behind their lengths.
      stop_at: (2,): return early once at most this many rows run in all, or in every part.
      size: positions of the cache that may be read; no running row is longer.

    Returns:
      The cache, tokens (steps, p, w), and the number of steps made; a row's tokens after its end
      mean nothing.
    """
    model = facts.merge(weights)
    parts, width = rows.token_pw.shape

    def merged(x):
        return constrain(x.reshape(-1, *x.shape[2:]), "batch", *[None] * (x.ndim - 2))

    of_rows = rows.lengths_pw, rows.made_pw, rows.limit_pw, rows.key_pw2
    lengths_b, made_b, limit_b, key_b2 = map(merged, of_rows)
    kinds = model.config.kinds
    prefix_of = prefix_attention(facts.attention, cache, rows.lengths_pw, size, model.dtype, kinds)
    walk = make_walk(model, loop_weights, prefix_of)
    # Of all steps at once: in the loop, XLA takes sines anew for every head of every layer, and
    # random numbers are many small operations, which take longer to start than to run.
    rotations = make_rotations(model.config, lengths_b[:, None] + jnp.arange(steps))
    positions_tb = made_b + jnp.arange(steps)[:, None]
    uniform_tb2 = jax.vmap(uniforms, (None, 0))(_keys(key_b2), positions_tb)

    def goes_on(state):
        step, running_b, *_ = state
        in_part_p = running_b.reshape(parts, width).sum(axis=1)
        return (step < steps) & (in_part_p.sum() > stop_at[0]) & (in_part_p.max() > stop_at[1])

    def advance(state):
        step, running_b, token_b, tail, chosen_tb, count_b = state
        # Slots whose rows go on in a later call remember nothing of the steps after their end.
        remembers_b = None if rows.given_pwt is None else running_b
        hidden_bd, tail, picked_bm = decode_step(
            model, walk, rotations, token_b, lengths_b, step, tail, remembers_b
        )
        logits_bv = model.logits(hidden_bd[:, None], loop_weights.head)[:, 0]
        chosen_b = Chosen(
            *choose(logits_bv, uniform_tb2[step], params, facts.vocab_size),
            picked=picked_bm if facts.records_routes else None,
        )
        ended_b = jnp.isin(chosen_b.token, jnp.asarray(facts.eos_ids, jnp.int32))
        if rows.given_pwt is not None:
            given_b = merged(rows.given_pwt)[:, step]
            token_b = jnp.where(given_b >= 0, given_b, chosen_b.token)
            chosen_b = dataclasses.replace(chosen_b, token=token_b)
            ended_b &= given_b < 0
            count_b += running_b
        chosen_tb = jax.tree.map(lambda x_tb, x_b: x_tb.at[step].set(x_b), chosen_tb, chosen_b)
        ended_b |= made_b + step + 1 >= limit_b
        return step + 1, running_b & ~ended_b, chosen_b.token, tail, chosen_tb, count_b

    state = (
        jnp.int32(0),
        merged(rows.running_pw),
        merged(rows.token_pw),
        first_tails(model, cache, width, steps),
        _no_tokens(steps, parts * width, routes.width(model.config) * facts.records_routes),
        None if rows.given_pwt is None else jnp.zeros_like(made_b),
    )
    step, _, _, tail, chosen_tb, count_b = jax.lax.while_loop(goes_on, advance, state)
    count = step if count_b is None else count_b
    cache = _append(facts, model, cache, tail, rows.lengths_pw, count)
    chosen = jax.tree.map(lambda x: x.reshape(steps, parts, width, *x.shape[2:]), chosen_tb)
    return cache, *constrain_whole((chosen, step))


def _keys(data_x2: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(data_x2.reshape(-1, data_x2.shape[-1]), impl=KEY_IMPL)


def _append(
    facts: ModelFacts, model: Transformer, cache: Cache, tail: Any, lengths_pw, count
) -> Cache:
    """The cache with the loop's first tokens of each row: count_b of them, or as many of all."""
    new = new_cache(model.config, len(lengths_pw), stack_tails(model.config, tail), facts.int8)
    count_b = jnp.broadcast_to(count, lengths_pw.size)
    return caches.append(cache, new, lengths_pw, count_b.reshape(lengths_pw.shape))


def _no_tokens(steps: int, batch: int, picks: int) -> Chosen:
    zeros = jnp.zeros((steps, batch), jnp.float32)
    picked = jnp.zeros((steps, batch, picks), routes.DTYPE) if picks else None
    return Chosen(zeros.astype(jnp.int32), zeros, zeros, picked)
