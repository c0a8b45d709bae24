"""Does it fit, and how long does a step take at least: from shapes alone, or from programs."""

from __future__ import annotations

import dataclasses

from distill.base.sharding import bytes_per_device
from distill.base.topology import Topology
from distill.build.devices import build_mesh, build_sampler_mesh
from distill.planning import costs
from distill.planning.arrays import Arrays, make_arrays
from distill.planning.programs import Program, compile_programs
from distill.planning.workload import Workload


def _shown(label: str) -> float:
    """A field with the words for it in a report, in which {} is where the figure comes from."""
    return dataclasses.field(metadata={"label": label})


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, of the largest device; what is not there is 0.

    The sampler's copy of the student stays while the update runs; each batch that is sampled ahead
    may have one. The cache, and the loop weights of a shallow sampler, are there only while it
    samples.
    """

    apart: bool  # sampler and cache are on other devices
    student: float = _shown("student, float32")
    frozen: float = _shown("student's frozen weights")
    optimizer: float = _shown("optimizer")
    teacher: float = _shown("teacher")
    batch: float = _shown("batch")
    sampler: float = _shown("sampler's copy of the student")
    cache: float = _shown("keys and values")
    loop_weights: float = _shown("the sampler's weights, layer by layer")
    update: float = _shown("temporaries of the update, {}")
    gradients: float = _shown("  of them gradients, float32")
    prefill: float = _shown("temporaries of prefill, {}")
    decode: float = _shown("temporaries of decoding, {}")

    @property
    def labelled(self) -> list[tuple[str, float]]:
        fields = [field for field in dataclasses.fields(self) if field.metadata]
        return [(field.metadata["label"], getattr(self, field.name)) for field in fields]

    @property
    def held(self) -> float:
        """By the trainer, always."""
        return self.student + self.frozen + self.optimizer + self.teacher

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

    Where nothing was compiled, temporaries and network traffic are estimates.
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
    def is_refused(self) -> bool:
        """Whether the compiler fails by itself, where less memory would not help."""
        return any(each.failure and each.temporaries is None for each in self.compiled.values())

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
    assert workload.sampler_mesh is not None  # since the workload fits
    arrays = make_arrays(workload, workload.mesh, workload.sampler_mesh)
    return _plan(workload, topology, arrays, {})


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
        if program.temporaries is not None:
            temporaries[name] = program.temporaries
        if program.sent is not None:
            sent[name] = sum(program.sent.values())
    generation = workload.config.policy.generation
    phases = [costs.update_phase(workload, arrays, sent["update"])]
    sampler = arrays.sampler
    if sampler:
        phases.append(costs.generation_phase(workload, arrays, sent))
    memory = Memory(
        student=bytes_per_device(arrays.state.trainable),
        frozen=bytes_per_device(arrays.state.frozen),
        optimizer=bytes_per_device(arrays.state.opt_state),
        gradients=bytes_per_device(arrays.state.trainable),
        teacher=bytes_per_device(arrays.weights_of_teachers),
        batch=bytes_per_device(arrays.batch),
        sampler=generation.num_held * bytes_per_device(sampler and sampler.weights),
        cache=bytes_per_device(sampler and sampler.cache),
        loop_weights=bytes_per_device(sampler and sampler.loop_weights),
        update=temporaries["update"],
        prefill=temporaries.get("prefill", 0.0),
        decode=temporaries.get("decode", 0.0),
        apart=workload.samples_apart,
    )
    return Plan(workload, topology, arrays, memory, tuple(phases), programs)
