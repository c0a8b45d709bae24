"""Every config with a smoke run: the commands of its docstring, as they are written there."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from one_device import QUICK_XLA_FLAGS

from distill.config.parse import parse_config

ROOT = Path(__file__).parents[1]
SMOKE = [
    path.stem for path in sorted((ROOT / "configs").glob("*.py")) if ":smoke" in path.read_text()
]


def config_module(name: str):
    return importlib.import_module(f"configs.{name}")


def smoke_commands(name: str) -> list[list[str]]:
    lines = config_module(name).__doc__.splitlines()  # without the backslashes at line ends
    commands = [shlex.split(line) for line in lines if line.startswith("    python -m")]
    return [command for command in commands if f"--config=configs/{name}.py:smoke" in command]


def test_all_are_found():
    assert {"math_cl", "qwen3", "qwen35", "gemma", "moe"} <= set(SMOKE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_smoke_run(name, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/without_torch'}",
        "XLA_FLAGS": QUICK_XLA_FLAGS,
    }
    *scratch, train = smoke_commands(name)
    assert all(command[2] == "distill.scratch" for command in scratch)  # embedded models need none
    assert train[2] == "distill.main"
    for command in (*scratch, train):
        command[0] = sys.executable
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
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
