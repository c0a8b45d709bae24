"""Whole runs at toy size: what they write, how they resume, and how bad input ends."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from distill.base.errors import RunStopped, UserError
from distill.batches.coins import lambda_coin
from distill.data.arithmetic import CHARACTERS
from distill.data.tokenizer import character_tokenizer, load_tokenizer
from distill.evaluate import evaluate_checkpoint
from distill.generate import generate
from distill.models.checkpoints.source import load_model_config
from distill.rollout.in_process import JaxBackend
from distill.run import progress as metrics
from distill.sampling.engine import Engine

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> tuple[Path, distill.Result]:
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, distill.train(with_models(tiny_config(lambda_=0.5), models), workdir)


def test_run_leaves_results_metrics_and_a_student(finished):
    workdir, result = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results == result.results
    assert set(results) == {"base", "student", "teacher"}
    for values in results.values():
        assert set(values) == {
            "accuracy", "accuracy_low", "accuracy_high", "examples", "forward_kl", "graded",
            "mean_length", "reverse_kl", "truncated",
        }  # fmt: skip
        assert values["examples"] == 8
        assert values["accuracy_low"] <= values["accuracy"] <= values["accuracy_high"]
    assert results["teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert results["base"]["forward_kl"] > 1e-4 and results["base"]["reverse_kl"] > 1e-4
    assert load_model_config(result.student)[0].model_width == 16
    assert load_tokenizer(result.student).get_vocab() == character_tokenizer(CHARACTERS).get_vocab()
    assert list((workdir / "tensorboard").iterdir())
    losses = [line["loss"] for line in read_metrics(workdir) if "loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_coin_decides_the_batch_and_sampler_agrees_with_trainer(finished):
    workdir, _ = finished
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    coins = [bool(line["on_policy"]) for line in lines]
    assert coins == [lambda_coin(0, step, 0.5) for step in range(6)]
    assert len(set(coins)) == 2, "six tosses should show both kinds of batch"
    for line in lines:
        assert line["log_prob_gap_max"] < 1e-3


def test_killed_run_resumes_to_the_same_bits(models, finished, tmp_path, monkeypatch):
    """Killed after update 5, with checkpoints at 2 and 4: update 5 is lost and made again."""
    workdir, result = finished
    end_step = metrics.Progress.end_step

    def dies(self, step, *values):
        end_step(self, step, *values)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "end_step", dies)
        with pytest.raises(KeyboardInterrupt):
            distill.train(with_models(tiny_config(lambda_=0.5), models), tmp_path)
    assert not (tmp_path / "results.json").exists()
    again = distill.train(with_models(tiny_config(lambda_=0.5), models), tmp_path)
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (result.student / weights).read_bytes()
    assert again.results == result.results
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_failed_generation_is_saved_and_resumes_to_the_same_bits(
    models, finished, tmp_path, monkeypatch
):
    """Servers that went away: the batch that was not trained on is served again."""
    workdir, result = finished
    last = max(step for step in range(6) if lambda_coin(0, step, 0.5))
    assert last % 2, "a step that no checkpoint of its own precedes"
    generate = "distill.rollout.in_process.JaxBackend.generate"
    original = JaxBackend.generate

    def fails(self, request):
        if request.step == last:
            raise RunStopped("http://127.0.0.1:1 stayed away")
        return original(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(generate, fails)
        with pytest.raises(RunStopped, match=f"stayed away .step {last} is saved: the same comm"):
            distill.train(with_models(tiny_config(lambda_=0.5), models), tmp_path)
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    again = distill.train(with_models(tiny_config(lambda_=0.5), models), tmp_path)
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (result.student / weights).read_bytes()
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_finished_run_is_not_trained_again(models, finished):
    workdir, result = finished
    before = read_metrics(workdir)
    again = distill.train(with_models(tiny_config(lambda_=0.5), models), workdir)
    assert again.results == result.results and again.steps == 6
    assert read_metrics(workdir) == before


def test_workdir_of_another_run_is_refused(models, finished):
    workdir, _ = finished
    config = with_models(tiny_config(lambda_=0.25, logging_steps=3), models)
    with pytest.raises(UserError) as error:
        distill.train(config, workdir)
    assert "distillation.lambda_ (0.5 there, 0.25 here)" in str(error.value)
    assert "logging_steps" not in str(error.value)


def test_lambda_0_never_samples_and_lambda_1_needs_no_responses(models, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("lambda_=0 sampled")

    monkeypatch.setattr("distill.rollout.in_process.JaxBackend.generate", never)
    config = with_models(tiny_config(lambda_=0.0, max_steps=1), models)
    config.data.validation.max_samples = 0
    distill.train(config, tmp_path / "fixed")
    monkeypatch.undo()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1"}) + "\n" for i in range(8)))
    config = with_models(tiny_config(lambda_=1.0, max_steps=1), models)
    config.data.name, config.data.path, config.data.holdout_fraction = "jsonl", str(prompts), 0.0
    config.data.validation.max_samples = 0
    distill.train(config, tmp_path / "sampled")


def test_mix_per_sample_tosses_for_every_row(models, tmp_path):
    config = with_models(tiny_config(lambda_=0.5, mix="sample", max_steps=3), models)
    config.data.validation.max_samples = 0
    distill.train(config, tmp_path)
    shares = [line["on_policy"] for line in read_metrics(tmp_path)]
    assert any(0 < share < 1 for share in shares)


def test_mix_both_trains_on_both_responses(models, tmp_path):
    changes = dict(lambda_=0.5, mix="both", kl_type_on_data="jsd", max_steps=1)
    config = with_models(tiny_config(**changes), models)
    config.distillation.objective.horizon = 2
    config.data.validation.max_samples = 0
    distill.train(config, tmp_path)
    (line,) = read_metrics(tmp_path)
    assert line["on_policy"] == 0.5 and 8 < line["tokens"] <= 16


def test_disagreeing_sampler_stops_the_run(models, tmp_path, monkeypatch):
    """Weights that never reach the sampler: the classic silent failure."""
    refit = "distill.rollout.in_process.JaxBackend.refit"

    def stale(self, params, version):
        self._weights.hold(version, jax.tree.map(lambda x: x + 0.3, params))

    monkeypatch.setattr(refit, stale)
    config = with_models(tiny_config(max_steps=3), models)
    config.data.validation.max_samples = 0
    with pytest.raises(RunStopped, match="sampler and trainer disagree"):
        distill.train(config, tmp_path)


def test_supervised_training_lowers_the_loss(models, tmp_path):
    config = tiny_config(hard_labels=True, lambda_=0.0, max_steps=20)
    config.policy.model_name = models["student"]
    config.data.validation.max_samples = 0
    config.data.max_samples = 8
    result = distill.train(config, tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    assert result.results == {}


def test_generated_sequences_are_fixed_data(models, tmp_path, monkeypatch, capsys):
    config = with_models(tiny_config(), models)
    config.data.max_samples = 16
    config.distillation.generate_strategy.temperature = 2.0
    config.distillation.generate_strategy.num_generations = 2
    config.data.prompt_template = "0{problem}"
    # Of what is learned nothing is asked, and nothing is refused.
    config.reward.function, config.distillation.objective.reward_advantage = "accuracy", 1.0
    config.policy.router_replay = "replay"
    output = tmp_path / "answers.jsonl"
    counts = generate(config, models["teacher"], output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert counts["written"] == len(lines) == 32
    assert counts["truncated"] == sum("truncated" in line for line in lines) > 0
    assert set(lines[0]) - {"truncated"} == {"id", "prompt", "response", "answer", "level"}
    assert lines[0]["level"] == "1", "by which teachers may be asked"
    assert all(line["prompt"].startswith("0") for line in lines), "what the teacher was asked"
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]

    # Stopped and started again: the same rows, of which none is made twice.
    monkeypatch.setattr("distill.build.fixed_data._RESPONSES_PER_REQUEST", 8)
    calls, original = [], Engine.generate

    def stops(self, params, request):
        calls.append(request.prompt_index[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, params, request)

    monkeypatch.setattr(Engine, "generate", stops)
    again = tmp_path / "again.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(config, models["teacher"], again)
    assert not again.exists()
    config.logger.progress_bar = not config.logger.progress_bar  # which changes nothing
    assert generate(config, models["teacher"], again) == counts
    assert calls == [0, 4, 8, 8, 12] and "going on behind 8 prompts" in capsys.readouterr().out
    assert again.read_bytes() == output.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "again.jsonl"}
    # With other rows, it starts over.
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        generate(config, models["teacher"], tmp_path / "other.jsonl")
    config.seed = 1
    generate(config, models["teacher"], tmp_path / "other.jsonl")
    assert calls == [0, 4, 8, 0, 4, 8, 12] and "starting over" in capsys.readouterr().out

    config = tiny_config(hard_labels=True, lambda_=0.0, max_steps=1)
    config.policy.model_name = models["student"]
    config.data.name, config.data.path, config.data.holdout_fraction = "jsonl", str(output), 0.0
    config.data.validation.max_samples = 0
    distill.train(config, tmp_path / "run")


def test_evaluate_gives_the_numbers_of_the_run(models, finished):
    _, result = finished
    config = with_models(tiny_config(), models)
    results = evaluate_checkpoint(config, models["student"])
    for name, value in result.results["base"].items():
        assert results["student"][name] == pytest.approx(value, rel=1e-5), name


def test_teacher_may_compute_in_another_precision_and_end_answers_its_own_way(models, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(models["teacher"], teacher)
    # An instruction-tuned teacher of a base student: '=' ends its answers too.
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 15]}))
    config = with_models(tiny_config(max_steps=1), models)
    config.distillation.teacher_model_path = str(teacher)
    config.teacher.precision = "bfloat16"
    result = distill.train(config, tmp_path / "run")
    exported = json.loads((result.student / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [1, 15]


# ---------------------------------------------------------------------------------- bad input


def expect_error(config: ConfigDict, workdir: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        distill.train(config, workdir)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not workdir.exists(), "nothing may be written"


def test_missing_model_path(models, tmp_path):
    config = with_models(tiny_config(), models)
    config.policy.model_name = "./nowhere/model"
    expect_error(config, tmp_path / "run", "nowhere/model", "config.json")


def test_unreachable_hub(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = with_models(tiny_config(), models)
    config.distillation.teacher_model_path = "nobody/no-such-model"
    expect_error(config, tmp_path / "run", "nobody/no-such-model", "local folder")


def test_different_tokenizers(models, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(models["teacher"], other)
    character_tokenizer("9" + CHARACTERS.replace("9", "")).save_pretrained(other)
    config = with_models(tiny_config(), models)
    config.distillation.teacher_model_path = str(other)
    expect_error(config, tmp_path / "run", "different tokenizers", "'0'", "student id 2")


def test_corrupt_weights(models, tmp_path):
    broken = tmp_path / "student"
    shutil.copytree(models["student"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    config = with_models(tiny_config(), models)
    config.policy.model_name = str(broken)
    expect_error(config, tmp_path / "run", str(weights))


def test_missing_columns(models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1", "text": "2"}\n')
    config = with_models(tiny_config(), models)
    config.data.name, config.data.path = "jsonl", str(rows)
    expect_error(config, tmp_path / "run", "no column prompt", "question, text")


def test_nothing_left_after_filtering(models, tmp_path):
    config = with_models(tiny_config(lambda_=0.0), models)
    config.distillation.generate_strategy.max_length = 2
    expect_error(config, tmp_path / "run", "none of 64", "64 responses longer than 2", "raise")


def test_unknown_divergence(models, tmp_path):
    config = with_models(tiny_config(kl_type="wasserstein"), models)
    expect_error(config, tmp_path / "run", "wasserstein", "forward", "jsd", "skew_reverse")


def test_batch_that_does_not_divide_over_the_mesh(models, tmp_path):
    config = with_models(tiny_config(), models)
    config.policy.train_micro_batch_size = 4
    expect_error(config, tmp_path / "run", "8 devices", "try train_micro_batch_size=8")


def test_unknown_dataset_and_plugin(models, tmp_path):
    config = with_models(tiny_config(), models)
    config.data.name = "nosuch"
    expect_error(config, tmp_path / "run", "nosuch", "arithmetic", "math_cl")
    config = with_models(tiny_config(), models)
    config.plugins = ("no_such_module",)
    expect_error(config, tmp_path / "run", "no_such_module", "PYTHONPATH")


def test_bad_validation_split_is_found_before_models_are(tmp_path):
    config = tiny_config()
    config.policy.model_name = "./nowhere/model"
    config.data.validation.split = "math500"
    expect_error(config, tmp_path / "run", "math500", "validation")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.distillation.lamda=0.7"], ["distillation.lamda", "distillation.lambda_"]),
        (["--config.distillation.max_steps=many"], ["max_steps", "many"]),
        (["--config.policy.generation.backend=megatron"], ["megatron", "jax"]),
        (["--nosuch=1"], ["nosuch"]),
        (["surplus"], ["surplus"]),
    ],
)
def test_command_line_says_one_line_and_exits_with_2(tmp_path, arguments, words):
    workdir = tmp_path / "run"
    command = [
        sys.executable, "-m", "distill.main", "--config=configs/arithmetic.py",
        f"--workdir={workdir}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not workdir.exists()
