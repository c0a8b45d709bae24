import multiprocessing
import subprocess
import sys
import time

import pytest

from distill.base.errors import UserError
from distill.data.base import Example
from distill.data.table import InMemoryDataset
from distill.evaluation import math_check
from distill.evaluation.grading import Grader, wilson_interval


class ExactDataset(InMemoryDataset):
    def is_correct(self, example, response):
        return response == example.answer


def examples_with(answers):
    return [Example("p", None, answer, str(i)) for i, answer in enumerate(answers)]


def test_wilson_interval_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_interval_edges():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(10, 10)
    assert 0.7 < low < 0.75 and high == 1.0


def test_math_verify_verdicts():
    cases = [
        (r"\frac{1}{2}", r"so \boxed{0.5}", True),
        ("$12$", "the answer is 12.", True),
        (r"\boxed{12}", r"\boxed{13}", False),
        ("(1,2)", r"\boxed{(1, 2)}", True),
        ("3", r"first 3, no: \boxed{4}", False),
        ("1", "", False),
        # Golds of MATH: an escaped dollar is money, not the start of a formula.
        (r"\$18", r"\boxed{\$18}", True),
        (r"\$18", r"\boxed{19}", False),
        (r"\$32,\!348", r"\boxed{32348}", True),
        (r"\$18.90", r"\boxed{\$18.90}", True),
        ("$18$", r"\boxed{18}", True),
        ("$18$", r"\boxed{19}", False),
    ]
    examples = examples_with([answer for answer, _, _ in cases])
    with Grader() as grader:
        verdicts = grader.grade(InMemoryDataset(examples), examples, [case[1] for case in cases])
    assert verdicts == [case[2] for case in cases]
    assert (grader.timeouts, grader.crashes) == (0, 0)


def test_hostile_answers_hit_the_limit_and_the_grader_goes_on():
    hostile = ["9**9**9**9", r"\boxed{9^{9^{9^{9}}}}"]
    responses = [*hostile, r"\boxed{9}", r"\boxed{8}"]
    examples = examples_with(["9"] * len(responses))
    start = time.monotonic()
    with Grader(time_limit=2.0, workers=1) as grader:
        verdicts = grader.grade(InMemoryDataset(examples), examples, responses)
    assert verdicts == [False, False, True, False]
    assert grader.timeouts == 2
    assert time.monotonic() - start < 60


def test_own_checker_decides_without_a_process():
    examples = examples_with(["a", "b"])
    with Grader() as grader:
        assert grader.grade(ExactDataset(examples), examples, ["a", "a"]) == [True, False]
        assert not multiprocessing.active_children()


def test_own_checker_may_leave_single_answers_to_math_verify():
    class NumbersOnly(InMemoryDataset):
        def is_correct(self, example, response):
            return response == example.answer if response.isdigit() else None

    examples = examples_with(["4", "4"])
    with Grader(workers=1) as grader:
        verdicts = grader.grade(NumbersOnly(examples), examples, ["5", r"\boxed{8/2}"])
    assert verdicts == [False, True]


def test_worker_that_dies_counts_as_wrong(monkeypatch):
    # The worker ends itself, as it would on a segmentation fault.
    monkeypatch.setattr(math_check, "matches", die_on_demand)
    examples = examples_with(["die", "live"])
    with Grader(workers=1) as grader:
        assert grader.grade(InMemoryDataset(examples), examples, ["x", "live"]) == [False, True]
        assert (grader.timeouts, grader.crashes) == (0, 1)


def die_on_demand(answer, response):
    import os

    if answer == "die":
        os._exit(3)
    return answer == response


def test_missing_answer_is_an_error():
    examples = examples_with([None])
    with Grader() as grader, pytest.raises(UserError, match="data.answer_column"):
        grader.grade(InMemoryDataset(examples), examples, ["1"])


def run_python(program):
    """Runs a program that Python reads from its standard input, where workers cannot find it."""
    return subprocess.run(
        [sys.executable, "-"], input=program, text=True, capture_output=True, timeout=60
    )


def test_worker_module_is_light_and_limits_memory():
    program = """
import mmap
import sys
from distill.evaluation import math_check
assert "jax" not in sys.modules and "numpy" not in sys.modules
math_check.prepare_worker()
assert "jax" not in sys.modules
try:
    mmap.mmap(-1, 8 * 2**30)
except OSError:
    print("limited")
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    if sys.platform == "linux":
        assert done.stdout.strip() == "limited"


def test_script_that_cannot_start_workers_is_told_why():
    program = """
from distill.data.base import Example
from distill.data.table import InMemoryDataset
from distill.base.errors import UserError
from distill.evaluation.grading import Grader
examples = [Example("p", None, "1", "0")]
with Grader() as grader:
    try:
        grader.grade(InMemoryDataset(examples), examples, ["1"])
    except UserError as error:
        print(error)
"""
    done = run_python(program)
    assert "__main__" in done.stdout, done.stderr
