"""What the trainer asks of whatever samples the student's responses."""

from __future__ import annotations

from typing import Protocol

from flax import nnx
from jax.typing import ArrayLike

from distill.sampling.decode import Rollout


class RolloutBackend(Protocol):
    """Samples responses with the weights of the latest refit."""

    def start(self) -> None:
        """Acquires what generation needs, such as servers."""

    def refit(self, student_params: nnx.State) -> None:
        """Moves the student's current weights to the sampler; later training leaves them alone."""

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
        """Answers each row's prompt once.

        Args:
          prompts_bp: int32 token ids, right-padded, at least one token per row.
          prompt_lengths_b: int32.
          prompt_index_b: position of each prompt in the dataset.
          generation_index_b: which of the answers to that prompt the row is.
          seed, step: with the two indices, all that a row's randomness depends on.

        Raises:
          RuntimeError: before the first refit, or when generation fails; never fewer rows.
        """

    def stop(self) -> None:
        """Releases what `start` and `refit` acquired."""
