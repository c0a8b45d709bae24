"""Rows of a request as single questions to a server, and their replies as arrays."""

from __future__ import annotations

import hashlib
import itertools
from typing import NamedTuple

import numpy as np

from distill.base.errors import RunStopped
from distill.data.tokenizer import Vocabulary
from distill.rollout.vllm.client import Completion, VllmClient
from distill.rollout.vllm.probe import REMEDY
from distill.sampling.choice import SamplingParams
from distill.sampling.request import RolloutRequest, Turns


class Row(NamedTuple):
    """A row's number, its prompt, the seed of its response, and how many tokens that may have."""

    number: int
    prompt: list[int]
    seed: int
    limit: int


class Response(NamedTuple):
    """Token ids, with log-probabilities under the model and under what they were drawn from.

    `sampled`: whether the student wrote the token, else an environment. `stopped`: not cut.
    """

    token_ids: list[int]
    log_probs: list[float]
    sampled_log_probs: list[float]
    sampled: list[bool]
    stopped: bool


def make_rows(request: RolloutRequest) -> list[Row]:
    numbers = (divmod(i, request.num_generations) for i in range(request.num_rows))
    rows = enumerate(zip(numbers, request.limits, strict=True))
    return [
        Row(row, request.prompts[i].tolist(), request_seed(request, i, number), int(limit))
        for row, ((i, number), limit) in rows
    ]


def request_seed(request: RolloutRequest, prompt: int, generation: int) -> int:
    """The row's seed for vLLM, of all that its randomness may depend on."""
    return _hashed(request.seed, request.step, int(request.prompt_index[prompt]), generation)


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a row's turn."""
    return _hashed(seed, turn) if turn else seed


def _hashed(*parts: int) -> int:
    """63 bits."""
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
    turns: Turns | None = None,
) -> Response:
    """One row sampled by one server: a response, or a dialogue from its beginning.

    Every turn is asked for with all that came before, which the server has in its prefix cache.

    Raises:
      RunStopped: a turn does not end where it must, or has ids that are not in use.
      ServerFailed, RequestRefused: see `VllmClient`.
    """
    made: list[tuple[int, float, bool]] = []  # as in a response: drawn with, and sampled
    if turns is not None:
        turns.begin(row.number)
    for turn in itertools.count():
        now = row._replace(
            prompt=row.prompt + [token for token, *_ in made],
            seed=turn_seed(row.seed, turn),
            limit=row.limit - len(made),
        )
        said = _ask_turn(client, now, params, vocabulary)
        made += [(token, log_prob, True) for token, log_prob in zip(*said, strict=True)]
        stopped = said.token_ids[-1] in vocabulary.end_ids
        if turns is None or not stopped:
            break
        reply_t = turns.reply(row.number, np.array(said.token_ids, np.int32))
        if reply_t is None:
            break
        if len(made) + len(reply_t) >= row.limit:
            stopped = False  # no room for another turn
            break
        made += [(token, 0.0, False) for token in reply_t.tolist()]
    token_ids, drawn, sampled = map(list, zip(*made, strict=True))
    log_probs = drawn
    if is_tempered(params, vocabulary.size):
        scores = client.score(row.prompt + token_ids)[len(row.prompt) - 1 :]
        own = [log_prob for _, (log_prob, *_) in scores]
        log_probs = [x if is_own else 0.0 for x, is_own in zip(own, sampled, strict=True)]
    elif params.greedy:
        drawn = [0.0] * len(token_ids)
    return Response(token_ids, log_probs, drawn, sampled, stopped)


def _ask_turn(
    client: VllmClient, row: Row, params: SamplingParams, vocabulary: Vocabulary
) -> Completion:
    """One turn, with the log-probabilities that the server reports."""
    end_ids, vocab_size = vocabulary.end_ids, vocabulary.size
    top_k = params.top_k if params.top_k < vocab_size else 0
    truncation = dict(top_k=top_k, top_p=params.top_p, min_p=params.min_p)
    made = client.complete(
        row.prompt,
        max_tokens=row.limit,
        temperature=0.0 if params.greedy else params.temperature,
        seed=row.seed,
        stop_token_ids=list(end_ids),
        **(truncation if is_tempered(params, vocab_size) else {}),
    )
    ends = [token in end_ids for token in made.token_ids]
    if any(ends[:-1]) or not (ends[-1] or len(ends) == row.limit):
        raise RunStopped(
            f"{client.url} ended a response of {len(ends)} tokens neither at its first end "
            f"token (one of {end_ids}) nor at its limit of {row.limit}: it was started with stop "
            "settings or a logits processor of its own"
        )
    if max(made.token_ids) >= vocab_size:
        raise RunStopped(
            f"{client.url} sampled id {max(made.token_ids)}, but only {vocab_size} are in use: "
            f"{REMEDY}"
        )
    return made


def to_arrays(
    responses: list[Response], params: SamplingParams, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """The fields of a rollout, right-padded to max_length columns; and what was sampled."""
    shape = len(responses), params.max_length
    made = dict(
        tokens_br=np.full(shape, vocabulary.pad_id, np.int32),
        lengths_b=np.array([len(response.token_ids) for response in responses], np.int32),
        log_probs_br=np.zeros(shape, np.float32),
        sampled_log_probs_br=np.zeros(shape, np.float32),
        stopped_b=np.array([response.stopped for response in responses]),
        sampled_br=np.zeros(shape, bool),
    )
    for i, response in enumerate(responses):
        end = len(response.token_ids)
        made["tokens_br"][i, :end] = response.token_ids
        made["log_probs_br"][i, :end] = response.log_probs
        made["sampled_log_probs_br"][i, :end] = response.sampled_log_probs
        made["sampled_br"][i, :end] = response.sampled
    return made
