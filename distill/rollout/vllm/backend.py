"""Rollouts from vLLM servers: prompts and answers as token ids over HTTP, refits over a folder."""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from distill.base.errors import RunStopped, UserError
from distill.rollout.vllm import checks
from distill.rollout.vllm.client import RequestRefused, ServerFailed, VllmClient
from distill.rollout.vllm.dispatch import answer_all, keep_trying
from distill.rollout.vllm.probe import REMEDY, Expected, Probe
from distill.rollout.vllm.rows import (
    Answer,
    Ends,
    Row,
    ask_row,
    check_temperature,
    make_rows,
    needs_scores,
    to_rollout,
)
from distill.rollout.vllm.server import OwnServer
from distill.rollout.vllm.weights import WeightsFolder
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest

SECTION = "policy.generation.vllm"
_FRESH = "default"  # what a server calls its weights until somebody names them
_MOST_RESTARTS = 5  # of a server within one batch


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds: for an answer, of retries, for a server's start."""

    request: float
    retry: float
    start: float


class VllmBackend:
    """A `RolloutBackend` that samples on vLLM servers.

    Every row is a request of its own with a seed made of (seed, step, prompt index, generation
    index): its tokens do not depend on the server, the batch or the order, as far as the server's
    arithmetic does not.

    Args:
      clients: of servers that are running; none if `own` is given.
      own: a server to start at the first refit, from the weights of that refit.
      weights: where refits are written.
      probe: compares the servers with the trainer.
      student_config: what a server's model must look like.
      tokenizer: the student's.
      params: how tokens will be chosen; decides what is asked of the servers at the start.
      eos_ids: any of these ends a response.
      pad_id: fills responses after their end.
      vocab_size: ids in use.
      max_length: tokens of prompt and response at most.
      limits: time-outs.
    """

    def __init__(
        self,
        clients: Sequence[VllmClient],
        *,
        own: OwnServer | None,
        weights: WeightsFolder,
        probe: Probe,
        student_config: Any,
        tokenizer: Any,
        params: SamplingParams,
        eos_ids: tuple[int, ...],
        pad_id: int,
        vocab_size: int,
        max_length: int,
        limits: Limits,
    ):
        self._clients, self._own, self._limits = list(clients), own, limits
        self._weights, self._probe = weights, probe
        self._student_config, self._tokenizer, self._params = student_config, tokenizer, params
        self._ends, self._pad_id, self._vocab_size = Ends(eos_ids, vocab_size), pad_id, vocab_size
        self._max_length, self._room = max_length, 0
        self._run = secrets.token_hex(4)  # tells this run's refits from those of others
        self._held: _Held | None = None
        self._tied: set[str] = set()  # URLs of servers whose model is known to be tied
        self._believed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._restarts: Counter[str] = Counter()  # by URL, as far as they were noticed and mended
        self._refit_gap = 0.0

    def start(self) -> None:
        """Checks the servers, or that one can be started; see `RolloutBackend.start`."""
        if needs_scores(self._params, self._vocab_size):
            check_temperature(self._params)
        if self._own is not None:
            self._own.check()
            return
        checks.await_up(self._clients, self._limits.start, SECTION)
        self._each(self._check_server)

    def refit(self, student_params: nnx.State, version: int) -> None:
        """Writes the weights, has all servers load them, and compares log-probabilities.

        The first refit starts the own server, and is rehearsed with other weights (probe.py).
        """
        folder = self._weights.write(student_params, version)
        expected = self._probe.expected(student_params)
        if self._own is not None and not self._clients:
            self._launch(folder)
        first = self._held is None
        if first:
            self._rehearse(student_params, expected)
        self._held = _Held(f"distill-{self._run}-{version}", folder, expected, far_apart=first)
        gaps = self._each(lambda client: self._trying(lambda: self._load(client)))
        self._held = dataclasses.replace(self._held, far_apart=False)
        self._refit_gap = max(gaps)

    def generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        """See `RolloutBackend.generate`.

        Measures refit_gap (mean |nats| between servers and trainer at the probe) and retries (rows
        asked again).
        """
        if self._held is None:
            raise RuntimeError("generate before refit: the servers hold no weights of this run")
        self._check_request(request)
        answers, retries = self._answers(make_rows(request), request.params)
        rollout = to_rollout(answers, request.params, self._ends.eos_ids, self._pad_id)
        measured = {
            "generation/refit_gap": self._refit_gap,
            "generation/retries": float(retries),
        }
        return rollout, measured

    def stop(self) -> None:
        """Ends the own server; others go on running, with the last weights."""
        self._held = None
        if self._own is not None:
            self._own.stop()
            self._clients = []

    # ---- servers ----

    def _each(self, action) -> list[Any]:
        """Results of `action` for all servers at once."""
        with ThreadPoolExecutor(len(self._clients)) as pool:
            return list(pool.map(action, self._clients))

    def _trying(self, action) -> Any:
        def checked():
            if self._own is not None:
                self._own.check_running()
            return action()

        return keep_trying(checked, self._limits.retry)

    def _needed(self) -> int:
        """Tokens of context; a scored sequence is a prompt, after which one token is sampled."""
        return self._max_length + needs_scores(self._params, self._vocab_size)

    def _check_server(self, client: VllmClient) -> None:
        def check():
            room = checks.check_context(client, self._needed())
            checks.check_dev_mode(client)
            if needs_scores(self._params, self._vocab_size):
                checks.check_log_probs_mode(client)
            client.post("/resume")  # a trainer that died during a refit left it paused
            checks.check_same_model(client, self._student_config, self._vocab_size)
            checks.check_same_tokenizer(client, self._tokenizer, self._vocab_size)
            if checks.is_tied(client):
                self._tied.add(client.url)
            return room

        room = self._trying(check)
        self._room = min(room, self._room or room)

    def _launch(self, folder: Path) -> None:
        url = self._own.launch(folder)
        client = VllmClient(url, self._own.api_key, self._limits.request)
        self._own.await_up(client, self._limits.start)
        self._clients = [client]
        self._check_server(client)

    def _rehearse(self, student_params: nnx.State, true: Expected) -> None:
        self._believed = {
            client.url: (self._trying(lambda client=client: self._probe.measure(client)), true.new)
            for client in self._clients
        }
        folder = self._weights.write_rehearsal(student_params)
        expected = self._probe.expected_in_rehearsal(student_params)
        self._held = _Held(f"distill-{self._run}-rehearsal", folder, expected, far_apart=True)
        try:
            self._each(lambda client: self._trying(lambda: self._load(client)))
        finally:
            self._held = None
            self._weights.drop_rehearsal()

    def _load(self, client: VllmClient) -> float:
        """Has a server load the held weights; returns its gap to the trainer."""
        held = self._held
        client.post("/pause", mode="wait")
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(held.folder)}}
        try:
            client.post("/collective_rpc", arguments)
        except (ServerFailed, RequestRefused) as error:
            if error.status is None:
                raise
            raise UserError(
                f"the refit was refused: {error}; the server must see {held.folder} under this "
                "path and serve the same model; its own log says more, and it must be restarted: "
                f"{REMEDY}"
            ) from None
        if not client.post("/reset_prefix_cache")["success"]:
            raise ServerFailed(f"{client.url}: its prefix cache is in use and keeps old states")
        client.post("/update_weight_version", {"new_version": held.name})
        client.post("/resume")
        measured = self._probe.measure(client)
        gap = self._probe.check(
            client.url,
            measured,
            held.expected,
            self._believed.get(client.url),
            far_apart=held.far_apart,
            tied=client.url in self._tied,
        )
        self._believed[client.url] = measured, held.expected.new
        return gap

    def _recover(self, client: VllmClient) -> None:
        """After a failed request: a server that has restarted has the weights of its start."""
        if self._own is not None:
            self._own.check_running()
        if not self._is_fresh(client):
            return
        self._load(client)
        self._restarts[client.url] += 1  # at the end: what was asked before has unknown weights

    def _is_fresh(self, client: VllmClient) -> bool:
        """Whether the server has restarted since the refit.

        Raises:
          RunStopped: it has weights of another run.
        """
        name = client.get("/weight_info", timeout=min(30.0, self._limits.request))["weight_version"]
        if name not in (self._held.name, _FRESH):
            raise RunStopped(
                f"{client.url} was refitted by somebody else (its weights are called {name!r}): "
                "give every run servers of its own"
            )
        return name == _FRESH

    # ---- rows ----

    def _check_request(self, request: RolloutRequest) -> None:
        check_temperature(request.params)
        if needs_scores(request.params, self._vocab_size) > needs_scores(
            self._params, self._vocab_size
        ):
            raise UserError(
                "these sampling parameters truncate or temper, unlike those that the servers were "
                "checked for: start the run with them"
            )
        longest = max(len(prompt) for prompt in request.prompts)
        needed = longest + request.params.max_length + (self._needed() - self._max_length)
        if needed > self._room:
            raise UserError(
                f"a prompt of {longest} tokens and {request.params.max_length} of an answer need a "
                f"context of {needed}, the servers have {self._room}: start them with "
                f"--max-model-len {needed}, or lower policy.max_total_sequence_length"
            )

    def _answers(self, rows: list[Row], params: SamplingParams) -> tuple[list[Answer], int]:
        """Every row's answer by the held weights, and the number of failed tries."""

        def ask(client: VllmClient, row: Row) -> tuple[Answer, int]:
            restarts = self._restarts[client.url]
            return ask_row(client, row, params, self._ends), restarts

        answers: list[Answer | None] = [None] * len(rows)
        left, retries, restarts = list(range(len(rows))), 0, Counter(self._restarts)
        while left:
            got, given_by, failed = answer_all(
                self._clients, [rows[i] for i in left], ask, self._recover, self._limits.retry
            )
            for client in self._clients:
                # One that restarted between two requests failed none.
                self._trying(lambda client=client: self._recover(client))
            for i, (answer, count), client in zip(left, got, given_by, strict=True):
                # The count says that the held weights were in place before and until now.
                answers[i] = answer if count == self._restarts[client.url] else None
            left = [i for i in left if answers[i] is None]
            retries += failed + len(left)
            for url, count in (self._restarts - restarts).items():
                if count > _MOST_RESTARTS:
                    raise RunStopped(f"{url} restarted {count} times in one batch: see its log")
        return answers, retries


@dataclasses.dataclass(frozen=True)
class _Held:
    """The weights that the servers must have."""

    name: str
    folder: Path
    expected: Expected
    far_apart: bool
