"""Changes to a config: which would make it fit, and which make the fastest step."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from distill.base.errors import UserError
from distill.base.mesh import make_abstract_mesh
from distill.base.sharding import MESH_AXES, RULES, axis_parts, batch_parts
from distill.base.topology import SLICES, Topology, parse_topology
from distill.config.policy import microbatch_values, rows_per_microbatch
from distill.config.schema import Config, all_teachers, teacher_key
from distill.planning.counts import cut_sizes
from distill.planning.estimate import Plan, compile_plan, estimate
from distill.planning.workload import Workload, fit_to_devices, with_values

PRECISIONS_OF_TEACHERS = ("float32", "bfloat16", "int8")
COMPILED = 3  # of a sweep's candidates, the best
_ROWS, *_WEIGHTS = MESH_AXES  # the first axis cuts rows alone, the others weights
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Change:
    """Keys with new values, or another topology, and what comes of it."""

    values: Values
    plan: Plan

    @property
    def words(self) -> str:
        keys = [f"--config.{key}={value}" for key, value in self.values.items()]
        return " ".join(keys) or f"--topology={self.plan.topology.name}"


# ---------------------------------------------------------------------------------- what fits


def find_remedies(plan: Plan) -> list[Change]:
    """The smallest change of each kind that alone makes it fit; else, all kinds together.

    Temporaries are estimates, corrected by how far the estimate is off for what was compiled. Where
    it is possible, changes are compiled, too, the small before the large, until one is confirmed.
    """
    estimated = estimate(plan.workload, plan.topology)
    correction = plan.memory.update / estimated.memory.update
    remedies: list[Change] = []
    for changes in (*(_changed(plan, values) for values in kinds(plan)), _more_devices(plan)):
        fitting: Iterator[Change] = (change for change in changes if _fits(change.plan, correction))
        if not remedies:
            fitting = _not_refuted(fitting)
        remedies += itertools.islice(fitting, 1)
    return remedies or list(_not_refuted(_all_together(estimated, correction)))


def _fits(plan: Plan, correction: float) -> bool:
    memory = dataclasses.replace(plan.memory, update=correction * plan.memory.update)
    return memory.peak <= plan.topology.chip.memory


def _not_refuted(changes: Iterable[Change]) -> Iterator[Change]:
    """Those that fit when they are compiled; for GPUs, where nothing can be, all."""
    for change in changes:
        if change.plan.topology.platform != "gpu":
            change = Change(change.values, compile_plan(change.plan.workload, change.plan.topology))
            if not change.plan.fits:
                continue
        yield change


def _all_together(plan: Plan, correction: float) -> list[Change]:
    """One kind of change after the other, each the one that saves most, until it fits."""
    values: Values = {}
    for i in range(len(kinds(plan))):
        changes = _changed(plan, kinds(plan)[i])
        best = min(changes, key=lambda change: change.plan.memory.peak, default=None)
        if best and best.plan.memory.peak < plan.memory.peak:
            values, plan = values | best.values, best.plan
        if _fits(plan, correction):
            return [Change(values, plan)]
    return []


def _changed(
    plan: Plan, choices: Iterable[Values], topology: Topology | None = None
) -> Iterator[Change]:
    """Changes by each of the values, but for those that a mesh cannot split."""
    topology = topology or plan.topology
    for values in choices:
        config = with_values(plan.workload.config, values)
        workload = dataclasses.replace(plan.workload, config=config, notes=())
        try:
            made = estimate(fit_to_devices(workload, topology.count), topology)
        except UserError:
            continue
        yield Change(values, made)


def kinds(plan: Plan) -> list[list[Values]]:
    """The changes of each kind, from small to large."""
    config, policy = plan.workload.config, plan.workload.config.policy

    def beyond(key: str, *ways: str) -> list[Values]:
        now = operator.attrgetter(key)(config)
        return [{key: way} for way in ways[ways.index(now) + 1 :]]

    microbatches = [
        microbatch_values(policy, size)
        for size in _microbatches(plan.workload, batch_parts(plan.workload.mesh))
        if size < rows_per_microbatch(policy)
    ]
    precision, streamed = _of_teachers(config)
    base = beyond("policy.lora.base_dtype", "auto", "int8") if policy.lora.rank else []
    cache = [
        {"policy.generation.cache_memory": policy.generation.cache_memory / part}
        for part in (2, 4, 8, 16)
    ]
    sizes = plan.workload.mesh.shape
    meshes = [  # that split weights further, or more of the activations
        mesh
        for mesh in _meshes(plan)
        if math.prod(mesh[axis] for axis in _WEIGHTS) > math.prod(sizes[axis] for axis in _WEIGHTS)
        or any(mesh[axis] > sizes[axis] for axis in _WEIGHTS[1:])
    ]
    meshes.sort(key=lambda mesh: [mesh[axis] for axis in reversed(_WEIGHTS)])
    return [
        beyond("policy.activation_checkpointing", "none", "dots", "full"),
        microbatches,
        precision,
        base,
        beyond("policy.optimizer.offload", "none", "host") + streamed,
        cache,
        list(map(_mesh_values, meshes)),
    ]


def _of_teachers(config: Config) -> tuple[list[Values], list[Values]]:
    """Lower precisions of all teachers' weights, and streaming them, where they can be changed."""
    loaded = {
        name: teacher
        for name, teacher in all_teachers(config).items()
        if teacher.backend == "local" and not (teacher.in_state or teacher.scores)
    }
    precisions = []
    for way in ("bfloat16", "int8"):
        higher = PRECISIONS_OF_TEACHERS[: PRECISIONS_OF_TEACHERS.index(way)]
        names = [name for name, teacher in loaded.items() if teacher.precision in higher]
        precisions += [{teacher_key(name, "precision"): way for name in names}] if names else []
    resident = [name for name, teacher in loaded.items() if teacher.offload == "none"]
    streamed = [{teacher_key(name, "offload"): "layers" for name in resident}] if resident else []
    return precisions, streamed


