"""Time to sample one batch of rollouts: our engine, our static batch, transformers, vLLM, Tunix.

    python -m benchmarks.sampling [--json=PATH] [--repeats=N] [--only=TEXT,...]
        [--vllm_python=PATH] [--tunix_python=PATH]

`make .venv-vllm/.installed .venv-tunix/.installed` makes the environments whose interpreters these
flags want.

How to read it. Everyone has the same random weights, prompts and forced response lengths; nothing
ends an answer early, temperature is 1, nothing is truncated. Lengths are spread like those of real
answers: lognormal, mean 128, maximum 512. `tokens per second` counts only tokens that were asked
for: a static batch decodes every row until the longest ends. `slots` are the rows decoded at once,
`-` where the implementation decides. `ratio` is the part of our static batch's time: below 1 is
better. `seconds` is a median of interleaved repeats, each after runs that are not timed;
`peak_bytes` is what a run adds to the weights, nothing for an engine that keeps its cache.

Log-probabilities of the sampled tokens are part of ours, vLLM's and Tunix's work, not of
transformers'. vLLM is a server on loopback, its cache of prompts off: repeats would find theirs
there. Tunix's own sampler, in JAX, decodes a static batch; on a GPU it is left out.

On a CPU: a Qwen2 of 20M parameters in float32, 64 prompts, the first two CPUs for everyone. On a
GPU: Qwen2.5-1.5B's shape in bfloat16, 256 prompts, and `of bound`: the time that it takes to read
what must be read (weights every turn, the cache of every answer) at the bandwidth of a copy made in
the same run, over the time measured.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import harness
from benchmarks.sampling_jobs import (
    CPU_WORKLOAD,
    CPUS,
    GPU_WORKLOAD,
    TRANSFORMERS_CACHES,
    VLLM_MODES,
    Workload,
    build_engine,
    build_static,
    build_transformers,
    build_tunix,
    build_vllm,
    bytes_read,
    weights_folder,
)
from distill.config import cli

BASELINE, COPY = "static batch", "copy"
GPU_SLOTS = (64, 128, 256)
COPIED_BYTES = 1 << 30

_ONLY = flags.DEFINE_list("only", [""], "Only implementations whose name has one of these.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)
_TUNIX_PYTHON = flags.DEFINE_string("tunix_python", None, "Python interpreter that has Tunix.")
_VLLM_PYTHON = flags.DEFINE_string("vllm_python", None, "Python interpreter that has vLLM.")


class Entry(NamedTuple):
    """An implementation, and how many rows it decodes at once if that is ours to say."""

    job: harness.Job
    slots: int | None = None


def main() -> None:
    harness.check_json_path()
    platform = harness.select_platform()
    workload = CPU_WORKLOAD if platform == "cpu" else GPU_WORKLOAD
    if platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the workers inherit it
    with weights_folder(workload) as folder:
        entries, notes = _entries(workload, folder, platform)
        measurements = harness.measure([entry.job for entry in entries], _REPEATS.value)
        rows = _rows(workload, entries, measurements, _bytes_of_weights(folder))
    notes += harness.failures(workload.name, measurements)
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def _entries(workload: Workload, folder: Path, platform: str) -> tuple[list[Entry], list[str]]:
    """What is to run, and a line for each implementation that cannot."""
    ours = [Entry(harness.Job(BASELINE, build_static, (workload, folder)), workload.num_prompts)]
    if platform == "cpu":
        ours.append(_engine("engine", workload, folder, workload.num_prompts))
    else:
        ours.append(Entry(harness.Job(COPY, build_copy, ())))
        ours += [_engine(f"engine, {n} slots", workload, folder, n) for n in GPU_SLOTS]
    peers, notes = [], []
    if importlib.util.find_spec("torch"):
        peers += _transformers(workload, folder, platform)
    else:
        notes.append("transformers is left out: pip install torch")
    if _VLLM_PYTHON.value:
        peers += _vllm(workload, folder, platform)
    else:
        notes.append("vLLM is left out: --vllm_python=PATH of an interpreter that has it")
    if _TUNIX_PYTHON.value and platform == "cpu":
        arguments = workload, folder, _TUNIX_PYTHON.value
        job = harness.Job("Tunix", build_tunix, arguments, _unknown_peak)
        peers.append(Entry(job, workload.num_prompts))
    else:
        notes.append(
            "Tunix is left out: --tunix_python=PATH of an interpreter that has it, on a CPU"
        )
    always = (BASELINE, COPY)
    wanted = [
        entry
        for entry in ours + peers
        if entry.job.implementation in always
        or any(text in entry.job.implementation for text in _ONLY.value)
    ]
    return wanted, notes


def _engine(name: str, workload: Workload, folder: Path, slots: int) -> Entry:
    return Entry(harness.Job(name, build_engine, (workload, folder, slots)), slots)


def _transformers(workload: Workload, folder: Path, platform: str) -> list[Entry]:
    peak_bytes = harness.torch_peak_bytes if platform == "gpu" else None
    return [
        Entry(
            harness.Job(
                f"transformers, {cache} cache",
                build_transformers,
                (workload, folder, cache),
                peak_bytes,
            ),
            workload.num_prompts,
        )
        for cache in TRANSFORMERS_CACHES
    ]


def _vllm(workload: Workload, folder: Path, platform: str) -> list[Entry]:
    # On a GPU the other workers are there too.
    shared = ("--gpu-memory-utilization=0.3",) if platform == "gpu" else ()
    return [
        Entry(
            harness.Job(
                f"vLLM, {mode}",
                build_vllm,
                (workload, folder, _VLLM_PYTHON.value, (*arguments, *shared)),
                _unknown_peak,
            )
        )
        for mode, arguments in VLLM_MODES.items()
    ]


def _unknown_peak(run: Callable[[], None]) -> None:
    """The memory is another process's, which takes all of its cache when it starts."""


def _rows(
    workload: Workload, entries: list[Entry], measurements, weight_bytes: int
) -> list[harness.Row]:
    rows = harness.compare(workload.name, measurements, BASELINE)
    copied = measurements.get(COPY)
    for row, entry in zip(rows, entries, strict=True):
        seconds, slots = row["seconds"], entry.slots
        samples = row["implementation"] != COPY and seconds
        row["tokens_per_second"] = round(workload.num_tokens / seconds) if samples else None
        row["slots"] = slots
        if copied is not None:
            row["of_bound"] = None
            if slots and seconds and copied.seconds:
                bandwidth = 2 * COPIED_BYTES / copied.seconds  # read and written
                read = bytes_read(workload.prompts, workload.lengths, workload, slots, weight_bytes)
                row["of_bound"] = read / bandwidth / seconds
    return rows


def _bytes_of_weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def build_copy():
    """Reads and writes an array: the yardstick for bandwidth."""
    x = jnp.zeros(COPIED_BYTES // 2, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)

    def run():
        jax.block_until_ready(copy(x))

    return run


if __name__ == "__main__":
    cli.run(main)
