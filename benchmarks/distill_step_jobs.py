"""The work of benchmarks/distill_step.py and lora.py, as functions that their workers call."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.objectives import objective_of
from benchmarks.sampling_jobs import SMALL_CONFIG, export_weights, load_weights
from benchmarks.train_step_jobs import GPU_WORKLOAD as GPU_UPDATE
from benchmarks.train_step_jobs import first_state
from distill.base.errors import UserError
from distill.batches.packing import Layout, Shape
from distill.batches.source import Asked, BatchSource
from distill.build.optimizer import build_optimizer
from distill.config.policy import Lora, Optimizer
from distill.data.pipeline import make_train_iterator
from distill.data.prompts import Prompts
from distill.models.facts import ModelConfig
from distill.rollout.in_process import JaxBackend
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.step import TeacherInStep, make_train_step

CPUS = 2
SHORTEST_PROMPT = 16
LEARNING_RATE, WEIGHT_DECAY, BETA = 1e-5, 0.01, 0.5
LOSS_TOLERANCE = 0.05
KL_TYPES = "jsd", "forward"  # of the peers; ours is the first
LOSSES = "losses.json"


class Workload(NamedTuple):
    name: str
    student: ModelConfig
    teacher: ModelConfig
    dtype: str = "float32"
    num_prompts: int = 16
    longest_prompt: int = 64
    response: int = 64
    microbatch: int = 8

    def prompts(self) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        sizes = random.integers(SHORTEST_PROMPT, self.longest_prompt + 1, self.num_prompts)
        return [random.integers(1, self.student.vocab_size, n).astype(np.int32) for n in sizes]


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
        # As many heads as fill the width: EasyDeL knows no other width of heads.
        dataclasses.replace(_TINY, num_layers=2, model_width=64, num_heads=2, ffn_width=192),
        dataclasses.replace(_TINY, num_layers=4, model_width=128, ffn_width=384),
    ),
)
GPU_WORKLOAD = Workload(
    GPU_UPDATE.title,
    GPU_UPDATE.student,
    GPU_UPDATE.teacher,
    GPU_UPDATE.dtype,
    num_prompts=64,
    longest_prompt=256,
    response=512,
    microbatch=8,
)


def check_python(peer: str, python: str | None) -> str | None:
    """The interpreter, as --PEER_python has it; UserError if there is none there."""
    if python is not None and not os.access(python, os.X_OK):
        raise UserError(
            f"--{peer}_python={python}: no such interpreter: make .venv-{peer}/.installed"
        )
    return python and os.path.abspath(python)


def write_work(workload: Workload, folder: Path) -> None:
    """Both models, and what TRL's side must know."""
    export_weights(workload.student, workload.dtype, folder / "student")
    export_weights(workload.teacher, workload.dtype, folder / "teacher")
    work = dict(
        prompts=[prompt.tolist() for prompt in workload.prompts()],
        response_length=workload.response,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        beta=BETA,
    )
    (folder / "work.json").write_text(json.dumps(work))


def build_ours(workload: Workload, folder: Path | None):
    """Of the weights in the folder, where peers find the first losses; None: of random weights."""
    if folder is not None:
        first = {kl_type: make_ours(workload, folder, kl_type=kl_type)[0]() for kl_type in KL_TYPES}
        (folder / LOSSES).write_text(json.dumps(first))
    step, _ = make_ours(workload, folder)
    return lambda: (step(), None)[1]


def make_ours(
    workload: Workload,
    folder: Path | None,
    lora: Lora = Lora(),  # noqa: B008
    kl_type: str = "jsd",
):
    """`step() -> loss`, and the bytes of what is held between steps: state and teacher."""
    student_folder, teacher_folder = (folder and folder / role for role in ("student", "teacher"))
    student, params = load_weights(workload.student, workload.dtype, student_folder, "float32")
    teacher, teacher_params = load_weights(workload.teacher, workload.dtype, teacher_folder)
    vocab_size = workload.student.vocab_size
    adamw = Optimizer(learning_rate=LEARNING_RATE, warmup_steps=0, weight_decay=WEIGHT_DECAY)
    optimizer = build_optimizer(adamw, max_steps=1)
    objective = objective_of(kl_type, jsd_beta=BETA)
    train_step = make_train_step(
        student, [TeacherInStep(teacher)], objective, optimizer, vocab_size=vocab_size
    )
    batches = _make_batches(workload, student)
    state = first_state(params, optimizer, workload.student, lora)
    held, steps = [state], itertools.count()

    def step() -> float:
        batch, measured = batches.next(next(steps), held[0].params)
        if measured["generation/mean_length"] != workload.response:
            raise RuntimeError("answers have other lengths than were asked for")
        held[0], metrics = train_step(held[0], [teacher_params], batch)
        return float(jax.block_until_ready((held[0], metrics))[1]["loss"])

    return step, sum(x.nbytes for x in jax.tree.leaves((state, teacher_params)))


def _make_batches(workload: Workload, student) -> BatchSource:
    """As the trainer makes it: on-policy, one answer to a prompt, padded rows."""
    number = workload.num_prompts
    prompts = Prompts(np.arange(number), workload.prompts(), None, {}, pad_id=0)
    longest = workload.longest_prompt + workload.response
    engine = Engine(
        student,
        EngineConfig(max_length=longest),
        eos_ids=(),
        pad_id=0,
        vocab_size=workload.student.vocab_size,
    )
    return BatchSource(
        make_train_iterator(prompts, batch_size=number, seed=0, shuffle=False),
        JaxBackend(engine, dtype=jnp.dtype(workload.dtype)),
        jax.device_put,
        params=SamplingParams(max_length=workload.response),
        num_generations=1,
        seed=0,
        lambda_=1.0,
        teachers=[Asked(Layout((Shape(workload.microbatch, longest),)))],
        pad_id=0,
    )


def build_peer(folder: Path, peer: str, python: str, settings: dict):
    step, _ = start_peer(folder, peer, python, settings)
    return lambda: (step(), None)[1]


def start_peer(folder: Path, peer: str, python: str, settings: dict):
    """`step() -> loss`, after a first one, and the number of the process.

    Peer: the end of the name of a `distill_step_*.py`, which takes the settings. One of them may
    be `kl_type`, "jsd" if it is left out: the first loss has to be near ours of this kind.
    """
    script = Path(__file__).with_name(f"distill_step_{peer}.py")
    command = [python, str(script), str(folder), json.dumps(settings)]
    ask, process = harness.start_process(command, folder / f"{peer}-{os.getpid()}.log")
    losses = json.loads((folder / LOSSES).read_text())
    ours, theirs = losses[settings.get("kl_type", KL_TYPES[0])], float(ask())
    if not np.isclose(theirs, ours, rtol=LOSS_TOLERANCE):
        raise RuntimeError(f"its loss is {theirs}, ours {ours}: not the same work")
    return lambda: float(ask()), process
