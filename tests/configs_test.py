"""Every config with a smoke run: the commands of its docstring, as they are written there."""

import importlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forks
from quick_xla import QUICK_XLA_FLAGS

from distill.config.parse import parse_config

ROOT = Path(__file__).parents[1]
SMOKE = [
    path.stem for path in sorted((ROOT / "configs").glob("*.py")) if ":smoke" in path.read_text()
]

# Of the others, it would repeat what preflight_test.py has; it takes a third of a run's time.
CHECKED = "llama_teacher", "qwen35"


def config_module(name: str):
    return importlib.import_module(f"configs.{name}")


def smoke_commands(name: str) -> list[list[str]]:
    lines = config_module(name).__doc__.splitlines()  # without the backslashes at line ends
    commands = [shlex.split(line) for line in lines if line.startswith("    python -m")]
    return [command for command in commands if f"--config=configs/{name}.py:smoke" in command]


def test_all_are_found():
    assert {"math_cl", "qwen3", "gemma", "moe", *CHECKED} <= set(SMOKE)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    path = f"{ROOT}:{ROOT / 'tests/without_torch'}"
    with Forks(os.environ | {"PYTHONPATH": path, "XLA_FLAGS": QUICK_XLA_FLAGS}) as forks:
        yield forks


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_smoke_run(name, forks, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    *scratch, train = smoke_commands(name)
    assert all(command[2] == "distill.scratch" for command in scratch)  # embedded models need none
    assert train[2] == "distill.main"
    if name not in CHECKED:
        train.append("--config.preflight=False")
    for command in (*scratch, train):
        done = forks.run(command, tmp_path, tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    (results,) = tmp_path.glob("runs/*_smoke/results.json")
    found = json.loads(results.read_text())
    teachers = [role for role in found if role.startswith("teacher")]
    assert found.keys() == {"base", "student", *teachers} and teachers
    assert found["base"]["forward_kl"] > 0
    assert all(found[role]["forward_kl"] == 0 for role in teachers)


@pytest.mark.parametrize("arg, thinks", [("", False), ("thinking", True), ("long", True)])
def test_qwen3_thinks_if_asked_to(arg, thinks):
    config = parse_config(config_module("qwen3").get_config(arg))
    assert config.data.template_arguments == (f"enable_thinking={thinks}",)
