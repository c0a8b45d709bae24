"""The in-process backend: the sampler shares the trainer's devices or has its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from distill.base.mesh import copy_to_mesh
from distill.models.lora import is_stored, weight
from distill.rollout.base import HeldWeights
from distill.sampling.engine import Engine
from distill.sampling.request import Rollout, RolloutRequest


class JaxBackend:
    """Samples with an engine, on its own copy of the student's weights.

    Args:
      shardings: of the held weights, on the trainer's devices; default: as they come.
      finish: what is made of the cast weights, by which they may be in 8 bits; default: nothing.
      mesh: samples; on devices other than the trainer's, `refit` copies the weights there. Default:
        the current one of whoever calls.
      keep_cache: hold the engine's memory between requests; else the trainer has it meanwhile.
      num_held: copies of the weights at once, for as many batches that wait to be sampled.

    Attributes:
      copy: makes the weights of the student's, on the trainer's devices.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        dtype: jax.typing.DTypeLike,
        shardings: Any = None,
        finish: Callable[[nnx.State], nnx.State] | None = None,
        mesh: Mesh | None = None,
        keep_cache: bool = False,
        num_held: int = 1,
    ):
        self._engine, self._mesh, self._keep_cache = engine, mesh, keep_cache

        def copy(student_params):
            # a true copy even if nothing is cast: the trainer donates its buffers to the next step
            cast = jax.tree.map(
                lambda x: jnp.array(weight(x, dtype), copy=True), student_params, is_leaf=is_stored
            )
            return finish(cast) if finish else cast

        self.copy = jax.jit(copy, out_shardings=shardings)
        self._weights = HeldWeights[nnx.State](num_held)

    def start(self) -> None:
        """Nothing to do: the devices are this process's."""

    def refit(self, student_params: nnx.State, version: int) -> None:
        """One jitted cast and reshard, copied to the sampler's devices if it has its own.

        Old weights are freed first to save memory. Returns when the new ones have arrived.
        """

        def move() -> nnx.State:
            weights = self.copy(student_params)
            return weights if self._mesh is None else copy_to_mesh(weights, self._mesh)

        self.hold(version, move)

    def hold(self, version: int, bring: Callable[[], nnx.State]) -> None:
        """A refit with what `bring` returns, on the sampler's mesh."""
        self._weights.make_room(version)
        self._weights.hold(version, jax.block_until_ready(bring()))

    def generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        """See `RolloutBackend.generate`."""
        weights = self._weights.of(request)
        # The current mesh is a property of the thread, and the caller's may be the trainer's.
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            sampled = self._engine.generate(weights, request)
        if not self._keep_cache:
            self._engine.release()
        return sampled

    def stop(self) -> None:
        """Frees the held weights and the cache."""
        self._weights.clear()
        self._engine.release()
