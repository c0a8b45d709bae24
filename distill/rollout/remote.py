"""A sampler in processes of its own: the trainer's order, the sampler's obey.

The first process of each side speaks for it (`base.processes`). Orders have numbers, and are obeyed
in that order by all processes of the sampler alike: programs of several devices, a refit among
them, begin in the same order everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distill.base import processes
from distill.base.errors import RunInterrupted, RunStopped, UserError
from distill.base.mesh import send_to_mesh
from distill.rollout.environment import Dialogues
from distill.rollout.in_process import JaxBackend
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest

Arrays = dict[str, np.ndarray]
_REFIT, _GENERATE, _END = "refit", "generate", "end"
# Of a message: what is no array, as JSON; and columns of a rollout, among its other arrays.
_FACTS, _COLUMN, _PROMPT_COLUMN = "facts", "column/", "prompt column/"
_PLAIN = "num_generations", "version", "seed", "step"  # of a request
_OF_ROLLOUT = "tokens_br", "lengths_b", "log_probs_br", "sampled_log_probs_br", "stopped_b"
_numbers, _one_at_a_time = itertools.count(), threading.Lock()


class RemoteSampler:
    """The backend of the trainer's processes; see `RolloutBackend`.

    Args:
      backend: does what is done on the trainer's devices.
      mesh: the sampler's.
    """

    def __init__(self, backend: JaxBackend, mesh: Mesh):
        self._copy, self._mesh = backend.copy, mesh

    def start(self) -> None:
        """Nothing to do: the sampler's processes have come with the others."""

    def refit(self, student_params: nnx.State, version: int) -> None:
        """One jitted cast and reshard, and a collective of all processes."""
        _order(_REFIT, version=version)
        send_to_mesh(self._copy(student_params), self._mesh)

    def generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        """See `RolloutBackend.generate`."""

        def ask() -> Arrays:
            arrays, facts = _of_request(request)
            return processes.receive(f"reply/{_order(_GENERATE, arrays, **facts)}")

        made = processes.arrays_from_first(ask)
        if isinstance(request.turns, Dialogues):
            outcome = {name: made.pop(name) for name in request.turns.outcome()}
            request.turns.take_outcome(**outcome)
        return _to_rollout(made, request), _facts(made)

    def stop(self) -> None:
        """Nothing to do: the sampler's processes end with the session."""


@contextlib.contextmanager
def dismissing() -> Iterator[None]:
    """Of the trainer's processes: at its end the sampler's end, unless an error ends them all."""
    try:
        yield
    except RunInterrupted:
        _order(_END)
        raise
    _order(_END)


def serve(
    backend: JaxBackend,
    receive: Callable[[], nnx.State],
    begin_dialogues: Callable[[np.ndarray], Dialogues] | None,
    *,
    refits_meanwhile: bool,
) -> None:
    """Obeys, as one of the sampler's processes, until the trainer's have done.

    Args:
      receive: the weights of a refit; a collective of all processes.
      begin_dialogues: for rows of the dataset; None: a response is all there is.
      refits_meanwhile: whether a refit may be ordered while a request is sampled.
    """
    number = 0  # of the next order

    def take() -> Arrays:
        nonlocal number
        order = processes.arrays_from_first(lambda: processes.receive(f"order/{number}"))
        number += 1
        return order

    def refit_if_ordered() -> None:
        if processes.from_first(lambda: processes.was_sent(f"order/{number}")):
            backend.hold(_facts(take())["version"], receive)

    def generate(order: Arrays) -> Arrays:
        turns = begin_dialogues(order["rows"]) if begin_dialogues and "rows" in order else None
        between = refit_if_ordered if refits_meanwhile else None
        rollout, measured = backend.generate(_to_request(order, turns, between))
        return _of_rollout(rollout, measured) | (turns.outcome() if turns else {})

    while (kind := _facts(order := take())["kind"]) != _END:
        if kind == _REFIT:
            backend.hold(_facts(order)["version"], receive)
        elif processes.is_first():
            processes.send(f"reply/{number - 1}", functools.partial(generate, order))
        else:
            with contextlib.suppress(UserError, RunStopped):  # which the first one sends
                generate(order)


def _order(kind: str, arrays: Mapping[str, np.ndarray] | None = None, **facts: Any) -> int:
    """Gives the next order, as only the first of the trainer's processes does; its number."""
    if not processes.is_first():
        return -1
    with _one_at_a_time:
        number = next(_numbers)
        processes.send(f"order/{number}", lambda: _with_facts(arrays or {}, kind=kind, **facts))
    return number


def _with_facts(arrays: Mapping[str, np.ndarray], **facts: Any) -> Arrays:
    return {**arrays, _FACTS: np.frombuffer(json.dumps(facts).encode(), np.uint8)}


def _facts(arrays: Arrays) -> dict[str, Any]:
    return json.loads(arrays[_FACTS].tobytes())


# ---------------------------------------------------------------------- requests and rollouts


def _of_request(request: RolloutRequest) -> tuple[Arrays, dict[str, Any]]:
    arrays = dict(
        tokens=np.concatenate(request.prompts),
        lengths=np.array([len(prompt) for prompt in request.prompts]),
        prompt_index=request.prompt_index,
        limits=request.limits,
    )
    if isinstance(request.turns, Dialogues):
        arrays["rows"] = request.turns.row_b
    facts = {name: getattr(request, name) for name in _PLAIN}
    return arrays, {**facts, "params": dataclasses.asdict(request.params)}


def _to_request(
    order: Arrays, turns: Dialogues | None, between: Callable[[], None] | None
) -> RolloutRequest:
    facts = _facts(order)
    return RolloutRequest(
        tuple(np.split(order["tokens"], np.cumsum(order["lengths"])[:-1])),
        order["prompt_index"],
        SamplingParams(**facts["params"]),
        max_lengths=order["limits"],
        turns=turns,
        between=between,
        **{name: facts[name] for name in _PLAIN},
    )


def _of_rollout(rollout: Rollout, measured: Mapping[str, float]) -> Arrays:
    arrays = {name: getattr(rollout, name) for name in _OF_ROLLOUT}
    arrays |= {f"{_COLUMN}{name}": values for name, values in rollout.columns.items()}
    for name, values in rollout.prompt_columns.items():
        arrays[f"{_PROMPT_COLUMN}{name}"] = np.concatenate(values)
    return _with_facts(arrays, **measured)


def _to_rollout(made: Arrays, request: RolloutRequest) -> Rollout:
    lengths = np.repeat([len(prompt) for prompt in request.prompts], request.num_generations)
    return Rollout(
        **{name: made[name] for name in _OF_ROLLOUT},
        columns=_named(made, _COLUMN),
        prompt_columns={
            name: np.split(values, np.cumsum(lengths)[:-1])
            for name, values in _named(made, _PROMPT_COLUMN).items()
        },
    )


def _named(arrays: Arrays, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): values
        for name, values in arrays.items()
        if name.startswith(prefix)
    }
