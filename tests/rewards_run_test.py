"""Whole runs with rewards, and rewards that are none."""

import shutil

import pytest
from tiny_runs import read_metrics, tiny_config

import distill
from distill.base.errors import RunStopped, UserError
from distill.build.session import open_session
from distill.config.parse import parse_config
from distill.rollout.rewards import ask_each, register_reward

pytestmark = pytest.mark.usefixtures("losses_as_before")


def rewarded_config(function: str = "digits"):
    """Pure RL: nothing reads a teacher."""
    config = tiny_config(max_steps=3)
    config.reward.function = function
    config.distillation.teacher_model_path = ""
    config.distillation.objective.update(divergence=0.0, reward_advantage=1.0)
    config.distillation.generate_strategy.num_generations = 4
    config.data.validation.max_samples = 0
    return config


def digits(example, response):
    """How many of the problem's digits the response has: its example is the right one."""
    return sum(character in response for character in example.prompt if character.isdigit())


def test_a_run_without_a_teacher_resumes_to_the_same_bits(tmp_path):
    register_reward("digits")(digits)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = distill.train(rewarded_config(), whole)
    lines = read_metrics(whole)
    assert lines[0]["reward/mean"] > 0 and lines[0]["reward/group_std"] > 0
    assert all(0 <= line["reward/groups_without_spread"] <= 1 for line in lines)
    assert all(line["grad_norm"] > 1e-4 for line in lines)
    card = (result.student / "README.md").read_text()
    assert "policy gradient of the reward `digits`" in card and "teacher, " not in card
    shutil.copytree(whole / "checkpoints" / "2", resumed / "checkpoints" / "2")
    again = distill.train(rewarded_config(), resumed)
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (result.student / weights).read_bytes()
    assert read_metrics(resumed)[-1] == lines[-1]


@pytest.mark.parametrize("value", ["good", None, float("nan"), [1, 2]])
def test_a_reward_that_is_no_number_is_found_before_models_are(tmp_path, value):
    register_reward("faulty")(lambda example, response: value)
    with (
        open_session(parse_config(rewarded_config("faulty")), tmp_path) as session,
        pytest.raises(UserError, match="reward.function=faulty: .*example.*returns .* number"),
    ):
        _ = session.reward


def test_a_reward_that_fails_later_stops_the_run():
    def fails(example, response):
        return 1 / len(response)

    with pytest.raises(RunStopped, match="fails on example x fails: ZeroDivisionError"):
        ask_each(fails, [distill.data.base.Example("p", None, None, "x")], [""])


def test_accuracy_needs_answers(tmp_path):
    config = rewarded_config("accuracy")
    config.data.update(name="jsonl", path=str(tmp_path / "data.jsonl"))
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "1+2=", "answer": "3"}\n')
    with (
        open_session(parse_config(config), tmp_path) as session,
        pytest.raises(UserError, match="needs answers, and 1 of 2 prompts have none .first .*1"),
    ):
        _ = session.reward
