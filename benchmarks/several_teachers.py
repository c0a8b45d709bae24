"""Time of one update with two teachers, each asked about half of the prompts, beside one teacher.

    python -m benchmarks.several_teachers [--json=PATH] [--repeats=N]

How to read it. The same student, sequences and microbatches for both, and two teachers of one size:
every microbatch is computed with one of them. `ratio` is the part of the time with one teacher.
`seconds` is a median of interleaved repeats. The models are those of `benchmarks.train_step`.
"""

from __future__ import annotations

import os

import jax
from absl import flags

from benchmarks import harness
from benchmarks.train_step_jobs import CPU_WORKLOAD, CPUS, GPU_WORKLOAD, Workload, make_parts
from distill.config import cli

_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each.", lower_bound=1)
ONE, TWO = "one teacher", "two teachers"


def build(workload: Workload, number: int):
    """An update whose sequences are dealt to so many teachers in turn."""
    state, teachers, step = make_parts(workload, None, teachers=number)
    held, batch = [state], jax.device_put(workload.dealt_batch(number))

    def run():
        held[0], metrics = step(held[0], teachers, batch)
        jax.block_until_ready((held[0], metrics))

    return run


def main() -> None:
    harness.check_json_path()
    platform = harness.select_platform()
    workload = CPU_WORKLOAD if platform == "cpu" else GPU_WORKLOAD
    if platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the workers inherit it
    jobs = [harness.Job(n, build, (workload, i)) for i, n in enumerate((ONE, TWO), start=1)]
    measurements = harness.measure(jobs, _REPEATS.value)
    rows = harness.compare(workload.title, measurements, ONE)
    harness.print_rows(rows)
    print(*harness.failures(workload.title, measurements), sep="\n")
    harness.write_json(rows)


if __name__ == "__main__":
    cli.run(main)
