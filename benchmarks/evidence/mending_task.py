"""Datasets of mistakes that can be mended, as a plugin."""

from __future__ import annotations

import dataclasses
import random

from distill.data.arithmetic import DistinctArithmetic
from distill.data.base import Example, register_dataset
from distill.data.table import InMemoryDataset

TASK, WITH_SLIPS = "mending", "mending_slips"
LEVELS = "2", "3", "4"
SLIPS = 0.3  # of the prompts that the teacher learns from end in a wrong line


@register_dataset(TASK)
class Mending(InMemoryDataset):
    """Problems of two to four operations, each once."""

    def __init__(self, split="train", seed=0, max_samples=None, path=None):
        source = DistinctArithmetic(split, seed)
        rows = (source[i] for i in range(len(source)))
        super().__init__([row for row in rows if row.columns["level"] in LEVELS][:max_samples])
        self._source = source

    def is_correct(self, example: Example, response: str) -> bool:
        return self._source.is_correct(example, response)


@register_dataset(WITH_SLIPS)
class WithSlips(Mending):
    """Some lines of the response stand in the prompt, and behind them often a wrong one."""

    def __getitem__(self, index: int) -> Example:
        example, rng = super().__getitem__(index), random.Random(f"slips/{index}")
        lines = example.response.split("\n")
        done = rng.randrange(len(lines))
        begun = lines[:done]
        if rng.random() < SLIPS:
            begun.append(make_wrong(lines[done], rng))
        prompt = "\n".join([example.prompt, *begun])
        return dataclasses.replace(example, prompt=prompt, response="\n".join(lines[done:]))


def make_wrong(line: str, rng: random.Random) -> str:
    """The line with one character changed, which makes it no right one."""
    while True:
        place = rng.randrange(len(line))
        if line[place].isdigit() and (changed := str(rng.randrange(10))) != line[place]:
            return line[:place] + changed + line[place + 1 :]
