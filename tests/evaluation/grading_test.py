import multiprocessing
import subprocess
import sys
import time

import pytest

from distill.base.errors import RunStopped, UserError
from distill.data.base import Example
from distill.data.gsm8k import GSM8KDataset
from distill.data.table import InMemoryDataset
from distill.evaluation import math_check
from distill.evaluation.answers import kind_of
from distill.evaluation.grading import Grader, register_grader, wilson_interval


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


# Answer of the data, response, whether it is right: one or two of every kind that people write.
# fmt: off
MATH = [
    ("2", r"<think>maybe \boxed{2}", False),
    ("2", r"<think>maybe \boxed{3}</think>\boxed{2}", True),
    ("2", r"<think>\boxed{2}</think> I give up", False),
    ("2", r"\boxed{3}</think>\boxed{2}", True),
    ("7", r"First \boxed{3}, but correcting: \boxed{7}", True),
    ("3", r"First \boxed{3}, but correcting: \boxed{7}", False),
    ("5.", r"\boxed{5}", True),
    ("18 dollars", r"\boxed{18}", True),
    ("18", r"\boxed{18 dollars}", True),
    ("18 dollars", "19", False),
    ("30°", r"\boxed{30}", True),
    ("30", r"\boxed{30^\circ}", True),
    (r"30^\circ", r"\boxed{30°}", True),
    ("30°", r"\boxed{31}", False),
    ("[0,1]", r"\boxed{0\le x\le 1}", True),
    (r"0\le x\le 1", r"\boxed{[0,1]}", True),
    ("(0,1)", r"\boxed{0<x<1}", True),
    ("[0,1]", r"\boxed{0<x<1}", False),
    ("[0,1)", r"\boxed{0\le x<1}", True),
    ("[0,1)", r"\boxed{[0,1]}", False),
    (r"10\,000", r"\boxed{10000}", True),
    (r"10\,000", r"\boxed{10,000}", True),
    ("10000", r"\boxed{10\,000}", True),
    (r"12\,345", r"\boxed{12345}", True),
    ("12345", r"\boxed{12\,345}", True),
    ("12345", r"\boxed{357}", False),
    (r"12\,345", "357", False),
    (r"12.5\%", r"\boxed{12.5}", True),
    ("12.5", r"\boxed{12.5\%}", True),
    (r"12.5\%", r"\boxed{12.5\%}", True),
    ("12.5%", "12.5%", True),
    (r"12.5\%", r"\boxed{0.125}", True),
    (r"12.5\%", r"\boxed{13}", False),
    ("6.02e23", r"\boxed{6.02e23}", True),
    ("6.02e23", r"\boxed{6.02 \times 10^{23}}", True),
    ("6.02e23", r"\boxed{6.02e22}", False),
    (r"\varnothing", r"\boxed{\emptyset}", True),
    (r"\emptyset", r"\boxed{\varnothing}", True),
    (r"\varnothing", r"\boxed{\varnothing}", True),
    (r"\varnothing", r"\boxed{0}", False),
    (r"\varnothing", r"\boxed{\{\}}", True),
    ("1/3", r"\boxed{0.333333}", False),
    (r"\frac{1}{3}", "0.333333", False),
    ("0.333333", r"\boxed{1/3}", False),
    ("0.5", r"\boxed{1/2}", True),
    ("(1,2)", r"\boxed{\{1,2\}}", False),
    (r"\{1,2\}", r"\boxed{(1,2)}", False),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", True),
    ("(1,2)", r"\boxed{(2,1)}", False),
    ("(1,2)", r"\boxed{(1,2)}", True),
    ("2516_8", r"\boxed{2516_9}", False),
    ("2516_9", r"\boxed{2516_8}", False),
    ("2516_8", r"\boxed{2516_8}", True),
    ("2516_8", r"\boxed{2516}", True),
    ("2516_{8}", r"\boxed{2516_8}", True),
    ("1/2", r"\boxed{\frac12}", True),
    (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}", True),
    ("x^2+1", r"\boxed{1+x^2}", True),
    (r"\sqrt{2}", r"\boxed{2^{1/2}}", True),
    ("3 1/2", r"\boxed{3.5}", True),
    ("3 1/2", r"\boxed{3\frac{1}{2}}", True),
    (r"3\frac{1}{2}", "3 1/2", True),
    ("3.5", r"\boxed{3 1/2}", True),
    ("-$5", r"\boxed{-5}", True),
    ("1 000", r"\boxed{1000}", True),
    ("1000", r"\boxed{1 000}", True),
    ("1,000", r"\boxed{1000}", True),
    ("1e3", r"\boxed{1000}", True),
    ("1,2", r"\boxed{2,1}", True),
    ("1,2", r"\boxed{1, 2}", True),
    ("x=5", r"\boxed{5}", True),
    ("5", r"\boxed{x=5}", True),
    ("x=1, x=2", r"\boxed{1,2}", True),
    ("print(1)", "print(1)", True),
    ("print(1)", "print(2)", False),
    ("10 am", "10 a.m.", True),
    ("5", "the answer is 5", True),
    ("5", "", False),
    ("5", "6", False),
    ("5", "I think 5 or 6", False),
    (r"\frac{3}{4}\text{ inches}", r"\boxed{\frac34}", True),
    (r"11\sqrt{2}", r"\boxed{11\sqrt2}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", True),
    (r"(-\infty, 2]", r"\boxed{x \le 2}", True),
    (r"x \le 2", r"\boxed{(-\infty,2]}", True),
    (r"\infty", r"\boxed{\infty}", True),
    (r"2\pi", r"\boxed{6.28}", False),
    (r"2\pi", r"\boxed{2\pi}", True),
    ("3:2", r"\boxed{3:2}", True),
    ("3:2", r"\boxed{2:3}", False),
    ("5:30", r"\boxed{5:30}", True),
    ("8", "#### 10 - 2 = 8", True),
    ("10", "#### 10 - 2 = 8", False),
    ("0.5", "#### 1/2", True),
    ("1", "#### 1/2", False),
    ("1000", "#### 1e3", True),
    ("1", "#### 1e3", False),
    ("1000", "#### 1 000", True),
    ("1", "#### 1 000", False),
    ("-5", "#### -$5", True),
    ("5", "#### -$5", False),
    ("3.5", "#### 3 1/2", True),
    ("3", "#### 3 1/2", False),
    ("1200", "#### $1,200.", True),
    ("5", "so\n#### **5**", True),
    ("72", "Natalia sold 48/2 = 24\n48+24 = 72\n#### 72", True),
    ("72", "#### 72\n#### 73", False),
    ("18", "#### 18 dollars", True),
    ("10 am", "10 pm", False),
    ("10 am", r"\boxed{10\text{ a.m.}}", True),
    ("5 cm", r"\boxed{5\text{ centimeters}}", True),
    ("5 cm", r"\boxed{5}", True),
    ("5 cm", r"\boxed{5\text{ inches}}", False),
    ("5", r"\boxed{5\text{ cm}}", True),
    ("5 cm^2", r"\boxed{5\text{ cm}^2}", True),
    ("2xy", r"\boxed{2yx}", True),
    ("2xy", r"\boxed{2}", False),
    (r"\frac{xy}{2}", r"\boxed{\frac12 xy}", True),
    (r"\sqrt{ab}", r"\boxed{\sqrt{ba}}", True),
    ("sin(x)", r"\boxed{\sin x}", True),
    (r"\sin x", r"\boxed{\sin(x)}", True),
    ("-3 1/2", r"\boxed{-3.5}", True),
    ("-3 1/2", r"\boxed{-2.5}", False),
    (r"-3\frac{1}{2}", r"\boxed{-\frac72}", True),
    ("12.5%", "The answer is 12.5", True),
    ("12.5", "about 12.5%", True),
    ("12.5%", "The answer is 0.125", True),
    ("30°", "The angle is 30 degrees", True),
    ("30", r"The angle is $30^\circ$.", True),
    ("[0,1]", r"\boxed{0 \leq x \leq 1}", True),
    ("1/3", r"\boxed{0.3333333333333333}", True),
    ("1/3", r"\boxed{0.333}", False),
    ("3.14", r"\boxed{\pi}", False),
    ("0.1+0.2", r"\boxed{0.3}", True),
    (r"\{1,2,3\}", r"\boxed{1,2,3}", True),
    (r"\{(1,2)\}", r"\boxed{(1,2)}", False),
    ("1011_2", r"\boxed{1011_2}", True),
    ("1011_2", r"\boxed{1011_3}", False),
    ("1011_{two}", r"\boxed{1011}", True),
    (r"\$18.90", r"\boxed{18.9}", True),
    (r"\$32,\!348", r"\boxed{32348}", True),
    ("£5", "5", True),
    ("5 €", r"\boxed{5}", True),
    ("1,234.5", r"\boxed{1234.5}", True),
    ("-1,234", r"\boxed{-1234}", True),
    ("12 345 678", r"\boxed{12345678}", True),
    ("12{,}345", r"\boxed{12345}", True),
    ("100,200", r"\boxed{100, 200}", False),
    ("100, 200", r"\boxed{200, 100}", True),
    (r"\{100, 200\}", r"\boxed{\{200,100\}}", True),
    ("x = 3 or x = 5", r"\boxed{3, 5}", True),
    ("x=3 or x=5", r"\boxed{x=5\text{ or }x=3}", True),
    ("1", r"\boxed{1} is right? No: <think>\boxed{2}", False),
    ("2", "<think>a</think><think>b</think>2", True),
    ("7", r"\boxed{7", False),
    ("7", r"\boxed{3 \boxed{7}", True),
    ("7", r"\boxed{\boxed{7}}", True),
    ("7", r"So \boxed{7} and also \{ \boxed{8} \}", False),
    ("7", r"}}} \boxed{7}", True),
    ("f(x)=2x", r"\boxed{f(x)=2x}", True),
    ("y=2x+1", r"\boxed{2x+1}", True),
    ("0", r"\boxed{}", False),
    ("", r"\boxed{1}", False),
]
EXACT = [
    ("Paris", "The answer is Paris.", True),
    ("Paris", r"\boxed{Paris}", True),
    ("Paris", r"\boxed{Pairs}", False),
    ("Paris", "Paris", True),
    ("Paris", "paris", True),
    ("Paris", "London", False),
    ("Paris", r"\boxed{\text{Paris}}", True),
    ("yes", "Yes.", True),
    ("yes", "yes", True),
    ("yes", "no", False),
    ("no", r"\boxed{No}", True),
    ("yes", r"\boxed{no}", False),
    ("True", r"\boxed{true}", True),
    ("True", "False", False),
    ("New York", "new york", True),
    ("New York", "The answer is New York.", True),
    ("New York", "York", False),
    ("def f(x): return x", "```python\ndef f(x): return x\n```", True),
    ("def f(x): return x", "```python\ndef f(x): return x+1\n```", False),
    ("Tuesday", r"\boxed{\text{Tuesday}}", True),
    (r"\text{Tuesday}", r"\boxed{Tuesday}", True),
    (r"\text{Tuesday}", r"\boxed{Wednesday}", False),
    (r"\text{east}", r"\boxed{\text{west}}", False),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
    (r"\text{even}", r"\boxed{\text{odd}}", False),
    (r"\text{even}", r"The function is \boxed{\text{even}}.", True),
    ("AB", r"\boxed{AB}", True),
    ("AB", r"\boxed{BA}", False),
    ("2023-01-05", r"\boxed{2023-01-05}", True),
    ("2023-01-05", r"\boxed{2023-01-06}", False),
    ("東京", r"答えは\boxed{東京}", True),
    ("東京", r"\boxed{京都}", False),
    ("Köln", "**Köln**", True),
    ("2023-01-05", "The answer is 2023-01-05.", True),
    ("Yes", "Yes, since 2<3\n\nAnswer: Yes", True),
    ("no", "Answer: yes", False),
    ("yes", "The answer is no.\nWait, the answer is yes.", True),
    ("1.000.000", "1.000.000", True),
    ("2 apples and 3 oranges", r"\boxed{2 apples and 3 oranges}", True),
    ("2 apples and 3 oranges", r"\boxed{2}", False),
    (r"\text{False}", r"\boxed{\text{false}}", True),
    ("none", r"\boxed{\text{None}}", True),
]
CHOICE = [
    ("B", "B", True),
    ("B", r"\boxed{B}", True),
    ("B", r"\boxed{A}", False),
    ("B", "The answer is B.", True),
    ("B", "The answer is (B)", True),
    ("B", r"\boxed{\text{(B)}}", True),
    ("B", "Answer: C", False),
    ("A", "A) 5", True),
    ("A", "A. 5", True),
    ("A", r"\boxed{A) 5}", True),
    ("A", r"\boxed{B) 5}", False),
    ("B", r"\boxed{b}", True),
    ("A) 5", "A", True),
    ("(A)", "A", True),
    (r"\text{(B)}", r"\boxed{B}", True),
    (r"\text{(B)}", r"\boxed{C}", False),
    ("C", "I pick **C**", False),
    ("C", "**C**", True),
    ("C", "**Answer:** C", True),
    ("C", "Answer: **C**", True),
    ("C", "The correct answer is option C.", True),
    ("C", "C. because it is", True),
    ("D", "The best answer is (D) 12", True),
    ("A", "The answer is B, not A", False),
    ("B", r"\boxed{\textbf{(B)}\ 5}", True),
    ("J", r"\boxed{J}", True),
    ("I", r"\boxed{I}", True),
]
# fmt: on
DEEP = [
    ("1", r"\boxed{" + 3000 * "(" + "1" + 3000 * ")" + "}", False),
    ("1", 5000 * r"\boxed{" + "1" + 5000 * "}", False),
    ("1", 200000 * "[", False),
    ("Paris", r"\boxed{" + 50000 * "a b" + "}", False),
    ("A", 100000 * "(", False),
    ("A", 30000 * "answer ", False),
]


