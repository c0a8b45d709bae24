"""Runs that go on with something else, and what is kept before the first step."""

import json
import shutil

import pytest
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from distill import trainer
from distill.base.errors import RunInterrupted, RunStopped, UserError
from distill.config.changes import classes
from distill.config.keys import FREE
from distill.evaluation.evaluator import Evaluator
from distill.rollout.in_process import JaxBackend
from distill.run.interrupts import Interrupts
from distill.run.progress import Progress
from distill.run.saver import BEGINNING, find_beginning

WEIGHTS = "model.safetensors"
# Another value of every free key that a run of this size on eight CPU devices can have.
FREE_VALUES = {
    "distillation.eval_steps": 3,
    "distillation.save_steps": 3,
    "distillation.logging_steps": 2,
    "distillation.max_skipped_steps": 3,
    "policy.generation.max_log_prob_gap": 0.5,
    "policy.generation.num_slots": 16,
    "policy.generation.cache_memory": 0.5,
    "policy.activation_checkpointing": "full",
    "evaluation.batch_size": 16,
    "data.max_bad_rows": 0.5,
    "checkpointing.keep": 3,
    "checkpointing.save_minutes": 1e-9,
    "checkpointing.export_shard_size": 1.0,
    "logger.warn.truncated": 0.9,
    "logger.warn.every": 3,
}


def fixed_data(tmp_path, models, **distillation):
    """A run on rows of a file, with responses."""
    rows = [
        {"id": str(i), "prompt": f"{i}+1", "response": f"{i + 1}", "answer": f"{i + 1}"}
        for i in range(24)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_models(tiny_config(lambda_=0.5, **distillation), models)
    config.data.name, config.data.path, config.data.holdout_fraction = "jsonl", str(path), 0.3
    config.data.validation.max_samples = 4
    return config, path


def stopped_at(step: int, config, workdir) -> None:
    """Runs until `step` is saved."""
    interrupts, end_step = Interrupts(), Progress.end_step

    def stops(self, number, *values):
        end_step(self, number, *values)
        if number == step:
            interrupts.requested = "SIGTERM"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "end_step", stops)
        with pytest.raises(RunInterrupted):
            distill.train(config, workdir, interrupts)


def test_every_free_key_changes_nothing_in_the_result(models, tmp_path):
    config = with_models(tiny_config(lambda_=0.5), models)
    whole = distill.train(config, tmp_path / "whole")
    stopped_at(3, config, tmp_path / "run")
    assert {classes()[key] for key in FREE_VALUES} == {FREE}
    config.update_from_flattened_dict(FREE_VALUES)
    again = distill.train(config, tmp_path / "run")
    assert (again.student / WEIGHTS).read_bytes() == (whole.student / WEIGHTS).read_bytes()


def test_other_rows_template_or_weights_are_named_and_need_a_name(models, tmp_path, capsys):
    """One run, stopped, and every content changed in turn; moved models are the same run."""
    config, rows = fixed_data(tmp_path, models)
    for role in ("student", "teacher"):
        shutil.copytree(models[role], tmp_path / role)
    config = with_models(config, {role: str(tmp_path / role) for role in ("student", "teacher")})
    workdir = tmp_path / "run"
    stopped_at(1, config, workdir)

    def refused(*names: str) -> None:
        with pytest.raises(UserError) as error:
            distill.train(config, workdir)
        for name in names:
            assert f"{name} (" in str(error.value), str(error.value)
        assert "allow_changes=" in str(error.value)

    text = rows.read_text()
    rows.write_text(text.replace('"response": "8"', '"response": "9"'))
    refused("data")
    rows.write_text(text)
    with config.unlocked():
        config.data.prompt_template = "{problem}="
        refused("template")
        config.data.prompt_template = ""
        config.data.validation.max_samples = 3
        refused("validation")
        config.data.validation.max_samples = 4
    for role in ("student", "teacher"):
        weights = tmp_path / role / WEIGHTS
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-9000] + bytes(8) + whole[-8992:])
        refused(role)
        weights.write_bytes(whole)
    moved = with_models(config, models)
    moved.checkpointing.allow_changes = ("policy.optimizer.learning_rate", "validation")
    moved.policy.optimizer.learning_rate, moved.data.validation.max_samples = 1e-4, 3
    result = distill.train(moved, workdir)
    assert result.results["student"]["examples"] == result.results["teacher"]["examples"] == 3
    assert "base" not in result.results, "of four other prompts"
    line = "changed at step 1: policy.optimizer.learning_rate from 0.01 to 0.0001"
    assert line in capsys.readouterr().out
    (note,) = [line for line in read_metrics(workdir) if "changes" in line]
    assert note["step"] == 1 and set(note["changes"]) == {
        "policy.optimizer.learning_rate",
        "validation",
    }
    card = (result.student / "README.md").read_text()
    assert "Changed at step 1: `policy.optimizer.learning_rate` from 0.01 to 0.0001" in card
    moved.checkpointing.allow_changes = ()
    distill.train(moved, workdir)  # what was allowed is what the run is now


def test_more_steps_after_a_finished_run_are_those_of_a_longer_one(models, tmp_path):
    config = with_models(tiny_config(lambda_=0.5), models)
    config.data.validation.max_samples = 0
    whole = distill.train(config, tmp_path / "whole")
    config.distillation.max_steps = 3
    distill.train(config, tmp_path / "run")
    config.distillation.max_steps = 6
    longer = distill.train(config, tmp_path / "run")
    assert longer.steps == 6
    assert (longer.student / WEIGHTS).read_bytes() == (whole.student / WEIGHTS).read_bytes()
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    config.policy.optimizer.schedule = "cosine"
    with pytest.raises(UserError, match="optimizer.schedule"):
        distill.train(config, tmp_path / "run")


def test_checks_and_evaluations_before_the_first_step_are_kept(models, tmp_path, monkeypatch):
    config = with_models(tiny_config(max_steps=2), models)
    config.preflight = True
    checked, evaluated, original = [], [], Evaluator.__call__

    def counting(self, model, teacher, **options):
        evaluated.append(model is teacher)
        return original(self, model, teacher, **options)

    monkeypatch.setattr(trainer, "preflight", lambda *_: checked.append(1))
    monkeypatch.setattr(Evaluator, "__call__", counting)
    with monkeypatch.context() as patch:
        patch.setattr(JaxBackend, "generate", fail)
        for _ in range(2):
            with pytest.raises(RunStopped, match="no sampler"):
                distill.train(config, tmp_path)
    assert checked == [1] and evaluated == [False, True]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 0]
    config.policy.optimizer.learning_rate = 1e-4  # another run, of which nothing is known
    result = distill.train(config, tmp_path)
    assert checked == [1, 1] and evaluated == [False, True] * 2 + [False]
    assert set(result.results) == {"base", "teacher", "student"}
    assert read_metrics(tmp_path)[:2] == lines


@pytest.mark.parametrize("text", ['{"step": 0, "confi', "[]", "{}"])
def test_a_damaged_beginning_is_none(text, tmp_path, capsys):
    (tmp_path / BEGINNING).write_text(text)
    assert find_beginning(tmp_path, dict(config={}, contents={})) == {}
    assert f"{tmp_path / BEGINNING} is damaged" in capsys.readouterr().out


def fail(self, request):
    raise RunStopped("no sampler")
