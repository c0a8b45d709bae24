"""Several real processes are one run: its numbers, its checkpoints, its end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from forked import Forks
from processes_config import get_config
from quick_xla import QUICK_XLA_FLAGS
from safetensors.numpy import load_file
from tiny_runs import random_model, read_metrics

import distill
from distill.base import processes
from distill.base.errors import UserError
from distill.base.roll_call import call_the_roll
from distill.reporting.read import read_run

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "tests" / name for name in ("", "run", "run/faults", "without_torch")]
# What is compared is compared up to rounding, so programs may be compiled in a third of the time.
XLA_FLAGS = f"--xla_force_host_platform_device_count=8 {QUICK_XLA_FLAGS}"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": ":".join(map(str, FOLDERS)),
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
}
# float32: sums over devices come in another order; Adam divides by roots of tiny squares, so that
# rounding grows from step to step.
CURVE = dict(rel=2e-5)
COMPARED = {"loss", "grad_norm", "student_log_prob", "tokens", "on_policy"}
COMPARED |= {"environment/turns", "environment/reward"}
EVALUATION = dict(rel=1e-4, abs=1e-6)
WEIGHTS = dict(rel=1e-4, abs=1e-5)
# What Gloo's threads say about their connections, each word written by itself, among others' words.
GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+"
)


class Two:
    """Starts a command in processes that share eight devices, and compiled programs.

    Each number has a process that has imported the project, of which its processes are forks.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._forks: list[Forks] = []
        self._open = contextlib.ExitStack()

    def start(
        self,
        workdir: Path,
        *flags: str,
        of_one: tuple[str, ...] = (),
        fault: str = "",
        count: int = 2,
        coming: Sequence[int] = (),
    ) -> list[subprocess.CompletedProcess]:
        """Runs `python -m distill.main`.

        Args:
          workdir: of the run.
          flags: of all.
          of_one: further flags of process 1.
          fault: what happens to process 1; see tests/run/faults/fault_plugin.py.
          count: of processes.
          coming: those that are started; all by default.
        """
        flags = (f"--workdir={workdir}", *flags)
        if count > 1:
            address = f"--coordinator_address=127.0.0.1:{free_port()}"
            flags = (address, f"--num_processes={count}", *flags)
        coming = coming or range(count)
        while len(self._forks) < count:
            self._forks.append(self._open.enter_context(Forks(ENVIRONMENT)))

        def run(number: int) -> subprocess.CompletedProcess:
            more = (*flags, *of_one) if number == 1 else flags
            return self._run(number, count, more, fault if number == 1 else "")

        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(run, coming))

    def _run(self, number: int, count: int, flags, fault: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "distill.main", "--config=tests/run/processes_config.py"]
        if count > 1:
            command.append(f"--process_id={number}")
        output = self.folder / f"output-{number}"
        output.mkdir(exist_ok=True)
        return self._forks[number].run(
            [*command, *flags],
            ROOT,
            output,
            XLA_FLAGS=XLA_FLAGS.replace("count=8", f"count={8 // count}"),
            FAULT=fault,
            FAULT_LOG=str(self.folder / "faults.log"),
        )

    def close(self) -> None:
        self._open.close()


def _finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def statuses(done: list[subprocess.CompletedProcess]) -> list[int]:
    return [each.returncode for each in done]


