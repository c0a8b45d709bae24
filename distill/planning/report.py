"""A plan in words and numbers; GB are 1e9 bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distill.config.schema import rows_per_microbatch
from distill.config.words import all_keys, show_value
from distill.models.facts import ModelConfig
from distill.planning import costs
from distill.planning.changes import Change
from distill.planning.outlook import Outlook
from distill.sampling.engine import STEPS_PER_CALL

_GB = 1e9

_PROGRAMS = {
    "update": "the update",
    "prefill": "a reading of prompts",
    "decode": f"{STEPS_PER_CALL} decode steps",
}


def setting_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    """A run's config, from `to_flat_dict`: every key, with its default where it is another."""
    defaults = {key.name: key.default for key in all_keys()}
    for name, value in settings.items():
        shown = show_value(value)
        default = defaults[name]
        yield f"{name}={shown}" + (f"  (default: {default})" if shown != default else "")


def lines(outlook: Outlook) -> Iterator[str]:
    """All that a plan says of one config on one topology."""
    topology, subject = outlook.topology, outlook.subject
    for role, model in subject.models.items():
        yield f"{role:8} {_size(model)}"
    yield f"devices  {topology.count} of {topology.name}, mesh {subject.sizes}" + (
        f"; the sampler has {subject.sampler.count} of its own" if subject.samples_apart else ""
    )
    yield from (f"note     {note}" for note in subject.notes)
    yield ""
    yield from _memory(outlook)
    yield ""
    yield from _operations(outlook)
    yield ""
    yield from _time(outlook)
    yield from _programs(outlook)


def _size(model: ModelConfig) -> str:
    return (
        f"{costs.num_weights(model) / 1e9:.3g}e9 weights: {model.family}, "
        f"{model.num_layers} layers of width {model.model_width}, {model.num_heads} heads over "
        f"{model.num_kv_heads}, {model.vocab_size} rows of vocabulary"
    )


def _memory(outlook: Outlook) -> Iterator[str]:
    memory, chip = outlook.memory, outlook.topology.chip
    source = "by the compiler" if outlook.compiled else "estimated"
    rows = {
        "student, float32": memory.student,
        "optimizer": memory.optimizer,
        "teacher": memory.teacher,
        "batch": memory.batch,
        "sampler's copy of the student": memory.sampler,
        "keys and values": memory.cache,
        "the sampler's weights, layer by layer": memory.loop_weights,
        f"temporaries of the update, {source}": memory.update,
        "  of them gradients, float32": memory.gradients,
        f"temporaries of prefill, {source}": memory.prefill,
        f"temporaries of decoding, {source}": memory.decode,
    }
    unit, size_of_unit = ("GB", _GB) if memory.peak >= _GB else ("MB", 1e6)
    rows = {name: size for name, size in rows.items() if size}
    rows |= {f"at once in the {phase}": peak for phase, peak in memory.peaks.items()}
    yield f"{'memory per device':45}{unit:>6}"
    yield from (f"{name:42}{size / size_of_unit:9.3f}" for name, size in rows.items())
    verdict = "fits" if outlook.fits else "does not fit"
    yield f"{'the device has':42}{chip.memory / size_of_unit:9.3f}  ({chip.source}): {verdict}"
    for name, program in outlook.compiled.items():
        if program.failure:
            yield f"the compiler refuses {_PROGRAMS[name]}: {program.failure}"


def _operations(outlook: Outlook) -> Iterator[str]:
    subject = outlook.subject
    tokens, parts = costs.count_tokens(subject), costs.flops(subject)
    total = sum(parts.values())
    yield (
        f"operations per token: {total / tokens.total:.3e}, with {tokens.rows} full rows of "
        f"{tokens.prompt} + {tokens.response} tokens (counted from shapes)"
    )
    shares = (f"{name} {size / total:.1%}" for name, size in parts.items() if size)
    yield "of them " + ", ".join(shares)


def _time(outlook: Outlook) -> Iterator[str]:
    topology, tokens = outlook.topology, costs.count_tokens(outlook.subject)
    yield "seconds at least      compute   memory  network"
    for phase in outlook.phases:
        seconds = phase.seconds(topology.chip, topology.network)
        yield f"{phase.name:18}" + "".join(f"{each:11.4g}" for each in seconds.values())
    yield (
        f"a step takes at least {outlook.seconds:.4g} s, that is at most "
        f"{tokens.responses / outlook.seconds:.4g} response tokens per second; bound by "
        f"{outlook.limit}"
    )


def _programs(outlook: Outlook) -> Iterator[str]:
    for phase in outlook.phases:
        yield f"sent per device and {phase.name}: {phase.sent / _GB:.4g} GB"
    for name, program in outlook.compiled.items():
        sent = (program.sent or {}).items()
        if kinds := ", ".join(f"{kind} {size / _GB:.4g}" for kind, size in sent if size > 1e6):
            yield f"  in {_PROGRAMS[name]}: {kinds}"
    if outlook.compiled:
        each = (f"{name} {each.seconds:.1f} s" for name, each in outlook.compiled.items())
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
        outlook = change.outlook
        how = "by the compiler" if outlook.compiled else "estimated"
        yield f"  {change.words}  ({outlook.memory.peak / _GB:.3f} GB, {how})"
        yield from (f"    {note}" for note in outlook.subject.notes)


def sweep_lines(best: list[Outlook], tried: int) -> Iterator[str]:
    yield f"the best {len(best)} of {tried} meshes and microbatches:"
    yield "data  fsdp  tensor  microbatch  peak GB  fits  seconds  bound by"
    for outlook in best:
        sizes, micro = outlook.subject.sizes, rows_per_microbatch(outlook.subject.config.policy)
        yield (
            f"{sizes.data:<6}{sizes.fsdp:<6}{sizes.tensor:<8}{micro:<12}"
            f"{outlook.memory.peak / _GB:<9.3f}{'yes' if outlook.fits else 'no':<6}"
            f"{outlook.seconds:<9.4g}{outlook.limit}"
        )
