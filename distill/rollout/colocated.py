"""The in-process backend: sampler and trainer share the devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from distill.sampling.choice import SamplingParams, row_keys
from distill.sampling.decode import Rollout, make_generate


class ColocatedBackend:
    """Samples with the jitted decode loop, on its own copy of the student's weights.

    Args:
      graphdef: of the student, from `nnx.split(model, nnx.Param)`; its dtype is computed in.
      params: sampling parameters.
      eos_ids: any of these ends a response.
      pad_id: fills responses after their end.
      vocab_size: number of real tokens.
      dtype: of the held weights.
      shardings: of the held weights, a pytree like the student's parameters; default: as they come.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: SamplingParams,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int,
        vocab_size: int,
        dtype: jax.typing.DTypeLike,
        shardings: Any = None,
    ):
        generate = make_generate(
            graphdef, params, eos_ids=eos_ids, pad_id=pad_id, vocab_size=vocab_size
        )

        def copy(student_params):
            # a true copy even if nothing is cast: the trainer donates its buffers to the next step
            return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), student_params)

        def keyed_generate(weights, prompts_bp, prompt_lengths_b, *request):
            return generate(weights, prompts_bp, prompt_lengths_b, row_keys(*request))

        self._copy = jax.jit(copy, out_shardings=shardings)
        self._generate = jax.jit(keyed_generate)
        self._weights: nnx.State | None = None

    def start(self) -> None:
        """Nothing to do: the devices are the trainer's."""

    def refit(self, student_params: nnx.State) -> None:
        """One jitted cast and reshard; the old weights are freed first to save memory."""
        self._weights = None
        self._weights = self._copy(student_params)

    def generate(
        self,
        prompts_bp: ArrayLike,
        prompt_lengths_b: ArrayLike,
        prompt_index_b: ArrayLike,
        generation_index_b: ArrayLike,
        *,
        seed: int,
        step: int,
    ) -> Rollout:
        """See `RolloutBackend.generate`. Returns at once; the devices are still at work."""
        if self._weights is None:
            raise RuntimeError("generate before refit: the sampler holds no weights")
        return self._generate(
            self._weights,
            prompts_bp,
            prompt_lengths_b,
            np.asarray(seed).astype(np.uint32),
            np.asarray(step).astype(np.uint32),
            prompt_index_b,
            generation_index_b,
        )

    def stop(self) -> None:
        """Frees the held weights."""
        self._weights = None