@pytest.mark.parametrize("kind, cases", [("math", MATH), ("exact", EXACT), ("choice", CHOICE)])
def test_the_kind_of_an_answer(kind, cases):
    assert [answer for answer, _, _ in cases if kind_of(answer) != kind] == []


@pytest.fixture(scope="module")
def grader():
    with Grader(time_limit=60) as grader:  # on a busy machine too
        yield grader


def test_responses_are_read_as_a_person_reads_them(grader):
    cases = [*MATH, *EXACT, *CHOICE, *DEEP]
    examples = examples_with([answer for answer, _, _ in cases])
    verdicts = grader.grade(InMemoryDataset(examples), examples, [case[1] for case in cases])
    wrong = [
        case[:2] for case, is_right in zip(cases, verdicts, strict=True) if is_right != case[2]
    ]
    assert wrong == []
    assert (grader.timeouts, grader.crashes) == (0, 0)


def test_any_of_several_answers_is_right(grader):
    examples = examples_with([("Paris", "4"), ("Paris", "4"), ("Paris", "4"), None])
    responses = [r"\boxed{paris}", r"\boxed{8/2}", "Rome", "Rome"]
    verdicts = grader.grade(InMemoryDataset(examples), examples, responses)
    assert verdicts == [True, True, False, None]


