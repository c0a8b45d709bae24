"""Each check of the preflight, on a healthy run and on one that is broken in just that way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_runs import tiny_config, with_models
from tokenizers import Regex, normalizers

import distill
from distill.base.errors import UserError
from distill.batches import rows as microbatch
from distill.build import models as build_models
from distill.build import session as build_session
from distill.checks import layout, numbers, texts
from distill.checks.run import STATE_CHECKS, TEXT_CHECKS
from distill.config import parse_config
from distill.data.tokenizer import load_tokenizer, save_tokenizer
from distill.losses import divergences
from distill.models.model import Model
from distill.preflight import preflight_alone
from distill.rollout.in_process import JaxBackend

ROOT = Path(__file__).parents[2]
CHECKS = [*TEXT_CHECKS, *STATE_CHECKS]


def problem_of(config) -> str:
    with pytest.raises(UserError, match="^preflight: ") as caught:
        preflight_alone(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copied(folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def with_template(folder: Path, template: str) -> str:
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture
def config(models):
    config = with_models(tiny_config(), models)
    config.preflight = True
    return config


@pytest.mark.parametrize("lambda_", [1.0, 0.0])
def test_healthy_run_passes_every_check(config, lambda_):
    config.distillation.lambda_ = lambda_
    found = preflight_alone(config)
    assert list(found) == CHECKS and all(found.values())


@pytest.mark.parametrize("data, fsdp, context", [(2, 4, 1), (1, 8, 1), (1, 2, 4)])
def test_healthy_sharded_run_passes(config, data, fsdp, context, monkeypatch):
    monkeypatch.setattr(layout, "LARGE_BYTES", 1000)
    config.mesh.update(data=data, fsdp=fsdp, context=context)
    assert "are split" in preflight_alone(config)["layout"]


def test_hard_labels_pass(config):
    config.distillation.update(hard_labels=True, lambda_=0.0)
    preflight_alone(config)


def test_swapped_weights_after_refit(config, monkeypatch):
    refit = JaxBackend.refit

    def stale(self, student_params, version):
        refit(self, jax.tree.map(lambda x: x + 0.05, student_params), version)

    monkeypatch.setattr(JaxBackend, "refit", stale)
    assert "a refit that did not arrive" in problem_of(config)


@pytest.fixture
def rounding_sampler(config, monkeypatch):
    """A sampler in bfloat16 beside a trainer in float32."""
    build_backend = build_session.build_backend

    def rounding(config, student, *arguments, **folders):
        model = nnx.merge(student.graph, student.params)
        model.dtype = model.layers.dtype = jnp.dtype("bfloat16")
        student = Model(nnx.split(model, nnx.Param)[0], student.params)
        return build_backend(config, student, *arguments, **folders)

    monkeypatch.setattr(build_session, "build_backend", rounding)
    # Trained: the answers of random models are so uniform that rounding hardly shows.
    config.policy.model_name = "embedded:arithmetic-student"
    config.distillation.teacher_model_path = "embedded:arithmetic-teacher"


def test_sampler_of_another_precision(config, rounding_sampler):
    assert "another precision" in problem_of(config)


def test_accelerators_may_round_products_unless_forbidden(config, rounding_sampler, monkeypatch):
    monkeypatch.setattr(numbers, "platform", lambda: "gpu")
    preflight_alone(config)
    with jax.default_matmul_precision("highest"):
        assert "another precision" in problem_of(config)


def filled_differently(monkeypatch, change):
    """Rows of a microbatch as `change(rows)` leaves them."""
    fill = microbatch._fill

    def differently(*arguments):
        rows = fill(*arguments)
        change(rows)
        return rows

    monkeypatch.setattr(microbatch, "_fill", differently)


def test_shifted_mask(config, monkeypatch):
    def shift(rows):
        for name in ("tokens", "weight"):
            rows.columns[name][:] = np.roll(rows.columns[name], 1, axis=1)

    filled_differently(monkeypatch, shift)
    assert "looks at other positions" in problem_of(config)


def test_padding_that_is_trained_on(config, monkeypatch):
    def unmask(rows):
        for row, length in enumerate(rows.lengths_b):
            rows.columns["weight"][row, length - 1 : length + 1] = 1

    filled_differently(monkeypatch, unmask)
    config.distillation.lambda_ = 0.0
    assert "padding is attended to or trained on" in problem_of(config)


def test_packed_sequences_that_see_each_other(config, monkeypatch):
    config.policy.sequence_packing.enabled = True

    def join(rows):
        if rows.segment_ids_bt is not None:
            rows.segment_ids_bt[:] = 1

    filled_differently(monkeypatch, join)
    # Trained: random models hardly notice what stands before.
    config.policy.model_name = "embedded:arithmetic-student"
    config.distillation.teacher_model_path = "embedded:arithmetic-teacher"
    assert "share a row see each other" in problem_of(config)


def test_healthy_packed_run_passes(config):
    config.policy.sequence_packing.enabled = True
    assert "as padded ones" in preflight_alone(config)["numbers"]


@pytest.fixture
def config_with_a_view(config):
    config.teacher.prompt_template = "{answer}={problem}"
    config.policy.sequence_packing.enabled = True
    return config


def test_teacher_with_prompts_of_its_own_passes(config_with_a_view):
    found = preflight_alone(config_with_a_view)
    assert "one position late" in found["numbers"] and "the teacher reads '" in found["view"]


@pytest.mark.parametrize(
    ("late", "words"), [(1, "joined wrongly"), (-99, "as without a shift")], ids=["shift", "blind"]
)
def test_teacher_that_is_asked_elsewhere(config_with_a_view, monkeypatch, late, words):
    """By a shift of the index map; and by a map that asks at one place whatever it is given."""
    of = microbatch.in_place_of
    if late < 0:
        monkeypatch.setattr(numbers, "_late", lambda rows: rows)
    else:
        monkeypatch.setattr(microbatch, "in_place_of", lambda *args: of(*args) + late)
    assert words in problem_of(config_with_a_view)


def test_loss_that_moves_a_perfect_student(config, monkeypatch):
    monkeypatch.setattr(divergences._LOSSES, "_parts", dict(divergences._LOSSES._parts))
    divergences.register_divergence("doubled")(lambda log_p, log_q: jnp.exp(2 * log_q))
    config.distillation.kl_type = "doubled"
    assert "is no divergence" in problem_of(config)


def test_template_that_loses_the_problem(config, models, tmp_path):
    folder = copied(models["student"], tmp_path)
    config.policy.model_name = with_template(folder, "1+1\n")
    with pytest.raises(UserError, match="message by 'user' the chat template leaves out"):
        preflight_alone(config)


def test_tokenizer_that_loses_the_problem(config, models, tmp_path):
    folder = copied(models["student"], tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "+"}
    content["decoder"] = {"type": "Fuse"}
    path.write_text(json.dumps(content))
    config.policy.model_name = str(folder)
    config.distillation.update(hard_labels=True, lambda_=0.0)
    assert preflight_alone(config)  # the text is looked for as the tokenizer normalises it
    content["normalizer"] = None
    content["decoder"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "+"}
    path.write_text(json.dumps(content))
    assert "loses its text" in problem_of(config)


def test_template_that_closes_the_prompt(config, models, tmp_path):
    folder = copied(models["student"], tmp_path)
    closing = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
    config.policy.model_name = with_template(folder, closing)
    assert "ends a response before it has begun" in problem_of(config)


def test_end_that_only_the_template_names(config, models, tmp_path):
    folder = copied(models["student"], tmp_path)
    other_end = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|pad|>{% else %}\n{% endif %}{% endfor %}"
    )
    config.policy.model_name = with_template(folder, other_end)
    found = preflight_alone(config)["end of responses"]
    assert found == "responses end at '<|pad|>', '<|endoftext|>'; those of the data with '<|pad|>'"


def test_held_out_prompts_that_are_trained_on(config, tmp_path):
    rows = [{"prompt": f"{i}+{i}", "response": str(2 * i)} for i in range(2, 42)]
    for name, part in (("train", rows), ("other", rows[:10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config.data.update(name="jsonl", path=str(tmp_path / "train.jsonl"))
    config.data.validation.path = str(tmp_path / "other.jsonl")
    found = preflight_alone(config)["held-out prompts"]
    assert found.startswith("warning: 8 of 8 held-out prompts are trained on")
    config.data.validation.path = ""
    assert preflight_alone(config)["held-out prompts"].startswith("0 of 1 held-out prompts")


def test_end_outside_of_the_vocabulary(config, models, tmp_path):
    folder = copied(models["student"], tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4096]}))
    config.policy.model_name = str(folder)
    assert "4096 is not in the vocabulary" in problem_of(config)


def test_ids_without_an_embedding_are_not_in_use(config, models, tmp_path):
    folders = {role: str(shutil.copytree(models[role], tmp_path / role)) for role in models}
    for folder in folders.values():
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens([f"<{i}>" for i in range(20)])
        tokenizer.pad_token = "<19>"
        save_tokenizer(tokenizer, Path(folder))
    vocabulary = build_session.Session(parse_config(with_models(config, folders))).vocabulary
    assert (vocabulary.size, vocabulary.pad_id) == (17, 1)  # of 37 ids
    assert list(preflight_alone(config)) == CHECKS


def test_tokenizer_of_the_same_words_that_cuts_otherwise(config, monkeypatch):
    """Equal vocabularies, which the comparison of ids cannot tell apart."""

    def other(folder, chat_template=""):
        tokenizer = load_tokenizer(folder, chat_template)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[0-9]"), "7")
        return tokenizer

    monkeypatch.setattr(texts, "load_tokenizer", other)  # the teacher's
    assert "make different tokens of" in problem_of(config)


def test_tokenizer_that_transformers_would_load_otherwise(config, models, tmp_path):
    folders = {role: str(shutil.copytree(models[role], tmp_path / role)) for role in models}
    for folder in map(Path, folders.values()):
        content = json.loads((folder / "tokenizer.json").read_text())
        content["normalizer"] = {"type": "Replace", "pattern": {"String": "1"}, "content": "7"}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "Qwen2Tokenizer"  # whose own normaliser takes its place
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    session = build_session.Session(parse_config(with_models(config, folders)))
    assert "warning: AutoTokenizer of transformers cuts" in texts.check_tokenizers(session)


def test_tokenizer_of_equal_size_with_other_words(config, models, tmp_path):
    folder = copied(models["teacher"], tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    path.write_text(json.dumps(content))
    config.distillation.teacher_model_path = str(folder)
    with pytest.raises(UserError, match="different tokenizers: first difference at token '1'"):
        preflight_alone(config)


def test_teacher_with_another_template_is_warned_of(config, models, tmp_path, capsys):
    folder = copied(models["teacher"], tmp_path)
    template = "be kind\n{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    config.distillation.teacher_model_path = with_template(folder, template)
    preflight_alone(config)
    assert "warning: the teacher's chat template renders them otherwise" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_weight_that_is_not_finite(config, models, tmp_path, role):
    folder = copied(models[role], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    broken = tensors[key].copy()
    broken[3, 2] = np.inf
    save_file(tensors | {key: broken}, folder / "model.safetensors")
    with_models(config, models | {role: str(folder)})
    assert f"preflight: weights: the {role}'s {key} has entries" in problem_of(config)


def test_unsharded_copy(config, monkeypatch):
    shardings = build_models.param_shardings

    def whole(params, mesh, rules=None):
        replicated = jax.sharding.NamedSharding(mesh, jax.P())
        return jax.tree.map(lambda _: replicated, shardings(params, mesh))

    monkeypatch.setattr(layout, "LARGE_BYTES", 1000)
    monkeypatch.setattr(build_models, "param_shardings", whole)
    config.mesh.update(data=2, fsdp=4, tensor=1)
    problem = problem_of(config)
    assert "every device holds all of it" in problem and "student and optimizer" in problem


def test_too_little_memory(config, monkeypatch):
    monkeypatch.setattr(layout, "device_memory", lambda: 10_000)
    assert "a step needs at least" in problem_of(config)


def test_runs_begin_with_it_unless_told_not_to(config, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "device_memory", lambda: 10_000)
    config.distillation.max_steps = 1
    with pytest.raises(UserError, match="--config.preflight=False"):
        distill.train(config, tmp_path / "checked")
    config.preflight = False
    assert distill.train(config, tmp_path / "unchecked").steps == 1


def test_command_line(models):
    command = [sys.executable, "-m", "distill.preflight", "--config=configs/arithmetic.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"preflight: {len(CHECKS)} checks passed" in result.stdout


def test_rounding_of_16_bits_passes(config):
    """The gradient of a trained student that is its own teacher is rounding, not zero."""
    config.policy.model_name = "embedded:arithmetic-student"
    config.distillation.teacher_model_path = "embedded:arithmetic-teacher"
    config.policy.precision = config.teacher.precision = "bfloat16"
    assert "own teacher" in preflight_alone(config)["numbers"]