def errors(done: subprocess.CompletedProcess) -> list[str]:
    assert "Traceback" not in done.stderr and "Check failure" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if "error:" in line]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Loss curve, evaluations and exported weights, up to rounding."""
    lines = list(zip(read_metrics(ours), read_metrics(theirs), strict=True))
    assert len([1 for mine, _ in lines if "loss" in mine]) == 6
    assert max(mine.get("environment/reward", 0) for mine, _ in lines) > 0, "else nobody replied"
    for mine, other in lines:
        assert mine.keys() == other.keys()
        for name in mine.keys() & COMPARED:
            assert mine[name] == pytest.approx(other[name], **CURVE), (mine["step"], name)
    mine, other = (json.loads((folder / "results.json").read_text()) for folder in (ours, theirs))
    assert mine.keys() == other.keys() == {"base", "student", "teacher"}
    for role, values in other.items():
        assert mine[role] == pytest.approx(values, **EVALUATION), role
    assert 0 < other["student"]["accuracy"] < 1, "else shares of the grading could be lost"
    for role in ("base", "student"):
        mine, other = (read_run(folder).rollouts[role]["responses"] for folder in (ours, theirs))
        assert len(mine) == len(other) > 4
        for answer, same in zip(mine, other, strict=True):
            assert answer["correct"] == same["correct"] and answer["tokens"] == same["tokens"]
            assert answer["divergence"] == pytest.approx(same["divergence"], rel=1e-3, abs=1e-4)
    mine, other = (load_file(folder / "student/model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == other.keys() and len(mine) > 10
    for key, array in other.items():
        assert mine[key] == pytest.approx(array, **WEIGHTS), key


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Iterator[Two]:
    get_config()  # makes the models, which processes that have not joined could not
    two = Two(tmp_path_factory.mktemp("processes"))
    yield two
    two.close()


@pytest.fixture(scope="module")
def alone(two) -> Path:
    """The workdir of one process with eight devices."""
    workdir = two.folder / "alone"
    (done,) = two.start(workdir, count=1)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def together(two) -> tuple[Path, list[subprocess.CompletedProcess]]:
    workdir = two.folder / "together"
    done = two.start(workdir)
    assert statuses(done) == [0, 0], done
    return workdir, done


# ----------------------------------------------------------------------------- the same run


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(alone, together):
    """Training, evaluation, export; only the first speaks."""
    workdir, (first, second) = together
    assert_same_run(workdir, alone)
    assert f"student: {workdir / 'student'}" in first.stdout
    assert not GLOO.sub("", second.stdout).strip()
    assert (workdir / "report.html").stat().st_size > 50_000
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


@pytest.mark.slow
def test_error_and_signal_in_one_of_two_and_the_rest_by_one(two, alone, tmp_path):
    """Told of the error, process 0 ends at once: it does not wait until a heartbeat is missed."""
    first, second = two.start(tmp_path, fault="train:5:error")
    assert statuses([first, second]) == [1, 1], (first, second)
    assert errors(first) == ["process 1: error: RuntimeError: a fault"]
    assert "Traceback" in second.stderr and "error: RuntimeError: a fault" in second.stderr
    # In step 4, from 3 on; the first process may already have decided to make step 5.
    done = two.start(tmp_path, fault="train:1:SIGTERM")
    assert statuses(done) == [0, 0], done
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved in (4, 5)
    assert f"step {saved} is saved: the same command goes on from it" in done[0].stdout
    assert not (tmp_path / "student").exists() and not (tmp_path / ".lock").exists()
    (done,) = two.start(tmp_path, count=1)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_sampler_with_devices_of_four_processes(two, tmp_path):
    """It samples two ahead, in another layout than the trainer's, as that of one process does.

    It has one device of each; or all of the last two, until one process makes the rest.
    """
    changes = {
        "distillation.lambda_": 1.0, "distillation.max_steps": 4, "distillation.save_steps": 2,
        "checkpointing.keep": 3, "distillation.eval_steps": 0, "data.validation.max_samples": 0,
        "mesh.expert": 1, "mesh.fsdp": 2, "policy.generation.tensor": 1,
        "policy.generation.async_steps": 2, "policy.generation.importance_clip": 2.0,
        "policy.generation.colocated.enabled": False,
        "policy.model_name": random_model(model_width=16, vocab_size=24),
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    (done,) = two.start(tmp_path / "one", *flags, count=1)
    assert done.returncode == 0, done.stderr
    done = two.start(tmp_path / "four", *flags, count=4)
    assert statuses(done) == [0] * 4, done
    flags.append("--config.policy.generation.colocated.whole_processes=True")
    done = two.start(tmp_path / "whole", *flags, count=4, fault="train:2:SIGTERM")
    assert statuses(done) == [0] * 4, done
    assert "the same command goes on from it" in done[0].stdout
    del flags[-1]
    (done,) = two.start(tmp_path / "whole", *flags, count=1)
    assert done.returncode == 0, done.stderr
    theirs = read_metrics(tmp_path / "one")
    ahead = np.load(tmp_path / "one/checkpoints/2/arrays.npz")
    for name in ("four", "whole"):
        lines = zip(read_metrics(tmp_path / name), theirs, strict=True)
        losses = [(mine["loss"], other["loss"]) for mine, other in lines if "loss" in other]
        assert len(losses) == 4
        for mine, other in losses:
            assert mine == pytest.approx(other, **CURVE)
        ours = np.load(tmp_path / name / "checkpoints/2/arrays.npz")
        for array in ("tokens", "reward", "tokens/1"):
            np.testing.assert_array_equal(ours[array], ahead[array])


# -------------------------------------------------------------------------- what goes wrong


@pytest.mark.slow
def test_killed_process_is_named_by_the_other(two, tmp_path):
    """In one line, before JAX ends the other one with stack traces."""
    first, second = two.start(tmp_path, "--heartbeat_timeout=20", fault="train:5:SIGKILL")
    assert statuses([first, second]) == [1, -signal.SIGKILL], (first, second)
    (line,) = errors(first)
    assert "process 1 has shown no sign of life for 20 s" in line
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_another_config_is_named_by_both(two, tmp_path):
    done = two.start(tmp_path / "run", of_one=("--config.seed=1",))
    assert statuses(done) == [2, 2], done
    for each in done:
        (line,) = errors(each)
        assert "process 1 has another config than process 0: seed is 1 there, 0 here" in line
    assert not (tmp_path / "run").exists()


def test_process_that_never_comes_is_named(two, tmp_path):
    """Of three, two come; all that is waited for is the time-out."""
    done = two.start(tmp_path, "--initialization_timeout=8", count=3, coming=(0, 2))
    assert statuses(done) == [2, 2], done
    for each in done:
        (line,) = errors(each)
        assert re.search(r"process 1 did not come to 127.0.0.1:\d+ within 8 s", line)
        assert "2 of 3 are there" in line


def test_first_process_that_never_comes_is_named():
    with pytest.raises(UserError, match="could not reach process 0 at 127.0.0.1:.* within 1 s"):
        processes.join(f"127.0.0.1:{free_port()}", 2, 1, timeout=1)


def test_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port} .*Address already"):
            processes.join(f"127.0.0.1:{port}", 2, 0, timeout=1)


@pytest.mark.parametrize(
    "comers, words",
    [
        ([(1, 3), (1, 3)], "two processes came as number 1"),
        ([(1, 2)], "process 1 was started for a run of 2, process 0 for one of 3"),
    ],
)
def test_wrong_numbers_are_named_by_all(comers, words):
    address, said = f"127.0.0.1:{free_port()}", []

    def come(number: int, count: int) -> None:
        with pytest.raises(UserError) as error:
            call_the_roll(address, count, number, 20)
        said.append(str(error.value))

    threads = [threading.Thread(target=come, args=comer) for comer in ((0, 3), *comers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == len(threads) and len(set(said)) == 1 and words in said[0]


SAYS = """
import sys, threading
import numpy as np
from distill.base import processes
from distill.base.errors import RunStopped, UserError

