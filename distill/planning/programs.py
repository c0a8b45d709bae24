"""The arrays that a run holds, as shapes on a mesh, and its programs, compiled ahead of time."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from distill.base.sharding import SAMPLER_RULES, bytes_per_device, param_shardings, stacked_sharding
from distill.batches.rows import Batch, make_batch
from distill.build.layout import build_layout
from distill.build.models import (
    abstract_model,
    abstract_state,
    on_mesh,
    student_options,
)
from distill.build.objective import build_objective
from distill.build.optimizer import build_optimizer
from distill.build.sampler import build_sampling_params, engine_sizes
from distill.build.teachers import abstract_teacher
from distill.config.schema import Config
from distill.data.sequences import Sequences
from distill.models.decoding import abstract_loop_weights
from distill.models.model import Model
from distill.planning import costs
from distill.planning.collectives import sent_bytes
from distill.planning.subject import Subject
from distill.sampling.cache import Cache
from distill.sampling.engine import STEPS_PER_CALL, Engine
from distill.step import TrainState, make_train_step

AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Shapes and layouts of what a run holds.

    Attributes:
      student: its graph; the parameters are the state's.
      teacher, sampler, loop_weights, cache: None where the run has none here; `loop_weights` are
        a shallow sampler's, as its decode loop reads them.
      reading: parts, prompts and tokens of the sampler's largest reading; None without a sampler.
    """

    student: Model
    state: TrainState
    teacher: Model | None
    batch: Batch
    engine: Engine | None
    sampler: Any
    loop_weights: Any
    cache: Cache | None
    reading: tuple[int, int, int] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, per device.

    Attributes:
      seconds: of tracing and compiling.
      temporaries: bytes that it needs beside its arguments, results that replace none included.
      sent: bytes sent in one run, by kind of collective; None where it does not fit the chip.
      failure: the compiler's words then.
    """

    seconds: float
    temporaries: float
    sent: dict[str, float] | None
    failure: str = ""


def make_arrays(subject: Subject, mesh: AnyMesh, sampler_mesh: AnyMesh) -> Arrays:
    """All arrays of a run on meshes that may be described or abstract."""
    config = subject.config
    student = abstract_model(subject.student, "the student", mesh, **student_options(config.policy))
    optimizer = build_optimizer(config.policy.optimizer, config.distillation.max_steps)
    teacher = None
    if subject.teacher is not None:
        teacher = abstract_teacher(config, subject.teacher, mesh)
    engine = sampler = loop_weights = cache = reading = None
    if subject.samples:
        tokens = costs.count_tokens(subject)
        engine = Engine(
            student.graph,
            engine_sizes(config.policy),
            eos_ids=(0,),
            pad_id=0,
            vocab_size=subject.vocab_size,
        )
        sampler = _sampler_copy(config, student, sampler_mesh)
        loop_weights = abstract_loop_weights(nnx.merge(student.graph, sampler))
        with _current(sampler_mesh):
            cache = engine.abstract_cache(sampler, tokens.rows)
            repeats = config.distillation.generate_strategy.num_generations
            reading = engine.prefill_shape(sampler, tokens.rows, repeats, tokens.prompt)
    state = abstract_state(student, optimizer, mesh, config.policy.optimizer.offload)
    batch = abstract_batch(config, mesh)
    return Arrays(student, state, teacher, batch, engine, sampler, loop_weights, cache, reading)


def abstract_batch(config: Config, mesh: AnyMesh) -> Batch:
    """A batch of full rows: the longest prompts with responses up to the limit."""
    rows, length = config.policy.train_global_batch_size, config.policy.max_total_sequence_length
    response = config.distillation.generate_strategy.max_length

    columns = {"weight": 1}
    if config.teacher.backend == "vllm":
        known = rows * response, config.teacher.vllm.top_k + 1  # and the sampled token
        columns |= {name: np.zeros(known) for name in ("teacher_ids", "teacher_log_probs")}
    prompts = Sequences.of_tokens(np.zeros((rows, length - response)))
    responses = Sequences.of_tokens(np.zeros((rows, response)), **columns)
    layout = build_layout(config.policy, length, mesh)
    batch = make_batch(prompts.join(responses), layout=layout, pad_id=0)

    def on_mesh(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stacked_sharding(mesh, x.ndim))

    return jax.tree.map(on_mesh, batch)


def compile_train_step(subject: Subject, arrays: Arrays, mesh: Mesh) -> Program:
    """The train step of a run, as the trainer makes it."""
    config, teacher = subject.config, arrays.teacher
    # Of the loops over rows of several lengths, full rows run the one over the longest, the last.
    trips = [0] * (len(arrays.batch) - 1) + [costs.count_tokens(subject).microbatches]
    with jax.set_mesh(mesh):
        step = make_train_step(
            arrays.student.graph,
            teacher and teacher.graph,
            build_objective(config),
            build_optimizer(config.policy.optimizer, config.distillation.max_steps),
            vocab_size=subject.vocab_size,
            state_shardings=jax.tree.map(lambda x: x.sharding, arrays.state),
            importance_clip=config.policy.generation.importance_clip,
        )
        arguments = arrays.state, teacher and teacher.params, arrays.batch
        return _compile(lambda: step.lower(*arguments), arguments, mesh, trips)


def compile_prefill(arrays: Arrays, mesh: Mesh) -> Program:
    """The sampler's largest reading of prompts."""
    with jax.set_mesh(mesh):
        return _compile(
            lambda: arrays.engine.lower_prefill(arrays.sampler, arrays.reading),
            arrays.sampler,
            mesh,
            [],
        )


