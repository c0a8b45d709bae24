"""Rows of a request as single questions to a server, and their answers as a rollout."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from distill.base.errors import RunStopped, UserError
from distill.rollout.vllm.client import Completion, VllmClient
from distill.rollout.vllm.probe import REMEDY
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest

_LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to it


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt, the seed of its answer, and how many tokens that may have."""

    prompt: list[int]
    seed: int
    limit: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """Token ids, with log-probabilities under the model and under what they were drawn from."""

    token_ids: list[int]
    log_probs: list[float]
    sampled_log_probs: list[float]


@dataclasses.dataclass(frozen=True)
class Ends:
    """Ids that end an answer, and the number of ids in use."""

    eos_ids: tuple[int, ...]
    vocab_size: int


def make_rows(request: RolloutRequest) -> list[Row]:
    repeats = request.num_generations
    return [
        Row(
            request.prompts[i // repeats].tolist(),
            request_seed(request, i // repeats, i % repeats),
            int(limit),
        )
        for i, limit in enumerate(request.limits)
    ]


def request_seed(request: RolloutRequest, prompt: int, generation: int) -> int:
    """The row's seed for vLLM, 63 bits of a hash of all that its randomness may depend on."""
    parts = request.seed, request.step, int(request.prompt_index[prompt]), generation
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def needs_scores(params: SamplingParams, vocab_size: int) -> bool:
    """Whether tokens are drawn from another distribution than the model's own.

    Then the server reports their log-probabilities under the former (logprobs mode
    processed_logprobs), and scores the finished answer for the latter.
    """
    truncated = 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0
    return not params.greedy and (params.temperature != 1 or truncated)


def check_temperature(params: SamplingParams) -> None:
    """Raises UserError for a temperature that vLLM would replace by another."""
    if not params.greedy and params.temperature < _LOWEST_TEMPERATURE:
        raise UserError(
            f"sampling temperature={params.temperature}: vLLM takes {_LOWEST_TEMPERATURE} for "
            "anything lower; choose that, or decoding_method=greedy"
        )


def ask_row(client: VllmClient, row: Row, params: SamplingParams, ends: Ends) -> Answer:
    """One row answered by one server.

    Raises:
      RunStopped: the answer does not end where it must, or has ids that are not in use.
      ServerFailed, RequestRefused: see `VllmClient`.
    """
    options = {
        "max_tokens": row.limit,
        "temperature": 0.0 if params.greedy else params.temperature,
        "seed": row.seed,
        "stop_token_ids": list(ends.eos_ids),
    }
    scored = needs_scores(params, ends.vocab_size)
    if scored:
        top_k = params.top_k if params.top_k < ends.vocab_size else 0
        options |= {"top_k": top_k, "top_p": params.top_p, "min_p": params.min_p}
    completion = client.complete(row.prompt, **options)
    _check(client, completion, row.limit, ends)
    log_probs = sampled_log_probs = completion.log_probs
    if scored:
        scores = client.score(row.prompt + completion.token_ids)
        log_probs = [log_probs[0] for _, log_probs in scores[len(row.prompt) - 1 :]]
    elif params.greedy:
        sampled_log_probs = [0.0] * len(log_probs)
    return Answer(completion.token_ids, log_probs, sampled_log_probs)


def _check(client: VllmClient, completion: Completion, limit: int, ends: Ends) -> None:
    *inner, last = completion.token_ids
    length = len(completion.token_ids)
    whole = last in ends.eos_ids or length == limit
    if any(token in ends.eos_ids for token in inner) or not whole:
        raise RunStopped(
            f"{client.url} ended an answer of {length} tokens neither at its first end token "
            f"(one of {ends.eos_ids}) nor at its limit of {limit}: it was started with "
            "stop settings or a logits processor of its own"
        )
    if max(completion.token_ids) >= ends.vocab_size:
        raise RunStopped(
            f"{client.url} sampled id {max(completion.token_ids)}, but only {ends.vocab_size} are "
            f"in use: {REMEDY}"
        )


def to_rollout(
    answers: list[Answer], params: SamplingParams, eos_ids: tuple[int, ...], pad_id: int
) -> Rollout:
    """Right-padded host arrays, max_length columns."""
    shape = len(answers), params.max_length
    rollout = Rollout(
        tokens_br=np.full(shape, pad_id, np.int32),
        lengths_b=np.array([len(answer.token_ids) for answer in answers], np.int32),
        log_probs_br=np.zeros(shape, np.float32),
        sampled_log_probs_br=np.zeros(shape, np.float32),
        stopped_b=np.array([answer.token_ids[-1] in eos_ids for answer in answers]),
    )
    for i, answer in enumerate(answers):
        length = len(answer.token_ids)
        rollout.tokens_br[i, :length] = answer.token_ids
        rollout.log_probs_br[i, :length] = answer.log_probs
        rollout.sampled_log_probs_br[i, :length] = answer.sampled_log_probs
    return rollout
