"""Is an answer right? math-verify under a hard time limit, and how sure a success rate is."""

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from pebble import ProcessExpired, ProcessPool

from distill.base.errors import UserError
from distill.data.base import DatasetInterface, Example
from distill.evaluation import math_check


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval (low, high) of a success rate; z=1.96 is 95%. (0, 1) for n=0.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, center - margin), min(1.0, center + margin)


class Grader:
    """Checks answers in worker processes: `with Grader() as grader: grader.grade(...)`.

    An answer that takes longer than `time_limit` seconds, kills its worker or cannot be compared
    counts as wrong; a lost worker is replaced and the others go on. Workers end with this process,
    on Linux even if it is killed.

    Attributes:
        timeouts: answers stopped by the time limit so far.
        crashes: answers that ended their worker so far.
    """

    def __init__(self, time_limit: float = 5.0, workers: int = 2):
        self.timeouts = 0
        self.crashes = 0
        self._time_limit = time_limit
        self._workers = workers

    def __enter__(self) -> "Grader":
        self._pool = ProcessPool(
            max_workers=self._workers,
            initializer=math_check.prepare_worker,
            # Not fork: the parent has threads and an accelerator.
            context=multiprocessing.get_context("spawn"),
        )
        return self

    def __exit__(self, *exception) -> None:
        self._pool.stop()
        self._pool.join()

    def grade(
        self, dataset: DatasetInterface, examples: Sequence[Example], responses: Sequence[str]
    ) -> list[bool]:
        """Says for each response whether it answers its example.

        `dataset.is_correct` decides; where it returns None, math-verify does.

        Raises:
            UserError: an example has no answer to compare with.
        """
        pairs = list(zip(examples, responses, strict=True))
        verdicts = [dataset.is_correct(example, response) for example, response in pairs]
        # All are scheduled before the first is awaited, so that the workers share them.
        pending = [
            self._schedule(example, response) if verdict is None else None
            for verdict, (example, response) in zip(verdicts, pairs, strict=True)
        ]
        return [
            bool(verdict) if future is None else self._await(future)
            for verdict, future in zip(verdicts, pending, strict=True)
        ]

    def _schedule(self, example: Example, response: str):
        if example.answer is None:
            raise UserError(
                f"example {example.id} has no answer to grade against: set data.answer_column"
            )
        arguments = (example.answer, response)
        return self._pool.schedule(math_check.matches, arguments, timeout=self._time_limit)

    def _await(self, future) -> bool:
        try:
            return future.result()
        except TimeoutError:
            self.timeouts += 1
        except ProcessExpired:
            self.crashes += 1
        except BrokenProcessPool:
            raise UserError(
                "answer checking cannot start its worker processes: a script that grades must be "
                "a file whose work stands under `if __name__ == '__main__':`"
            ) from None
        return False
