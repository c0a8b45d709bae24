"""Time of one whole on-policy step: sample the answers, score them, update. Ours and TRL's.

    python -m benchmarks.distill_step [--json=PATH] [--repeats=N] [--only=TEXT,...]
        [--trl_python=PATH]

`make .venv-trl/.installed` makes the environment whose interpreter --trl_python wants.

How to read it. The same random weights and prompts for everyone, float32, temperature 1; nothing
ends an answer early, so everyone samples the same number of tokens. The loss is the Jensen-Shannon
divergence with weight 0.5, a mean over the sampled tokens; then AdamW. Ours are the parts that the
trainer wires up (BatchSource, JaxBackend, Engine, train step), with a run's default activation
checkpointing; TRL's are a run of `trainer.train()` held back before each step: current
`DistillationTrainer`, and `GKDTrainer` with lmbda=1, each with gradient checkpointing and without,
all prompts in one batch. `defaults` are GKD's: checkpointing, which has it sample without a cache
of keys and values, and bfloat16, which nobody else computes in here; its temperature of 0.9 is not
taken over, for the sake of equal work. `ratio` is the part of our time: 3 is three times slower.
`seconds` is a median of interleaved repeats, each after steps that are not timed; loading is not
counted. `products of the update` is no step: it is what remains of ours without sampling,
attention, softmax, norms and optimizer, the matrix products of both models' layers and heads on the
real tokens, one after the other.

Everyone samples with random numbers of its own, so the losses of the first step, which are means
over the tokens of the same distribution, are compared with a tolerance of 5%.

Runs on a CPU, the first two CPUs for everyone: 16 prompts of 16 to 64 tokens, 64 tokens sampled for
each; a student of 6M and a teacher of 20M parameters, and models of about the quickstart's size.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import harness
from benchmarks.sampling_jobs import SMALL_CONFIG, export_weights, load_weights
from benchmarks.train_step_jobs import build_products
from distill.base.errors import UserError
from distill.batches.packing import Layout, Shape
from distill.batches.source import Asked, BatchSource
from distill.build.optimizer import build_optimizer
from distill.config import cli
from distill.config.policy import Lora, Optimizer
from distill.data.pipeline import make_train_iterator
from distill.data.prompts import Prompts
from distill.losses.objective import make_objective
from distill.models.facts import ModelConfig
from distill.models.lora import abstract_adapters, make_adapters
from distill.models.quantization import quantize
from distill.rollout.in_process import JaxBackend
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.step import TeacherInStep, TrainState, make_train_step

CPUS = 2
BASELINE, PRODUCTS = "distill", "products of the update"
DTYPE = "float32"
NUM_PROMPTS, SHORTEST_PROMPT, LONGEST_PROMPT, RESPONSE = 16, 16, 64, 64
MICROBATCH = 8
LEARNING_RATE, WEIGHT_DECAY, BETA = 1e-5, 0.01, 0.5
LOSS_TOLERANCE = 0.05


class Workload(NamedTuple):
    name: str
    student: ModelConfig
    teacher: ModelConfig


_TINY = dataclasses.replace(SMALL_CONFIG, vocab_size=512, num_heads=4, head_width=32)
WORKLOADS = (
    Workload(
        "6M from 20M",
        dataclasses.replace(
            SMALL_CONFIG, num_layers=4, model_width=256, num_heads=4, ffn_width=768
        ),
        SMALL_CONFIG,
    ),
    Workload(
        "0.2M from 1M",
        dataclasses.replace(_TINY, num_layers=2, model_width=64, ffn_width=192),
        dataclasses.replace(_TINY, num_layers=4, model_width=128, ffn_width=384),
    ),
)

_ONLY = flags.DEFINE_list("only", [""], "Only implementations whose name has one of these.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)
_TRL_PYTHON = flags.DEFINE_string("trl_python", None, "Python interpreter that has TRL.")

TRL_SETTINGS = {
    f"TRL {trainer}{', checkpointing' if checkpointing else ''}": dict(
        trainer=trainer, checkpointing=checkpointing, bf16=False
    )
    for trainer in ("DistillationTrainer", "GKDTrainer")
    for checkpointing in (False, True)
} | {"TRL GKDTrainer, defaults": dict(trainer="GKDTrainer", checkpointing=True, bf16=True)}


def main() -> None:
    harness.check_json_path()
    os.environ["JAX_PLATFORMS"] = "cpu"  # the workers inherit both
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    python = check_python()
    rows, notes = [], []
    for workload in WORKLOADS:
        measured, failures = _measure(workload, python)
        rows, notes = rows + measured, notes + failures
    if python is None:
        notes.append("TRL is left out: --trl_python=PATH of an interpreter that has it")
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def check_python() -> str | None:
    """TRL's interpreter, as --trl_python has it; UserError if there is none there."""
    python = _TRL_PYTHON.value
    if python is not None and not os.access(python, os.X_OK):
        raise UserError(f"--trl_python={python}: no such interpreter: make .venv-trl/.installed")
    return python and os.path.abspath(python)


def _measure(workload: Workload, python: str | None) -> tuple[list[harness.Row], list[str]]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as parent:
        folder = Path(parent)
        export_weights(workload.student, DTYPE, folder / "student")
        export_weights(workload.teacher, DTYPE, folder / "teacher")
        write_work(workload, folder)
        measurements = harness.measure(_jobs(workload, folder, python), _REPEATS.value)
    rows = harness.compare(workload.name, measurements, BASELINE)
    for row in rows:
        del row["peak_bytes"], row["peak_ratio"]  # not compared: TRL's is another process's
        seconds = row["seconds"] if row["implementation"] != PRODUCTS else None
        row["tokens_per_second"] = round(NUM_PROMPTS * RESPONSE / seconds) if seconds else None
    return rows, harness.failures(workload.name, measurements)


