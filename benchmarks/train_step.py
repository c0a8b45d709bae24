"""Time of one update: teacher forward, student forward and backward, AdamW.

    python -m benchmarks.train_step [--json=PATH] [--repeats=N] [--only=TEXT,...] [--notorch]

How to read it. The same random weights and the same batch for everyone: prompts and responses of
mixed lengths in padded rows, forward KL on the response tokens. `packed` has the same sequences,
several in a row of twice the length (policy.sequence_packing), in microbatches of as many tokens;
on accelerators, `chunked loss` has them with the loss in plain XLA, whatever the default there.
`torch` is what one writes without a framework: two `transformers` models, the logits of every
position, log_softmax, AdamW, eager or with both models compiled. Before an implementation is timed,
its first loss is compared with ours. `ratio` is the part of eager torch's time: below 1 is better.
With --notorch, weights are made where they stay instead of going through files, and ratios are
parts of ours. `seconds` is a median, on a CPU of interleaved repeats. `of peak` is the arithmetic
that the models need (twice the weights per token forward, four times backward, heads on response
tokens only, attention, no recomputation) over the rate of a large matrix product measured in the
same run.

`products of the step` is no step but its profile: what remains of one on padded rows without
attention, softmax, norms and optimizer, the matrix products of both models' layers and heads.

On a CPU: a student of 20M and a teacher of 75M parameters in float32, 16 rows of up to 256 tokens,
the first two CPUs for everyone. On a GPU: the shapes of Qwen2.5-1.5B and 7B, weights of the teacher
and arithmetic in bfloat16, 32 rows of up to 2048 tokens; one implementation after the other, as
there is no room for two.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Container
from pathlib import Path

from absl import flags

from benchmarks import harness
from benchmarks.sampling_jobs import export_weights
from benchmarks.train_step_jobs import (
    CPU_WORKLOAD,
    CPUS,
    GPU_WORKLOAD,
    Workload,
    build_ours,
    build_products,
    build_torch,
)
from distill.config import cli

OURS, TORCH = "distill", "torch, eager"
MATRIX, PRODUCTS = "matrix product", "products of the step"

_ONLY = flags.DEFINE_list("only", [""], "Only implementations whose name has one of these.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each implementation.", lower_bound=1)
_TORCH = flags.DEFINE_bool(
    "torch", True, "Whether to compare with torch, for which weights go through files."
)


def main() -> None:
    harness.check_json_path()
    platform = harness.select_platform()
    workload = CPU_WORKLOAD if platform == "cpu" else GPU_WORKLOAD
    if platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the workers inherit it
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if _TORCH.value:
            for role in ("student", "teacher"):
                export_weights(getattr(workload, role), workload.dtype, Path(folder) / role)
        jobs, notes = _jobs(workload, Path(folder), platform)
        measure = harness.measure if platform == "cpu" else harness.measure_alone
        measurements = measure(jobs, _REPEATS.value)
    rows = _rows(workload, measurements)
    notes += harness.failures(workload.title, measurements)
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def _jobs(workload: Workload, folder: Path, platform: str) -> tuple[list[harness.Job], list[str]]:
    jobs = [
        harness.Job(MATRIX, harness.build_matrix_product, (workload.matrix, workload.dtype)),
        harness.Job(OURS, build_ours, (workload, folder, False, _TORCH.value)),
        harness.Job(f"{OURS}, packed", build_ours, (workload, folder, True, _TORCH.value)),
        harness.Job(PRODUCTS, build_products, _products(workload)),
    ]
    if platform != "cpu":  # whose default may be another
        arguments = workload, folder, True, _TORCH.value, "chunked"
        jobs.append(harness.Job(f"{OURS}, packed, chunked loss", build_ours, arguments))
    notes = []
    if _TORCH.value and importlib.util.find_spec("torch"):
        peak_bytes = harness.torch_peak_bytes if platform == "gpu" else None
        jobs += [
            harness.Job(name, build_torch, (workload, folder, compiled), peak_bytes)
            for name, compiled in ((TORCH, False), ("torch, compiled", True))
        ]
    elif _TORCH.value:
        notes.append("torch is left out: pip install torch")
    always = (MATRIX, _baseline([job.implementation for job in jobs]))
    wanted = [
        job
        for job in jobs
        if job.implementation in always or any(text in job.implementation for text in _ONLY.value)
    ]
    return wanted, notes


def _baseline(implementations: Container[str]) -> str:
    return TORCH if TORCH in implementations else OURS


def _products(workload: Workload) -> tuple:
    """Arguments of `build_products`: all positions of the padded rows, and the response tokens."""
    tokens = workload.rows * workload.row_length
    models = workload.student, workload.teacher, workload.dtype
    return *models, tokens, int(workload.sequences()["weight"].sum())


def _rows(workload: Workload, measurements: dict[str, harness.Measurement]) -> list[harness.Row]:
    measurements = dict(measurements)
    matrix = measurements.pop(MATRIX)
    rate = None if matrix.seconds is None else 2 * workload.matrix**3 / matrix.seconds
    name = f"{workload.title} {workload.dtype}"
    rows = harness.compare(name, measurements, _baseline(measurements))
    for row in rows:
        # Not compared: what torch frees on a CPU stays with its process.
        del row["peak_bytes"], row["peak_ratio"]
        known = None not in (row["seconds"], rate) and row["implementation"] != PRODUCTS
        row["of_peak"] = workload.flops() / row["seconds"] / rate if known else None
    return rows


if __name__ == "__main__":
    cli.run(main)
