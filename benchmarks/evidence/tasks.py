"""Datasets of the evidence, as a plugin: `--config.plugins=benchmarks.evidence.tasks`."""

from __future__ import annotations

import random

from distill.data.arithmetic import ArithmeticDataset
from distill.data.base import DatasetInterface, Example, register_dataset

TASK = "distinct_arithmetic"


@register_dataset(TASK)
class DistinctArithmetic(DatasetInterface):
    """The built-in arithmetic of two to six operations, each problem once.

    Training problems come in an order drawn from `seed`, so `max_samples` takes a random part of
    them. Held-out problems are the same for every seed.
    """

    def __init__(self, split="train", seed=0, max_samples=None, path=None):
        training = split == "train"
        self._source = ArithmeticDataset(split, seed if training else 0)
        rows = list(range(len(self._source)))
        if training:
            random.Random(seed).shuffle(rows)
        firsts: dict[str, int] = {}
        for row in rows:
            if len(firsts) == max_samples:
                break
            if self._source.level(row) > 1:
                firsts.setdefault(self._source[row].prompt, row)
        self._rows = list(firsts.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._rows[index]]

    def is_correct(self, example: Example, response: str) -> bool:
        return self._source.is_correct(example, response)
