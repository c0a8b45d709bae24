"""What the train step sees of a batch: rows of sequences, already cut into microbatches.

Made on the host, in numpy, where the answers are: which token a position predicts, and whether
that counts, is settled here once, for padded rows and packed ones.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.typing import ArrayLike

from distill.batches.packing import Layout, Placement, Shape, place
from distill.losses.objective import TopKScores
from distill.sampling.request import Rollout

NO_TARGET = -1
_ABSENT = TopKScores(ids_brk=-1, log_probs_brk=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Rows to learn from; a batch has them stacked, (m, b, t) instead of (b, t).

    Position t of a row predicts the row's token t + 1.

    Attributes:
      tokens_bt: prompts with their responses, one or several to a row, then padding.
      positions_bt: of tokens in their sequences. None: every row is one sequence.
      segment_ids_bt: numbers of the sequences in a row, from 1, padding being 0; None likewise.
      targets_bt: the response token that the position predicts, EOS included; NO_TARGET at the
        positions that predict none.
      log_probs_bt: the sampler's untruncated log-probabilities of the targets.
      on_policy_bt: whether the student sampled the target.
      lengths_b: tokens of a row, padding not counted.
      sequences_b, sampled_b, truncated_b: a row's sequences, those of them that the student
        sampled, and those of the sampled that stopped at the length limit.
      scores: what is known of a teacher that is not here, (b, t, k); None when the teacher is.
    """

    tokens_bt: ArrayLike
    positions_bt: ArrayLike | None
    segment_ids_bt: ArrayLike | None
    targets_bt: ArrayLike
    log_probs_bt: ArrayLike
    on_policy_bt: ArrayLike
    lengths_b: ArrayLike
    sequences_b: ArrayLike
    sampled_b: ArrayLike
    truncated_b: ArrayLike
    scores: TopKScores | None = None


# Microbatches of each of the layout's shapes, stacked. The last of them may be empty.
Batch = tuple[Microbatch, ...]


def make_batch(
    prompts_bp: np.ndarray,
    prompt_lengths_b: np.ndarray,
    rollout: Rollout,
    on_policy_b: np.ndarray,
    scores: TopKScores | None = None,
    *,
    layout: Layout,
    pad_id: int,
) -> Batch:
    """Joins prompts and responses and lays them out; host arrays in, host arrays out.

    Validity comes from the lengths and never from token ids, because pad may equal EOS. Without a
    prompt nothing predicts the first response token, which then does not count.

    Raises:
      ValueError: a sequence is longer than the longest rows.
    """
    lengths_b = np.asarray(prompt_lengths_b) + rollout.lengths_b
    if lengths_b.max() > layout.shapes[-1].length:
        raise ValueError(
            f"a sequence of {lengths_b.max()} tokens in rows of {layout.shapes[-1].length}"
        )
    batch = []
    for shape, placement in zip(layout.shapes, place(lengths_b, layout), strict=True):
        number = -(-len(lengths_b) // shape.rows)  # whatever the lengths
        rows = _empty(number * shape.rows, shape.length, layout.packed, pad_id, scores)
        _fill(rows, placement, prompts_bp, prompt_lengths_b, rollout, on_policy_b, scores)
        batch.append(jax.tree.map(lambda x, shape=shape: _stack(x, shape), rows))
    return tuple(batch)


def num_filled(microbatches: Microbatch) -> ArrayLike:
    """How many of stacked microbatches have sequences: they come first."""
    return (microbatches.sequences_b > 0).any(axis=1).sum()


def _empty(
    rows: int, length: int, packed: bool, pad_id: int, scores: TopKScores | None
) -> Microbatch:
    def full(value, dtype=np.int32, *axes: int) -> np.ndarray:
        return np.full((rows, *(axes or (length,))), value, dtype)

    def of_row() -> np.ndarray:
        return np.zeros(rows, np.int32)

    return Microbatch(
        tokens_bt=full(pad_id),
        positions_bt=full(0) if packed else None,
        segment_ids_bt=full(0) if packed else None,
        targets_bt=full(NO_TARGET),
        log_probs_bt=full(0, np.float32),
        on_policy_bt=full(False, bool),
        lengths_b=of_row(),
        sequences_b=of_row(),
        sampled_b=of_row(),
        truncated_b=of_row(),
        scores=scores
        and jax.tree.map(
            lambda x, absent: full(absent, x.dtype, length, x.shape[-1]), scores, _ABSENT
        ),
    )


def _fill(
    rows: Microbatch,
    placement: Placement,
    prompts_bp: np.ndarray,
    prompt_lengths_b: np.ndarray,
    rollout: Rollout,
    on_policy_b: np.ndarray,
    scores: TopKScores | None,
) -> None:
    """Writes the placed sequences into the rows, in place."""
    indices = placement.sequence_i, placement.row_i, placement.start_i
    for b, row, start in zip(*indices, strict=True):
        prompt, response = int(prompt_lengths_b[b]), int(rollout.lengths_b[b])
        tokens = np.concatenate([prompts_bp[b, :prompt], rollout.tokens_br[b, :response]])
        sequence = slice(start, start + len(tokens))
        rows.tokens_bt[row, sequence] = tokens
        rows.lengths_b[row] += len(tokens)
        rows.sequences_b[row] += 1
        rows.sampled_b[row] += on_policy_b[b]
        rows.truncated_b[row] += on_policy_b[b] and not rollout.stopped_b[b]
        if rows.segment_ids_bt is not None:
            rows.segment_ids_bt[row, sequence] = rows.sequences_b[row]
            rows.positions_bt[row, sequence] = np.arange(len(tokens))
        # The state at a position predicts the next token.
        first = max(prompt, 1)
        predicting = slice(start + first - 1, start + len(tokens) - 1)
        answer = slice(first - prompt, response)
        rows.targets_bt[row, predicting] = tokens[first:]
        rows.log_probs_bt[row, predicting] = rollout.log_probs_br[b, answer]
        rows.on_policy_bt[row, predicting] = on_policy_b[b]
        if scores is not None:
            rows.scores.ids_brk[row, predicting] = scores.ids_brk[b, answer]
            rows.scores.log_probs_brk[row, predicting] = scores.log_probs_brk[b, answer]


def _stack(rows_bx: np.ndarray, shape: Shape) -> np.ndarray:
    return rows_bx.reshape(-1, shape.rows, *rows_bx.shape[1:])
