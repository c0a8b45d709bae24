"""The schema: what is refused, and how the message reads."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from distill.base.errors import UserError
from distill.config import cli
from distill.config.method import OneTeacher
from distill.config.parse import default_config, known_keys, parse_config, to_flat_dict
from distill.config.schema import all_teachers


def valid_config() -> ConfigDict:
    config = default_config()
    config.policy.model_name = "student"
    config.distillation.teacher_model_path = "teacher"
    return config


def set_key(config: ConfigDict, key: str, value) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    with config.unlocked(), config.ignore_type():
        config[name] = value


def test_defaults_with_field_evidence():
    config = parse_config(valid_config())
    optimizer = config.policy.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay) == (2e-5, 0.01)
    assert (optimizer.warmup_steps, optimizer.max_grad_norm) == (10, 1.0)
    assert config.distillation.generate_strategy.temperature == 1.0
    assert config.distillation.kl_temperature == 1.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("distillation.lamda", 1.0, ["distillation.lamda", "did you mean 'distillation.lambda_'"]),
        ("distillation.lambda_", 1.5, ["distillation.lambda_", "1.5", "between 0 and 1"]),
        ("distillation.lambda_", float("nan"), ["distillation.lambda_", "between 0 and 1"]),
        ("distillation.lambda_", "half", ["distillation.lambda_", "'half'", "float"]),
        ("distillation.max_steps", 1.5, ["distillation.max_steps", "1.5", "int"]),
        ("distillation.max_steps", True, ["distillation.max_steps", "int"]),
        ("distillation.mix", "token", ["distillation.mix", "batch, sample"]),
        ("policy.generation.backend", "megatron", ["'megatron'", "allowed is jax"]),
        (
            "policy.generation.importance_clip",
            0.5,
            ["importance_clip=0.5", "0 (off) or at least 1"],
        ),
        (
            "policy.generation.async_steps",
            2,
            ["async_steps=2", "up to 2 updates old", "importance_clip", "or async_steps=1"],
        ),
        ("policy.generation.async_steps", 9, ["async_steps", "9", "between 0 and 8"]),
        (
            "distillation.objective.terms",
            ("policy_gradient:2",),
            ["reads the tokens' advantages", "reward.function", "backend=jax", "plugin"],
        ),
        ("policy.generation.backend", "vllm", ["generation.vllm.urls", "generation.vllm.python"]),
        ("teacher.backend", "vllm", ["teacher.vllm.urls"]),
        ("teacher.vllm.top_k", 0, ["teacher.vllm.top_k", "at least 1"]),
        ("policy.precision", "float16", ["policy.precision", "bfloat16, float32"]),
        ("policy.train_micro_batch_size", 7, ["64", "7", "try train_micro_batch_size=4"]),
        ("distillation.generate_strategy.num_generations", 3, ["64", "num_generations=3"]),
        ("distillation.generate_strategy.max_length", 4096, ["max_length=4096", "2048"]),
        ("distillation.generate_strategy.top_p", 0.0, ["top_p", "above 0"]),
        ("distillation.hard_labels", True, ["hard_labels", "lambda_=0"]),
        ("distillation.teacher_model_path", "", ["distillation.teacher_model_path", "empty"]),
        ("distillation.teacher_model_path", "ema", ["teacher.ema_decay=0.0", "such as 0.99"]),
        ("distillation.teacher_model_path", "self", ["=self reads what the student", "_prompt"]),
        ("distillation.teacher_model_path", "start", ["=start reads what the student", "_prompt"]),
        ("teacher.scores", "runs/scores", ["teacher.scores=runs/scores", "distillation.lambda_"]),
        ("teacher.alignment", "bytes", ["teacher.alignment", "none, dense, spans"]),
        ("teacher.ema_decay", 0.9, ["teacher.ema_decay=0.9", "no other has one"]),
        ("policy.model_name", "", ["policy.model_name", "embedded:NAME"]),
        ("data", 3, ["'data' is a section", "path"]),
        ("data.max_samples", 0, ["data.max_samples", "at least 1"]),
    ],
)
def test_bad_value_is_one_line_that_names_it(key, value, words):
    config = valid_config()
    set_key(config, key, value)
    with pytest.raises(UserError) as error:
        parse_config(config)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_groups_of_answers_need_on_policy_batches():
    config = valid_config()
    config.distillation.lambda_ = 0.5
    config.distillation.generate_strategy.num_generations = 2
    with pytest.raises(UserError, match="use lambda_=1"):
        parse_config(config)


@pytest.mark.parametrize("key", ["policy.model_name", "distillation.teacher_model_path"])
def test_models_are_named(key):
    config = valid_config()
    config.update_from_flattened_dict({key: ""})
    with pytest.raises(UserError, match=f"'{key}' is empty: pass a folder"):
        parse_config(config)


def test_vllm_sections_check_addresses_and_show_no_secrets():
    def message(**values) -> str:
        config = valid_config()
        config.teacher.backend = "vllm"
        config.teacher.vllm.update({"urls": ("http://127.0.0.1:8000",), **values})
        with pytest.raises(UserError) as error:
            parse_config(config)
        return str(error.value)

    assert "http://HOST:PORT" in message(urls=("127.0.0.1:8000",))
    assert "passw0rd" not in message(urls=("http://me:passw0rd@10.0.0.1:8000",))
    assert "twice" in message(urls=("http://a:1", "http://a:1"))
    assert "sk-1234" not in message(api_key_variable="sk-1234")


def test_vllm_teacher_refuses_what_a_tail_cannot_do():
    config = valid_config()
    config.teacher.backend, config.teacher.vllm.urls = "vllm", ("http://127.0.0.1:8000",)
    config.distillation.teacher_model_path = ""  # its tokenizer is asked for over HTTP
    parse_config(config)
    config.distillation.kl_temperature = 2.0
    with pytest.raises(UserError, match="kl_temperature=2.0 does not go with teacher.backend=vllm"):
        parse_config(config)


def several(**teachers) -> ConfigDict:
    config = default_config()
    config.policy.model_name, config.teachers = "student", teachers
    return config


@pytest.mark.parametrize("changes", [{}, {"reward.function": "accuracy"}])
def test_feedback_needs_rewards_in_groups(changes):
    config = valid_config()
    set_key(config, "teacher.prompt_template", "{feedback} {problem}")
    for key, value in changes.items():
        set_key(config, key, value)
    with pytest.raises(UserError, match="names {feedback}.*reward.function.*num_generations"):
        parse_config(config)


def test_named_teachers_have_defaults_for_what_they_leave_out():
    config = several(easy=dict(model="a"), hard=dict(model="b", prompts="level=3", weight=2))
    teachers = all_teachers(parse_config(config))
    assert [*teachers] == ["hard", "easy"], "with rules first"
    assert teachers["easy"] == OneTeacher(model="a")
    assert teachers["hard"] == OneTeacher(model="b", prompts=("level=3",), weight=2.0)
    one = all_teachers(parse_config(valid_config()))
    assert [*one] == [""] and one[""].model == valid_config().distillation.teacher_model_path


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        (dict(a=dict(model="m", weight=0.0)), "teachers.a.weight=0.0 must be a number but 0"),
        (
            dict(a=dict(model="m", weight=-1.0), b=dict(model="m")),
            "weight=-1.0 moves .* reverse KL alone: distillation.kl_type=forward .* to 'reverse'",
        ),
        (dict(a=dict(model="m"), b=dict(model="ema")), "teachers.b.ema_decay=0.0 .* such as 0.99"),
        (dict(a=dict(model="m"), b=dict(model="self")), "teachers.b.model=self reads what the"),
        (dict(a=dict(model="m", prompts="math")), "teachers.a.prompts has 'math': write COLUMN="),
        (dict(a=dict(modell="m")), "did you mean 'teachers.NAME.model'"),
        (dict(a=dict()), "'teachers.a.model' is empty"),
        (dict(a="m"), "'teachers.a' is a section"),
        ({"a/b": dict(model="m")}, "names a teacher 'a/b'"),
        (
            dict(a=dict(model="m", backend="vllm")),
            "teachers.a.backend=vllm needs teachers.a.vllm.u",
        ),
    ],
)
def test_bad_teachers_are_told_in_one_line(teachers, words):
    with pytest.raises(UserError, match=words) as error:
        parse_config(several(**teachers))
    assert "\n" not in str(error.value)


def test_one_teacher_or_several_by_name():
    config = several(a=dict(model="m"))
    config.teacher.precision = "float32"
    with pytest.raises(UserError, match="both ways to name teachers at once"):
        parse_config(config)


def test_teachers_are_named_on_the_command_line():
    decay = "--config.teachers.a.ema_decay=2"
    assert "'teachers.a.ema_decay' is 2.0" in run_main("--config=arithmetic", decay)
    twice = run_main("--config=arithmetic", decay, decay)
    assert "is given twice: two teachers need two names" in twice


def test_flat_dict_has_every_leaf_key():
    flat = to_flat_dict(parse_config(valid_config()))
    sections = {key.rpartition(".")[0] for key in flat} | {"policy.optimizer"}
    named = {key for key in known_keys() if key.startswith("teachers")}  # by the user
    assert set(flat) == {key for key in known_keys() if key not in sections} - named
    assert flat["plugins"] == []


def test_parsed_config_is_frozen():
    config = parse_config(valid_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


MISTAKES = {
    "None": ("return None", "get_config of the config file returned None"),
    "numpy": (
        "config.distillation.max_steps = numpy.int64(3)",
        "'max_steps' is 3, of type numpy.int64: it takes .* int",
    ),
    "path": (
        "config.policy.model_name = pathlib.Path('x')",
        "'model_name' is x, of type pathlib.PosixPath: it takes .* str",
    ),
    "argument": (
        "raise ValueError('argument x: allowed is short')",
        "argument x: allowed is short",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_config_file_are_one_plain_line(tmp_path, mistake):
    line, words = MISTAKES[mistake]
    (tmp_path / "mine.py").write_text(
        "import numpy, pathlib\nfrom distill.config import default_config\n"
        f"def get_config():\n  config = default_config()\n  {line}\n  return config\n"
    )
    done = run_main(f"--config={tmp_path}/mine.py")
    assert re.search(words, done) and "Traceback" not in done


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--resume", "no flag --resume: a run goes on by the same command"),
        ("--max_steps=3", "did you mean --config.distillation.max_steps="),
        ("--nosuch=3", "--help"),
        ("--config=nosuch", "no config file nosuch"),
        ("--config.distillation.max_steps=1e3", "max_steps=1e3: it takes a whole number\n"),
        ("--config.distillation.lambda_=half", "lambda_=half: it takes a number\n"),
        ("--config.distillation.learning_rate=1", "did you mean 'policy.optimizer.learning_rate'"),
        ("--config.warmup_steps=1", "did you mean 'policy.optimizer.warmup_steps'"),
        ("--config.plugin.x", "has no value: write --config.plugin.x=VALUE"),
        ("--config.teachers.a=3", "'teachers.a' is a section with keys backend,"),
    ],
)
def test_flags_that_are_keys_or_nothing_at_all(flag, words):
    assert words in run_main("--config=arithmetic", flag)


def test_a_folder_is_not_taken_for_a_config_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()  # such as the data's
    monkeypatch.chdir(tmp_path)
    [found] = cli._with_packaged_config(["--config=gsm8k:scratch"])
    assert found.endswith("/distill/configs/gsm8k.py:scratch")


def test_a_value_out_of_range_does_not_wait_for_jax():
    command = [sys.executable, "-X", "importtime", "-m", "distill.main", "--workdir=nowhere"]
    command += ["--config=arithmetic", "--config.distillation.max_steps=-3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and "must be at least 1" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "distill.config.parse" in imported and not imported & {"jax", "transformers"}


def run_main(*arguments: str) -> str:
    """The one line that an error is."""
    command = [sys.executable, "-m", "distill.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "key, value",
    [
        ("policy.train_global_batch_size", 2147483647),
        ("evaluation.batch_size", 2147483647),
        ("policy.max_total_sequence_length", 2147483647),
        ("policy.generation.num_slots", 2147483647),
        ("policy.generation.cache_memory", 1e300),
        ("checkpointing.export_shard_size", 1e300),
    ],
)
def test_sizes_beyond_what_anybody_has_are_refused(key, value):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config key '{key}'.*must be between"):
        parse_config(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"teacher.backend": "vllm", "teacher.vllm.urls": ("http://x:1",)},
            "servers score the stud",
        ),
        ({"teacher.scores": "runs/scores", "distillation.lambda_": 0.0}, "=spans is about resp"),
        (
            {
                "teacher.scores": "runs/scores",
                "teacher.alignment": "dense",
                "distillation.lambda_": 0.0,
            },
            "teacher.alignment=dense is .* not go with teacher.scores=runs/scores: scores on disk",
        ),
        ({"distillation.teacher_model_path": "start"}, "=start: it has the student's tokenizer"),
        ({"environment.name": "python_tool"}, "aligns one response, and environment.name=python"),
        (
            {
                "teacher.prompt_template": "{feedback}{problem}",
                "reward.function": "accuracy",
                "distillation.generate_strategy.num_generations": 4,
            },
            "prompt_template=.*: feedback is in the student's tokens",
        ),
        (
            {"distillation.generate_strategy.temperature": 0.7},
            "temperature=0.7 biases the policy gradient of teacher.alignment=spans",
        ),
        (
            {"policy.generation.async_steps": 1, "policy.generation.colocated.enabled": False},
            "async_steps=1 biases the policy gradient",
        ),
    ],
)
def test_alignments_that_cannot_work_are_refused(changes, words):
    config = valid_config()
    config.update_from_flattened_dict({"teacher.alignment": "spans", **changes})
    with pytest.raises(UserError, match=words) as error:
        parse_config(config)
    assert "\n" not in str(error.value)


REWARDED = {
    "reward.function": "accuracy",
    "distillation.objective.reward_advantage": 1.0,
    "distillation.generate_strategy.num_generations": 4,
}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reward.function": ""}, "reads the tokens' advantages, but nothing makes any: set rew"),
        (
            {"distillation.generate_strategy.num_generations": 1},
            "num_generations=1: a reward less the mean of its group is always 0",
        ),
        (
            {"distillation.lambda_": 0.0, "distillation.generate_strategy.num_generations": 1},
            "a group of one",
        ),
        ({"distillation.generate_strategy.temperature": 0.8}, "strategy.temperature=0.8 biases"),
        ({"distillation.generate_strategy.top_p": 0.9}, "strategy.top_p=0.9 biases the policy"),
        ({"distillation.generate_strategy.decoding_method": "greedy"}, "=greedy biases.*to sample"),
        ({"distillation.kl_temperature": 2.0}, "kl_temperature=2.0 biases"),
        (
            {
                "policy.generation.async_steps": 1,
                "policy.generation.colocated.enabled": False,
            },
            "async_steps=1 biases the policy gradient.*importance_clip",
        ),
        ({"distillation.objective.ratio_clip": 0.2}, "importance_clip at least 1.2"),
        (
            {
                "distillation.objective.importance_clip": 2.0,
                "policy.generation.importance_clip": 2.0,
            },
            "importance_clip=2.0 weighs the tokens of the policy gradient alone",
        ),
        ({"distillation.objective.importance_clip": 0.5}, "importance_clip=0.5 .* at least 1"),
        ({"distillation.objective.target_pace": 0.1}, "set distillation.objective.target_start"),
        (
            {
                "distillation.objective.proximal_share": 0.5,
                "distillation.objective.divergence": 0.0,
            },
            "proximal_share=0.5 mixes the student into the teacher: give",
        ),
        ({"distillation.objective.weights": ("advantage",)}, "pushed away from the teacher"),
        ({"distillation.objective.reward_advantage": -1.0}, "reward_advantage.*at least 0"),
    ],
)
def test_advantages_that_estimate_nothing_are_refused(changes, words):
    config = valid_config()
    config.update_from_flattened_dict({**REWARDED, **changes})
    with pytest.raises(UserError, match=words) as error:
        parse_config(config)
    assert "\n" not in str(error.value)


def test_what_reads_a_teacher():
    config = valid_config()
    config.update_from_flattened_dict(REWARDED)
    assert parse_config(config).distillation.has_teacher
    config.distillation.objective.divergence = 0.0
    config.distillation.teacher_model_path = ""
    assert not parse_config(config).distillation.has_teacher
    for changes in ({"teacher_advantage": 1.0}, {"terms": ("jsd:0.1",)}, {"weights": ("mine",)}):
        more = valid_config()
        more.update_from_flattened_dict(REWARDED)
        more.distillation.objective.divergence = 0.0
        more.distillation.objective.update(changes)
        assert parse_config(more).distillation.has_teacher


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"distillation.mix": "both"}, "mix=both makes half.*set distillation.lambda_=0.5"),
        ({"distillation.kl_type_on_data": "forward"}, "kl_type_on_data=forward is for the data's"),
        ({"distillation.objective.position_discount": 1.1}, "position_discount.*and 1"),
        ({"distillation.objective.horizon": -1}, "horizon.*at least 0"),
    ],
)
def test_weights_that_do_not_go_together(changes, words):
    config = valid_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        parse_config(config)
