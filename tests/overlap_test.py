"""The sampler on devices of its own: same results, and what cannot be split."""

from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from distill.errors import UserError
from distill.rollout.in_process import JaxBackend


def separate_config(**distillation) -> ConfigDict:
    """Four devices train, four sample."""
    config = tiny_config(**distillation)
    config.data.validation.max_samples = 0
    config.policy.generation.colocated.enabled = False
    return config


def run_and_record_tokens(config: ConfigDict, workdir: Path, monkeypatch) -> list[np.ndarray]:
    """The tokens of every rollout of a run."""
    tokens, generate = [], JaxBackend.generate

    def recording(self, request):
        rollout, measured = generate(self, request)
        tokens.append(rollout.tokens_br)
        return rollout, measured

    with monkeypatch.context() as patch:
        patch.setattr(JaxBackend, "generate", recording)
        distill.train(config, workdir)
    return tokens


def test_split_devices_give_the_curve_of_shared_ones(models, tmp_path, monkeypatch):
    """4 + 4 of 8 devices, weights cut two ways; the order of sums differs, nothing else."""
    config = with_models(separate_config(), models)
    config.mesh.fsdp = 2
    own = run_and_record_tokens(config, tmp_path / "own", monkeypatch)
    config.policy.generation.colocated.enabled = True
    shared = run_and_record_tokens(config, tmp_path / "shared", monkeypatch)
    np.testing.assert_array_equal(own, shared)
    lines = zip(read_metrics(tmp_path / "own"), read_metrics(tmp_path / "shared"), strict=True)
    for ours, theirs in lines:
        # Adam divides by the root of tiny squared gradients: rounding grows from step to step.
        for name in ("loss", "grad_norm", "student_log_prob"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
        assert ours["log_prob_gap_max"] < 1e-3


def test_split_may_change_when_a_run_goes_on(models, tmp_path):
    config = with_models(separate_config(max_steps=4), models)
    config.policy.generation.colocated.sampler_devices = 4
    distill.train(config, tmp_path)
    config.policy.generation.colocated.enabled = True
    config.policy.generation.colocated.sampler_devices = 0
    assert distill.train(config, tmp_path).steps == 4


def expect_refusal(config: ConfigDict, workdir: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        distill.train(config, workdir)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not workdir.exists(), "nothing may be written"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler_devices": 8}, ["sampler_devices=8", "none of 8 devices", "at most 7"]),
        ({"sampler_devices": 3, "tensor": 5}, ["3 devices", "mesh.tensor=5", "multiple of 5"]),
        ({"data": 8}, ["'data': 8", "4 devices", "4 of 8 devices to the sampler, 4 remain"]),
        ({"sampler_devices": 4, "enabled": True}, ["sampler_devices=4", "enabled=False"]),
        ({"sampler_devices": 7}, ["train_global_batch_size=8", "7 device groups", "try 14"]),
    ],
)
def test_devices_that_cannot_be_split_that_way(tmp_path, changes, words):
    config = separate_config()
    for key, value in changes.items():
        section = config.mesh if key in config.mesh else config.policy.generation.colocated
        section[key] = value
    expect_refusal(config, tmp_path / "run", *words)


def test_one_device_and_several_processes_cannot_be_split(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [None])
        expect_refusal(separate_config(), tmp_path / "run", "only 1", "colocated.enabled=True")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    expect_refusal(separate_config(), tmp_path / "run", "one process", "colocated.enabled=True")
