"""A teacher that is a vLLM server: the likeliest tokens at every response position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.base.errors import UserError
from distill.config.schema import VllmTeacher
from distill.losses.objective import TopKScores
from distill.rollout.vllm import checks
from distill.rollout.vllm.client import RequestRefused, Scores, VllmClient
from distill.rollout.vllm.dispatch import ask_all, at_each
from distill.sampling.request import Rollout

SECTION = "teacher.vllm"
_ABSENT = -1
_NEVER = -100.0  # log-probability beside an absent id: finite, and nothing


class ServerTeacher:
    """Scores sequences on vLLM servers that serve the teacher.

    Args:
      clients: one per server.
      servers: tokens asked for at every position, and how long servers are waited for.
      tokenizer: the student's, which must be the teacher's.
      vocab_size: ids in use.
      max_length: tokens of prompt and response at most.
    """

    def __init__(
        self,
        clients: Sequence[VllmClient],
        servers: VllmTeacher,
        *,
        tokenizer: Any,
        vocab_size: int,
        max_length: int,
    ):
        self._clients, self._servers = list(clients), servers
        self._top_k = min(servers.top_k, vocab_size)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._max_length = max_length

    def start(self) -> None:
        """Checks the servers.

        Raises:
          UserError: one cannot be reached, has another tokenizer, too small a context, or does not
            list as many tokens.
        """
        remedy = f"start it, or correct {SECTION}.urls or raise {SECTION}.start_timeout"
        for client in self._clients:
            checks.await_up(client, self._servers.start_timeout, remedy)
        at_each(self._clients, self._check, self._servers.retry_timeout)

    def score(
        self, prompts_bp: np.ndarray, prompt_lengths_b: np.ndarray, rollout: Rollout
    ) -> TopKScores:
        """The top_k tokens, and the actual one if it is another, at every response position.

        Args:
          prompts_bp: prompts, right-padded.
          prompt_lengths_b: their lengths.
          rollout: the responses, host arrays.

        Returns:
          Numpy arrays (b, r, top_k + 1), of padding only beyond each response.

        Raises:
          RunStopped: a server stayed away.
        """
        tokens_br, lengths_b = np.asarray(rollout.tokens_br), np.asarray(rollout.lengths_b)
        rows = [
            (prompt_p[:size].tolist() + tokens_r[:length].tolist(), int(size))
            for prompt_p, size, tokens_r, length in zip(
                prompts_bp, prompt_lengths_b, tokens_br, lengths_b, strict=True
            )
        ]
        replies, _ = ask_all(
            self._clients, rows, self._ask, _is_another, self._servers.retry_timeout
        )
        shape = *tokens_br.shape, self._top_k + 1
        ids_brk = np.full(shape, _ABSENT, np.int32)
        log_probs_brk = np.full(shape, _NEVER, np.float32)
        for row, positions in enumerate(replies):
            for position, scores in enumerate(positions):
                ids, log_probs = self._real(scores)
                ids_brk[row, position, : len(ids)] = ids
                log_probs_brk[row, position, : len(ids)] = log_probs
        return TopKScores(ids_brk, log_probs_brk)

    def _ask(self, client: VllmClient, row: tuple[list[int], int]) -> list[Scores]:
        tokens, prompt_length = row
        return client.score(tokens, self._top_k)[prompt_length - 1 :]

    def _real(self, scores: Scores) -> Scores:
        """Without ids that pad the teacher's vocabulary, whose probability the others get."""
        ids, log_probs = scores
        if max(ids) < self._vocab_size:
            return scores
        pairs = [pair for pair in zip(ids, log_probs, strict=True) if pair[0] < self._vocab_size]
        padding = sum(np.exp(p) for i, p in zip(*scores, strict=True) if i >= self._vocab_size)
        kept = np.log1p(-min(padding, 1 - 1e-6))
        return [i for i, _ in pairs], [p - kept for _, p in pairs]

    def _check(self, client: VllmClient) -> None:
        checks.check_context(client, self._max_length + 1)
        checks.check_same_tokenizer(client, self._tokenizer, self._vocab_size)
        try:
            client.score([0, self._vocab_size - 1], self._top_k)
        except RequestRefused as error:
            raise UserError(
                f"{client.url} does not score tokens as teacher.vllm.top_k={self._top_k} asks: "
                f"{error}; start it with --max-logprobs {self._top_k} or more"
            ) from None


def _is_another(client: VllmClient) -> bool:
    """Readies a server that has failed; one that has restarted still serves the teacher."""
    client.get("/health")
    return False
