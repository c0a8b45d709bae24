"""Does it fit, and how long does a step take at least: from shapes alone, or from programs."""

from __future__ import annotations

import dataclasses

from distill.base.sharding import bytes_per_device, make_abstract_mesh
from distill.base.topology import Topology
from distill.build.devices import build_mesh, build_sampler_mesh
from distill.planning import costs
from distill.planning.programs import (
    Arrays,
    Program,
    compile_decode,
    compile_prefill,
    compile_train_step,
    make_arrays,
)
from distill.planning.subject import Subject
from distill.sampling.engine import STEPS_PER_CALL


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, of the largest device; what is not there is 0.

    Attributes:
      student: float32 master weights.
      optimizer: moments.
      gradients: float32, a part of the update's temporaries.
      teacher: weights.
      batch: of the update.
      sampler: the sampler's copy of the student, which stays while the update runs.
      cache: keys and values, given back before the update.
      loop_weights: of a shallow sampler, held while it samples.
      update: temporaries of the train step, gradients included.
      prefill: temporaries and results of the largest reading of prompts.
      decode: temporaries of the decode loop.
      apart: whether sampler and cache are on other devices.
    """

    student: float
    optimizer: float
    gradients: float
    teacher: float
    batch: float
    sampler: float
    cache: float
    loop_weights: float
    update: float
    prefill: float
    decode: float
    apart: bool

    @property
    def held(self) -> float:
        """By the trainer, always."""
        return self.student + self.optimizer + self.teacher

    @property
    def peaks(self) -> dict[str, float]:
        """What is needed at once, by phase."""
        update = self.held + self.batch + self.update
        generation = self.sampler + self.cache + self.loop_weights + max(self.prefill, self.decode)
        if self.apart:
            return {"update": update, "generation": generation}
        peaks = {"update": update + self.sampler}
        return peaks | ({"generation": self.held + generation} if self.sampler else {})

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Of one config on one mesh.

    Attributes:
      phases: in turn, or at once with devices apart and answers sampled ahead.
      compiled: the programs 'update', 'prefill' and 'decode'; empty where nothing was compiled and
        temporaries and network traffic are estimates.
    """

    subject: Subject
    topology: Topology
    memory: Memory
    phases: tuple[costs.Phase, ...]
    compiled: dict[str, Program]

    @property
    def fits(self) -> bool:
        failed = any(program.failure for program in self.compiled.values())
        return self.memory.peak <= self.topology.chip.memory and not failed

    @property
    def bounds(self) -> dict[str, tuple[str, float]]:
        """What limits each phase, and its seconds then."""
        bounds = {}
        for phase in self.phases:
            seconds = phase.seconds(self.topology.chip, self.topology.network)
            limit = max(seconds, key=seconds.get)
            bounds[phase.name] = limit, seconds[limit]
        return bounds

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        times = [seconds for _, seconds in self.bounds.values()]
        ahead = self.subject.config.policy.generation.async_steps
        return max(times) if ahead else sum(times)

    @property
    def limit(self) -> str:
        """What limits most of the step."""
        phase, (limit, _) = max(self.bounds.items(), key=lambda bound: bound[1][1])
        return f"{limit}, in the {phase}"


def estimate(subject: Subject, topology: Topology) -> Outlook:
    """From shapes alone: nothing is compiled. The subject fits the topology's devices."""
    meshes = (make_abstract_mesh(*sizes) for sizes in (subject.sizes, subject.sampler))
    return _outlook(subject, topology, make_arrays(subject, *meshes), {})


def compile_programs(subject: Subject, topology: Topology) -> Outlook:
    """From the run's programs, compiled for the topology, whose devices the subject fits."""
    devices = topology.devices()
    mesh = build_mesh(subject.config, devices)
    sampler_mesh = build_sampler_mesh(subject.config.policy.generation, mesh, devices)
    arrays = make_arrays(subject, mesh, sampler_mesh)
    programs = {"update": compile_train_step(subject, arrays, mesh)}
    if subject.samples:
        programs["prefill"] = compile_prefill(arrays, sampler_mesh)
        programs["decode"] = compile_decode(subject, arrays, sampler_mesh)
    return _outlook(subject, topology, arrays, programs)


def _outlook(
    subject: Subject, topology: Topology, arrays: Arrays, programs: dict[str, Program]
) -> Outlook:
    phases = [costs.update_phase(subject, _sent("update", subject, arrays, programs))]
    if subject.samples:
        _, prompts, _ = arrays.reading
        turn = _sent("decode", subject, arrays, programs) / STEPS_PER_CALL
        reading = _sent("prefill", subject, arrays, programs)
        phases.append(costs.generation_phase(subject, prompts, _slots(arrays), reading, turn))
    memory = _memory(subject, topology, arrays, programs)
    return Outlook(subject, topology, memory, tuple(phases), programs)


def _slots(arrays: Arrays) -> int:
    """Of every part."""
    return arrays.cache.k_lpckhs.shape[2]


def _memory(
    subject: Subject, topology: Topology, arrays: Arrays, programs: dict[str, Program]
) -> Memory:
    student = bytes_per_device(arrays.state.params)
    if programs:
        temporaries = {name: program.temporaries for name, program in programs.items()}
    else:
        temporaries = {"update": costs.estimated_temporaries(subject, topology.platform)}
        if subject.samples:
            _, prompts, size = arrays.reading
            slots = _slots(arrays)
            temporaries["prefill"] = costs.estimated_prefill_temporaries(subject, prompts, size)
            temporaries["decode"] = costs.estimated_decode_temporaries(subject, slots)
    return Memory(
        student=student,
        optimizer=bytes_per_device(arrays.state.opt_state),
        gradients=student,
        teacher=bytes_per_device(arrays.teacher and arrays.teacher.params),
        batch=bytes_per_device(arrays.batch),
        sampler=bytes_per_device(arrays.sampler),
        cache=bytes_per_device(arrays.cache),
        loop_weights=bytes_per_device(arrays.loop_weights),
        update=temporaries["update"],
        prefill=temporaries.get("prefill", 0.0),
        decode=temporaries.get("decode", 0.0),
        apart=subject.samples_apart,
    )


def _sent(name: str, subject: Subject, arrays: Arrays, programs: dict[str, Program]) -> float:
    """Bytes that a device sends in one run of the program."""
    program = programs.get(name)
    if program is not None and program.sent is not None:
        return sum(program.sent.values())
    if name == "update":
        return costs.estimated_sent(subject)
    _, prompts, size = arrays.reading
    tokens = prompts * size if name == "prefill" else STEPS_PER_CALL * _slots(arrays)
    return costs.estimated_forward_sent(subject, tokens)