def test_the_kind_can_be_chosen():
    examples = examples_with(["1/2"])
    with Grader("exact") as grader:
        assert grader.grade(ExactDataset(examples), examples, ["0.5"]) == [False]
        assert grader.grade(InMemoryDataset(examples), examples, ["1/2"]) == [True]
        # Nothing, or other punctuation, is no answer that is punctuation.
        said = {"": False, "...": False, "()": False, "[]": True, "The answer is `[]`.": True}
        examples = examples_with(["[]"] * len(said))
        verdicts = grader.grade(InMemoryDataset(examples), examples, list(said))
        assert verdicts == list(said.values())
    with pytest.raises(UserError, match="'exakt'.*auto, choice.*, exact, math"):
        Grader("exakt")


def test_a_grader_of_ones_own(losses_as_before):
    @register_grader("last_letter")
    def last_letter(example, response):
        return None if response == "?" else response[-1] == example.answer

    examples = examples_with(["x", "x", "x"])
    with Grader("last_letter") as grader:
        verdicts = grader.grade(InMemoryDataset(examples), examples, ["ax", "xa", "?"])
    assert verdicts == [True, False, False]
    broken = examples_with([1])
    with Grader("last_letter") as grader, pytest.raises(RunStopped, match="last_letter.*example 0"):
        grader.grade(InMemoryDataset(broken), broken, [""])


