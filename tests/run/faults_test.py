"""Real runs, killed and signalled at every kind of moment, end as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked import Forks
from tiny_runs import read_metrics

from distill.run.interrupts import Interrupts
from distill.run.workdir import claim_workdir

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "tests" / name for name in ("", "run", "run/faults", "without_torch")]
WEIGHTS, CARD = "student/model.safetensors", "student/README.md"
pytestmark = pytest.mark.slow


class Runs:
    """Starts `python -m distill.main` with tests/run/faults/config.py.

    All share a compilation cache, which the undisturbed run fills: a start takes a few seconds.
    """

    def __init__(self, folder: Path, forks: Forks, *flags: str):
        folder.mkdir()
        self.folder, self._forks, self._flags = folder, forks, flags
        self.undisturbed = folder / "undisturbed"
        done = self.start(self.undisturbed)
        assert done.returncode == 0, done.stderr

    def start(self, workdir: Path, fault: str = "") -> subprocess.CompletedProcess:
        command = [
            sys.executable, "-m", "distill.main", f"--workdir={workdir}",
            f"--config=tests/run/faults/config.py:{self.folder.parent / 'models'}", *self._flags,
        ]  # fmt: skip
        log = str(self.folder / "faults.log")
        return self._forks.run(command, ROOT, self.folder, FAULT=fault, FAULT_LOG=log)

    def strikes(self) -> list[str]:
        log = self.folder / "faults.log"
        return log.read_text().splitlines() if log.exists() else []

    def assert_same(self, workdir: Path) -> None:
        """Weights, card, train state, metrics, results and shown answers, bit for bit."""
        shown = "rollouts/base.json", "rollouts/student.json"
        for name in (WEIGHTS, CARD, "results.json", *shown):
            assert (workdir / name).read_bytes() == (self.undisturbed / name).read_bytes(), name
        assert read_metrics(workdir) == read_metrics(self.undisturbed)
        ours, theirs = last_state(workdir), last_state(self.undisturbed)
        assert len(jax.tree.leaves(ours)) > 10
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def last_state(workdir: Path):
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return ocp.StandardCheckpointer().restore(last / "state")


@pytest.fixture(autouse=True, scope="module")
def signals_are_heard():
    """Also where the tests run under nohup or with signals blocked: a process inherits both."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's own


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    for role, path in models.items():
        shutil.copytree(path, folder / "models" / role)
    return folder


@pytest.fixture(scope="module")
def forks(signals_are_heard, folder) -> Iterator[Forks]:
    environment = {
        **os.environ,
        "PYTHONPATH": ":".join(map(str, FOLDERS)),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
    with Forks(environment) as forks:
        yield forks


@pytest.fixture(scope="module")
def runs(folder, forks) -> Runs:
    """Of a dozen steps."""
    return Runs(folder / "short", forks, "--config.distillation.max_steps=12")


def test_killed_27_times_and_none_the_worse(folder, forks, tmp_path):
    """kill -9 in every phase; the same command again each time, in one workdir."""
    runs = Runs(folder / "long", forks, "--config.distillation.max_steps=40")
    chance = random.Random(0)
    kills = [
        f"{point}:{chance.choice((1, 2))}"
        for point in (
            "evaluate", "evaluate-sampled", "evaluated", "generate", "generate-prefilled",
            "generate-decoded", "train", "logged", "save", "save-started", "save-committed",
            "save-digest", "save-summed",
        )
    ]  # fmt: skip
    kills += ["save-pruning:1", "restore:1", "restored:1"]
    kills += [f"delay:{chance.uniform(0, 0.3):.3f}" for _ in range(4)]
    chance.shuffle(kills)
    kills[:0] = ["rollouts:1", "save-renamed:2"]  # else there may be nothing to restore or prune
    # Once the last step is saved, every start exports.
    kills += ["export:1", "export-weights:1", "export-rename:1", "exported:1", "report:1"]
    before = len(runs.strikes())
    for kill in kills:
        done = runs.start(tmp_path, f"{kill}:SIGKILL")
        assert done.returncode == -signal.SIGKILL, (kill, done.stdout, done.stderr)
    struck = [line.split()[0] for line in runs.strikes()[before:]]
    assert struck == [kill.split(":")[0] for kill in kills] and len(struck) == 27
    done = runs.start(tmp_path)
    assert done.returncode == 0, done.stderr
    runs.assert_same(tmp_path)


# ---------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "fault",
    ["generate-prefilled:6:SIGTERM", "train:4:SIGINT", "evaluate-sampled:3:SIGHUP"],
)
def test_signal_finishes_saves_and_says_how_to_go_on(runs, tmp_path, fault):
    done = runs.start(tmp_path, fault)
    assert done.returncode == 0, done.stderr
    assert "a second signal ends the run at once" in done.stderr
    assert "is saved: the same command goes on from it" in done.stdout
    assert not (tmp_path / "student").exists() and not (tmp_path / ".lock").exists()
    assert runs.start(tmp_path).returncode == 0
    runs.assert_same(tmp_path)


@pytest.mark.parametrize(
    "fault", ["evaluate:1:SIGTERM", "generate:1:SIGINT", "export-weights:1:SIGTERM"]
)
def test_signal_ends_a_run_at_once_where_nothing_would_be_lost(runs, tmp_path, fault):
    """Before the end of the first step, and while the saved student is exported."""
    done = runs.start(tmp_path, fault)
    assert done.returncode == 0, done.stderr
    assert "nothing was lost, the same command goes on" in done.stderr
    assert not (tmp_path / "student").exists()
    if fault.startswith("export"):
        assert runs.start(tmp_path).returncode == 0
        runs.assert_same(tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_second_signal_ends_the_run_at_once(runs, tmp_path, name):
    done = runs.start(tmp_path, f"evaluate:4:{name},evaluate-sampled:4:{name}")
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert "the last save is intact" in done.stderr
    assert runs.start(tmp_path).returncode == 0
    runs.assert_same(tmp_path)


# --------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("point", ["save:3", "save-started:3", "generate:5", "export:1"])
def test_full_disk_stops_the_run_and_leaves_the_older_checkpoint(runs, tmp_path, point):
    done = runs.start(tmp_path, f"{point}:full")
    assert done.returncode == 1, done.stderr
    (line, *more) = filter(None, done.stderr.splitlines())
    assert not more, done.stderr
    # Once a save has begun, the log may be the first to find no room.
    assert line.startswith("error: ") and "make room" in line, line
    assert "is intact" in line or point != "save:3", line
    assert runs.start(tmp_path).returncode == 0
    runs.assert_same(tmp_path)


def test_what_the_parent_ignores_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            interrupts.hold()
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert not interrupts.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------- lock


def test_second_run_in_one_workdir_is_refused(runs, tmp_path):
    with claim_workdir(tmp_path):
        done = runs.start(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"another run (process {os.getpid()} on" in line and str(tmp_path) in line
    assert list(tmp_path.iterdir()) == []
