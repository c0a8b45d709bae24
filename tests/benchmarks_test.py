"""What benchmarks/ computes of what it measures, and that its GPU day runs all of its parts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import decode_jobs, growth_jobs
from benchmarks.sampling_jobs import CPU_WORKLOAD

ROOT = Path(__file__).parents[1]


def test_an_exponent_is_of_the_upper_half():
    # 100 + n**2: the constant hides the exponent in the lower half.
    sizes = [1, 2, 4, 1024, 2048, 4096, 8192]
    assert growth_jobs.exponent(sizes, [100 + n**2 for n in sizes]) == pytest.approx(2, abs=0.01)
    assert growth_jobs.exponent(sizes, [None] * 5 + [1.0, 2.0]) == pytest.approx(1)
    assert growth_jobs.exponent(sizes, [None] * 6 + [1.0]) is None


def test_what_grows_faster_than_its_work_is_a_fault():
    def points(time_power: float, memory_power: float):
        return {
            n: growth_jobs.Point(float(n), n**time_power, int(n**memory_power))
            for n in (64, 128, 256)
        }

    assert growth_jobs.faults("x", growth_jobs.exponents(points(1.1, 1.1))) == []
    (line,) = growth_jobs.faults("x", growth_jobs.exponents(points(2.0, 1.0)))
    assert line == "FAULT x: seconds grow with exponent 2.00, allowed are 1.00"
    (line,) = growth_jobs.faults("x", growth_jobs.exponents(points(1.0, 2.0)))
    assert "temporary" in line


def test_work_that_stays_may_not_take_longer():
    teachers = {n: growth_jobs.Point(5.0, float(n)) for n in (1, 2, 4, 8)}
    assert growth_jobs.faults("teachers", growth_jobs.exponents(teachers))


def test_the_decode_loop_is_measured_at_a_tiny_size():
    config = dataclasses.replace(
        CPU_WORKLOAD.config, vocab_size=64, num_layers=1, model_width=32, num_heads=2, ffn_width=32
    )
    workload = dataclasses.replace(CPU_WORKLOAD, config=config)
    one, two = decode_jobs.measured(workload, [1, 2], response=8, repeats=1)
    assert (one["slots"], two["slots"]) == (1, 2)
    assert one["ms_per_step"] > 0 and two["tokens_per_second"] > 0
    assert one["of_read"] > 0


STUB = """#!{python}
# Stands in for a Python on a GPU: writes rows where it is asked for some, and one part fails.
import pathlib, subprocess, sys
arguments = sys.argv[1:]
if arguments == ["-"]:
    print('{{"device": "a GPU"}}')
elif arguments[0] == "-":
    sys.exit(subprocess.run([sys.executable, *arguments]).returncode)
else:
    for each in arguments:
        if each.startswith("--json="):
            pathlib.Path(each.removeprefix("--json=")).write_text('[{{"seconds": 1}}]')
    print(*arguments)
    sys.exit("benchmarks.decode" in arguments)
"""


def test_a_gpu_day_runs_every_part_and_reports_the_one_that_fails(tmp_path):
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu_day.sh"), str(out)],
        env=os.environ | {"PYTHON": str(stub)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads((out / "gpu_day.json").read_text())
    assert found["device"] == "a GPU"
    codes = {name: part["exit_code"] for name, part in found["parts"].items()}
    assert codes.pop("decode") == 1
    assert set(codes) == {"kernels", "loss-8192", "loss-16384", "update", "step", "torch"}
    assert set(codes.values()) == {0}
    assert found["parts"]["update"]["rows"] == [{"seconds": 1}]
    assert "decode failed" in done.stdout


def test_a_gpu_day_without_a_gpu_says_so(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu_day.sh"), str(tmp_path)],
        env=os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "this needs a GPU from Hopper on" in done.stderr
