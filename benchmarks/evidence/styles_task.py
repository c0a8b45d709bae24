"""Sums of three numbers that may be worked in several styles, all equally right, as a dataset."""

from __future__ import annotations

import random
from collections.abc import Mapping

from distill.data.base import Example, register_dataset
from distill.data.table import InMemoryDataset

TASK, ALL = "styles", "all"
TRAINING, HELD_OUT = 40_000, 512
# What the lines of a style add: numbers a, b, c of the problem, their tens A, B, C, their units
# x, y, z, and results of its lines 0, 1, ...
LEFT, RIGHT, ENDS, TENS = "left", "right", "ends", "tens"
STYLES = {
    LEFT: ("ab", "0c"),
    RIGHT: ("cb", "0a"),
    ENDS: ("ac", "0b"),
    TENS: ("AB", "0C", "xy", "2z", "13"),
}


@register_dataset(TASK)
class Styles(InMemoryDataset):
    """Distinct problems; each training one has a style by chance, or the one that `subset` names.

    Held-out ones are there twice, one half behind the other, to be asked for two responses.

    problem   17+48+25
    left      17+48=65     right     25+48=73     ends      17+25=42     tens      10+40=50
              65+25=90               73+17=90               42+48=90               50+20=70
                                                                                   7+8=15
                                                                                   15+5=20
                                                                                   70+20=90
    """

    def __init__(self, split="train", seed=0, max_samples=None, path=None, subset=ALL):
        rng = random.Random(TASK)
        numbers = [n for n in range(11, 100) if n % 10]
        problems = list(
            dict.fromkeys(tuple(rng.sample(numbers, 3)) for _ in range(HELD_OUT + TRAINING))
        )
        held_out = problems[:HELD_OUT][:max_samples]
        chosen = held_out * 2 if split == "test" else problems[HELD_OUT:][:max_samples]
        styles = STYLES if subset == ALL else [subset]
        super().__init__(
            [
                Example(
                    write(terms),
                    "\n".join(work(rng.choice([*styles]), terms)),
                    str(sum(terms)),
                    str(i),
                )
                for i, terms in enumerate(chosen)
            ]
        )

    def is_correct(self, example: Example, response: str) -> bool:
        return response.rpartition("=")[2] == example.answer


def write(terms: tuple[int, ...]) -> str:
    return "+".join(map(str, terms))


def work(style: str, terms: tuple[int, ...]) -> list[str]:
    """The lines of a response."""
    values, lines = _named(terms), []
    for i, (x, y) in enumerate(STYLES[style]):
        values[str(i)] = values[x] + values[y]
        lines.append(f"{values[x]}+{values[y]}={values[str(i)]}")
    return lines


def _named(terms: tuple[int, ...]) -> dict[str, int]:
    tens, units = [n // 10 * 10 for n in terms], [n % 10 for n in terms]
    return dict(zip("abcABCxyz", (*terms, *tens, *units), strict=True))


def style_of(problem: str, response: str) -> str:
    """The style of whose lines a response has the left sides, if its results were right; or ''."""
    lines = [line.partition("=") for line in response.split("\n")]
    stated = {str(i): result for i, (_, _, result) in enumerate(lines)}
    values: Mapping[str, object] = _named(tuple(map(int, problem.split("+")))) | stated
    left_sides = [left for left, _, _ in lines]
    for name, steps in STYLES.items():
        if len(steps) == len(lines) and left_sides == [
            f"{values[x]}+{values[y]}" for x, y in steps
        ]:
            return name
    return ""