def _more_devices(plan: Plan) -> Iterator[Change]:
    """Larger slices of the same chip, with weights split over all of them."""
    now = plan.topology
    names = {
        "tpu": [f"{now.kind}:{size}" for size in SLICES.get(now.kind, ())],
        "gpu": [f"gpu:{now.kind}x{8 << i}" for i in range(6)],
    }
    for topology in map(parse_topology, names.get(now.platform, ())):
        if topology.count > now.count:
            axis = _WEIGHTS[0]
            size = plan.workload.mesh.shape[axis] * topology.count // now.count
            for change in _changed(plan, [_mesh_values({axis: size})], topology):
                yield dataclasses.replace(change, values={})


# -------------------------------------------------------------------------------- what is fast


def faster_sampler(plan: Plan) -> Change | None:
    """The layout of the sampler that takes least, if it saves a tenth of the step.

    Only the colocated one is looked at: with devices of its own, their number matters more.
    """
    if not plan.workload.samples or plan.workload.samples_apart:
        return None
    base, key = estimate(plan.workload, plan.topology), "policy.generation"
    powers = [1 << i for i in range(plan.topology.count.bit_length())]
    choices = (
        {f"{key}.tensor": tensor, f"{key}.width": width}
        for tensor in working_sizes(base, "tensor")
        for width in powers
        if plan.topology.count % (tensor * width) == 0
    )
    fitting = (change for change in _changed(base, choices) if change.plan.fits)
    best = min(fitting, key=lambda change: change.plan.seconds, default=None)
    return best if best and best.plan.seconds < 0.9 * base.seconds else None


def sweep(workload: Workload, topology: Topology) -> tuple[list[Plan], int]:
    """The best meshes and microbatches, compiled if that is possible, and how many were tried.

    Those that fit come first, the fastest step before the others.
    """
    base = estimate(workload, topology)
    choices = (
        _mesh_values(mesh) | microbatch_values(workload.config.policy, size)
        for mesh in _meshes(base)
        for size in _microbatches(workload, batch_parts(make_abstract_mesh(**mesh)))
    )
    plans = sorted((change.plan for change in _changed(base, choices)), key=_rank)
    best = plans[:COMPILED]
    if topology.platform != "gpu":
        best = sorted((compile_plan(each.workload, topology) for each in best), key=_rank)
    return best, len(plans)


def _rank(plan: Plan) -> tuple:
    return not plan.fits, plan.seconds, plan.memory.peak


def _meshes(plan: Plan) -> Iterator[dict[str, int]]:
    """Sizes of all meshes that divide the models and the batch.

    Positions are cut only where no more rows can be: rows need nothing of each other.
    """
    rows = plan.workload.config.policy.train_global_batch_size
    axes = _WEIGHTS[::-1]
    for sizes in itertools.product(*(working_sizes(plan, axis) for axis in axes)):
        copies, rest = divmod(plan.workload.mesh.size, math.prod(sizes))
        if rest == 0:
            mesh = {_ROWS: copies, **dict(zip(axes, sizes, strict=True))}
            made = make_abstract_mesh(**mesh)
            if rows % batch_parts(made) == 0 and 1 in (copies, axis_parts(made, "position")):
                yield mesh


def _mesh_values(sizes: dict[str, int]) -> Values:
    return {f"mesh.{axis}": sizes[axis] for axis in MESH_AXES if axis in sizes}


def working_sizes(plan: Plan, axis: str) -> list[int]:
    """Sizes of a mesh axis that divide all that it splits."""
    facts = [plan.workload.student, *filter(None, plan.workload.teachers)]
    if axis == "expert" and not any(each.experts for each in facts):
        return [1]  # it would be another fsdp
    models = [plan.arrays.student, *(each.model for each in plan.arrays.teachers.values())]
    sizes = [size for model in models if model.params for size in cut_sizes(model.params, axis)]
    if axis == RULES["position"]:
        sizes.append(plan.workload.tokens.length)
    common = math.gcd(*sizes) or 1  # nothing is split over it
    return [size for size in range(1, common + 1) if common % size == 0]


def _microbatches(workload: Workload, parts: int) -> list[int]:
    """Numbers of rows that divide the batch and can be split `parts` ways, the most first."""
    rows = workload.config.policy.train_global_batch_size
    return [size for size in range(rows, 0, -1) if rows % size == 0 and size % parts == 0]
