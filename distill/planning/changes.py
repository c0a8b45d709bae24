"""Changes to a config: which would make it fit, and which make the fastest step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distill.base.errors import UserError
from distill.base.topology import SLICES, Topology, parse_topology
from distill.config.schema import microbatch_values, rows_per_microbatch
from distill.planning import costs
from distill.planning.outlook import Outlook, compile_programs, estimate
from distill.planning.subject import Subject, fit_to_devices, with_values, working_sizes

COMPILED = 3  # of a sweep's candidates, the best
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Change:
    """Keys with new values, or another topology, and what comes of it."""

    values: Values
    outlook: Outlook

    @property
    def words(self) -> str:
        keys = [f"--config.{key}={value}" for key, value in self.values.items()]
        return " ".join(keys) or f"--topology={self.outlook.topology.name}"


# ---------------------------------------------------------------------------------- what fits


def find_remedies(outlook: Outlook) -> list[Change]:
    """The smallest change of each kind that alone makes it fit; else, all kinds together.

    Temporaries are estimates, corrected by how far the estimate is off for what was compiled. Where
    it is possible, changes are compiled, too, the small before the large, until one is confirmed.
    """
    estimated = costs.estimated_temporaries(outlook.subject, outlook.topology.platform)
    correction = outlook.memory.update / estimated
    remedies: list[Change] = []
    for kind in _KINDS:
        fitting = (change for change in kind(outlook) if _fits(change.outlook, correction))
        if not remedies:
            fitting = _not_refuted(fitting)
        remedies += itertools.islice(fitting, 1)
    return remedies or list(_not_refuted(_all_together(outlook, correction)))


def _fits(outlook: Outlook, correction: float) -> bool:
    memory = outlook.memory
    corrected = dataclasses.replace(memory, update=correction * memory.update)
    return corrected.peak <= outlook.topology.chip.memory


def _not_refuted(changes: Iterable[Change]) -> Iterator[Change]:
    """Those that fit when they are compiled; for GPUs, where nothing can be, all."""
    for change in changes:
        if change.outlook.topology.platform == "gpu":
            yield change
            continue
        outlook = compile_programs(change.outlook.subject, change.outlook.topology)
        if outlook.fits:
            yield dataclasses.replace(change, outlook=outlook)


def _changed(outlook: Outlook, values: Values, topology: Topology | None = None) -> Change | None:
    """None where the mesh cannot split it."""
    topology = topology or outlook.topology
    config = with_values(outlook.subject.config, values)
    try:
        subject = dataclasses.replace(outlook.subject, config=config, notes=())
        return Change(values, estimate(fit_to_devices(subject, topology.count), topology))
    except UserError:
        return None


def _each(outlook: Outlook, choices: Iterator[Values]) -> Iterator[Change]:
    changes = (_changed(outlook, values) for values in choices)
    return (change for change in changes if change is not None)


def _more_checkpointing(outlook: Outlook) -> Iterator[Change]:
    ways = ("none", "dots", "full")
    now = ways.index(outlook.subject.config.policy.activation_checkpointing)
    key = "policy.activation_checkpointing"
    return _each(outlook, ({key: way} for way in ways[now + 1 :]))


def _smaller_microbatches(outlook: Outlook) -> Iterator[Change]:
    subject = outlook.subject
    policy = subject.config.policy
    now = rows_per_microbatch(policy)
    sizes = (size for size in _microbatches(subject, subject.sizes.parts) if size < now)
    return _each(outlook, (microbatch_values(policy, size) for size in sizes))


def _smaller_cache(outlook: Outlook) -> Iterator[Change]:
    now, key = outlook.subject.config.policy.generation.cache_memory, "cache_memory"
    smaller = (now / part for part in (2, 4, 8, 16))
    return _each(outlook, ({f"policy.generation.{key}": size} for size in smaller))


def _smaller_teacher(outlook: Outlook) -> Iterator[Change]:
    """Fewer bits for its weights."""
    if outlook.subject.teacher is None:
        return iter(())
    ways = ("float32", "bfloat16", "int8")
    now = ways.index(outlook.subject.config.teacher.precision)
    return _each(outlook, ({"teacher.precision": way} for way in ways[now + 1 :]))


def _offload(outlook: Outlook) -> Iterator[Change]:
    """The optimizer's state or the teacher's layers in the hosts' memory."""
    config, choices = outlook.subject.config, []
    if config.policy.optimizer.offload == "none":
        choices.append({"policy.optimizer.offload": "host"})
    if outlook.subject.teacher is not None and config.teacher.offload == "none":
        choices.append({"teacher.offload": "layers"})
    return _each(outlook, iter(choices))


