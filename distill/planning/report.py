"""A plan in words and numbers; GB are 1e9 bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distill.base.sharding import MESH_AXES
from distill.base.topology import INSTALL_COMPILER
from distill.config.policy import rows_per_microbatch
from distill.config.schema import schema_key
from distill.config.words import all_keys, show_value
from distill.models import expert_exchange
from distill.models.facts import ModelConfig
from distill.planning import costs
from distill.planning.changes import Change, faster_sampler
from distill.planning.counts import Counts
from distill.planning.estimate import Plan
from distill.planning.workload import Workload
from distill.sampling.slots import STEPS_PER_CALL

_GB = 1e9

_PROGRAMS = {
    "update": "the update",
    "prefill": "a prefill",
    "decode": f"{STEPS_PER_CALL} decode steps",
}


def setting_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    """A run's config, from `to_flat_dict`: every key, with its default where it is another."""
    defaults = {key.name: key.default for key in all_keys()}
    for name, value in settings.items():
        shown = show_value(value)
        default = defaults[schema_key(name)]
        yield f"{name}={shown}" + (f"  (default: {default})" if shown != default else "")


def lines(plan: Plan) -> Iterator[str]:
    """All that a plan says of one config on one topology."""
    topology, workload = plan.topology, plan.workload
    yield f"student  {_size(workload.student, plan.arrays.student_counts)}"
    for name, teacher in plan.arrays.teachers.items():
        if teacher.counts:
            yield f"{f'teacher {name}'.strip():8} {_size(teacher.facts, teacher.counts)}"
    mesh = " ".join(f"{axis}={workload.mesh.shape[axis]}" for axis in MESH_AXES)
    yield f"devices  {topology.count} of {topology.name}, mesh {mesh}{_sampler_mesh(workload)}"
    yield from (f"note     {note}" for note in workload.notes)
    for facts in dict.fromkeys((workload.student, *workload.teachers)):
        if facts and facts.experts and (devices := workload.mesh.shape["expert"]) > 1:
            yield _exchange(devices, facts.experts.per_token)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _operations(plan)
    yield ""
    yield from _time(plan)
    if change := faster_sampler(plan):
        seconds, weights = change.plan.bounds["generation"][1], change.plan.memory.sampler / _GB
        yield (
            f"generation would take at least {seconds:.4g} s, estimated, with {change.words}: a "
            f"decode step reads {weights:.3g} GB of weights instead of "
            f"{plan.memory.sampler / _GB:.3g}"
        )
    yield from _programs(plan)


def _sampler_mesh(workload: Workload) -> str:
    sampler = workload.sampler_mesh
    if sampler is None or not workload.samples or sampler == workload.mesh:
        return ""
    sizes = " ".join(f"{axis}={size}" for axis, size in sampler.shape.items() if size > 1)
    own = f" has {sampler.size} of its own," if workload.samples_apart else ""
    return f"; the sampler{own} {sizes or 'data=1'}"


