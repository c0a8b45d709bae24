"""Rollouts from vLLM servers: token ids over HTTP, refits over a folder.

Of several processes, the first one speaks to the servers. All write the weights, and all get the
rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from distill.base import processes
from distill.base.errors import RunStopped, UserError
from distill.config.policy import VllmServers
from distill.data.tokenizer import Vocabulary
from distill.rollout.base import HeldWeights
from distill.rollout.vllm.checks import await_all_up, await_up
from distill.rollout.vllm.client import ServerFailed, VllmClient, VllmError, connect
from distill.rollout.vllm.dispatch import ask_all, at_each
from distill.rollout.vllm.probe import REMEDY, Probe
from distill.rollout.vllm.rows import ask_row, make_rows, to_arrays
from distill.rollout.vllm.server import OwnServer
from distill.rollout.vllm.weights import WeightsFolder
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest

SECTION = "policy.generation.vllm"
_FRESH = "default"  # what a server calls its weights until somebody names them
_LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to it


class VllmBackend:
    """A `RolloutBackend` that samples on vLLM servers.

    Every row is a request of its own with a seed made of (seed, step, prompt index, generation
    index): its tokens do not depend on the server, the batch or the order, as far as the server's
    arithmetic does not.

    Args:
      own: a server to start at the first refit, from the weights of that refit.
      check: raises UserError if a server that is up will not do.
      num_held: refits that wait for their batch; servers load one when it comes.
    """

    def __init__(
        self,
        servers: VllmServers,
        *,
        own: OwnServer | None,
        check: Callable[[VllmClient], None],
        weights: WeightsFolder,
        probe: Probe,
        params: SamplingParams,
        vocabulary: Vocabulary,
        max_length: int,
        num_held: int = 1,
    ):
        self._servers, self._clients = servers, connect(servers, SECTION)
        self._own, self._check = own, check
        self._weights, self._probe, self._params = weights, probe, params
        self._vocabulary, self._max_length = vocabulary, max_length
        self._run = secrets.token_hex(4)  # tells this run's refits from those of others
        self._held, self._holds_one = HeldWeights[_Held](num_held), num_held == 1
        self._loaded: _Held | None = None
        self._refit_gap = 0.0

    def start(self) -> None:
        """Checks the servers, or that one can be started; see `RolloutBackend.start`."""
        if not self._params.greedy and self._params.temperature < _LOWEST_TEMPERATURE:
            raise UserError(
                f"sampling temperature={self._params.temperature}: vLLM takes "
                f"{_LOWEST_TEMPERATURE} for anything lower; choose that, or decoding_method=greedy"
            )
        processes.from_first(self._check_all)

    def _check_all(self) -> None:
        if self._own is not None:
            self._own.check()
            return
        await_all_up(self._clients, self._servers, SECTION)
        self._at_each(self._check)

    def refit(self, student_params: nnx.State, version: int) -> None:
        """Writes the weights, has all servers load them, and compares log-probabilities.

        The first refit starts the own server, and is rehearsed with other weights (probe.py). Where
        batches wait for earlier weights, servers load these for the first request that names them.
        """
        student_params = self._weights.merged(student_params)
        folder = self._weights.write(student_params, version)
        first, expected = self._loaded is None, self._probe.expected(student_params)
        held = _Held(f"distill-{self._run}-{version}", folder, expected, far_apart=first)
        rehearsal = None
        if first:
            folder = self._weights.write_rehearsal(student_params)
            expected = self._probe.expected_in_rehearsal(student_params)
            rehearsal = _Held(f"distill-{self._run}-rehearsal", folder, expected, far_apart=True)
        if first or self._holds_one:
            self._load_all(held, rehearsal)
        self._held.make_room(version)
        self._held.hold(version, held)

    def generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        """See `RolloutBackend.generate`.

        Measures refit_gap (mean |nats| between servers and trainer at the probe) and retries (rows
        asked again).
        """
        held = self._held.of(request)
        params, longest = request.params, max(len(prompt) for prompt in request.prompts)
        if longest + params.max_length > self._max_length:
            raise UserError(
                f"a prompt of {longest} tokens and {params.max_length} of a response are more than "
                f"policy.max_total_sequence_length={self._max_length}, which servers were asked for"
            )

        if held is not self._loaded:
            self._load_all(held, None)

        def ask(client: VllmClient, row):
            return ask_row(client, row, params, self._vocabulary, request.turns)

        def sample() -> dict[str, np.ndarray]:
            responses, retries = ask_all(
                self._clients, make_rows(request), ask, self._restore, self._servers.retry_timeout
            )
            made = to_arrays(responses, params, self._vocabulary)
            return made | dict(retries=np.array(retries))

        made: dict[str, Any] = processes.arrays_from_first(sample)
        retries = float(made.pop("retries").item())
        measured = {"generation/refit_gap": self._refit_gap, "generation/retries": retries}
        sampled_br = made.pop("sampled_br")
        columns = dict(sampled=sampled_br, weight=sampled_br.astype(np.float32))
        return Rollout(**made, columns=columns if request.turns else {}), measured

    def stop(self) -> None:
        """Ends the own server; others go on running, with the last weights."""
        self._held.clear()
        self._loaded = None
        if self._own is not None:
            self._own.stop()
            self._clients = []

    def _at_each(self, action) -> list:
        return at_each(self._clients, action, self._servers.retry_timeout)

    def _launch(self, own: OwnServer, folder: Path) -> VllmClient:
        url = own.launch(folder)
        client = VllmClient(url, own.api_key, self._servers.request_timeout, own.check_running)
        await_up(client, self._servers.start_timeout, f"see {own.log}, or raise start_timeout")
        return client

    def _load_all(self, held: _Held, rehearsal: _Held | None) -> None:
        """Has all servers load weights, at first those of the rehearsal."""
        self._refit_gap = processes.from_first(lambda: self._loaded_gap(held, rehearsal))
        self._loaded = held

    def _loaded_gap(self, held: _Held, rehearsal: _Held | None) -> float:
        """Of the first process: loads everywhere and returns the widest gap."""
        try:
            if self._own is not None and not self._clients:
                self._clients = [self._launch(self._own, held.folder)]
                self._at_each(self._check)
            if rehearsal is not None:
                self._at_each(lambda client: self._probe.look(client, held.expected))
                self._at_each(lambda client: self._load(client, rehearsal))
        finally:
            self._weights.drop_rehearsal()
        return max(self._at_each(lambda client: self._load(client, held)))

    def _load(self, client: VllmClient, held: _Held) -> float:
        """Has a server load weights; returns its gap to the trainer."""
        client.post("/pause?mode=wait")
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(held.folder)}}
        try:
            client.post("/collective_rpc", arguments)
        except VllmError as error:
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
        return self._probe.verify(client, held.expected, far_apart=held.far_apart)

    def _restore(self, client: VllmClient) -> bool:
        """Gives the held weights to a server that has restarted since; returns whether it had.

        Raises:
          RunStopped: it has weights of another run.
        """
        held = self._loaded
        assert held is not None  # rows are asked after a refit
        name = client.get("/weight_info", timeout=30.0)["weight_version"]
        if name == held.name:
            return False
        if name != _FRESH:
            raise RunStopped(
                f"{client.url} was refitted by somebody else (its weights are called {name!r}): "
                "give every run servers of its own"
            )
        self._load(client, held)
        return True


class _Held(NamedTuple):
    """The weights that the servers must have."""

    name: str
    folder: Path
    expected: np.ndarray
    far_apart: bool  # from those before