def _other_meshes(outlook: Outlook) -> Iterator[Change]:
    """Those that split weights further, the least first."""
    sizes = outlook.subject.sizes
    meshes = [
        mesh
        for mesh in _meshes(outlook.subject, sizes.count)
        if mesh["mesh.fsdp"] * mesh["mesh.tensor"] > sizes.fsdp * sizes.tensor
        or mesh["mesh.tensor"] > sizes.tensor
    ]
    meshes.sort(key=lambda mesh: (mesh["mesh.tensor"], mesh["mesh.fsdp"]))
    return _each(outlook, iter(meshes))


def _more_devices(outlook: Outlook) -> Iterator[Change]:
    """Larger slices of the same chip, with weights split over all of them."""
    for topology in _larger(outlook.topology):
        sizes = outlook.subject.sizes
        grown = topology.count // outlook.topology.count
        values = {"mesh.fsdp": sizes.fsdp * grown}
        if change := _changed(outlook, values, topology):
            yield dataclasses.replace(change, values={})


def _larger(topology: Topology) -> Iterator[Topology]:
    if topology.platform == "tpu":
        names = (f"{topology.kind}:{size}" for size in SLICES[topology.kind])
    elif topology.platform == "gpu":
        names = (f"gpu:{topology.kind}x{8 << i}" for i in range(6))
    else:
        names = iter(())
    return (each for each in map(parse_topology, names) if each.count > topology.count)


_KINDS: tuple[Callable[[Outlook], Iterator[Change]], ...] = (
    _more_checkpointing,
    _smaller_microbatches,
    _smaller_teacher,
    _offload,
    _smaller_cache,
    _other_meshes,
    _more_devices,
)


def _all_together(outlook: Outlook, correction: float) -> list[Change]:
    """One kind of change after the other, each the one that saves most, until it fits."""
    values: Values = {}
    outlook = estimate(outlook.subject, outlook.topology)
    for kind in _KINDS[:-1]:
        changes = list(kind(outlook))
        best = min(changes, key=lambda change: change.outlook.memory.peak, default=None)
        if best and best.outlook.memory.peak < outlook.memory.peak:
            values, outlook = values | best.values, best.outlook
        if _fits(outlook, correction):
            return [Change(values, outlook)]
    return []


# -------------------------------------------------------------------------------- what is fast


def sweep(subject: Subject, topology: Topology) -> tuple[list[Outlook], int]:
    """The best meshes and microbatches, compiled if that is possible, and how many were tried.

    Those that fit come first, the fastest step before the others.
    """
    base = estimate(subject, topology)
    choices = (
        mesh | microbatch_values(subject.config.policy, size)
        for mesh in _meshes(subject, subject.sizes.count)
        for size in _microbatches(subject, mesh["mesh.data"] * mesh["mesh.fsdp"])
    )
    outlooks = sorted((change.outlook for change in _each(base, choices)), key=_rank)
    best = outlooks[:COMPILED]
    if topology.platform != "gpu":
        best = sorted((compile_programs(each.subject, topology) for each in best), key=_rank)
    return best, len(outlooks)


def _rank(outlook: Outlook) -> tuple:
    return not outlook.fits, outlook.seconds, outlook.memory.peak


def _meshes(subject: Subject, count: int) -> list[Values]:
    """All meshes that divide the models and the batch."""
    rows, meshes = subject.config.policy.train_global_batch_size, []
    for tensor in working_sizes(subject, "tensor"):
        for fsdp in working_sizes(subject, "fsdp"):
            data, rest = divmod(count, tensor * fsdp)
            if rest == 0 and rows % (data * fsdp) == 0:
                sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
                meshes.append(sizes)
    return meshes


def _microbatches(subject: Subject, parts: int) -> list[int]:
    """Numbers of rows that divide the batch and can be split `parts` ways, the most first."""
    rows = subject.config.policy.train_global_batch_size
    return [size for size in range(rows, 0, -1) if rows % size == 0 and size % parts == 0]
