"""What the trainer asks of whatever samples the student's responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from flax import nnx

from distill.base.errors import RunStopped, UserError
from distill.base.registry import Registry, describe, name_of, own_values
from distill.config.policy import KNOWN_BACKENDS
from distill.sampling.request import Rollout, RolloutRequest

T = TypeVar("T")


class RolloutBackend(Protocol):
    """Samples responses with the student's weights.

    `refit` is called in the trainer's thread under the trainer's mesh, `generate` there or in
    another one beside training, for one request at a time. Sampling ahead by more than one update,
    `refit` may be called during `generate`, and a request names an earlier refit's weights.
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
          student_params: on the trainer's mesh; of a student with adapters,
            `models.lora.merged` makes plain arrays.
          version: updates the student has had; at least that of the refit before. Requests may
            name it until that of a refit is higher by `async_steps`.

        Raises:
          RunStopped: the sampler does not compute with the new weights.
        """

    def generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        """A response for every row of the request, by the weights of its version.

        Returns:
          The rollout, numpy arrays of `request.num_rows` rows and `params.max_length` columns in
          the request's order; and what was measured, by metric name: where there are slots,
          'generation/slot_occupancy' (share of slots that were decoding), 'generation/queue_wait'
          (mean seconds that a row waited for one), 'generation/prefill_seconds' and
          'generation/decode_seconds'. What can be read off any rollout need not be measured.

        Raises:
          UserError: the request can never be served, such as a prompt longer than the cache.
          RunStopped: generation failed; never fewer rows, never rows of another request.
          RuntimeError: before the refit of that version, or long after it.
        """

    def stop(self) -> None:
        """Releases what `start` and `refit` acquired; may be called more than once."""


class HeldWeights(Generic[T]):
    """What a backend keeps of refits, by version: for batches that wait to be sampled."""

    def __init__(self, count: int):
        self._count, self._held = count, dict[int, T]()

    def make_room(self, version: int) -> None:
        """Before a refit, forgets what is as old as no request will be behind it."""
        oldest = version - self._count + 1
        self._held = {v: held for v, held in self._held.items() if oldest <= v < version}

    def hold(self, version: int, weights: T) -> None:
        self._held = self._held | {version: weights}

    def of(self, request: RolloutRequest) -> T:
        """The weights that are to sample; see `RolloutBackend.generate`."""
        held = self._held
        version = max(held, default=None) if request.version is None else request.version
        if version not in held:
            raise RuntimeError(f"generate before refit: no weights of {version} updates are held")
        return held[version]

    def clear(self) -> None:
        self._held = {}


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
BACKENDS = Registry(
    "policy.generation.backend",
    "distill.rollout.base.register_backend",
    dict.fromkeys(KNOWN_BACKENDS, "distill.rollout"),
)


def register_backend(name: str) -> Callable[[BackendMaker], BackendMaker]:
    """Decorator: makes what builds from `BackendParts` available as `generation.backend=name`.

    With `samples_ahead = N`, an attribute of it, it says that its backend may `generate` while the
    trainer's devices are busy, since it has devices of its own. Then `async_steps` may be up to N.

    Further parameters with defaults are keys of the config: `plugin.NAME`. UserError when the name
    is taken.
    """
    return BACKENDS.register(name, takes=("parts",))


def build_own_backend(name: str, parts: BackendParts, values: Mapping[str, Any]) -> RolloutBackend:
    """The backend registered under `name`, with those of the values that it declares.

    Raises:
      UserError: it cannot be built, or is none.
    """
    maker = BACKENDS.get(name)
    options = own_values(maker, ("parts",), values)
    where = f"policy.generation.backend={name}: {name_of(maker)}"
    try:
        backend = maker(parts, **options)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{where} fails: {describe(error)}") from error
    methods = "start", "refit", "generate", "stop"
    if missing := [method for method in methods if not callable(getattr(backend, method, None))]:
        raise UserError(
            f"{where} made a {type(backend).__name__} without {', '.join(missing)}: a backend has "
            f"the methods {', '.join(methods)}"
        )
    return backend


def generate_checked(
    backend: RolloutBackend, request: RolloutRequest
) -> tuple[Rollout, dict[str, float]]:
    """`backend.generate`; raises RunStopped unless it has made what `RolloutBackend` says."""
    made: Any = backend.generate(request)
    rows, width = request.num_rows, request.params.max_length
    try:
        rollout, _ = made
        shapes = [x.shape for x in (rollout.tokens_br, rollout.log_probs_br, rollout.lengths_b)]
        fine = shapes == [(rows, width)] * 2 + [(rows,)]
        fine = fine and 1 <= rollout.lengths_b.min() and rollout.lengths_b.max() <= width
        found = f"a rollout with arrays of shapes {', '.join(map(str, shapes))}"
    except Exception:  # of anything else
        fine, found = False, f"a {type(made).__name__}"
    if not fine:
        raise RunStopped(
            f"{name_of(backend)}.generate returned {found}: it must return a Rollout of {rows} "
            f"rows and {width} columns with 1 to {width} tokens each, and a dict of measured "
            "numbers"
        )
    return made
