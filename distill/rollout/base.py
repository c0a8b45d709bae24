"""What the trainer asks of whatever samples the student's responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from flax import nnx

from distill.base.registry import Registry
from distill.config.schema import KNOWN_BACKENDS
from distill.sampling.request import Rollout, RolloutRequest


class RolloutBackend(Protocol):
    """Samples responses with the weights of the latest refit.

    `refit` is called in the trainer's thread under the trainer's mesh, `generate` there or in
    another one beside training; the two never at the same time.
    """

    def start(self) -> None:
        """Acquires what generation needs, such as servers.

        Raises:
          UserError: what is needed is not there, or is not what the config says.
        """

    def refit(self, student_params: nnx.State, version: int) -> None:
        """Moves the student's current weights to the sampler; later training leaves them alone.

        The time until it returns is logged as the time of the refit.

        Args:
          student_params: on the trainer's mesh.
          version: updates the student has had; at least that of the refit before.

        Raises:
          RunStopped: the sampler does not compute with the new weights.
        """

    def generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        """A response for every row of the request.

        Returns:
          The rollout, numpy arrays of `request.num_rows` rows and `params.max_length` columns in
          the request's order; and what was measured, by metric name: where there are slots,
          'generation/slot_occupancy' (share of slots that were decoding), 'generation/queue_wait'
          (mean seconds that a row waited for one), 'generation/prefill_seconds' and
          'generation/decode_seconds'. What can be read off any rollout need not be measured.

        Raises:
          UserError: the request can never be served, such as a prompt longer than the cache.
          RunStopped: generation failed; never fewer rows, never rows of another request.
          RuntimeError: before the first refit.
        """

    def stop(self) -> None:
        """Releases what `start` and `refit` acquired; may be called more than once."""


@dataclasses.dataclass(frozen=True)
class BackendParts:
    """What a backend of the user's own is made from.

    `nnx.merge(graph, params)` is the student; `build_in_process` makes the `jax` backend, for one
    that adds to it.
    """

    graph: nnx.GraphDef
    tokenizer: Any
    vocab_size: int
    end_ids: tuple[int, ...]
    student_folder: Path
    workdir: Path
    build_in_process: Callable[[], RolloutBackend]


BackendMaker = Callable[[BackendParts], RolloutBackend]

# The built-in ones are made by build/sampler.py, which knows their sections of the config.
_BACKENDS = Registry(
    "policy.generation.backend",
    "distill.rollout.base.register_backend",
    dict.fromkeys(KNOWN_BACKENDS, "distill.rollout"),
)


def register_backend(name: str) -> Callable[[BackendMaker], BackendMaker]:
    """Decorator: makes what builds from `BackendParts` available as `generation.backend=name`.

    With `samples_ahead = True`, an attribute of it, it says that its backend may `generate` while
    the trainer's devices are busy: it has devices of its own, and `async_steps=1` may be set.

    UserError when the name is taken.
    """
    return _BACKENDS.register(name)


def get_backend(name: str) -> BackendMaker:
    """What was registered under `name`; UserError when there is nothing."""
    return _BACKENDS.get(name)
