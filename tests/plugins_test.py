"""Faulty parts of the user's own: one line that names the part, before the first step."""

import dataclasses
import sys

import numpy as np
import pytest
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from benchmarks.objectives import objective_of
from distill.base.errors import RunStopped, UserError
from distill.build.plugins import import_plugins
from distill.config import default_config, parse_config
from distill.config.schema import PluginKeys
from distill.data.base import examples_of, get_dataset
from distill.rollout.base import build_own_backend, generate_checked
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest

pytestmark = pytest.mark.usefixtures("losses_as_before")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module of the user's own, and imports it as the config's only plugin."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name: str, source: str, *keys: tuple[str, object]):
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)
        config = default_config()
        config.plugins = (name,)
        config.policy.model_name = config.distillation.teacher_model_path = "embedded:x"
        with config.unlocked():
            config.update_from_flattened_dict(dict(keys))
        parsed = parse_config(config)
        import_plugins(parsed)
        return parsed

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "source, words",
    [
        ("1 / 0", "ZeroDivisionError: division by zero, at .*faulty.py:1"),
        ("import sys\nsys.exit(3)", "SystemExit: 3, at .*faulty.py:2"),
        ("def f(:", r"SyntaxError: .*line 1\)\): it must"),
        ("import nosuchmodule", r"No module named 'nosuchmodule', at .*faulty.py:1\)"),
    ],
)
def test_a_module_that_raises_when_it_is_imported(write, source, words):
    with pytest.raises(UserError, match=f"^plugins names 'faulty'.*{words}") as error:
        write("faulty", source)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", [".faulty", "faulty/part.py"])
def test_a_module_that_is_no_name(name):
    config = default_config()
    config.plugins = (name,)
    config.policy.model_name = config.distillation.teacher_model_path = "embedded:x"
    with pytest.raises(UserError, match="written as my_plugin"):
        import_plugins(parse_config(config))


SIGNATURES = {
    "evaluation.metrics.register_metric": ("()", r"evaluation.metrics=bad.*\(responses\)"),
    "evaluation.grading.register_grader": ("(text)", r"grading=bad.*\(example, response\)"),
    "losses.divergences.register_divergence": ("(p)", r"kl_type=bad.*\(log_p, log_q\)"),
    "losses.divergences.register_term": ("(p, q)", r"kl_type=bad.*\(log_p, log_q, is_target\)"),
    "losses.divergences.register_loss": ("(p, q)", r"\(log_p_cv, log_q_cv, targets_c\)"),
    "losses.weights.register_weight": ("(s)", r"weights=bad.*\(statistics, columns\)"),
    "losses.metrics.register_step_metric": ("(s)", r"step_metrics=bad.*\(statistics, columns\)"),
    "rollout.rewards.register_reward": ("()", r"reward.function=bad.*\(example, response\)"),
    "rollout.base.register_backend": ("()", r"backend=bad.*\(parts\)"),
}


@pytest.mark.parametrize("place", SIGNATURES)
def test_a_part_with_the_wrong_signature(write, place):
    module, _, register = place.rpartition(".")
    signature, words = SIGNATURES[place]
    source = f"from distill.{module} import {register}\n@{register}('bad')\ndef bad{signature}: 1\n"
    with pytest.raises(UserError, match=f"'faulty'.*{words}") as error:
        write("faulty", source)
    assert "faulty.bad" in str(error.value)


def test_a_name_that_is_taken(write):
    source = (
        "from distill.losses.divergences import register_divergence\n"
        "@register_divergence('forward')\ndef mine(log_p, log_q): return log_p\n"
    )
    with pytest.raises(UserError, match="'faulty'.*'forward'.*taken by distill.losses.divergences"):
        write("faulty", source)


def test_losses_that_cannot_run(write):
    write(
        "faulty",
        """
import numpy as np
from distill.losses.divergences import register_divergence, register_loss
from distill.losses.weights import register_weight

@register_divergence("of_numpy")
def of_numpy(log_p, log_q):
    return np.exp(np.asarray(log_p)) * (log_p - log_q)

@register_loss("of_numpy_rows")
def of_numpy_rows(log_p, log_q, targets):
    return np.asarray(log_p).sum(axis=1)

@register_loss("whole")
def whole(log_p, log_q, targets):
    return (log_p - log_q).sum()

@register_weight("constant")
def constant(statistics, columns):
    return 1.0 + columns["mine"].sum()
""",
    )
    for kl_type, words in {
        "of_numpy": "of_numpy fails .TracerArrayConversionError.*jax.numpy",
        "of_numpy_rows": "faulty.of_numpy_rows fails: TracerArrayConversionError.*jax.numpy",
        "whole": r"faulty.whole makes an array of shape \(\) of 3 tokens",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            objective_of(kl_type)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"weights=constant: faulty.constant makes .* shape \(\)"):
        objective_of("forward", weights=("constant",))


