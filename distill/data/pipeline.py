"""Batches of token prompts: training order with exact resume (Grain), and evaluation order."""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from distill.data.prompts import Prompts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Rows of a batch (b rows, p prompt positions, r response positions).

    Attributes:
        index_b: position in the endless stream, int64: another one for every row of every epoch,
            so randomness keyed by it never repeats.
        row_b: index in the dataset, int64.
        prompt_tokens_bp: right-padded to `Prompts.prompt_width`, int32.
        prompt_lengths_b: int32.
        response_tokens_br: right-padded to `Prompts.response_width` (0 without responses), int32.
        response_lengths_b: EOS counted, 0 without responses; int32.
    """

    index_b: np.ndarray
    row_b: np.ndarray
    prompt_tokens_bp: np.ndarray
    prompt_lengths_b: np.ndarray
    response_tokens_br: np.ndarray
    response_lengths_b: np.ndarray


def make_train_iterator(
    prompts: Prompts,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
) -> grain.DatasetIterator:
    """Endless iterator over the batches of all steps, the same in every process.

    Step n's batch depends on nothing but `prompts`, `batch_size`, `seed` and `shuffle`, so
    `get_state` and `set_state` (a dict with one integer) continue exactly, in any number of
    processes. A batch may span two epochs; no row is skipped.

    Args:
        prompts: the rows to serve.
        batch_size: prompts per step.
        seed: of the shuffle.
        shuffle: draw a new order every epoch; False keeps the dataset's order, its curriculum.
    """
    positions = grain.MapDataset.range(len(prompts))
    if shuffle:
        positions = positions.shuffle(seed=seed % 2**32)
    batches = (
        positions.repeat()
        .map_with_index(lambda index, position: (index, position))
        # The stream has no end; grain rounds its length up beyond what Python can count to.
        .batch(
            batch_size,
            drop_remainder=True,
            batch_fn=lambda pairs: _collate(prompts, pairs),
        )
    )
    # All data is in memory: reading threads would only compete with the trainer.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(prompts: Prompts, batch_size: int) -> Iterator[tuple[PromptBatch, np.ndarray]]:
    """Yields (batch, valid_b) so that every row is valid exactly once, in order.

    The last batch is filled up with repeated rows, for which valid_b is False.
    """
    for start in range(0, len(prompts), batch_size):
        indices = range(start, start + batch_size)
        pairs = [(index, index % len(prompts)) for index in indices]
        yield _collate(prompts, pairs), np.array(indices) < len(prompts)


def _collate(prompts: Prompts, pairs: Sequence[tuple[int, int]]) -> PromptBatch:
    positions = [int(position) for _, position in pairs]
    prompt_rows = [prompts.prompt_tokens[i] for i in positions]
    responses = prompts.response_tokens
    response_rows = [responses[i] if responses else [] for i in positions]
    return PromptBatch(
        index_b=np.array([index for index, _ in pairs], np.int64),
        row_b=prompts.rows[positions],
        prompt_tokens_bp=_pad(prompt_rows, prompts.prompt_width, prompts.pad_id),
        prompt_lengths_b=np.array([len(row) for row in prompt_rows], np.int32),
        response_tokens_br=_pad(response_rows, prompts.response_width, prompts.pad_id),
        response_lengths_b=np.array([len(row) for row in response_rows], np.int32),
    )


def _pad(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    return tokens
