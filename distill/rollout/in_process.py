"""The in-process backend: the sampler shares the trainer's devices or has its own."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distill.sampling.choice import SamplingParams, row_keys
from distill.sampling.decode import make_generate
from distill.sampling.request import Rollout, RolloutRequest
from distill.sharding import copy_to_mesh


class JaxBackend:
    """Samples with the jitted decode loop, on its own copy of the student's weights.

    Args:
      graphdef: of the student, from `nnx.split(model, nnx.Param)`; its dtype is computed in.
      eos_ids: any of these ends a response.
      pad_id: fills responses after their end.
      vocab_size: number of real tokens.
      dtype: of the held weights.
      shardings: of the held weights, a pytree like the student's parameters, on the trainer's mesh;
        default: as they come.
      mesh: samples; on devices other than the trainer's, `refit` copies the weights there, laid out
        in the same way. Default: the current one of whoever calls.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int,
        vocab_size: int,
        dtype: jax.typing.DTypeLike,
        shardings: Any = None,
        mesh: Mesh | None = None,
    ):
        self._pad_id, self._mesh = pad_id, mesh

        def copy(student_params):
            # a true copy even if nothing is cast: the trainer donates its buffers to the next step
            return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), student_params)

        @functools.cache
        def generate_for(params: SamplingParams):
            generate = make_generate(
                graphdef, params, eos_ids=eos_ids, pad_id=pad_id, vocab_size=vocab_size
            )
            return jax.jit(
                lambda weights, prompts_bp, lengths_b, *keys: generate(
                    weights, prompts_bp, lengths_b, row_keys(*keys)
                )
            )

        self._copy = jax.jit(copy, out_shardings=shardings)
        self._generate_for = generate_for
        self._weights: nnx.State | None = None

    def start(self) -> None:
        """Nothing to do: the devices are this process's."""

    def refit(self, student_params: nnx.State, version: int) -> None:
        """One jitted cast and reshard, copied to the sampler's devices if it has its own.

        The old weights are freed first to save memory. Returns when the new ones have arrived.
        """
        self._weights = None
        weights = self._copy(student_params)
        if self._mesh is not None:
            weights = copy_to_mesh(weights, self._mesh)
        self._weights = jax.block_until_ready(weights)

    def generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        """See `RolloutBackend.generate`."""
        # The current mesh is a property of the thread, and the caller's may be the trainer's.
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return self._generate(request)

    def _generate(self, request: RolloutRequest) -> tuple[Rollout, dict[str, float]]:
        if self._weights is None:
            raise RuntimeError("generate before refit: the sampler holds no weights")
        repeats = request.num_generations
        lengths_b = np.repeat([len(prompt) for prompt in request.prompts], repeats).astype(np.int32)
        prompts_bp = np.full((request.num_rows, max(lengths_b)), self._pad_id, np.int32)
        for row, prompt_row in enumerate(prompts_bp):
            prompt_row[: lengths_b[row]] = request.prompts[row // repeats]
        rollout = self._generate_for(request.params)(
            self._weights,
            prompts_bp,
            lengths_b,
            np.asarray(request.seed).astype(np.uint32),
            np.asarray(request.step).astype(np.uint32),
            np.repeat(request.prompt_index, repeats).astype(np.uint32),
            np.tile(np.arange(repeats, dtype=np.uint32), len(request.prompts)),
        )
        return jax.device_get(rollout), {}

    def stop(self) -> None:
        """Frees the held weights."""
        self._weights = None