def compile_decode(subject: Subject, arrays: Arrays, mesh: Mesh) -> Program:
    """The sampler's decode loop, at its widest; one call of it."""
    rows = subject.config.policy.train_global_batch_size
    params = build_sampling_params(subject.config.distillation.generate_strategy)
    with jax.set_mesh(mesh):
        return _compile(
            lambda: arrays.engine.lower_decode(arrays.sampler, rows, params),
            (arrays.sampler, arrays.loop_weights, arrays.cache),
            mesh,
            [STEPS_PER_CALL],
        )


def _compile(lower, arguments: Any, mesh: Mesh, unknown_trips: Sequence[float]) -> Program:
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        temporaries = _refused_temporaries(str(error), bytes_per_device(arguments))
        if temporaries is None:
            raise
        return Program(seconds, temporaries, None, " ".join(str(error).split())[:200])
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        seconds,
        memory.temp_size_in_bytes + new_results,
        sent_bytes(compiled.as_text(), mesh.size, unknown_trips),
    )


def _refused_temporaries(message: str, held: float) -> float | None:
    """Of the compiler's complaint that a program needs more memory than the chip has.

    It names the temporaries, or all that is used, of which `held` bytes are arguments.
    """
    size = r"([\d.]+)([KMGT])"
    if match := re.search(rf"required for HLO temporaries \({size}\)", message):
        return _in_bytes(*match.groups())
    if match := re.search(rf"[Uu]sed {size}i?B? of ", message):
        return max(_in_bytes(*match.groups()) - held, 0)
    return None


def _in_bytes(number: str, unit: str) -> float:
    return float(number) * 2.0 ** (10 * (1 + "KMGT".index(unit)))


def _sampler_copy(config: Config, student: Model, mesh: AnyMesh) -> Any:
    """The weights that a refit gives the sampler; see `rollout.in_process.JaxBackend`."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, config.policy.precision), student.params
    )
    shardings = param_shardings(shapes, mesh, SAMPLER_RULES)
    return on_mesh(shapes, shardings)


def _current(mesh: AnyMesh):
    """Context in which `mesh` is the current one."""
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    return jax.sharding.use_abstract_mesh(abstract)
