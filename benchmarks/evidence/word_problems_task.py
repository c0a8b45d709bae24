"""Word problems of two to five steps, written like those of GSM8K, as a dataset without end."""

from __future__ import annotations

import random

from distill.data.base import Example, register_dataset
from distill.data.table import InMemoryDataset

TASK = "word_problems"
TRAINING, HELD_OUT = 400_000, 512
STEPS = (2, 3, 4, 5)
MARK = "\n#### "  # before the answer, as in GSM8K
LARGEST = 400

NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo June Kim Leo Mia Noor Otto Pia Quin Rosa Sam Tess"
ITEMS = "apples books cards coins eggs flowers marbles pencils shells stamps stickers tickets"


@register_dataset(TASK)
class WordProblems(InMemoryDataset):
    """Distinct problems, the first HELD_OUT of which are those of `split="test"`.

    Mia has 12 shells. Then Leo brings 3 bags of 4 shells each. How many shells does Mia have now?

    The bags hold 3*4=12.
    12+12=24
    #### 24
    """

    def __init__(self, split="train", seed=0, max_samples=None, path=None, subset=""):
        wanted = HELD_OUT if split == "test" else HELD_OUT + min(max_samples or TRAINING, TRAINING)
        rng, problems = random.Random(TASK), dict[str, tuple[str, int]]()
        while len(problems) < wanted:
            problem, solution, answer = make_problem(rng)
            problems.setdefault(problem, (solution, answer))
        chosen = list(problems.items())
        chosen = chosen[:HELD_OUT][:max_samples] if split == "test" else chosen[HELD_OUT:]
        super().__init__(
            [
                Example(problem, f"{solution}{MARK}{answer}", str(answer), str(i))
                for i, (problem, (solution, answer)) in enumerate(chosen)
            ]
        )

    def is_correct(self, example: Example, response: str) -> bool:
        _, mark, answer = response.rpartition(MARK)
        return bool(mark) and answer.strip() == example.answer


def make_problem(rng: random.Random) -> tuple[str, str, int]:
    """The text, its solution without the answer's line, and the answer."""
    owner, other = rng.sample(NAMES.split(), 2)
    item, total = rng.choice(ITEMS.split()), rng.randint(2, 60)
    told, worked = [f"{owner} has {total} {item}."], []
    for _ in range(rng.choice(STEPS)):
        event, lines, total = rng.choice(_possible(rng, total, owner, other, item))
        told.append(event)
        worked += lines
    told.append(f"How many {item} does {owner} have now?")
    return " ".join(told), "\n".join(worked), total


def _possible(
    rng: random.Random, total: int, owner: str, other: str, item: str
) -> list[tuple[str, list[str], int]]:
    """What may happen next: the sentence, the lines that work it out, and the number after it."""
    some, bags, each = rng.randint(2, 50), rng.randint(2, 9), rng.randint(2, 9)
    found, brought = total + some, total + bags * each
    events = [
        (f"{owner} finds {some} more.", [f"{total}+{some}={found}"], found),
        (
            f"Then {other} brings {bags} bags of {each} {item} each.",
            [f"The bags hold {bags}*{each}={bags * each}.", f"{total}+{bags * each}={brought}"],
            brought,
        ),
    ]
    if total > some:
        events.append((f"{other} takes {some}.", [f"{total}-{some}={total - some}"], total - some))
    if 2 * total <= LARGEST:
        events.append(("A friend doubles them.", [f"{total}*2={2 * total}"], 2 * total))
    if total >= 6 and (divisors := [n for n in range(2, 7) if total % n == 0]):
        n = rng.choice(divisors)
        event = f"{owner} shares them equally among {n} people, and keeps one share."
        events.append((event, [f"{total}/{n}={total // n}"], total // n))
    return [event for event in events if event[2] <= LARGEST] or events[:1]
