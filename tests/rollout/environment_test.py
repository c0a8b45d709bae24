"""Environments: what they reply, what becomes of those that fail, and runs of dialogues."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_runs import read_metrics, tiny_config, train_killed

import distill
from distill.base.errors import RunStopped, UserError
from distill.config.parse import parse_config
from distill.data.base import Example
from distill.data.chat import Chat, Refused
from distill.data.tokenizer import character_tokenizer
from distill.rollout.calculator import evaluate
from distill.rollout.environment import Dialogues, Environment, Reply, register_environment, says
from distill.rollout.tools import Calculator, PythonTool, SelfCheck, compile_call


@pytest.mark.parametrize(
    "expression, value",
    [
        ("12*(3+4)", "84"),
        ("-7//2", "-4"),
        ("1/3", "0.333333333333"),
        ("2**100", "1267650600228229401496703205376"),
        ("1/0", "error: division by zero"),
        ("2.0**10000", "error: too large"),
        ("9" * 2000, "error: too long"),
        ("(" * 900, "error: "),
        ("3+", "error: "),
        ("__import__('os').getcwd()", "error: only numbers"),
        ("'a'*3", "error: only numbers"),
        ("[1]*3", "error: only numbers"),
        ("True", "error: only numbers"),
        ("1j", "error: only numbers"),
        ("(-8)**0.5", "error: not a real number"),
    ],
)
def test_calculator(expression, value):
    found = evaluate(expression)
    assert found.startswith(value) if value.startswith("error") else found == value


def test_tool_replies_to_a_call_and_survives_a_huge_one():
    calculator = Calculator()
    tool = PythonTool(compile_call(r"<call>(.*?)</call>$"), calculator)
    assert tool.step("so <call> 6*7 </call>") == Reply(says("tool", "42"))
    assert tool.step("the answer is 42") == Reply()
    assert tool.step("<call>9**9**9</call>") == Reply(says("tool", "error: too large"))
    assert tool.step("<call>1+1</call>") == Reply(says("tool", "2"))
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    assert tool.step("<call>1+1</call>") == Reply(says("tool", "2"))
    calculator.stop()
    assert not multiprocessing.active_children()


def test_second_attempt():
    example = Example("?", None, "4", "0")
    check = SelfCheck(example, lambda example, response: response == example.answer)
    (message,) = check.step("5").messages
    assert message["role"] == "user"
    assert check.step("4") == Reply(reward=1.0)
    again = SelfCheck(example, lambda example, response: False)
    assert again.step("5").messages and again.step("5") == Reply()
    ungraded = SelfCheck(example, lambda example, response: None)
    assert ungraded.step("5") == Reply()


class Fickle(Environment):
    """Counts its turns; the example says what goes wrong."""

    def __init__(self, example):
        self.kind, self.turns = example.prompt, 0

    def step(self, response):
        self.turns += 1
        if self.kind == "raises":
            raise ValueError("broken")
        if self.kind == "hangs":
            threading.Event().wait(60)
        if self.kind == "no reply":
            return "fine"
        if self.kind == "slow":
            time.sleep(0.2)
        if self.kind == "no number":
            return Reply(reward=float("nan"))
        return Reply(says("user", response * self.turns), reward=0.5)


def make_dialogues(kinds, **options) -> Dialogues:
    def write(messages):
        return np.array([ord(c) for message in messages for c in message["content"]])

    return Dialogues(
        Fickle,
        np.arange(len(kinds)),
        [Example(kind, None, None, str(i)) for i, kind in enumerate(kinds)],
        read=lambda tokens_t: "".join(map(chr, tokens_t)),
        write=write,
        **{"max_turns": 3, "timeout": 0.5, "max_failures": 0.8, **options},
    )


def test_failures_end_their_own_dialogues():
    dialogues = make_dialogues(["fine", "raises", "hangs", "no reply", "slow", "no number"])
    for row in range(6):
        dialogues.ask(row, np.array([97]))
    replies = dict(dialogues.replies(wait=False))
    assert replies[0].tolist() == replies[4].tolist() == [97]
    assert replies[1] is replies[2] is replies[3] is replies[5] is None
    assert dialogues.measured() == {
        "environment/turns": 1.0,
        "environment/reward": pytest.approx(1 / 6),
        "environment/failures": pytest.approx(4 / 6),
    }
    dialogues.ask(0, np.array([98]))
    assert [(0, [98, 98])] == [(r, t.tolist()) for r, t in dialogues.replies(wait=False)]
    dialogues.ask(0, np.array([98]))  # the last turn that it may have
    assert dialogues.replies(wait=False) == [(0, None)]
    assert dialogues.reward_b[0] == 1.5


def test_replies_that_threads_wait_for():
    """Those of servers: a slow one holds no other up; a dialogue may begin anew."""
    kinds = ["fine", "raises", "hangs", "no reply", "slow"]
    dialogues, turn = make_dialogues(kinds), np.array([97])
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(dialogues.reply, row, turn) for row in range(5)]
        assert waiting[0].result().tolist() == [97] and not waiting[4].done()
        assert waiting[4].result().tolist() == [97]
        assert [future.result() for future in waiting[1:4]] == [None, None, None]
    assert dialogues.measured()["environment/failures"] == 0.6
    for row in (0, 1):
        dialogues.begin(row)
    assert dialogues.measured()["environment/failures"] == 0.4
    assert [len(dialogues.reply(0, turn)) for _ in range(2)] == [1, 2]
    assert dialogues.reply(0, turn) is None, "the last turn that it may have"
    assert dialogues.reward_b[0] == 1.5 and dialogues.turns_b.tolist() == [3, 0, 1, 1, 1]
    with pytest.raises(RunStopped, match="3 of 5 dialogues .* first example [23]: "):
        dialogues._max_failures = 0.5
        dialogues.reply(1, turn)


def test_many_failures_stop_the_run():
    dialogues = make_dialogues(["fine", "raises", "raises"], max_failures=0.5)
    dialogues.ask(1, np.array([97]))
    assert dialogues.replies(wait=True) == [(1, None)]
    dialogues.ask(2, np.array([97]))
    with pytest.raises(RunStopped, match=r"2 of 3 dialogues .* example 1: ValueError: broken"):
        dialogues.replies(wait=True)


def test_slow_environment_holds_nothing_up():
    dialogues = make_dialogues(["slow", "fine"], slow=True, timeout=5)
    dialogues.ask(0, np.array([97]))
    dialogues.ask(1, np.array([97]))
    assert [row for row, _ in dialogues.replies(wait=True)] == [1]
    assert dialogues.replies(wait=False) == []
    assert [row for row, _ in dialogues.replies(wait=True)] == [0]


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(name="pyton_tool"), "environment.name.*allowed is python_tool, self_check"),
        (dict(name="python_tool", backend="own"), "environment.name=python_tool.*backend=own"),
        (dict(name="python_tool", max_turns=0), "environment.max_turns"),
        (dict(reward="environment"), "reward.function=environment is of dialogues"),
    ],
)
def test_refusals(keys, words):
    config = tiny_config()
    keys = dict(keys)
    config.policy.generation.backend = keys.pop("backend", "jax")
    config.reward.function = keys.pop("reward", "")
    config.plugins = ("a_plugin",) if config.policy.generation.backend == "own" else ()
    config.policy.generation.vllm.urls = ("http://localhost:8000",)
    config.environment.update(keys)
    with pytest.raises(UserError, match=words):
        parse_config(config)


@pytest.mark.parametrize("call", ["(", "no group", "(a)(b)"])
def test_calls_need_one_group(call):
    with pytest.raises(UserError, match="environment.call="):
        compile_call(call)


CALCULATOR = Calculator()  # without a process until it is asked


@register_environment("calculates")
class Calculates(Environment):
    """One message after the first turn."""

    def __init__(self, example, what="2"):
        self.what = what

    def step(self, response):
        what, self.what = self.what, ""
        return Reply(says("user", CALCULATOR(what)), reward=1.0) if what else Reply()


def kill_workers(monkeypatch) -> list[int]:
    """Has the calculator's process killed again and again, whatever other dialogues ask it then.

    No call loses two of them. Returns the processes that were killed, a list that grows.
    """
    call, alone, killed, answers = Calculator.__call__, threading.Lock(), [], []

    def killed_call(self, expression):
        with alone:
            if len(answers) >= 8:  # more than are under way: a new process has answered, too
                answers.clear()
                for worker in multiprocessing.active_children():
                    worker.kill()
                    killed.append(worker.pid)
        answer = call(self, expression)
        with alone:
            answers.append(answer)
        return answer

    monkeypatch.setattr(Calculator, "__call__", killed_call)
    return killed


def test_killed_run_of_dialogues_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Killed itself, and its worker processes too."""

    def make_config():
        config = tiny_config(max_steps=3, save_steps=1)
        config.policy.model_name = "embedded:arithmetic-student"  # one that ends its turns
        config.distillation.teacher_model_path = "embedded:arithmetic-teacher"
        config.policy.max_total_sequence_length = 64
        config.distillation.generate_strategy.max_length = 48
        config.data.validation.max_samples = 0
        config.environment.name, config.plugins = "calculates", ("environment_test",)
        config.plugin = {"what": "2+2"}
        return config

    distill.train(make_config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed = kill_workers(patch)
        train_killed(make_config(), tmp_path / "killed", monkeypatch, step=2)
        distill.train(make_config(), tmp_path / "killed")
    assert killed
    CALCULATOR.stop()
    whole = read_metrics(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed") == whole
    steps = [line for line in whole if "environment/turns" in line]
    assert len(steps) == 3 and all(line["environment/turns"] > 1.5 for line in steps)
    # What the environment said is in no loss, and in no number about the student's tokens.
    for line in steps:
        assert line["response_length"] < line["generation/mean_length"] - 1 and line["loss"] > 0
        assert line["log_prob_gap_max"] < 1e-3


def test_template_that_writes_earlier_responses_in_another_way_is_refused():
    tokenizer = character_tokenizer("ab\n")
    assert Chat(tokenizer).reply(says("user", "ab")) == "ab\n"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<t></t>{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    with pytest.raises(Refused, match="writes '<t></t>.*where a response was begun with"):
        Chat(tokenizer).reply(says("user", "ab"))
