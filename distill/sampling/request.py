"""What is asked of a sampler and what it returns, in host arrays that any backend can make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from distill.data.sequences import Sequences, get_column
from distill.sampling.choice import SamplingParams


class Turns(Protocol):
    """What follows the turns of dialogues: the other side of those that are no single response.

    Asked either by `ask` and `replies`, or by `begin` and `reply`; by the first process alone.
    """

    def ask(self, row: int, tokens_t: np.ndarray) -> None:
        """Asks what follows a turn of the student, its end token included; returns at once."""

    def replies(self, wait: bool) -> Iterable[tuple[int, np.ndarray | None]]:
        """Rows with the tokens that follow their turns, up to the next turn's first token.

        None ends a dialogue. With `wait`, at least one of those asked for.
        """

    def begin(self, row: int) -> None:
        """Begins a row's dialogue, anew if there was one."""

    def reply(self, row: int, tokens_t: np.ndarray) -> np.ndarray | None:
        """Waits for what follows a turn, as in `replies`; each row in a thread of its own."""


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """Prompts, each with `num_generations` responses to be sampled.

    Attributes:
      prompts: token ids of each prompt, int32, at least one token each, not padded.
      prompt_index: position of each prompt in the data stream, int64 (len(prompts),).
      params: how tokens are chosen.
      num_generations: responses per prompt.
      version: updates that the weights have had which are to sample; None: those of the last refit.
      seed, step: with prompt index and number of the response, all that its randomness depends on.
      max_lengths: response tokens of each row at most, int32 (num_rows,), where rows differ; never
        more than params.max_length.
      turns: the other side of dialogues; the responses are then of several turns, and `limits` are
        of both sides' tokens.
      between: called between programs of the sampler, at the same places in all processes.
    """

    prompts: tuple[np.ndarray, ...]
    prompt_index: np.ndarray
    params: SamplingParams
    num_generations: int = 1
    version: int | None = None
    seed: int = 0
    step: int = 0
    max_lengths: np.ndarray | None = None
    turns: Turns | None = None
    between: Callable[[], None] | None = None

    @property
    def num_rows(self) -> int:
        """Responses in all; row i * num_generations + j is response j to prompt i."""
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
      columns: further ones of the sequences, by name, (b, r, ...), or (b,) if they are of whole
        sequences: of a backend that knows more, such as rewards or an environment's tokens.
      prompt_columns: further ones of the prompts' tokens, by name, an array for each row.
    """

    tokens_br: np.ndarray
    lengths_b: np.ndarray
    log_probs_br: np.ndarray
    sampled_log_probs_br: np.ndarray
    stopped_b: np.ndarray
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    prompt_columns: Mapping[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def num_sampled(self) -> int:
        """Tokens that the student wrote."""
        return int(self.sampled_br.sum())

    @property
    def last_turn_b(self) -> np.ndarray:
        """Where the last turn begins: behind the last token that the student did not write."""
        positions_r = np.arange(1, self.tokens_br.shape[1] + 1)
        inside_br = positions_r <= self.lengths_b[:, None]
        return np.where(inside_br & ~self.sampled_br, positions_r, 0).max(axis=1)

    @property
    def sampled_br(self) -> np.ndarray:
        """Whether the student wrote the token."""
        inside_br = np.arange(self.tokens_br.shape[1]) < self.lengths_b[:, None]
        return inside_br & self.columns.get("sampled", True)

    def sequences(self, prompts: Sequences) -> Sequences:
        """The prompts with these responses behind them, in place of any of their own."""
        mask_br = np.arange(self.tokens_br.shape[1]) < self.lengths_b[:, None]
        known = dict(tokens=self.tokens_br, log_prob=self.log_probs_br) | dict(self.columns)
        flat: dict[str, Any] = {
            name: np.asarray(values)[mask_br] if get_column(name).per_token else values
            for name, values in known.items()
        }
        defaults = dict(sampled=True, weight=1, truncated=~self.stopped_b)
        known_p = {name: np.concatenate(values) for name, values in self.prompt_columns.items()}
        before = prompts.prompts().with_columns(**known_p)
        return before.join(Sequences(self.lengths_b, {**defaults, **flat}))
