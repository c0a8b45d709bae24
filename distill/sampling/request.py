"""What is asked of a sampler and what it answers, in host arrays that any backend can make."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill.sampling.choice import SamplingParams


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """Prompts, each to be answered `num_generations` times.

    Attributes:
      prompts: token ids of each prompt, int32, at least one token each, not padded.
      prompt_index: position of each prompt in the data stream, int64 (len(prompts),).
      params: how tokens are chosen.
      num_generations: answers per prompt.
      seed, step: with prompt index and number of the answer, all that its randomness depends on.
      max_lengths: response tokens of each row at most, int32 (num_rows,), where rows differ; never
        more than params.max_length.
    """

    prompts: tuple[np.ndarray, ...]
    prompt_index: np.ndarray
    params: SamplingParams
    num_generations: int = 1
    seed: int = 0
    step: int = 0
    max_lengths: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """Answers in all; row i * num_generations + j is answer j to prompt i."""
        return len(self.prompts) * self.num_generations

    @property
    def limits(self) -> np.ndarray:
        """Response tokens of each row at most, int32 (num_rows,)."""
        most = np.full(self.num_rows, self.params.max_length, np.int32)
        return most if self.max_lengths is None else np.minimum(self.max_lengths, most)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampled responses (r: response position), right-padded.

    Attributes:
      tokens_br: int32; pad_id from each row's length on.
      lengths_b: int32, the EOS counted. Masks come from here: pad_id may equal an EOS.
      log_probs_br: float32, under the model's own distribution (temperature 1, untruncated).
      sampled_log_probs_br: float32, under the distribution the tokens were drawn from; 0 if greedy.
      stopped_b: True where an EOS ended the response, False where max_length cut it.
    """

    tokens_br: ArrayLike
    lengths_b: ArrayLike
    log_probs_br: ArrayLike
    sampled_log_probs_br: ArrayLike
    stopped_b: ArrayLike

    def rows(self, index_b: np.ndarray) -> Rollout:
        """Some rows of the host's arrays."""
        return jax.tree.map(lambda x: x[index_b], self)


def to_sequences(
    prompts_bp: jax.Array, prompt_lengths_b: jax.Array, rollout: Rollout, pad_id: int
) -> tuple[jax.Array, jax.Array]:
    """Joins each prompt and its response into one right-padded row.

    Returns:
      tokens_bt (t = p + r) and lengths_b; the response starts at the row's prompt length.
    """
    prompt_size = prompts_bp.shape[1]
    joined_bt = jnp.concatenate([prompts_bp, rollout.tokens_br], axis=1)
    t = jnp.arange(joined_bt.shape[1])
    prompt_lengths_b1 = prompt_lengths_b[:, None]
    source_bt = jnp.where(t < prompt_lengths_b1, t, t - prompt_lengths_b1 + prompt_size)
    lengths_b = prompt_lengths_b + rollout.lengths_b
    tokens_bt = jnp.take_along_axis(joined_bt, source_bt, axis=1, mode="clip")
    return jnp.where(t < lengths_b[:, None], tokens_bt, pad_id), lengths_b
