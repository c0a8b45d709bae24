"""Does it fit, and how long does a step take at least: from shapes alone, or from programs."""

from __future__ import annotations

import dataclasses

from distill.base.sharding import bytes_per_device, make_abstract_mesh
from distill.base.topology import Topology
from distill.build.devices import build_mesh, build_sampler_mesh
from distill.planning import costs
from distill.planning.arrays import Arrays, make_arrays
from distill.planning.programs import Program, compile_programs
from distill.planning.workload import Workload


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
      prefill: temporaries and results of the largest prefill.
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
class Plan:
    """Of one workload on one topology.

    Attributes:
      phases: in turn, or at once with devices apart and responses sampled ahead.
      compiled: the programs 'update', 'prefill' and 'decode'; empty where nothing was compiled and
        temporaries and network traffic are estimates.
    """

    workload: Workload
    topology: Topology
    arrays: Arrays
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
            bounds[phase.name] = max(seconds.items(), key=lambda limit: limit[1])
        return bounds

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        times = [seconds for _, seconds in self.bounds.values()]
        ahead = self.workload.config.policy.generation.async_steps
        return max(times) if ahead else sum(times)

    @property
    def limit(self) -> str:
        """What limits most of the step."""
        phase, (limit, _) = max(self.bounds.items(), key=lambda bound: bound[1][1])
        return f"{limit}, in the {phase}"


def estimate(workload: Workload, topology: Topology) -> Plan:
    """From shapes alone: nothing is compiled. The workload fits the topology's devices."""
    assert workload.sampler is not None  # since the workload fits
    mesh, sampler_mesh = make_abstract_mesh(*workload.sizes), make_abstract_mesh(*workload.sampler)
    return _plan(workload, topology, make_arrays(workload, mesh, sampler_mesh), {})


def compile_plan(workload: Workload, topology: Topology) -> Plan:
    """From the run's programs, compiled for the topology, whose devices the workload fits."""
    devices = topology.devices()
    mesh = build_mesh(workload.config, devices)
    sampler_mesh = build_sampler_mesh(workload.config.policy.generation, mesh, devices)
    arrays = make_arrays(workload, mesh, sampler_mesh)
    programs = compile_programs(workload, arrays, mesh, sampler_mesh)
    return _plan(workload, topology, arrays, programs)


def _plan(
    workload: Workload, topology: Topology, arrays: Arrays, programs: dict[str, Program]
) -> Plan:
    temporaries = costs.estimated_temporaries(workload, arrays, topology.platform)
    sent = costs.estimated_sent(workload, arrays)
    for name, program in programs.items():
        temporaries[name] = program.temporaries
        if program.sent is not None:
            sent[name] = sum(program.sent.values())
    phases = [costs.update_phase(workload, arrays, sent["update"])]
    sampler = arrays.sampler
    if sampler:
        phases.append(costs.generation_phase(workload, arrays, sent))
    memory = Memory(
        student=bytes_per_device(arrays.state.params),
        optimizer=bytes_per_device(arrays.state.opt_state),
        gradients=bytes_per_device(arrays.state.trainable),
        teacher=bytes_per_device(arrays.teacher and arrays.teacher.params),
        batch=bytes_per_device(arrays.batch),
        sampler=bytes_per_device(sampler and sampler.weights),
        cache=bytes_per_device(sampler and sampler.cache),
        loop_weights=bytes_per_device(sampler and sampler.loop_weights),
        update=temporaries["update"],
        prefill=temporaries.get("prefill", 0.0),
        decode=temporaries.get("decode", 0.0),
        apart=workload.samples_apart,
    )
    return Plan(workload, topology, arrays, memory, tuple(phases), programs)
