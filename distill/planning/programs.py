"""A run's programs, compiled ahead of time."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.base.sharding import bytes_per_device
from distill.build.objective import build_objective
from distill.build.optimizer import optimizer_of
from distill.build.sampler import build_sampling_params
from distill.build.teachers import part_of_state
from distill.config.method import OneTeacher
from distill.config.schema import all_teachers, ema_decay
from distill.kernels.linear_divergence import SharedIds
from distill.models import expert_exchange
from distill.planning.arrays import Arrays
from distill.planning.collectives import sent_bytes
from distill.planning.workload import Workload
from distill.sampling.slots import STEPS_PER_CALL
from distill.step import TeacherInStep, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, per device.

    Temporaries are bytes beside the arguments, results that replace none included; None where the
    compiler fails without saying. `sent` is by kind of collective, and None where it cannot be
    read. A failure is in the compiler's words.
    """

    seconds: float
    temporaries: float | None
    sent: dict[str, float] | None
    failure: str = ""


def compile_programs(
    workload: Workload, arrays: Arrays, mesh: Mesh, sampler_mesh: Mesh
) -> dict[str, Program]:
    """The update; and, where the run samples here, the largest prefill and the decode loop."""
    update = {"update": compile_update(workload, arrays, mesh)}
    return update | compile_sampler(workload, arrays, sampler_mesh)


def compile_sampler(workload: Workload, arrays: Arrays, mesh: Mesh) -> dict[str, Program]:
    """The largest prefill and the decode loop, of a run that samples on this mesh."""
    sampler = arrays.sampler
    if sampler is None:
        return {}
    weights, loop = sampler.weights, (sampler.weights, sampler.loop_weights, sampler.cache)
    params = build_sampling_params(workload.config.distillation.generate_strategy)
    params = dataclasses.replace(params, max_length=1)  # limits are per row
    slots, size = sampler.engine.slots, (sampler.prefill[0], sampler.slots)
    prefill = functools.partial(slots.lower_prefill, weights, sampler.prefill)
    decode = functools.partial(slots.lower_decode, weights, *size, params)
    room = _used_room(workload)
    with jax.set_mesh(mesh):
        return {
            "prefill": _compile(prefill, weights, mesh, [], room),
            "decode": _compile(decode, loop, mesh, [STEPS_PER_CALL], room),
        }


def compile_update(workload: Workload, arrays: Arrays, mesh: Mesh) -> Program:
    """The train step of a run, as the trainer makes it."""
    config = workload.config
    # Of the loops over rows of several lengths, full rows run the one over the longest, the last.
    shapes = collections.Counter(part.teacher for part in arrays.batch)
    trips: list[float] = []
    for number, share in enumerate(workload.shares or (1.0,)):
        trips += [0.0] * (shapes[number] - 1) + [share * workload.tokens.microbatches]
    teachers, teacher_params = [], []
    for name, section in (all_teachers(config) or {"": OneTeacher()}).items():
        model = arrays.teachers[name].model if name in arrays.teachers else None
        from_state = part_of_state(config, section)
        teacher = TeacherInStep(None if model is None else model.graph, from_state, name)
        if section.alignment != "none" and name in arrays.teachers:
            # Which ids are shared is of no consequence; how many there are is.
            rows = arrays.teachers[name].facts.vocab_size
            pairs = np.arange(workload.vocab_size, dtype=np.int32)
            pairs = np.where(pairs < rows, pairs, -1).astype(np.int32)
            shared, spans = SharedIds.of_pairs(pairs, rows), section.alignment == "spans"
            teacher = dataclasses.replace(teacher, shared=shared, spans=spans)
        teachers.append(teacher)
        teacher_params.append(None if from_state or model is None else model.params)
    with jax.set_mesh(mesh):
        step = make_train_step(
            arrays.student.graph,
            teachers,
            build_objective(config),
            optimizer_of(config),
            vocab_size=workload.vocab_size,
            state_shardings=jax.tree.map(lambda x: x.sharding, arrays.state),
            ema_decay=ema_decay(config),
            router_aux_loss=config.policy.router_aux_loss,
        )
        arguments = arrays.state, teacher_params, arrays.batch
        lower = step.lower  # type: ignore[attr-defined]  # its type says what it is called with
        return _compile(lambda: lower(*arguments), arguments, mesh, trips, _used_room(workload))


def _used_room(workload: Workload) -> float:
    """Of the room for tokens that come to a device's experts, what the busiest mixture uses."""
    devices = workload.mesh.shape["expert"]
    models = (workload.student, *filter(None, workload.teachers))
    picks = [facts.experts.per_token for facts in models if facts.experts]
    return expert_exchange.copies(devices, max(picks, default=0)) / devices


def _compile(
    lower: Callable[[], jax.stages.Lowered],
    arguments: Any,
    mesh: Mesh,
    trips: Sequence[float],
    room: float = 1.0,
) -> Program:
    """The program, compiled.

    Args:
      trips: of the outermost loops whose number is known only when they run.
      room: share of what a ragged exchange has room for that is sent.
    """
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Of what was compiled for devices that are not here, nothing can be kept.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        temporaries = _refused_temporaries(str(error), bytes_per_device(arguments))
        return Program(seconds, temporaries, None, " ".join(str(error).split())[:200])
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None  # all compilers of JAX's own platforms give it
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    try:
        text = compiled.as_text()
        assert text is not None
        sent = sent_bytes(text, mesh.size, trips)
        sent |= {kind: room * size for kind, size in sent.items() if kind.startswith("ragged")}
    except RuntimeError:  # of a libtpu that does not fit this JAX
        sent = None
    return Program(seconds, memory.temp_size_in_bytes + new_results, sent)


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