def _size(model: ModelConfig, counts: Counts) -> str:
    return (
        f"{counts.weights / 1e9:.3g}e9 weights: {model.family}, "
        f"{model.num_layers} layers of width {model.model_width}, {model.num_heads} heads over "
        f"{model.num_kv_heads}, {model.vocab_size} rows of vocabulary"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory, chip = plan.memory, plan.topology.chip
    source = "by the compiler" if plan.compiled else "estimated"
    unit, size_of_unit = ("GB", _GB) if memory.peak >= _GB else ("MB", 1e6)
    rows = {label.format(source): size for label, size in memory.labelled if size}
    rows |= {f"at once in the {phase}": peak for phase, peak in memory.peaks.items()}
    yield f"{'memory per device':45}{unit:>6}"
    yield from (f"{name:42}{size / size_of_unit:9.3f}" for name, size in rows.items())
    verdict = "fits" if plan.fits else "does not fit"
    yield f"{'the device has':42}{chip.memory / size_of_unit:9.3f}  ({chip.source}): {verdict}"
    for name, program in plan.compiled.items():
        if program.failure:
            yield f"the compiler refuses {_PROGRAMS[name]}: {program.failure}"


def _exchange(devices: int, per_token: int) -> str:
    """How tokens come to experts that are cut over devices."""
    routed = expert_exchange.is_routed(devices, per_token)
    way = "sent to the devices of their experts" if routed else "gathered"
    return (
        f"experts  cut over {devices} devices, tokens are {way}: of each, "
        f"{expert_exchange.sent(devices, per_token):.3g} copies are sent per layer, and as many "
        "results"
    )


def _operations(plan: Plan) -> Iterator[str]:
    workload = plan.workload
    tokens, parts = workload.tokens, costs.flops(workload, plan.arrays)
    total = sum(parts.values())
    yield (
        f"operations per token: {total / tokens.total:.3e}, with {tokens.rows} full rows of "
        f"{tokens.prompt} + {tokens.response} tokens (counted from shapes)"
    )
    shares = (f"{name} {size / total:.1%}" for name, size in parts.items() if size)
    yield "of them " + ", ".join(shares)


def _time(plan: Plan) -> Iterator[str]:
    topology, tokens = plan.topology, plan.workload.tokens
    yield "seconds at least      compute   memory  network"
    for phase in plan.phases:
        seconds = phase.seconds(topology.chip, topology.network)
        yield f"{phase.name:18}" + "".join(f"{each:11.4g}" for each in seconds.values())
    yield (
        f"a step takes at least {plan.seconds:.4g} s, that is at most "
        f"{tokens.responses / plan.seconds:.4g} response tokens per second; bound by "
        f"{plan.limit}"
    )


def _programs(plan: Plan) -> Iterator[str]:
    for phase in plan.phases:
        yield f"sent per device and {phase.name}: {phase.sent / _GB:.4g} GB"
    for name, program in plan.compiled.items():
        sent = (program.sent or {}).items()
        if kinds := ", ".join(f"{kind} {size / _GB:.4g}" for kind, size in sent if size > 1e6):
            yield f"  in {_PROGRAMS[name]}: {kinds}"
    if any(each.sent is None and not each.failure for each in plan.compiled.values()):
        yield (
            "what is sent is partly an estimate: programs of the TPU compiler that is installed "
            f"cannot be printed; the one that fits this JAX comes with {INSTALL_COMPILER}"
        )
    if plan.compiled:
        each = (f"{name} {each.seconds:.1f} s" for name, each in plan.compiled.items())
        yield f"compiled in: {', '.join(each)}"
    else:
        yield "nothing was compiled: temporaries and what is sent are estimates"


def remedy_lines(remedies: list[Change]) -> Iterator[str]:
    """What would make it fit."""
    if not remedies:
        yield "no change of checkpointing, microbatches, cache, mesh or number of devices suffices"
        return
    yield "one of these would make it fit:"
    for change in remedies:
        plan = change.plan
        how = "by the compiler" if plan.compiled else "estimated"
        yield f"  {change.words}  ({plan.memory.peak / _GB:.3f} GB, {how})"
        yield from (f"    {note}" for note in plan.workload.notes)


def sweep_lines(best: list[Plan], tried: int) -> Iterator[str]:
    yield f"the best {len(best)} of {tried} meshes and microbatches:"
    yield "  ".join([*MESH_AXES, "microbatch", "peak GB", "fits", "seconds", "bound by"])
    for plan in best:
        sizes, micro = plan.workload.mesh.shape, rows_per_microbatch(plan.workload.config.policy)
        yield (
            "".join(f"{sizes[axis]:<{len(axis) + 2}}" for axis in MESH_AXES) + f"{micro:<12}"
            f"{plan.memory.peak / _GB:<9.3f}{'yes' if plan.fits else 'no':<6}"
            f"{plan.seconds:<9.4g}{plan.limit}"
        )
