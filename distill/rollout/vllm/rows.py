"""Rows of a request as single questions to a server, and their replies as arrays."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from distill.base.errors import RunStopped
from distill.data.tokenizer import Vocabulary
from distill.rollout.vllm.client import VllmClient
from distill.rollout.vllm.probe import REMEDY
from distill.sampling.choice import SamplingParams
from distill.sampling.request import RolloutRequest


class Row(NamedTuple):
    """A prompt, the seed of its response, and how many tokens that may have."""

    prompt: list[int]
    seed: int
    limit: int


class Response(NamedTuple):
    """Token ids, with log-probabilities under the model and under what they were drawn from."""

    token_ids: list[int]
    log_probs: list[float]
    sampled_log_probs: list[float]


def make_rows(request: RolloutRequest) -> list[Row]:
    numbers = (divmod(i, request.num_generations) for i in range(request.num_rows))
    return [
        Row(request.prompts[prompt].tolist(), request_seed(request, prompt, number), int(limit))
        for (prompt, number), limit in zip(numbers, request.limits, strict=True)
    ]


def request_seed(request: RolloutRequest, prompt: int, generation: int) -> int:
    """The row's seed for vLLM, 63 bits of a hash of all that its randomness may depend on."""
    parts = request.seed, request.step, int(request.prompt_index[prompt]), generation
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_tempered(params: SamplingParams, vocab_size: int) -> bool:
    """Whether tokens are drawn from another distribution than the model's own.

    Then the server reports their log-probabilities under the former (logprobs mode
    processed_logprobs), and scores the finished response for the latter.
    """
    truncated = 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0
    return not params.greedy and (params.temperature != 1 or truncated)


def ask_row(
    client: VllmClient,
    row: Row,
    params: SamplingParams,
    vocabulary: Vocabulary,
) -> Response:
    """One row sampled by one server.

    Raises:
      RunStopped: the response does not end where it must, or has ids that are not in use.
      ServerFailed, RequestRefused: see `VllmClient`.
    """
    end_ids, vocab_size = vocabulary.end_ids, vocabulary.size
    tempered = is_tempered(params, vocab_size)
    top_k = params.top_k if params.top_k < vocab_size else 0
    truncation = dict(top_k=top_k, top_p=params.top_p, min_p=params.min_p)
    token_ids, sampled_log_probs = client.complete(
        row.prompt,
        max_tokens=row.limit,
        temperature=0.0 if params.greedy else params.temperature,
        seed=row.seed,
        stop_token_ids=list(end_ids),
        **(truncation if tempered else {}),
    )
    ends = [token in end_ids for token in token_ids]
    if any(ends[:-1]) or not (ends[-1] or len(token_ids) == row.limit):
        raise RunStopped(
            f"{client.url} ended a response of {len(token_ids)} tokens neither at its first end "
            f"token (one of {end_ids}) nor at its limit of {row.limit}: it was started with stop "
            "settings or a logits processor of its own"
        )
    if max(token_ids) >= vocab_size:
        raise RunStopped(
            f"{client.url} sampled id {max(token_ids)}, but only {vocab_size} are in use: {REMEDY}"
        )
    log_probs = sampled_log_probs
    if tempered:
        scores = client.score(row.prompt + token_ids)[len(row.prompt) - 1 :]
        log_probs = [own for _, (own, *_) in scores]
    elif params.greedy:
        sampled_log_probs = [0.0] * len(token_ids)
    return Response(token_ids, log_probs, sampled_log_probs)


def to_arrays(
    responses: list[Response], params: SamplingParams, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """The fields of a rollout: right-padded host arrays, max_length columns."""
    shape = len(responses), params.max_length
    tokens_br = np.full(shape, vocabulary.pad_id, np.int32)
    log_probs_br, sampled_log_probs_br = np.zeros((2, *shape), np.float32)
    for i, (token_ids, log_probs, sampled_log_probs) in enumerate(responses):
        end = len(token_ids)
        tokens_br[i, :end] = token_ids
        log_probs_br[i, :end] = log_probs
        sampled_log_probs_br[i, :end] = sampled_log_probs
    return dict(
        tokens_br=tokens_br,
        lengths_b=np.array([len(response.token_ids) for response in responses], np.int32),
        log_probs_br=log_probs_br,
        sampled_log_probs_br=sampled_log_probs_br,
        stopped_b=np.array(
            [response.token_ids[-1] in vocabulary.end_ids for response in responses]
        ),
    )
