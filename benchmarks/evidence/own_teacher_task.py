"""Sums of three numbers, of which some have their solution before them, as a dataset."""

from __future__ import annotations

import dataclasses

from benchmarks.evidence.styles_task import LEFT, Styles
from distill.data.base import Example, register_dataset

TASK, PLAIN, SOLVED, BOTH = "own_teacher", "plain", "solved", "both"


@register_dataset(TASK)
class Sums(Styles):
    """Worked from the left; `subset` says whether prompts have their solution, or every other."""

    def __init__(self, split="train", seed=0, max_samples=None, path=None, subset=PLAIN):
        super().__init__(split, seed, max_samples, path, LEFT)
        self._subset = subset

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        if self._subset == PLAIN or (self._subset == BOTH and index % 2 == 0):
            return example
        return dataclasses.replace(example, prompt=f"{example.response}\n{example.prompt}")
