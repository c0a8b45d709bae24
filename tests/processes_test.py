"""Several real processes are one run: its numbers, its checkpoints, its end."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_runs import read_metrics

ROOT = Path(__file__).parents[1]
# float32: sums over devices come in another order, and Adam divides by roots of tiny squares, so
# that rounding grows from step to step.
CURVE = dict(rel=1e-4)
EVALUATION = dict(rel=1e-4, abs=1e-6)
WEIGHTS = dict(rel=1e-3, abs=1e-4)
pytestmark = pytest.mark.slow


class Jobs:
    """Starts `python -m distill.main` with tests/processes_config.py, in one process or in two."""

    def __init__(self, folder: Path):
        self.folder = folder

    def one(self, workdir: Path, mesh: str, *flags: str) -> subprocess.CompletedProcess:
        process = self._start(8, workdir, mesh, flags)
        return _finish(process)

    def two(
        self, workdir: Path, mesh: str, *flags: str, faults: tuple[str, str] = ("", "")
    ) -> list[subprocess.CompletedProcess]:
        """With four devices each, and what happens to each (tests/faults/fault_plugin.py)."""
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        started = [
            self._start(
                4, workdir, mesh, (address, "--num_processes=2", f"--process_id={i}", *flags), fault
            )
            for i, fault in enumerate(faults)
        ]
        return [_finish(process) for process in started]

    def _start(self, devices: int, workdir: Path, mesh: str, flags, fault: str = ""):
        command = [
            sys.executable, "-m", "distill.main", f"--workdir={workdir}",
            f"--config=tests/processes_config.py:{mesh}", *flags,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}/tests:{ROOT}/tests/faults",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_optimization_level=0",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "FAULT": fault,
            "FAULT_LOG": str(self.folder / "faults.log"),
        }
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def _finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "error:" in line]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Loss curve, evaluations and exported weights, up to rounding."""
    lines = list(zip(read_metrics(ours), read_metrics(theirs), strict=True))
    assert len([1 for mine, _ in lines if "loss" in mine]) == 6
    for mine, other in lines:
        assert mine.keys() == other.keys()
        for name in mine.keys() & {"loss", "grad_norm", "student_log_prob", "tokens", "on_policy"}:
            assert mine[name] == pytest.approx(other[name], **CURVE), (mine["step"], name)
    mine, other = (json.loads((folder / "results.json").read_text()) for folder in (ours, theirs))
    assert mine.keys() == other.keys() == {"base", "student", "teacher"}
    for role, values in other.items():
        assert mine[role] == pytest.approx(values, **EVALUATION), role
    mine, other = (load_file(folder / "student/model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    for key, array in other.items():
        assert mine[key] == pytest.approx(array, **WEIGHTS), key


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(jobs) -> Path:
    """The workdir of one process with eight devices."""
    workdir = jobs.folder / "alone"
    done = jobs.one(workdir, "1,8,1")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def together(jobs) -> tuple[Path, list[subprocess.CompletedProcess]]:
    """The workdir of two processes with four devices each, whose weights are cut over all."""
    workdir = jobs.folder / "together"
    done = jobs.two(workdir, "1,8,1")
    assert [each.returncode for each in done] == [0, 0], done
    return workdir, done


def test_two_processes_make_the_run_of_one(alone, together):
    """Models from scratch, pretraining, preflight, training, evaluation, checkpoints, export."""
    assert_same_run(together[0], alone)


def test_only_the_first_process_prints_and_writes(together):
    workdir, (first, second) = together
    assert f"student: {workdir / 'student'}" in first.stdout
    assert second.stdout == ""
    boards = list((workdir / "tensorboard").iterdir())
    assert len(boards) == 1
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["3", "6"]


def test_signal_to_one_saves_in_both_and_one_process_goes_on(jobs, alone, tmp_path):
    """On a mesh of which each process holds a half of the data, and of everything."""
    done = jobs.two(tmp_path, "2,2,2", faults=("", "train:4:SIGTERM"))
    assert [each.returncode for each in done] == [0, 0], done
    assert "step 4 is saved: the same command goes on from it" in done[0].stdout
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 4
    assert not (tmp_path / "student").exists() and not (tmp_path / ".lock").exists()
    again = jobs.one(tmp_path, "2,2,2")
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path, alone)


def test_death_of_one_ends_the_other_and_both_go_on(jobs, alone, tmp_path):
    """Of the run of one process that is killed after its save of step 3, two finish the rest."""
    shutil.copytree(alone / "scratch", tmp_path / "scratch")
    done = jobs.one(tmp_path, "1,8,1", "--config.preflight=False")
