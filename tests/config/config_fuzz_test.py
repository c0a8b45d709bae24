"""Thousands of bad overrides through the real command line: one line and status 2, or a config."""

import math
import random
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
from absl.testing import flagsaver
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.base.errors import UserError
from distill.config import cli
from distill.config.parse import default_config, known_keys, parse_config, to_flat_dict
from distill.config.schema import Config

ROOT = Path(__file__).parents[2]
EXPERIMENT = str(ROOT / "configs/arithmetic.py")
_CONFIG = cli.define_config_flag()  # of `distill.main`, which defines it when it runs
OVERRIDES = 2500
VALUES = [
    "", " ", "=", "''", '"', "\\", "0", "1", "-1", "-0.0", "1.5", "1e999", "-1e999", "1e-999",
    "nan", "NaN", "inf", "-inf", "9" * 9, "9" * 99, "9" * 5000, "0x10", "1_000", "٣", "½",
    "True", "true", "None", "none", "null", "[]", "()", "{}", "(1,)", "(1, 'a')", "['a', ['b']]",
    "(None,)", "{'a': 1}",
    "('a'", "a,b", "lambda: 1", "__import__('os')", "1+1", "(" * 300, "[" * 3000, "a" * 10**5, "é",
    "\u202e", "\x1b[31mred", "\0", "\ud800", "a\nb", "%s", "{0}", "$HOME", "../..", "jsd",
    "embedded:", "embedded:../..", "http://user:secret@host/", "--config.seed=1", "@",
]  # fmt: skip


def random_key(rng: random.Random) -> str:
    key = rng.choice(known_keys())
    twist = rng.randrange(12)
    if twist == 0:
        i = rng.randrange(len(key))
        return key[:i] + rng.choice(["", "x", ".", "é", "_", "\x1b"]) + key[i + 1 :]
    if twist == 1:
        return key + rng.choice(
            [".x", ".", "[0]", "['a']", "..a", " ", ".seed", "[", "]", "=", "\u202e"]
        )
    if twist == 2:
        return rng.choice(
            ["", ".", "x", "0", "lock", "__class__", "_fields", "to_json", "keys", "[0]"]
        )
    return key


def random_argument(rng: random.Random) -> list[str]:
    key, value = random_key(rng), rng.choice(VALUES)
    if rng.random() < 0.2:
        value = "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(1, 0x3000)])) for _ in range(9)
        )
    forms = [[f"--config.{key}={value}"]] * 8 + [
        [f"-config.{key}={value}"], [f"--config.{key}", value], [f"--config.{key}"],
        [f"--noconfig.{key}"], [f"--config.{key}=1", f"--config.{key}={value}"],
        [f"--config.{key}.x={value}", f"--config.{key}={value}"],
    ]  # fmt: skip
    return rng.choice(forms)


def status_of(arguments: list[str], monkeypatch) -> int:
    """Exit status of a command line that ends after its config is parsed."""
    argv = ["main", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads overrides from there
    saved = flagsaver.save_flag_values()
    try:
        cli._parse_flags(argv)
        cli._call(lambda: parse_config(cli.required_config(_CONFIG)))
    except SystemExit as end:
        return end.code
    finally:
        flagsaver.restore_flag_values(saved)
    return 0


def assert_one_line(status: int, output: str, arguments: list[str]) -> None:
    assert status in (0, 2), arguments
    if status == 0:
        assert not output, arguments
        return
    line = output.removesuffix("\n")
    assert line.startswith("error: ") and line.isprintable(), (arguments, output)
    assert 12 < len(line) < 2100, arguments


def test_random_overrides_end_in_one_line(monkeypatch, capsys):
    rng = random.Random(0)
    statuses = []
    for _ in range(OVERRIDES):
        arguments = [f"--config={EXPERIMENT}", *random_argument(rng)]
        try:
            status = status_of(arguments, monkeypatch)
        except BaseException as error:
            raise AssertionError(f"a traceback for {arguments!r:.300}") from error
        captured = capsys.readouterr()
        assert not captured.out
        assert_one_line(status, captured.err, arguments)
        statuses.append(status)
    # Most values are bad for most keys; some are fine, such as any text for a text.
    assert statuses.count(2) >= 2000 and statuses.count(0) >= 100


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config="],
        ["--config=absent.py"],
        ["--config=\x1b[31m.py"],
        ["--config=" + str(ROOT)],
        ["--config=README.md"],
        [f"--config={EXPERIMENT}:nonsense"],
        ["--config.seed=1", f"--config={EXPERIMENT}"],
        [f"--config={EXPERIMENT}", "--unknown=1"],
        [f"--config={EXPERIMENT}", "stray"],
        [f"--config={EXPERIMENT}", "--config"],
        ["--flagfile=absent"],
    ],
)
def test_wrong_command_lines_end_in_one_line(arguments, monkeypatch, capsys):
    status = status_of(arguments, monkeypatch)
    captured = capsys.readouterr()
    assert status == 2
    assert_one_line(status, captured.err, arguments)


