"""Long runs: memory, threads and files do not grow, nothing compiles or slows down late.

python -m pytest tests/run/soak_test.py -s    # prints what it measured
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc: Linux only"),
]


def test_three_thousand_updates(tmp_path):
    slope, grown, drift = soak(tmp_path / "first", "updates", 3000, 1000)
    if slope >= 2 or drift >= 0.05 or max(grown.values()) > 0:
        # Other work on the machine slows a run down, and pools start a thread late: once. A run
        # that slows down or leaks always does.
        slope, grown, drift = soak(tmp_path / "second", "updates", 3000, 1000)
    assert slope < 2, "MB per 1000 updates"
    assert max(grown.values()) <= 0
    assert drift < 0.05


def test_three_thousand_dialogues(tmp_path):
    steps, workdir = 96, tmp_path / "first"  # of 32 dialogues
    slope, grown, _ = soak(workdir, "dialogues", steps, 32)
    if slope * steps >= 10_000 or max(grown.values()) > 0:  # as above: once
        workdir = tmp_path / "second"
        slope, grown, _ = soak(workdir, "dialogues", steps, 32)
    assert slope * steps / 1000 < 10, "MB: 3 kB a dialogue; 0 to 4 MB were seen"
    assert max(grown.values()) <= 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    turns = [line["environment/turns"] for line in lines if "environment/turns" in line]
    failures = [line["environment/failures"] for line in lines if "environment/turns" in line]
    assert len(turns) == steps and np.mean(turns) > 1.5 and max(failures) == 0


def soak(workdir: Path, kind: str, steps: int, warm: int) -> tuple[float, dict[str, int], float]:
    """Growth of memory (MB per 1000 updates), of counts, and of the time of a step (a share).

    That is after `warm` of the run's steps. The run is to leave no process behind.

    The time is the main thread's, which is what can grow (programs do not change), as a multiple of
    what a fixed piece of work takes there after each step: other tests run beside this one, and a
    virtual machine is now faster, now slower.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    environment["MALLOC_ARENA_MAX"] = "1"  # of glibc: each thread's own keeps what was freed
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # every compilation is to be seen
        environment.pop(name, None)
    command = [sys.executable, str(TESTS / "run/soak_run.py"), kind, str(workdir), str(steps)]
    # Files, not pipes, which a process left behind would hold open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        run = subprocess.Popen(
            command, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        status = run.wait()
        for file in (out, err):
            file.seek(0)
        assert status == 0, err.read()[-3000:]
        lines = [json.loads(line) for line in out if line.startswith("{")]
    assert not left_of_session(run.pid)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    after = {key: np.array([line[key] for line in lines[warm:]]) for key in lines[0]}
    quarter = len(after["step"]) // 4
    # A leak grows in every quarter; what is made once, a thread's stack or a module, in one.
    quarters = zip(
        *(np.array_split(after[key], 4) for key in ("step", "resident_bytes")), strict=True
    )
    slope = np.median([np.polyfit(*quarter, 1)[0] for quarter in quarters]) * 1000 / 1e6
    relative = after["seconds"] / after["yardstick_seconds"]
    drift = np.median(relative[-quarter:]) / np.median(relative[:quarter]) - 1
    # What is usual: a save or an evaluation under way has threads and files of its own, sometimes
    # more than ever before. What one of them leaves behind is there from then on.
    grown = {
        key: int(np.median(after[key][-quarter:]) - np.median(after[key][:-quarter]))
        for key in ("threads", "files")
    }
    grown["programs"] = int(after["programs"][-1] - after["programs"][-quarter - 1])
    print(
        f"\n{steps} steps of {kind}: resident memory {after['resident_bytes'][-1] / 1e6:.0f} MB, "
        f"slope {slope:+.2f} MB per 1000 steps; step {np.median(after['seconds']) * 1e3:.1f} ms, "
        f"drift {drift:+.1%}; growth {grown}"
    )
    return slope, grown, drift


def left_of_session(session: int, seconds: float = 5.0) -> list[str]:
    """The names of its processes, which may take a moment to end."""
    until = time.monotonic() + seconds
    while True:
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                name, _, rest = (process / "stat").read_text().rpartition(")")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            if int(rest.split()[3]) == session:
                left.append(name)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.1)
