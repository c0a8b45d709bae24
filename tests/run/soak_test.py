"""Three thousand updates: memory, threads and files do not grow, nothing compiles or slows down.

python -m pytest tests/run/soak_test.py -s    # prints what it measured
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STEPS, WARM = 3000, 1000
TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc: Linux only")
def test_long_run_stays_as_it_is(tmp_path):
    slope, grown, drift = soak(tmp_path / "first")
    if slope >= 2 or drift >= 0.05 or max(grown.values()) > 0:
        # Other work on the machine slows a run down, and pools start a thread late: once. A run
        # that slows down or leaks always does.
        slope, grown, drift = soak(tmp_path / "second")
    assert slope < 2, "MB per 1000 updates"
    assert max(grown.values()) <= 0
    assert drift < 0.05


def soak(workdir: Path) -> tuple[float, dict[str, int], float]:
    """Growth of memory (MB per 1000 updates), of counts, and of the time of a step (a share).

    The time is the main thread's, which is what can grow (programs do not change), as a multiple of
    what a fixed piece of work takes there after each step: other tests run beside this one, and a
    virtual machine is now faster, now slower.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # every compilation is to be seen
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, str(TESTS / "run/soak_run.py"), str(workdir), str(STEPS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    after = {key: np.array([line[key] for line in lines[WARM:]]) for key in lines[0]}
    quarter = len(after["step"]) // 4
    slope = np.polyfit(after["step"], after["resident_bytes"], 1)[0] * 1000 / 1e6
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
        f"\n{STEPS} updates: resident memory {after['resident_bytes'][-1] / 1e6:.0f} MB, slope "
        f"{slope:+.2f} MB per 1000 updates; step {np.median(after['seconds']) * 1e3:.1f} ms, drift "
        f"{drift:+.1%}; growth {grown}"
    )
    return slope, grown, drift