def _jobs(workload: Workload, folder: Path, python: str | None) -> list[harness.Job]:
    _, student, teacher = workload
    responses = NUM_PROMPTS * RESPONSE
    tokens = responses + sum(map(len, make_prompts(student.vocab_size)))
    jobs = [
        harness.Job(BASELINE, build_ours, (workload, folder)),
        harness.Job(PRODUCTS, build_products, (student, teacher, DTYPE, tokens, responses)),
    ]
    if python is not None:
        jobs += [
            harness.Job(name, build_trl, (folder, python, settings), _unknown_peak)
            for name, settings in TRL_SETTINGS.items()
            if any(text in name for text in _ONLY.value)
        ]
    return jobs


def _unknown_peak(run) -> None:
    """The memory is another process's."""


def make_prompts(vocab_size: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = random.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1, NUM_PROMPTS)
    return [random.integers(1, vocab_size, size).astype(np.int32) for size in sizes]


def write_work(workload: Workload, folder: Path) -> None:
    """What TRL's side must know."""
    work = dict(
        prompts=[prompt.tolist() for prompt in make_prompts(workload.student.vocab_size)],
        response_length=RESPONSE,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        beta=BETA,
    )
    (folder / "work.json").write_text(json.dumps(work))


def build_ours(workload: Workload, folder: Path, lora: Lora = Lora()):  # noqa: B008
    step, _ = make_ours(workload, folder, lora)
    (folder / "loss.txt").write_text(str(step()))
    return lambda: (step(), None)[1]


def make_ours(workload: Workload, folder: Path, lora: Lora):
    """`step() -> loss`, and the bytes of what is held between steps: state and teacher."""
    student, params = load_weights(workload.student, DTYPE, folder / "student")
    teacher, teacher_params = load_weights(workload.teacher, DTYPE, folder / "teacher")
    vocab_size = workload.student.vocab_size
    adamw = Optimizer(learning_rate=LEARNING_RATE, warmup_steps=0, weight_decay=WEIGHT_DECAY)
    optimizer = build_optimizer(adamw, max_steps=1)
    objective = make_objective("jsd", jsd_beta=BETA)
    train_step = make_train_step(
        student, [TeacherInStep(teacher)], objective, optimizer, vocab_size=vocab_size
    )
    batches = _make_batches(student, vocab_size)
    trainable, frozen = params, nnx.State({})
    if lora.rank:
        trainable = make_adapters(abstract_adapters(params, lora), seed=0)
        frozen = _in_8_bits(workload.student, params) if lora.base_dtype == "int8" else params
    opt_state = jax.jit(optimizer.init)(trainable)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, frozen)
    held, steps = [state], itertools.count()

    def step() -> float:
        batch, measured = batches.next(next(steps), held[0].params)
        if measured["generation/mean_length"] != RESPONSE:
            raise RuntimeError("answers have other lengths than were asked for")
        held[0], metrics = train_step(held[0], [teacher_params], batch)
        return float(jax.block_until_ready((held[0], metrics))[1]["loss"])

    return step, sum(x.nbytes for x in jax.tree.leaves((state, teacher_params)))


def _in_8_bits(config: ModelConfig, params: nnx.State) -> nnx.State:
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, quantize(config, "/".join(path), x)) for path, x in flat])


def _make_batches(student, vocab_size: int) -> BatchSource:
    """As the trainer makes it: on-policy, one answer to a prompt, padded rows."""
    prompts = Prompts(np.arange(NUM_PROMPTS), make_prompts(vocab_size), None, {}, pad_id=0)
    longest = LONGEST_PROMPT + RESPONSE
    engine = Engine(
        student,
        EngineConfig(max_length=longest),
        eos_ids=(),
        pad_id=0,
        vocab_size=vocab_size,
    )
    return BatchSource(
        make_train_iterator(prompts, batch_size=NUM_PROMPTS, seed=0, shuffle=False),
        JaxBackend(engine, dtype=jnp.dtype(DTYPE)),
        jax.device_put,
        params=SamplingParams(max_length=RESPONSE),
        num_generations=1,
        seed=0,
        lambda_=1.0,
        teachers=[Asked(Layout((Shape(MICROBATCH, longest),)))],
        pad_id=0,
    )


def build_trl(folder: Path, python: str, settings: dict):
    step, _ = start_trl(folder, python, settings)
    return lambda: (step(), None)[1]


def start_trl(folder: Path, python: str, settings: dict):
    """`step() -> loss`, after a first one, and the number of TRL's process.

    Settings: as in TRL_SETTINGS; `lora`, with the rank and alpha of adapters, may be left out.
    """
    script = Path(__file__).with_name("distill_step_trl.py")
    log = folder / f"trl-{os.getpid()}.log"
    process = subprocess.Popen(
        [python, str(script), str(folder), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(log, "w"),
        text=True,
    )

    def step() -> float:
        process.stdin.write("step\n")
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            raise RuntimeError(f"TRL ended: {log.read_text().strip()[-150:]}")
        return float(answer)

    ours, theirs = float((folder / "loss.txt").read_text()), step()
    if not np.isclose(theirs, ours, rtol=LOSS_TOLERANCE):
        raise RuntimeError(f"TRL's loss is {theirs}, ours {ours}: not the same work")
    return step, process.pid


if __name__ == "__main__":
    cli.run(main)