def test_gsm8k_reads_all_that_stands_behind_the_mark(grader):
    stated = ["10 - 2 = 8", "1/2", "1e3", "1 000", "-$5", "3 1/2", "$1,200.", "<think>#### 8"]
    examples = examples_with(["8", "0.5", "1000", "1000", "-5", "3.5", "1200", "8"])
    dataset = object.__new__(GSM8KDataset)
    verdicts = grader.grade(dataset, examples, [f"#### {text}" for text in stated])
    assert verdicts == 7 * [True] + [False]
    others = examples_with(["10", "1", "1", "1", "5", "3", "1", "10"])
    verdicts = grader.grade(dataset, others, [f"#### {text}" for text in stated])
    assert verdicts == 8 * [False]


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
    examples, others = examples_with(["a", "b"]), multiprocessing.active_children()
    with Grader() as grader:
        assert grader.grade(ExactDataset(examples), examples, ["a", "a"]) == [True, False]
        assert multiprocessing.active_children() == others


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
    examples = examples_with(["1", "2"])
    with Grader(workers=1) as grader:
        assert grader.grade(InMemoryDataset(examples), examples, ["x", "2"]) == [False, True]
        assert (grader.timeouts, grader.crashes) == (0, 1)
        for worker in multiprocessing.active_children():  # with nothing to do, between responses
            worker.kill()
            worker.join()
        assert grader.grade(InMemoryDataset(examples[1:]), examples[1:], ["2"]) == [True]


def die_on_demand(answers, response):
    import os

    if "1" in answers:
        os._exit(3)
    return response in answers


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
assert "jax" not in sys.modules and "math_verify" in sys.modules  # no answer's clock pays for it
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
