"""Sampling as it is defined, a forward pass over all tokens for every token: the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.sampling.choice import choose, row_keys, uniforms
from distill.sampling.request import Rollout, RolloutRequest


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def next_tokens(graphdef, weights, params, vocab_size, tokens_bt, lengths_b, position, keys_b):
    """Each row's next token, the number `position` of its response, and both log-probabilities."""
    model = nnx.merge(graphdef, weights)
    last_b11 = (lengths_b - 1)[:, None, None]
    hidden_b1d = jnp.take_along_axis(model(tokens_bt), last_b11, axis=1)
    logits_bv = model.logits(hidden_b1d)[:, 0]
    return choose(logits_bv, uniforms(keys_b, position), params, vocab_size)


def simple_decode(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    request: RolloutRequest,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    vocab_size: int,
) -> Rollout:
    """What `Engine.generate` returns, but for what it measures."""
    repeats, rows, most = request.num_generations, request.num_rows, request.params.max_length
    prompts = [prompt for prompt in request.prompts for _ in range(repeats)]
    longest = max(map(len, prompts))
    tokens_bt = np.zeros((rows, longest + most), np.int32)
    for row, prompt in zip(tokens_bt, prompts, strict=True):
        row[: len(prompt)] = prompt
    starts_b = np.array([len(prompt) for prompt in prompts])
    generation_b = np.tile(np.arange(repeats), len(request.prompts))
    keys_b = row_keys(
        request.seed, request.step, np.repeat(request.prompt_index, repeats), generation_b
    )
    rollout = Rollout(
        tokens_br=np.full((rows, most), pad_id, np.int32),
        lengths_b=np.zeros(rows, np.int32),
        log_probs_br=np.zeros((rows, most), np.float32),
        sampled_log_probs_br=np.zeros((rows, most), np.float32),
        stopped_b=np.zeros(rows, bool),
    )
    params = dataclasses.replace(request.params, max_length=1)
    limits, given, sampled_br = request.limits.copy(), {}, np.ones((rows, most), bool)
    for position in range(most):
        running_b = ~rollout.stopped_b & (position < limits)
        sizes = starts_b + rollout.lengths_b, np.int32(position), keys_b
        chosen = next_tokens(graphdef, weights, params, vocab_size, tokens_bt, *sizes)
        token_b, log_prob_b, sampled_log_prob_b = map(np.array, jax.device_get(chosen))
        reads_b = np.array([bool(given.get(row)) for row in range(rows)])
        sampled_br[:, position] = ~reads_b
        token_b[reads_b] = [given[row].pop(0) for row in np.flatnonzero(reads_b)]
        log_prob_b[reads_b] = sampled_log_prob_b[reads_b] = 0
        tokens_bt[running_b, (starts_b + position)[running_b]] = token_b[running_b]
        rollout.tokens_br[running_b, position] = token_b[running_b]
        rollout.log_probs_br[running_b, position] = log_prob_b[running_b]
        rollout.sampled_log_probs_br[running_b, position] = sampled_log_prob_b[running_b]
        rollout.lengths_b[running_b] += 1
        ended_b = running_b & ~reads_b & np.isin(token_b, eos_ids)
        if request.turns is None:
            rollout.stopped_b[ended_b] = True
            continue
        for row in np.flatnonzero(ended_b):
            of_row = np.arange(most) <= position
            begun = np.where(of_row & ~sampled_br[row], np.arange(1, most + 1), 0).max()
            request.turns.ask(row, rollout.tokens_br[row, begun : position + 1])
        for row, tokens_t in request.turns.replies(wait=True) if ended_b.any() else ():
            rollout.stopped_b[row] = tokens_t is None
            if tokens_t is not None and position + 1 + len(tokens_t) < limits[row]:
                given[row] = list(tokens_t)
            elif tokens_t is not None:
                limits[row] = position + 1
    if request.turns is None:
        return rollout
    sampled_br |= np.arange(most) >= rollout.lengths_b[:, None]
    columns = dict(sampled=sampled_br, weight=sampled_br.astype(np.float32))
    return dataclasses.replace(rollout, columns=columns)
