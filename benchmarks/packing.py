"""Time of one update on answers of unequal length: padded, by token budget, packed.

    python -m benchmarks.packing [--json=PATH] [--repeats=N]

How to read it. The same student, teacher and batch for everyone: prompts of 16 to 64 tokens and
answers whose lengths are lognormal (mean 128, at most 512), forward KL, AdamW. `padded rows` have
room for the longest possible sequence; `dynamic batching` has rows of three lengths; `packing` puts
sequences behind each other into rows as long as the padded ones. All compute at most as many tokens
at once. `ratio` is the part of the padded rows' time, `padding` the share of the computed tokens
that are none. `seconds` is a median, on a CPU of interleaved repeats. Before one is timed, its loss
is compared with that of those before: they must agree.

On a CPU: a student of 20M and a teacher of 75M parameters in float32, 32 sequences, microbatches of
4 full rows, the first two CPUs for everyone. On a GPU: the shapes of Qwen2.5-1.5B and 7B in
bfloat16, and everything four times as long.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import harness
from benchmarks.sampling_jobs import export_weights
from benchmarks.train_step_jobs import (
    CPU_WORKLOAD,
    CPUS,
    GPU_WORKLOAD,
    Workload,
    check_same_loss,
    join,
    make_state_and_step,
)
from distill.batches.packing import Layout, Shape
from distill.batches.rows import make_batch
from distill.config import cli
from distill.data.sequences import Sequences

SEQUENCES, ROWS = 32, 4
BASELINE = "padded rows"

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)


def main() -> None:
    harness.check_json_path()
    platform = harness.select_platform()
    workload, scale = (CPU_WORKLOAD, 1) if platform == "cpu" else (GPU_WORKLOAD, 4)
    if platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the workers inherit it
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for role in ("student", "teacher"):
            export_weights(getattr(workload, role), workload.dtype, Path(folder) / role)
        jobs = [
            harness.Job(name, build_step, (workload, scale, layout, Path(folder)))
            for name, layout in layouts(scale).items()
        ]
        measure = harness.measure if platform == "cpu" else harness.measure_alone
        measurements = measure(jobs, _REPEATS.value)
        padding = {
            name: float(path.read_text())
            for name, layout in layouts(scale).items()
            if (path := _padding_file(Path(folder), layout)).exists()
        }
    rows = harness.compare(f"{SEQUENCES} sequences, {workload.title}", measurements, BASELINE)
    for row in rows:
        row["padding"] = padding.get(row["implementation"])
    harness.print_rows(rows)
    print(*harness.failures("packing", measurements), sep="\n")
    harness.write_json(rows)


def layouts(scale: int) -> dict[str, Layout]:
    longest = 576 * scale
    budget = ROWS * longest
    lengths = [longest // 4, longest // 2, longest]
    return {
        BASELINE: Layout((Shape(ROWS, longest),)),
        "dynamic batching": Layout(tuple(Shape(budget // n, n) for n in lengths)),
        "packing": Layout((Shape(ROWS, longest),), packed=True),
    }


def make_sequences(vocab_size: int, scale: int) -> Sequences:
    random = np.random.default_rng(0)
    prompt, response = 64 * scale, 512 * scale
    lengths_b = np.clip(random.lognormal(np.log(128 * scale) - 0.32, 0.8, SEQUENCES), 1, response)
    tokens_br = random.integers(1, vocab_size, (SEQUENCES, response))
    prompts_bp = random.integers(1, vocab_size, (SEQUENCES, prompt))
    prompt_lengths_b = random.integers(prompt // 4, prompt + 1, SEQUENCES)
    return join(prompts_bp, prompt_lengths_b, tokens_br, lengths_b.astype(int))


def build_step(workload: Workload, scale: int, layout: Layout, folder: Path):
    state, step = make_state_and_step(workload, folder)
    sequences = make_sequences(workload.student.vocab_size, scale)
    batch = jax.device_put(make_batch(sequences, layout=layout, pad_id=0))
    state, metrics = step(state, batch)
    check_same_loss(folder / "loss.txt", float(metrics["loss"]), workload.dtype)
    _padding_file(folder, layout).write_text(str(float(metrics["padding"])))
    held = [state]

    def run():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return run


def _padding_file(folder: Path, layout: Layout) -> Path:
    return folder / f"padding-{len(layout.shapes)}-{layout.packed}.txt"


if __name__ == "__main__":
    cli.run(main)
