"""Is a response right? By its dataset, a grader of the user's own, its text, or math-verify.

    @register_grader("runs")
    def runs(example, response):  # what stands behind </think>
        return execute(response) == example.answer

`evaluation.grading=runs` then decides by it. math-verify has a hard time limit.
"""

import math
from collections.abc import Callable, Sequence

from distill.base.errors import RunStopped
from distill.base.registry import Registry, describe, name_of
from distill.base.worker import WorkerEnded, Workers
from distill.data.base import DatasetInterface, Example
from distill.evaluation import answers, math_check

OwnGrader = Callable[[Example, str], bool | None]
KINDS = ("auto", "math", "exact", "choice")
_PLAIN = {"exact": answers.is_exact, "choice": answers.is_choice}
_GRADERS = Registry(
    "evaluation.grading",
    "distill.evaluation.grading.register_grader",
    dict.fromkeys(KINDS, "distill.evaluation.grading"),
)


def register_grader(name: str) -> Callable[[OwnGrader], OwnGrader]:
    """Decorator: makes f(example, response) available as `evaluation.grading=name`.

    It says whether the response is right; None leaves it to the kind of the answer. UserError when
    the name is taken.
    """
    return _GRADERS.register(name, takes=("example", "response"))


def get_grader(name: str) -> OwnGrader | None:
    """What was registered under `name`; None for the built-in kinds; UserError for no name."""
    return None if name in KINDS else _GRADERS.get(name)


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
    """Grades responses: `with Grader() as grader: grader.grade(...)`.

    math-verify works in processes of its own. A response that takes longer than `time_limit`
    seconds, ends two workers or cannot be compared counts as wrong; a lost worker is replaced and
    the others go on. Workers end with this process, on Linux even if it is killed.

    `kind` is one of KINDS or a registered grader; 'auto' asks the dataset, then goes by the answer.
    Attributes `timeouts` and `crashes` count the responses that were stopped or ended workers.
    """

    def __init__(self, kind: str = "auto", time_limit: float = 5.0, workers: int = 2):
        self.timeouts = 0
        self.crashes = 0
        self._own = get_grader(kind)
        self._kind = kind if kind in KINDS else "auto"
        self._asks_dataset = kind == "auto"
        self._time_limit = time_limit
        self._count = workers

    def __enter__(self) -> "Grader":
        self._workers = Workers(self._count, math_check.prepare_worker)
        return self

    def __exit__(self, *exception) -> None:
        self._workers.stop()

    def grade(
        self, dataset: DatasetInterface, examples: Sequence[Example], responses: Sequence[str]
    ) -> list[bool | None]:
        """Says for each response whether it answers its example; None if that has no answer.

        Raises:
            RunStopped: the dataset's `is_correct`, or a grader of the user's own, fails.
        """
        pairs = zip(examples, responses, strict=True)
        # All are scheduled before the first is awaited, so that the workers share them.
        begun = [self._begin(dataset, example, response) for example, response in pairs]
        return [x if x is None or isinstance(x, bool) else self._await(x) for x in begun]

    def _begin(self, dataset: DatasetInterface, example: Example, response: str):
        """The verdict, or the future of one."""
        if example.answer is None:
            return None
        text = answers.spoken(response)
        if text is None:
            return False
        verdict = None
        if self._own or self._asks_dataset:
            verdict = _ask(self._own or dataset.is_correct, example, text)
        if verdict is not None:
            return verdict
        kinds = [
            (answers.kind_of(answer) if self._kind == "auto" else self._kind, answer)
            for answer in example.answers
        ]
        if any(_PLAIN[kind](answer, text) for kind, answer in kinds if kind in _PLAIN):
            return True
        formulas = [answer for kind, answer in kinds if kind == "math"]
        if not formulas:
            return False
        return self._workers.submit(math_check.matches, formulas, text, timeout=self._time_limit)

    def _await(self, future) -> bool:
        try:
            return future.result()
        except TimeoutError:
            self.timeouts += 1
        except WorkerEnded:
            self.crashes += 1
        return False


def _ask(grader: OwnGrader, example: Example, text: str) -> bool | None:
    try:
        verdict = grader(example, text)
        return None if verdict is None else bool(verdict)
    except Exception as error:  # whatever the user's code raises
        raise RunStopped(
            f"{name_of(grader)} fails on example {example.id}: {describe(error)}; it takes "
            "(example, response) and returns True, False or None"
        ) from error
