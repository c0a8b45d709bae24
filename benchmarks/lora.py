"""Time and memory of an on-policy step that trains adapters, and of one that trains all weights.

    python -m benchmarks.lora [--json=PATH] [--repeats=N] [--trl_python=PATH]

Models, prompts, loss and how it is timed are those of benchmarks/distill_step.py, and so is TRL,
whose environment has peft, too. Adapters have rank 8, on every matrix of the layers; `8 bits` is
QLoRA: these matrices are frozen in 8 bits. TRL's are of its `DistillationTrainer`, its faster one;
QLoRA's kernels, bitsandbytes, are for GPUs. `ratio` and `peak ratio` are parts of our adapters'.

`peak bytes` are both models, the adapters and the moments of what is trained, counted by their
arrays, and how far the process's memory rises above them in a step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from absl import flags

from benchmarks import harness
from benchmarks.distill_step_jobs import (
    CPUS,
    KL_TYPES,
    LOSSES,
    WORKLOADS,
    Workload,
    check_python,
    make_ours,
    start_peer,
    write_work,
)
from distill.config import cli
from distill.config.policy import Lora

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)
_TRL_PYTHON = flags.DEFINE_string("trl_python", None, "Python interpreter that has TRL and peft.")
RANK, ALPHA = 8, 16.0
ADAPTERS = Lora(rank=RANK, alpha=ALPHA)
BASELINE = "distill, adapters"
OURS = {
    BASELINE: ADAPTERS,
    "distill, adapters, 8 bits": dataclasses.replace(ADAPTERS, base_dtype="int8"),
    "distill, all weights": Lora(),
}
TRL = {"TRL, adapters": ADAPTERS, "TRL, all weights": Lora()}


@dataclasses.dataclass(frozen=True)
class Step:
    """What is timed: a step, the bytes held between steps, and the process that makes it."""

    make: Callable[[], float]
    held_bytes: int
    process: str = "self"

    def __call__(self) -> None:
        self.make()


def main() -> None:
    harness.check_json_path()
    os.environ["JAX_PLATFORMS"] = "cpu"  # the workers inherit both
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    python = check_python("trl", _TRL_PYTHON.value)
    rows, notes = [], []
    for workload in WORKLOADS:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as parent:
            folder = Path(parent)
            write_work(workload, folder)
            jobs = _jobs(workload, folder, python)
            measured = harness.measure(jobs, _REPEATS.value)
        rows += harness.compare(workload.name, measured, BASELINE)
        notes += harness.failures(workload.name, measured)
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def _jobs(workload: Workload, folder: Path, python: str | None) -> list[harness.Job]:
    ours = {name: (build_ours, (workload, folder, lora)) for name, lora in OURS.items()}
    theirs = {name: (build_trl, (workload, folder, python, lora)) for name, lora in TRL.items()}
    jobs = ours | (theirs if python else {})
    return [harness.Job(name, *job, memory) for name, job in jobs.items()]


def memory(step: Step) -> int:
    return step.held_bytes + harness.resident_peak_bytes(step, step.process)


def build_ours(workload: Workload, folder: Path, lora: Lora) -> Step:
    step, held_bytes = make_ours(workload, folder, lora)
    (folder / LOSSES).write_text(json.dumps({KL_TYPES[0]: step()}))
    return Step(step, held_bytes)


def build_trl(workload: Workload, folder: Path, python: str, lora: Lora) -> Step:
    settings: dict = dict(trainer="DistillationTrainer", checkpointing=False, bf16=False)
    if lora.rank:
        settings["lora"] = dict(rank=lora.rank, alpha=lora.alpha)
    step, process = start_peer(folder, "trl", python, settings)
    _, held_bytes = make_ours(workload, folder, lora)  # the same arrays
    return Step(step, held_bytes, str(process))


if __name__ == "__main__":
    cli.run(main)
