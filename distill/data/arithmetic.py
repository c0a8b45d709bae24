"""Built-in curriculum of multi-step arithmetic: worked steps, an exact checker, no download.

A problem of level n is a chain of n additions, subtractions and multiplications by one digit,
evaluated left to right, with results from 0 to 99. The worked answer states every intermediate
result, so one wrong digit spoils all that follows: a model has to survive its own mistakes or,
better, not make them.

    problem   7+8-9*6
    response  7+8=15
              15-9=6
              6*6=36
    answer    36
"""

from __future__ import annotations

import hashlib
import random

from distill.base.errors import UserError
from distill.data.base import DatasetInterface, Example, register_dataset
from distill.data.tokenizer import END_OF_TEXT

CHARACTERS = "0123456789+-*=\n"
LEVELS = 6
VARIANTS, DISTINCT = ("hinted", "tools"), "distinct"
SIZES = {"train": 60_000, "validation": 2_000, "test": 2_000}
_LARGEST = 99
_HELD_OUT = {0: "validation", 1: "test"}  # of 20 buckets of problem texts; the rest is train


class ArithmeticDataset(DatasetInterface):
    """Problem i depends on (seed, split, i) alone; splits share no problem.

    Training goes from level 1 up to `LEVELS`, an equal share each. The held-out splits cycle
    through the levels instead, so that any prefix of them covers all levels.

    Args:
        variant: of `hinted` problems, four of five have their worked response before them, for a
            model that shall learn to read one; in responses with `tools`, an end token behind every
            "=" calls a calculator, whose reply is the line's rest, and the answer is said at last.

    Raises:
        UserError: there is no such split.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        max_samples: int | None = None,
        variant: str = "",
    ):
        if split not in SIZES:
            raise UserError(
                f"arithmetic has no split {split!r}; it has: {', '.join(sorted(SIZES))}"
            )
        self.split, self.seed, self._variant = split, seed, variant
        self._length = min(SIZES[split], max_samples or SIZES[split])

    def __len__(self) -> int:
        return self._length

    def level(self, i: int) -> int:
        return 1 + (i * LEVELS // SIZES["train"] if self.split == "train" else i % LEVELS)

    def __getitem__(self, i: int) -> Example:
        rng = random.Random(f"arithmetic/{self.seed}/{self.split}/{i}")
        while True:
            problem, steps, total = _make_problem(rng, self.level(i))
            if _split_of(problem) == self.split:
                break
        response = "\n".join(steps)
        prompt = f"{response}\n{problem}" if self._variant == "hinted" and i % 5 else problem
        if self._variant == "tools":
            response = f"{response}\n{total}".replace("=", f"={END_OF_TEXT}")
        columns = {"level": str(self.level(i))}
        return Example(prompt, response, str(total), f"{self.split}-{i}", columns=columns)

    def is_correct(self, example: Example, response: str) -> bool:
        """Whether the last stated result is exactly the answer."""
        return response.strip().rpartition("=")[2] == example.answer


class DistinctArithmetic(DatasetInterface):
    """The problems of two operations and more, each once.

    Training problems come in an order drawn from `seed`, so `max_samples` takes a random part of
    them. Held-out problems are the same for every seed.
    """

    def __init__(self, split: str = "train", seed: int = 0, max_samples: int | None = None):
        training = split == "train"
        self._source = ArithmeticDataset(split, seed if training else 0)
        rows = list(range(len(self._source)))
        if training:
            random.Random(seed).shuffle(rows)
        firsts: dict[object, Example] = {}  # by the problem's text
        for row in rows:
            if len(firsts) == max_samples:
                break
            if self._source.level(row) > 1:
                example = self._source[row]
                firsts.setdefault(example.prompt, example)
        self._examples = list(firsts.values())

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Example:
        return self._examples[i]

    def is_correct(self, example: Example, response: str) -> bool:
        return self._source.is_correct(example, response)


@register_dataset("arithmetic")
def make_arithmetic(
    split="train", seed=0, max_samples=None, path=None, subset="", **options
) -> DatasetInterface:
    """`subset`: `distinct`, or a variant.

    Raises:
        UserError: there is no such split or subset.
    """
    if subset == DISTINCT:
        return DistinctArithmetic(split, seed, max_samples)
    if subset not in ("", *VARIANTS):
        raise UserError(
            f"arithmetic has no data.subset={subset!r}: leave it empty, or "
            f"{', '.join(VARIANTS)} or {DISTINCT}"
        )
    return ArithmeticDataset(split, seed, max_samples, variant=subset)


def _make_problem(rng: random.Random, level: int) -> tuple[str, list[str], int]:
    total = rng.randint(2, 9)
    problem, steps = str(total), []
    for _ in range(level):
        operator, operand, result = _draw_step(rng, total)
        problem += f"{operator}{operand}"
        steps.append(f"{total}{operator}{operand}={result}")
        total = result
    return problem, steps, total


def _draw_step(rng: random.Random, total: int) -> tuple[str, int, int]:
    """One operation whose result stays within 0.._LARGEST."""
    while True:
        operator = rng.choice("++--*")
        operand = rng.randint(2, 9)
        result = {"+": total + operand, "-": total - operand, "*": total * operand}[operator]
        if 0 <= result <= _LARGEST:
            return operator, operand, result


def _split_of(problem: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:4], "big") % 20
    return _HELD_OUT.get(bucket, "train")
