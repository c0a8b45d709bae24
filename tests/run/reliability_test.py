"""Runs that go wrong and are none the worse: bad batches, other meshes, torn checkpoints."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tiny_runs import random_model, read_metrics, tiny_config, with_models

import distill
from distill import trainer
from distill.base.errors import RunInterrupted, RunStopped, UserError
from distill.evaluation.evaluator import Evaluator
from distill.evaluation.metrics import register_metric
from distill.export import export_checkpoint
from distill.rollout.in_process import JaxBackend
from distill.run import progress as metrics
from distill.run.interrupts import Interrupts

WEIGHTS = "model.safetensors"


def board_steps(workdir: Path) -> set[int]:
    """Steps in TensorBoard's files: records with a length of 8 and checksums of 4 bytes."""
    steps = set()
    for path in (workdir / "tensorboard").iterdir():
        rest = path.read_bytes()
        while rest:
            length = int.from_bytes(rest[:8], "little")
            steps.add(event_pb2.Event.FromString(rest[12 : 12 + length]).step)
            rest = rest[16 + length :]
    return steps


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def die_after(step: int, patch) -> None:
    end_step = metrics.Progress.end_step

    def dies(self, number, *values):
        end_step(self, number, *values)
        if number == step:
            raise KeyboardInterrupt

    patch.setattr(metrics.Progress, "end_step", dies)


# ------------------------------------------------------------------------------- bad batches


def poison(monkeypatch, steps) -> None:
    """A teacher that is not a number at these steps (from 1)."""
    make_train_step = trainer.make_train_step

    def make(*args, **kwargs):
        train_step = make_train_step(*args, **kwargs)

        def step(state, teacher_params, batch):
            if int(state.step) + 1 in steps:
                teacher_params = jax.tree.map(lambda x: x * np.nan, teacher_params)
            return train_step(state, teacher_params, batch)

        return step

    monkeypatch.setattr(trainer, "make_train_step", make)


def poisoned_config(models, **distillation):
    config = with_models(tiny_config(lambda_=0.5, **distillation), models)
    config.data.validation.max_samples = 0
    return config


def test_bad_batch_is_skipped_named_and_resumed_over(models, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 4})
    whole = distill.train(poisoned_config(models), tmp_path / "whole")
    assert "WARNING: step 3 is skipped: loss nan" in capsys.readouterr().out
    lines = read_metrics(tmp_path / "whole")
    assert [line["skipped"] for line in lines if "loss" in line] == [0, 0, 1, 2, 2, 2]
    (third, fourth) = [line for line in lines if "skipped_examples" in line]
    assert third["step"] == 3 and len(third["skipped_examples"]) == 8
    assert not set(third["skipped_examples"]) & set(fourth["skipped_examples"])
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[2] is None and None not in losses[4:]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[2] == rates[3] == rates[4] < rates[5], "warm-up waits for updates"
    with monkeypatch.context() as patch:
        die_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            distill.train(poisoned_config(models), tmp_path / "killed")
    again = distill.train(poisoned_config(models), tmp_path / "killed")
    assert (again.student / WEIGHTS).read_bytes() == (whole.student / WEIGHTS).read_bytes()
    assert read_metrics(tmp_path / "killed") == lines


def test_too_many_bad_batches_stop_a_saved_run(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(3, 7))
        with pytest.raises(RunStopped) as error:
            distill.train(poisoned_config(models, max_skipped_steps=1, save_steps=0), tmp_path)
    for words in ("2 steps in a row", "max_skipped_steps=1", "is saved: the same command"):
        assert words in str(error.value)
    assert steps_of(tmp_path) == [4]
    assert max(board_steps(tmp_path)) == read_metrics(tmp_path)[-1]["step"]
    result = distill.train(poisoned_config(models, max_skipped_steps=1, save_steps=0), tmp_path)
    assert result.steps == 6
    assert read_metrics(tmp_path)[-1]["skipped"] == 2


