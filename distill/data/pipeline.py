"""The prompts of every step, in training order with exact resume (Grain)."""

import grain
import numpy as np

from distill.data.prompts import Prompts
from distill.data.sequences import Sequences


def make_train_iterator(
    prompts: Prompts,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
) -> grain.DatasetIterator:
    """Endless iterator over the prompts of all steps, as Sequences, the same in every process.

    Step n's batch depends on nothing but the arguments, so `get_state` and `set_state` (a dict with
    one integer) continue exactly, in any number of processes. A batch may span two epochs; no row
    is skipped. `shuffle` draws a new order every epoch; else the dataset's order is kept, its
    curriculum.
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


def _collate(prompts: Prompts, pairs: list[tuple[int, int]]) -> Sequences:
    index_b, position_b = np.array(pairs, np.int64).T
    # Another number for every row of every epoch: randomness keyed by it never repeats.
    return prompts.sequences(position_b).with_columns(index=index_b)
