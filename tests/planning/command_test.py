"""What users of the plan type, and what they are told."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_plans import flagship

from distill.base.errors import UserError
from distill.planning import run

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess:
    shell = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "distill.plan", *arguments],
        cwd=ROOT, env=shell, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_this_host_is_divided_into_as_many_devices_as_asked():
    done = command("--config=configs/arithmetic.py", "--topology=cpu:4")
    assert done.returncode == 0, done.stderr
    assert "compiled in: update" in done.stdout


def test_exit_status_of_what_fits():
    done = command("--config=configs/math_cl.py", "--topology=gpu:h200x8")
    assert done.returncode == 0, done.stderr
    assert "planned with its published shape" in done.stdout and ": fits" in done.stdout


def test_exit_status_of_what_does_not_fit_and_of_its_remedy():
    asked = ["--config=configs/math_cl.py", "--topology=gpu:h100x1"]
    done = command(*asked)
    assert done.returncode == 3 and "does not fit" in done.stdout, done.stderr
    remedy = re.search(r"^  (--topology=\S+)", done.stdout, re.MULTILINE)[1]
    assert command(asked[0], remedy).returncode == 0


def test_exit_status_of_nonsense():
    done = command("--config=configs/math_cl.py", "--topology=v7:4x4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    for known in ("v5p", "v5e", "v6e", "tpu7x", "cpu:N", "gpu:h200xN"):
        assert known in done.stderr


@pytest.mark.parametrize(
    "changes_, name, pattern",
    [
        ({"mesh.data": 3}, "gpu:h200x8", "does not match 8 devices"),
        ({"mesh.tensor": 4}, "gpu:h200x8", "'kv_heads' of 2, which mesh.tensor=4.*may be 1 or 2$"),
        (
            {"mesh.fsdp": 3, "mesh.data": 1},
            "gpu:h200x3",
            "'embed' of 5120, which mesh.fsdp=3",
        ),
        ({"policy.model_name": "Qwen/Qwen9"}, "gpu:h200x8", "Qwen9 is not known here.*Qwen2.5"),
        ({"policy.max_total_sequence_length": 65536}, "gpu:h200x8", "32768 positions"),
        (
            {"policy.max_total_sequence_length": 3070, "mesh.context": 4},
            "gpu:h200x8",
            "max_total_sequence_length=3070 does not divide over mesh.context=4 .*: try 3072$",
        ),
        ({}, "cpu:9", "asks for 9 devices.*XLA_FLAGS"),
        ({}, "gpu:h200", "unknown topology 'gpu:h200': known are"),
    ],
)
def test_what_can_not_be_planned_is_said_in_one_line(changes_, name, pattern):
    config = flagship()
    config.update_from_flattened_dict(changes_)
    with pytest.raises(UserError, match=pattern) as caught:
        run.plan(config, name)
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    advice = f'pip install "jax[tpu]=={jax.__version__}"'
    with pytest.raises(UserError, match=re.escape(advice)):
        run.plan(flagship(), "v5p:4x4x4")
