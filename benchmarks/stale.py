"""What sampling ahead buys: accuracy and seconds of an update by `async_steps`.

    python -m benchmarks.stale [--updates=N] [--seeds=0] [--lambdas=1,0.5] [--json=PATH]

How to read it. The built-in student and teacher on two virtual CPU devices, of which one trains and
the other samples, with the first two CPUs for both. `lambda` 1 samples every batch, 0.5 every other
one on average: then generation takes unequal time, which a queue of batches evens out. Above
`async_steps` 1 an importance_clip is required, and all rows have the same. `update` is the mean of
all updates but the first twenty, `waiting` the part of it in which the trainer waits for its batch,
refits included. `training` is `update` times the updates. `accuracy` is of 256 held-out problems
after the last, with its 95% interval. Runs of the same seed see the same prompts and coins.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from benchmarks import harness
from distill.config import cli

CPUS, SETTLED = 2, 20  # updates that compile, or fill the queue
ASYNC_STEPS = (0, 1, 2, 4)

_UPDATES = flags.DEFINE_integer("updates", 200, "Updates of each run.", lower_bound=SETTLED + 1)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds: a run of each.")
_LAMBDAS = flags.DEFINE_list("lambdas", ["1", "0.5"], "Values of distillation.lambda_.")


def main() -> None:
    harness.check_json_path()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the runs inherit it
    rows = []
    print("lambda  async_steps  seed  ms/update  ms waiting  s training  accuracy  95% interval")
    for lambda_ in _LAMBDAS.value:
        for seed in _SEEDS.value:
            for steps in ASYNC_STEPS:
                row = dict(lambda_=float(lambda_), async_steps=steps, seed=int(seed))
                rows.append(row | measured(row, _UPDATES.value))
                print(as_line(rows[-1]), flush=True)
    harness.write_json(rows)


def measured(row: harness.Row, updates: int) -> harness.Row:
    """What a run in a process of its own leaves in its log."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        values = {
            "seed": row["seed"],
            "preflight": False,
            "distillation.lambda_": row["lambda_"],
            "distillation.max_steps": updates,
            "distillation.save_steps": 0,
            "distillation.logging_steps": 1,
            "policy.generation.async_steps": row["async_steps"],
            "policy.generation.importance_clip": 2.0,
            "policy.generation.colocated.enabled": False,
        }
        command = [sys.executable, "-m", "distill.main", "--config=arithmetic:short"]
        command += [f"--workdir={folder}/run"]
        command += [f"--config.{key}={value}" for key, value in values.items()]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={CPUS}",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        text = Path(folder, "run", "metrics.jsonl").read_text()
        student = json.loads(Path(folder, "run", "results.json").read_text())["student"]
    steps = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    staleness = {line["generation/staleness"] for line in steps}
    assert max(staleness) == row["async_steps"], staleness
    seconds = statistics.mean(line["seconds/step"] for line in steps[SETTLED:])
    waiting = statistics.mean(line["seconds/generate"] for line in steps[SETTLED:])
    return dict(
        update=seconds,
        waiting=waiting,
        training=seconds * updates,
        accuracy=student["accuracy"],
        low=student["accuracy_low"],
        high=student["accuracy_high"],
    )


def as_line(row: harness.Row) -> str:
    return (
        f"{row['lambda_']:<6}  {row['async_steps']:<11}  {row['seed']:<4}  "
        f"{1e3 * row['update']:<9.0f}  {1e3 * row['waiting']:<10.0f}  {row['training']:<10.1f}  "
        f"{row['accuracy']:<8.1%}  {row['low']:.1%} - {row['high']:.1%}"
    )


if __name__ == "__main__":
    cli.run(main)