processes.join(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
first = int(sys.argv[2]) == 0

def refuse(error):
    raise error

def of_first(name):
    assert first
    big = np.arange(2**19, dtype=np.float32).reshape(4, -1)
    return dict(big=big.T, flags=np.array([True, False]), none=np.zeros((0, 3), np.int32), **name)

def exchange(name):
    for _ in range(2):
        made = processes.arrays_from_first(lambda: of_first({name: np.array([len(name)])}))
        assert made["big"].dtype == np.float32 and made["big"].shape == (2**17, 4)
        assert made["big"][-1].tolist() == [2**17 * i - 1 for i in (1, 2, 3, 4)]
        assert made["flags"].tolist() == [True, False] and made["none"].shape == (0, 3)
        assert made[name].tolist() == [len(name)]
        assert processes.from_first(lambda: name) == name

# Two threads, which have no order between them.
other = threading.Thread(target=exchange, args=("beside",), name="beside")
if first:
    other.start(), exchange("main")
else:
    exchange("main"), other.start()
other.join()
for error in (UserError("no server"), RunStopped("lost")):
    try:
        processes.arrays_from_first(lambda: refuse(error))
    except type(error) as same:
        assert str(same) == str(error)
    else:
        raise AssertionError(error)
left = dict(processes._run.client.key_value_dir_get_bytes("distill/arrays/"))
assert processes.from_first(lambda: [2]) == [2] and not left, left.keys()
sys.stderr.write("fine")
"""


def test_what_the_first_says_reaches_all():
    """Arrays larger than a message, from threads beside each other; and its errors."""
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/tests/without_torch:{ROOT}"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SAYS, address, str(number)],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    for each in map(_finish, started):
        assert each.returncode == 0 and each.stderr.endswith("fine"), each.stderr


@pytest.fixture
def first_of_one(monkeypatch):
    """The key-value store of a run that this process has to itself."""
    from jax._src.lib import _jax

    address = f"127.0.0.1:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0)
    client.connect()
    monkeypatch.setattr(processes, "_run", processes._Run(client, 0, 1, 100, range(1)))
    yield client
    client.shutdown()
    service.shutdown()


def test_what_was_said_is_removed_when_all_have_read_it(first_of_one, monkeypatch):
    monkeypatch.setattr(processes, "_ROUNDS", 4)
    for number in range(10):
        assert processes.from_first(lambda number=number: [number]) == [number]
    assert processes.gather("x") == ["x"]
    keys = [key for key, _ in first_of_one.key_value_dir_get("distill/round/")]
    folder = "distill/round/0-0/MainThread/2"
    assert sorted(keys) == [f"{folder}/{place}" for place in ("0", "1", "2/0")]


def test_the_first_is_asked_to_stop(first_of_one):
    assert not processes.stop_asked()
    for name in ("SIGTERM", "SIGINT"):
        processes.ask_to_stop(name)
    assert processes.stop_asked() == "SIGINT"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            (None, 2, None),
            ["--num_processes=2 came without", "--coordinator_address and --process"],
        ),
        (("host:1", None, 1), ["--process_id=1 came without --num_processes: pass all three"]),
        (("host:1", 2, 2), ["--process_id=2 does not exist with --num_processes=2", "0 to 1"]),
        (("host", 2, 0), ["--coordinator_address=host has no port: write HOST:PORT"]),
    ],
)
def test_flags_that_contradict_each_other(arguments, words):
    with pytest.raises(UserError) as error:
        processes.join(*arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("arguments", [(), (None, 1), ("host:1", 1, 0)])
def test_a_plain_process_joins_nothing(arguments):
    processes.join(*arguments)
    assert not processes.several() and processes.is_first()
    assert processes.gather({"a": 1}) == [{"a": 1}] and processes.from_first(lambda: 2) == 2
    assert list(range(5))[processes.share(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        # Shells of `salloc`, which Slurm runs as a step of one task.
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_ID": "4294967290"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}, None),
        (
            {
                "SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2],m3",
                "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
            },
            ("n1:61441", 4, 3, [1], 9, 8),
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1,10.1.0.1:34911",
            },
            ("10.0.0.1:61441", 2, 1, [0], 9, 8),
        ),
    ],
)  # fmt: skip
def test_environment_says_what_is_not_given(monkeypatch, environment, expected):
    calls = []
    monkeypatch.setattr(processes, "_connect", lambda *values: calls.append(values))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.join(timeout=9, silence=8)
    assert calls == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    "slices, expected",
    [
        (dict(COORDINATOR_ADDRESS="", NUM_SLICES="1", SLICE_ID="0"), ("127.0.0.2:8482", 2, 1)),
        (dict(COORDINATOR_ADDRESS="127.0.0.1:8", NUM_SLICES="3", SLICE_ID="2"),
         ("127.0.0.1:8482", 6, 5)),
    ],
)  # fmt: skip
def test_hosts_of_a_tpu_pod_find_each_other(monkeypatch, slices, expected):
    """All is said by the environment; that this is a TPU host is pretended."""
    from jax._src.clusters import cloud_tpu_cluster

    calls = []
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(processes, "_connect", lambda *values: calls.append(values))
    environment = dict(TPU_WORKER_HOSTNAMES="127.0.0.2,127.0.0.3", TPU_WORKER_ID="1")
    environment |= {f"MEGASCALE_{name}": value for name, value in slices.items()}
    environment["TPU_SKIP_MDS_QUERY"] = "1"  # no server of the cloud to ask
    monkeypatch.delenv("TPU_PROCESS_ADDRESSES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.join(timeout=9, silence=8)
    assert calls == [(*expected, None, 9, 8)]


def test_environment_that_jax_cannot_read_is_named(monkeypatch):
    """Newer versions of Open MPI, and a pod without the cloud that answers."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Open MPI speaks of several .*pass --coordinator_address"):
        processes.join()


def test_several_that_have_not_joined_are_refused(tmp_path, monkeypatch):
    config = get_config()  # makes the models
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes see each other's devices, but cannot speak"):
        distill.train(config, tmp_path / "run")