DATASET = """
from distill.data.base import DatasetInterface, Example, register_dataset

@register_dataset("rows")
class Rows(DatasetInterface):
    def __init__(self, split, seed, max_samples, path, level: int = 1, kind: str = "fine"):
        self.level, self.kind = level, kind
        if kind == "never":
            raise OSError("gone")
    def __len__(self):
        return 4
    def __getitem__(self, i):
        if i < 2 or self.kind == "fine":
            return Example(str(i), None, None, str(i))
        return {
            "dict": {"prompt": "1"}, "none": None, "field": Example(1, None, None, "2"),
            "answer": Example("1", None, 2, "2"),
        }[self.kind]

@register_dataset("listed")
def listed(split, seed, max_samples, path):
    return None
"""


def test_rows_that_are_no_examples(write):
    write("faulty", DATASET)
    assert len(examples_of(get_dataset("rows", "train"))) == 4
    for kind, words in {
        "dict": "row 2 of the dataset .Rows. is dict: .*Example",
        "none": "row 2 of the dataset .Rows. is NoneType: .*Example",
        "field": "row 2 of the dataset .Rows. has prompt of type int",
        "answer": "row 2 of the dataset .Rows. has answer of type int",
        "raises": "row 2 of the dataset .Rows. cannot be read: KeyError: 'raises' .faulty.py:",
    }.items():
        with pytest.raises(UserError, match=words):
            examples_of(get_dataset("rows", "train", kind=kind))
    with pytest.raises(UserError, match="dataset 'rows' cannot be made: OSError: gone .faulty.py:"):
        get_dataset("rows", "train", kind="never")
    with pytest.raises(UserError, match="dataset 'listed' cannot be made: TypeError"):
        get_dataset("listed", "train")


def test_keys_of_ones_own(write):
    from distill.build.data import build_dataset

    config = write("faulty", DATASET, ("data.name", "rows"), ("plugin.level", 3))
    assert build_dataset(config).level == 3
    with pytest.raises(UserError, match="'plugin.level' is 'x': faulty.Rows takes.* type int"):
        build_dataset(dataclasses.replace(config, plugin=PluginKeys(level="x")))
    with pytest.raises(UserError, match="unknown config key 'plugin.lvl'.*known are level, kind"):
        write("faulty", DATASET, ("data.name", "rows"), ("plugin.lvl", 3))


def test_backends_that_are_none(write):
    source = """
from distill.rollout.base import register_backend

@register_backend("half")
class Half:
    def __init__(self, parts, rate: float = 0.5):
        self.rate = rate
        if rate > 1:
            raise ValueError("too fast")
    def start(self): pass
"""
    write("faulty", source)
    with pytest.raises(UserError, match="faulty.Half made a Half without refit, generate, stop"):
        build_own_backend("half", None, {})
    with pytest.raises(UserError, match="backend=half: faulty.Half fails: ValueError: too fast"):
        build_own_backend("half", None, {"rate": 2})


class Short:
    def __init__(self, made):
        self.made = made

    def generate(self, request):
        return self.made


def test_too_few_rows_of_a_backend():
    params = SamplingParams(max_length=4)
    request = RolloutRequest(tuple([np.arange(3)] * 2), np.arange(2), params)

    def rollout(rows, columns, length):
        return Rollout(
            tokens_br=np.zeros((rows, columns), np.int32),
            log_probs_br=np.zeros((rows, columns), np.float32),
            sampled_log_probs_br=np.zeros((rows, columns), np.float32),
            lengths_b=np.full(rows, length, np.int32),
            stopped_b=np.ones(rows, bool),
        )

    generate_checked(Short((rollout(2, 4, 4), {})), request)
    for made in [(rollout(1, 4, 4), {}), (rollout(2, 3, 3), {}), (rollout(2, 4, 0), {}), None]:
        with pytest.raises(RunStopped, match="plugins_test.Short.generate returned .* 2 rows"):
            generate_checked(Short(made), request)


def test_a_step_metric(models, tmp_path, monkeypatch):
    (tmp_path / "confident.py").write_text(
        "from distill.losses.metrics import register_step_metric\n"
        "@register_step_metric('p_of_sampled')\n"
        "def p(statistics, columns): return statistics.log_prob_s\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = with_models(tiny_config(max_steps=1), models)
    config.plugins, config.logger.step_metrics = ("confident",), ("p_of_sampled",)
    distill.train(config, tmp_path / "run")
    [line] = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert line["p_of_sampled"] == pytest.approx(line["student_log_prob"], rel=1e-5)