def test_a_run_whose_steps_were_all_skipped_is_no_success(models, tmp_path, monkeypatch):
    poison(monkeypatch, range(3))
    config = poisoned_config(models, max_steps=2)
    for _ in range(2):  # nor is it when it is asked again
        with pytest.raises(RunStopped, match="all steps had a loss .* the student is as it was"):
            distill.train(config, tmp_path)
    assert not (tmp_path / "student").exists() and not (tmp_path / "results.json").exists()


def test_lengths_that_explode_are_warned_of(models, tmp_path, capsys):
    """Random students end their answers by chance only."""
    config = with_models(tiny_config(max_steps=2), models)
    config.data.validation.max_samples, config.logger.warn.truncated = 0, 0.1
    distill.train(config, tmp_path)
    line = read_metrics(tmp_path)[0]
    assert line["generation/truncated"] > 0.1 and line["warnings"] == 1
    # Uniform over 17 ids, and untrained.
    assert line["generation/entropy_estimate"] == pytest.approx(np.log(17), rel=0.1)
    assert "(logger.warn.truncated)" in capsys.readouterr().out


# ------------------------------------------------------------- what may fail beside the training


def test_a_metric_that_fails_loses_no_update(models, tmp_path):
    calls = []

    @register_metric("flaky")
    def flaky(answers):
        calls.append(len(answers))
        if len(calls) == 3:  # of the student, after base and teacher, behind the last update
            raise ZeroDivisionError("no answer stopped")
        return {"answers": len(answers)}

    config = with_models(tiny_config(max_steps=2, save_steps=0), models)
    config.evaluation.metrics = ("flaky",)
    with pytest.raises(RunStopped, match="'flaky' failed: ZeroDivisionError.*step 2 is saved"):
        distill.train(config, tmp_path)
    assert steps_of(tmp_path) == [2]
    result = distill.train(config, tmp_path)
    assert result.results["student"]["flaky/answers"] == calls[0] > 0 and len(calls) == 4


