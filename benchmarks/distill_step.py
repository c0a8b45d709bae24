"""Time of one whole on-policy step: sample the answers, score them, update. Ours and its peers'.

    python -m benchmarks.distill_step [--json=PATH] [--repeats=N] [--only=TEXT,...]
        [--trl_python=PATH] [--easydel_python=PATH]

`make .venv-trl/.installed .venv-easydel/.installed` makes the environments whose interpreters these
flags want.

How to read it. The same random weights and prompts for everyone, float32, temperature 1; nothing
ends an answer early, so everyone samples the same number of tokens. The loss is the Jensen-Shannon
divergence with weight 0.5, a mean over the sampled tokens; then AdamW. Ours are the parts that the
trainer wires up (BatchSource, JaxBackend, Engine, train step), with a run's default activation
checkpointing. A peer's are a run of its `trainer.train()`, held back before each step. `ratio` is
the part of our time: 3 is three times slower. `seconds` is a median of interleaved repeats, each
after steps that are not timed; loading is not counted. `fastest` and `slowest` are of the same
repeats. `products of the update` is no step: it is what remains of ours without sampling,
attention, softmax, norms and optimizer, the matrix products of both models' layers and heads on the
real tokens, one after the other.

TRL: current `DistillationTrainer`, and `GKDTrainer` with lmbda=1, each with gradient checkpointing
and without, all prompts in one batch. `defaults` are GKD's: checkpointing, which has it sample
without a cache of keys and values, and bfloat16, which nobody else computes in here; its
temperature of 0.9 is not taken over, for the sake of equal work.

EasyDeL, in JAX: `GKDTrainer` with lmbda=1, and `OnPolicyDistillationTrainer`, whose loss is the
forward KL. Each with its defaults, and with what is best for it here: four accumulated microbatches
and plain attention. Temperatures and truncation are ours again. Neither samples by eSurge, whose
cache of keys and values takes 4 GiB. It draws the same random numbers at every step, and weighs the
positions of the sampled tokens instead of those before them, which is as much work.

Everyone samples with random numbers of its own, so the losses of the first step, which are means
over the tokens of the same distribution, are compared with a tolerance of 5%.

On a CPU, the first two CPUs for everyone: 16 prompts of 16 to 64 tokens, 64 tokens sampled for
each; a student of 6M and a teacher of 20M parameters, and models of about the quickstart's size. On
a GPU ours alone, in bfloat16: the shapes of Qwen2.5-1.5B and 7B, 64 prompts of 16 to 256 tokens,
512 sampled for each.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from absl import flags

from benchmarks import harness
from benchmarks.distill_step_jobs import (
    CPUS,
    GPU_WORKLOAD,
    WORKLOADS,
    Workload,
    build_ours,
    build_peer,
    check_python,
    write_work,
)
from benchmarks.train_step_jobs import build_products
from distill.config import cli

BASELINE, PRODUCTS = "distill", "products of the update"

_ONLY = flags.DEFINE_list("only", [""], "Only implementations whose name has one of these.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)
_PYTHONS = {
    peer: flags.DEFINE_string(f"{peer}_python", None, f"Python interpreter that has {name}.")
    for peer, name in (("trl", "TRL"), ("easydel", "EasyDeL"))
}

TRL_SETTINGS = {
    f"TRL {trainer}{', checkpointing' if checkpointing else ''}": dict(
        trainer=trainer, checkpointing=checkpointing, bf16=False
    )
    for trainer in ("DistillationTrainer", "GKDTrainer")
    for checkpointing in (False, True)
} | {"TRL GKDTrainer, defaults": dict(trainer="GKDTrainer", checkpointing=True, bf16=True)}


_EASYDEL_BEST = dict(microbatches=4, attn_mechanism="sdpa", decode_attn_mechanism="sdpa")
EASYDEL_SETTINGS = {
    f"EasyDeL {trainer}{name}": dict(trainer=trainer, kl_type=kl_type, **settings)
    for trainer, kl_type in (("GKDTrainer", "jsd"), ("OnPolicyDistillationTrainer", "forward"))
    for name, settings in (("", _EASYDEL_BEST), (", defaults", dict(microbatches=1)))
}
SETTINGS = {"trl": TRL_SETTINGS, "easydel": EASYDEL_SETTINGS}


def main() -> None:
    harness.check_json_path()
    pythons = {peer: check_python(peer, flag.value) for peer, flag in _PYTHONS.items()}
    rows, notes = [], []
    if is_cpu := harness.select_platform() == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the workers inherit it
    for workload in WORKLOADS if is_cpu else (GPU_WORKLOAD,):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as parent:
            folder = Path(parent) if is_cpu else None
            jobs = _jobs(workload, folder, pythons)
            measured, failures = _measure(workload, folder, jobs)
        rows, notes = rows + measured, notes + failures
    notes += [
        f"left out is {peer}: --{peer}_python=PATH of an interpreter that has it, on a CPU"
        for peer, python in pythons.items()
        if python is None or not is_cpu
    ]
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def _measure(
    workload: Workload, folder: Path | None, jobs: list[harness.Job]
) -> tuple[list[harness.Row], list[str]]:
    if folder is not None:
        write_work(workload, folder)
    measurements = harness.measure(jobs, _REPEATS.value)
    rows = harness.compare(workload.name, measurements, BASELINE)
    tokens = workload.num_prompts * workload.response
    for row in rows:
        del row["peak_bytes"], row["peak_ratio"]  # not compared: a peer's is another process's
        seconds = measurements[row["implementation"]].all_seconds
        row["fastest"], row["slowest"] = (min(seconds), max(seconds)) if seconds else (None, None)
        samples = row["implementation"] != PRODUCTS and row["seconds"]
        row["tokens_per_second"] = round(tokens / row["seconds"]) if samples else None
    return rows, harness.failures(workload.name, measurements)


def _jobs(
    workload: Workload, folder: Path | None, pythons: dict[str, str | None]
) -> list[harness.Job]:
    ours = harness.Job(BASELINE, build_ours, (workload, folder))
    if folder is None:
        return [ours]
    sampled = workload.num_prompts * workload.response
    tokens = sampled + sum(map(len, workload.prompts()))
    models = workload.student, workload.teacher, workload.dtype
    return [ours, harness.Job(PRODUCTS, build_products, (*models, tokens, sampled))] + [
        harness.Job(name, build_peer, (folder, peer, python, settings), _unknown_peak)
        for peer, python in pythons.items()
        if python is not None
        for name, settings in SETTINGS[peer].items()
        if any(text in name for text in _ONLY.value)
    ]


def _unknown_peak(run) -> None:
    """The memory is another process's."""


if __name__ == "__main__":
    cli.run(main)
