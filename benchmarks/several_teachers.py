"""Time of one update with two teachers, each asked about half of the prompts, beside one teacher.

    python -m benchmarks.several_teachers [--json=PATH] [--repeats=N]

How to read it. The same student, sequences and microbatches for both, and two teachers of one size:
every microbatch is computed with one of them. `ratio` is the part of the time with one teacher.
`seconds` is a median of interleaved repeats. The models are those of `benchmarks.train_step`.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import harness
from benchmarks.objectives import objective_of
from benchmarks.sampling_jobs import load_weights
from benchmarks.train_step_jobs import (
    CPU_WORKLOAD,
    CPUS,
    GPU_WORKLOAD,
    LEARNING_RATE,
    Workload,
)
from distill.batches.packing import Layout, Shape
from distill.batches.rows import make_batch
from distill.build.optimizer import build_optimizer
from distill.config import cli
from distill.config.policy import Optimizer
from distill.step import TeacherInStep, TrainState, make_train_step

_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each.", lower_bound=1)
ONE, TWO = "one teacher", "two teachers"


def build(workload: Workload, number: int):
    """An update whose sequences are dealt to so many teachers in turn."""
    student, params = load_weights(workload.student, workload.dtype, None, "float32")
    teacher, teacher_params = load_weights(workload.teacher, workload.dtype, None)
    weights = [jax.tree.map(lambda x, by=by: x * by, teacher_params) for by in (1.0, 1.1)[:number]]
    optimizer = build_optimizer(Optimizer(learning_rate=LEARNING_RATE, warmup_steps=0), max_steps=1)
    step = make_train_step(
        student,
        [TeacherInStep(teacher)] * number,
        objective_of("forward"),
        optimizer,
        vocab_size=workload.student.vocab_size,
    )
    sequences = workload.sequences()
    layout = Layout((Shape(workload.rows // workload.microbatches, workload.row_length),))
    batch = tuple(
        rows
        for each in range(number)
        for rows in make_batch(
            sequences.take(np.arange(each, workload.rows, number)),
            layout=layout,
            pad_id=0,
            teacher=each,
            most=workload.rows,
        )
    )
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    held, batch = [state], jax.device_put(batch)

    def run():
        held[0], metrics = step(held[0], weights, batch)
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
