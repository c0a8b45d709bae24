"""A run of a mixture of experts whose trainer replays what the sampler picked."""

from pathlib import Path

import pytest
from tiny_runs import random_model, read_metrics, tiny_config, train_killed

import distill
from distill.base.errors import UserError

LIKE = Path(__file__).parents[1] / "configs/tiny/qwen3_moe.json"


def test_batch_sampled_ahead_is_replayed_and_resumed_to_the_same_bits(tmp_path, monkeypatch):
    """By a sampler in 8 bits; killed while the last batch is sampled, and two more are saved."""
    config = tiny_config(max_steps=4, save_steps=1)
    config.policy.model_name = random_model(LIKE)
    config.preflight = True
    config.policy.router_replay = "replay"
    config.policy.sequence_packing.enabled = True
    config.policy.generation.precision = "int8"
    config.policy.generation.colocated.enabled = False
    config.policy.generation.async_steps, config.policy.generation.importance_clip = 2, 2.0
    config.data.validation.max_samples = 0
    whole = distill.train(config, tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    assert [line["routing_disagreement"] for line in lines if "loss" in line] == [0] * 4
    train_killed(config, tmp_path / "killed", monkeypatch, step=2)
    again = distill.train(config, tmp_path / "killed")
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (whole.student / weights).read_bytes()
    assert read_metrics(tmp_path / "killed") == lines


def test_dialogues_are_replayed_where_positions_and_experts_are_split(tmp_path):
    config = tiny_config(max_steps=1, save_steps=0)
    config.policy.model_name = random_model(LIKE)
    config.policy.router_replay = "replay"
    config.policy.generation.precision = "int8"
    config.mesh.context = config.mesh.expert = 2
    config.environment.name, config.data.subset = "python_tool", "tools"
    config.data.validation.max_samples = 0
    distill.train(config, tmp_path)
    [line] = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert line["routing_disagreement"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lambda_=0.0), "replay needs the experts that a sampler here .* distillation.lambda_"),
        ({}, "replay is for a mixture of experts, and a student of the family qwen2 is none"),
    ],
)
def test_refused_where_nobody_picks_experts(changes, message, tmp_path):
    config = tiny_config(**changes)
    config.policy.router_replay = "replay"
    with pytest.raises(UserError, match=message):
        distill.train(config, tmp_path)