def test_a_run_without_a_report_is_finished(models, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr("distill.trainer.write_report", fail)
    config = with_models(tiny_config(max_steps=1), models)
    result = distill.train(config, tmp_path)
    assert result.student.exists() and (tmp_path / "results.json").exists()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"no report (OSError: no room): python -m distill.report {tmp_path}"


# ------------------------------------------------------------------------------ other meshes


def test_run_goes_on_with_another_mesh_within_rounding(tmp_path, monkeypatch):
    """From rows alone to weights, heads and positions: the order of sums differs, nothing else."""
    config = tiny_config(lambda_=0.5)
    config.policy.model_name = random_model(model_width=16, vocab_size=24)
    whole = distill.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        die_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            distill.train(config, tmp_path / "moved")
    config.mesh.update(data=1, fsdp=2, tensor=2, context=2)
    moved = distill.train(config, tmp_path / "moved")
    for ours, theirs in zip(
        read_metrics(tmp_path / "moved"), read_metrics(tmp_path / "whole"), strict=True
    ):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "student_log_prob", "tokens", "on_policy"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
    for role, values in whole.results.items():
        assert moved.results[role] == pytest.approx(values, rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------- torn ones, and the best


def test_torn_checkpoint_is_refused_and_the_previous_one_gives_the_same_bits(
    models, tmp_path, capsys
):
    config = with_models(tiny_config(lambda_=0.5), models)
    config.data.validation.max_samples = 0
    whole = distill.train(config, tmp_path)
    weights, lines = (whole.student / WEIGHTS).read_bytes(), read_metrics(tmp_path)
    record = tmp_path / "checkpoints" / "6" / "record.json"
    record.write_bytes(record.read_bytes()[:-2])
    with pytest.raises(UserError, match="checkpoints/6 is damaged .record.json.*on_torn=previous"):
        distill.train(config, tmp_path)
    config.checkpointing.on_torn = "previous"
    again = distill.train(config, tmp_path)
    assert "going on from checkpoint 4" in capsys.readouterr().out
    assert (again.student / WEIGHTS).read_bytes() == weights and read_metrics(tmp_path) == lines
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["4", "6", "6.torn"]


def test_best_checkpoint_is_kept_and_exported_when_asked(models, tmp_path):
    config = with_models(tiny_config(eval_steps=1, save_steps=0), models)
    config.policy.optimizer.learning_rate = 0.1  # soon worse than at its best
    config.checkpointing.keep, config.checkpointing.best_metric = 1, "eval/student/forward_kl"
    last = distill.train(config, tmp_path / "run")
    name = "eval/student/forward_kl"
    scores = {line["step"]: line[name] for line in read_metrics(tmp_path / "run") if name in line}
    best = min(scores, key=scores.get)
    assert best != 6, "else nothing is shown"
    assert steps_of(tmp_path / "run") == [best, 6]
    assert export_checkpoint(config, tmp_path / "run", tmp_path / "best") == best
    assert export_checkpoint(config, tmp_path / "run", tmp_path / "last", "6") == 6
    ours, theirs = tmp_path / "best" / WEIGHTS, last.student / WEIGHTS
    assert (tmp_path / "last" / WEIGHTS).read_bytes() == theirs.read_bytes() != ours.read_bytes()
    with pytest.raises(UserError, match="--checkpoint=5 is not there: pass best, or one of"):
        export_checkpoint(config, tmp_path / "run", tmp_path / "none", "5")


def test_clock_makes_checkpoints_due_too(models, tmp_path):
    config = with_models(tiny_config(max_steps=3, save_steps=0), models)
    config.data.validation.max_samples = 0
    config.checkpointing.save_minutes, config.checkpointing.keep = 1e-9, 9
    distill.train(config, tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3]


# ---------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("when", ["before", "during"])
def test_signal_at_an_evaluation_leaves_it_to_the_next_start(models, tmp_path, monkeypatch, when):
    """During one, grading processes may have been signalled too: its numbers may be wrong."""
    config = with_models(tiny_config(lambda_=0.5, eval_steps=3), models)
    whole = distill.train(config, tmp_path / "whole")
    interrupts, evaluate, end_step = Interrupts(), Evaluator.__call__, metrics.Progress.end_step
    stop, stops, steps = JaxBackend.stop, [], []

    def counting(self, step, *values):
        end_step(self, step, *values)
        steps.append(step)
        if when == "before" and step == 3:
            interrupts.requested = "SIGTERM"

    def spoilt(self, model, teacher, **options):
        evaluation, answers = evaluate(self, model, teacher, **options)
        if not steps:
            return evaluation, answers
        interrupts.requested = "SIGTERM"
        return dataclasses.replace(evaluation, accuracy=-1.0), answers

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "end_step", counting)
        patch.setattr(Evaluator, "__call__", spoilt)
        patch.setattr(JaxBackend, "stop", lambda self: stops.append(stop(self)))
        with pytest.raises(RunInterrupted, match="SIGTERM: step 3 is saved: the same command"):
            distill.train(config, tmp_path / "run", interrupts)
    assert stops
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not any("eval/student/accuracy" in line for line in lines)
    again = distill.train(config, tmp_path / "run")
    assert (again.student / WEIGHTS).read_bytes() == (whole.student / WEIGHTS).read_bytes()
    assert again.results == whole.results
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_servers_that_were_signalled_too_make_no_error_of_it(models, tmp_path, monkeypatch):
    """A scheduler signals every process: the sampler fails while the trainer wants to stop."""
    interrupts, generate = Interrupts(), JaxBackend.generate

    def fails(self, request):
        if request.step == 2:
            interrupts.requested = "SIGTERM"
            raise RunStopped("the server is gone")
        return generate(self, request)

    monkeypatch.setattr(JaxBackend, "generate", fails)
    config = with_models(tiny_config(), models)
    config.data.validation.max_samples = 0
    with pytest.raises(RunInterrupted, match="step 2 is saved"):
        distill.train(config, tmp_path, interrupts)