def test_advice_on_huge_sizes_is_given_in_a_moment(monkeypatch, capsys):
    sizes = ("global_batch_size=999983", "micro_batch_size=999982")  # the first is prime
    overrides = [f"--config.policy.train_{size}" for size in sizes]
    start = time.monotonic()
    assert status_of([f"--config={EXPERIMENT}", *overrides], monkeypatch) == 2
    assert time.monotonic() - start < 10
    assert "try train_micro_batch_size=1" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(12))
def test_real_commands_end_the_same_way(seed, tmp_path):
    rng = random.Random(f"commands {seed}")
    arguments = random_argument(rng)
    while any("\0" in argument or "\ud800" in argument for argument in arguments):
        arguments = random_argument(rng)  # the system passes no such arguments
    # A value that is out of range, so that no run begins. An argument may take the last as its own.
    bad = "--config.distillation.max_steps=0"
    command = ["-m", "distill.main", f"--config={EXPERIMENT}", bad, *arguments, bad]
    done = subprocess.run(
        [sys.executable, *command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert_one_line(2, done.stderr, command)
    assert not (tmp_path / "run").exists()


# ---- the schema by itself ----

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(st.characters(categories=["L"]), min_size=1), inner, max_size=2)
    ),
)


@given(st.sampled_from(known_keys()), ANYTHING)
@example("teachers.NAME.vllm", {})
@settings(deadline=None, derandomize=True, max_examples=400)
def test_any_value_of_any_key_parses_or_is_told_in_one_line(key, value):
    config = default_config()
    config.policy.model_name = config.distillation.teacher_model_path = "model"
    if key.startswith("teachers"):
        config.distillation.teacher_model_path = ""
        config.teachers.NAME = dict(model="model", vllm={})
    *sections, name = key.split(".")
    section = config
    for each in sections:
        section = section[each]
    with section.unlocked(), section.ignore_type():
        section[name] = value
    try:
        parsed = parse_config(config)
    except UserError as error:
        assert key.rpartition(".")[2] in str(error) or key.rpartition(".")[0] in str(error)
        assert "\n" not in str(error)
        return
    flat = to_flat_dict(parsed) | {"teachers": [], "teachers.NAME": [], "teachers.NAME.vllm": []}
    assert all(math.isfinite(x) for x in flat.values() if isinstance(x, float))
    assert type(flat[key]) in (str, int, float, bool, list, type(None))


def test_every_number_has_bounds_that_can_be_told():
    """What the fuzzing relies on: a key without any would let NaN pass."""

    def visit(cls: type, prefix: str):
        for name, kind in typing.get_type_hints(cls).items():
            field = cls.__dataclass_fields__[name]
            if hasattr(kind, "__dataclass_fields__"):
                visit(kind, f"{prefix}{name}.")
            elif kind in (int, float):
                assert field.metadata["low"] is not None, prefix + name

    visit(Config, "")
