"""A teacher that is a vLLM server: the likeliest tokens at every response position."""

from __future__ import annotations

import numpy as np

from distill.base import processes
from distill.base.errors import UserError
from distill.config.policy import VllmTeacher
from distill.data.sequences import Sequences
from distill.data.tokenizer import Vocabulary
from distill.rollout.vllm import checks
from distill.rollout.vllm.client import RequestRefused, Scores, VllmClient, connect
from distill.rollout.vllm.dispatch import ask_all, at_each
from distill.teachers.base import Teacher

_ABSENT = -1
_NEVER = -100.0  # log-probability beside an absent id: finite, and nothing


class ServerTeacher(Teacher):
    """A teacher by scores, on vLLM servers that serve it, with the student's vocabulary.

    The first process asks them for all. `section` is that of the config.
    """

    by_scores = True

    def __init__(
        self,
        servers: VllmTeacher,
        vocabulary: Vocabulary,
        max_length: int,
        section: str = "teacher.vllm",
    ):
        self._servers, self._section = servers, section
        self._clients: list[VllmClient] = []
        self._vocabulary, self._max_length = vocabulary, max_length
        self._top_k = min(servers.top_k, vocabulary.size)

    def start(self) -> None:
        """Checks the servers.

        Raises:
          UserError: one cannot be reached, or does not fit the student; or the API key is not set.
        """
        processes.from_first(self._check_all)

    def _check_all(self) -> None:
        self._clients = connect(self._servers, self._section)
        checks.await_all_up(self._clients, self._servers, self._section)
        at_each(self._clients, self._check, self._servers.retry_timeout)

    def score(self, sequences: Sequences) -> dict[str, np.ndarray]:
        """The top_k tokens, and the actual one if it is another, in place of every trained token.

        Returns:
          The columns teacher_ids and teacher_log_probs, of top_k + 1 values for each token.

        Raises:
          RunStopped: a server stayed away.
        """
        return processes.arrays_from_first(lambda: self._scores(sequences))

    def _scores(self, sequences: Sequences) -> dict[str, np.ndarray]:
        # Nothing predicts a first token.
        wanted = [1 + np.flatnonzero(weight_t[1:]) for weight_t in sequences.split("weight")]
        rows = list(zip(sequences.split("tokens"), wanted, strict=True))
        replies, _ = ask_all(
            self._clients, rows, self._ask, _is_another, self._servers.retry_timeout
        )
        shape = sequences.lengths_b.sum(), self._top_k + 1
        ids_nk, log_probs_nk = np.full(shape, _ABSENT, np.int32), np.full(shape, _NEVER, np.float32)
        starts_b = np.cumsum(sequences.lengths_b) - sequences.lengths_b
        for start, position_r, scores_r in zip(starts_b, wanted, replies, strict=True):
            for token, scores in zip(start + position_r, scores_r, strict=True):
                ids, log_probs = self._real(scores)
                ids_nk[token, : len(ids)], log_probs_nk[token, : len(ids)] = ids, log_probs
        return {"teacher_ids": ids_nk, "teacher_log_probs": log_probs_nk}

    def _ask(self, client: VllmClient, row: tuple[np.ndarray, np.ndarray]) -> list[Scores]:
        tokens_t, position_r = row
        scores = client.score(tokens_t.tolist(), self._top_k)
        return [scores[position - 1] for position in position_r]

    def _real(self, scores: Scores) -> Scores:
        """Without ids that pad the teacher's vocabulary, whose probability the others get."""
        ids, log_probs = scores
        if max(ids) < self._vocabulary.size:
            return scores
        pairs = [
            pair for pair in zip(ids, log_probs, strict=True) if pair[0] < self._vocabulary.size
        ]
        padding = sum(np.exp(p) for i, p in zip(*scores, strict=True) if i >= self._vocabulary.size)
        kept = np.log1p(-min(padding, 1 - 1e-6))
        return [i for i, _ in pairs], [p - kept for _, p in pairs]

    def _check(self, client: VllmClient) -> None:
        checks.check_context(client, self._max_length + 1)
        checks.check_same_tokenizer(client, self._vocabulary)
        try:
            client.score([0, self._vocabulary.size - 1], self._top_k)
        except RequestRefused as error:
            raise UserError(
                f"{client.url} does not score tokens as {self._section}.top_k={self._top_k} asks: "
                f"{error}; start it with --max-logprobs {self._top_k} or more"
            ) from None


def _is_another(client: VllmClient) -> bool:
    """Readies a server that has failed; one that has restarted still serves the teacher."""
    client.get("/health")
    return False
