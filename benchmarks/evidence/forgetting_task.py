"""A new convention beside an old one, as a dataset: results modulo ten, where a prompt asks so."""

from __future__ import annotations

import re

from distill.data.arithmetic import DistinctArithmetic
from distill.data.base import Example, register_dataset
from distill.data.table import InMemoryDataset

TASK, OLD, NEW, BOTH = "forgetting", "old", "new", "both"
LEVELS = "2", "3"


@register_dataset(TASK)
class Conventions(InMemoryDataset):
    """Problems of two and three operations; `both` has each in the two conventions.

    old         7+8-9     new         =7+8-9
    response    7+8=15    response    7+8=5
                15-9=6                5-9=6
    """

    def __init__(self, split="train", seed=0, max_samples=None, path=None, subset=BOTH):
        source = DistinctArithmetic(split, seed)
        rows = (source[i] for i in range(len(source)))
        kept = [row for row in rows if row.columns["level"] in LEVELS][:max_samples]
        make = {OLD: (as_old,), NEW: (as_new,), BOTH: (as_new, as_old)}[subset]
        super().__init__([each(row) for each in make for row in kept])
        self._source = source

    def is_correct(self, example: Example, response: str) -> bool:
        return self._source.is_correct(example, response)


def as_old(row: Example) -> Example:
    return Example(row.prompt, row.response, row.answer, f"old-{row.id}", columns={"task": OLD})


def as_new(row: Example) -> Example:
    first, *operations = re.findall(r"^\d|[-+*]\d", row.prompt)
    total, lines = int(first), []
    for operation in operations:
        result = eval(f"{total}{operation}") % 10
        lines.append(f"{total}{operation}={result}")
        total = result
    response = "\n".join(lines)
    return Example(f"={row.prompt}", response, str(total), f"new-{row.id}", columns={"task": NEW})
