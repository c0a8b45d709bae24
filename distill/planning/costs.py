"""Arithmetic, memory traffic and network traffic of a step, counted from shapes; per device.

The compiler's own count is no use for totals: it counts a loop's body once and knows nothing of
kernels. What is counted here is what cannot be avoided, so that times are lower bounds: every row
is full, no more than the causal half of attention, each weight read once per pass, activations of
which only what the backward pass keeps.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from distill.base.sharding import axis_parts, batch_parts, bytes_per_device
from distill.kernels.attention import MOST_SEGMENTS
from distill.kernels.recurrent import CHUNK, flops_per_token
from distill.models.facts import ModelConfig
from distill.planning.arrays import Arrays
from distill.planning.counts import Counts
from distill.planning.workload import Workload
from distill.sampling.slots import STEPS_PER_CALL

FLOAT32 = 4
# Of the student's output head in the loss: logits, and their two gradients; or one, where it is
# frozen.
HEAD_PASSES, FROZEN_HEAD_PASSES = 6, 4


def flops(workload: Workload, arrays: Arrays) -> dict[str, float]:
    """Operations of a step on all devices by part; two per multiplication."""
    tokens, student, times = workload.tokens, arrays.student_counts, workload.times_asked
    forward = times * _forward(workload.student, student, workload)
    teachers = arrays.computed_teachers
    of_teachers = (each.share * _forward(each.facts, n, workload) for each, n in teachers)
    remat = workload.config.policy.activation_checkpointing
    is_frozen = workload.config.policy.lora.rank > 0
    widths = times * (FROZEN_HEAD_PASSES if is_frozen else HEAD_PASSES) * student.width
    widths += sum(2 * each.share * counts.width for each, counts in teachers)
    return {
        "teacher": float(sum(of_teachers)),
        "student": 3 * forward,
        # A lower bound: with `dots`, cuDNN's attention, and no other, is computed again, too.
        "recomputation": forward
        * ((remat == "full") + (workload.config.policy.router_aux_loss > 0)),
        "loss": float(tokens.responses * workload.vocab_size * widths),
        "generation": _generation(workload, student) if workload.samples else 0.0,
    }


def _forward(model: ModelConfig, counts: Counts, workload: Workload) -> float:
    tokens = workload.tokens
    body = (2 * counts.layer_weights + _recurrence(model)) * tokens.total
    parts = axis_parts(workload.mesh, "position")
    return body + tokens.rows * _attention(model, counts, tokens.length, parts)


def _recurrence(model: ModelConfig) -> float:
    """What states take per token, in all layers that have some."""
    sizes = [sizes for layer in model.layers if (sizes := model.kinds[layer].recurrent)]
    return sum(x.value_heads * flops_per_token(x.key_width, x.value_width) for x in sizes)


def _attention(model: ModelConfig, counts: Counts, length: int, parts: int = 1) -> float:
    """Scores and weighted sums of one row, over the pairs of tokens that see each other.

    Of a row in parts, all devices take as long as the one with the last.
    """
    specs = [spec for layer in model.layers if (spec := model.kinds[layer].attention)]
    windows = [min(spec.window or length, length) for spec in specs]
    before = length - length / parts
    pairs = sum(length * w - parts * max(w - before, 0.0) ** 2 / 2 for w in windows)
    return 4.0 * counts.attention_width / len(specs) * pairs


def _generation(workload: Workload, counts: Counts) -> float:
    """Operations of prefill and of all decode steps."""
    model, tokens = workload.student, workload.tokens
    body = 2 * counts.layer_weights + _recurrence(model)
    head = 2 * counts.width * workload.vocab_size
    of_prompt, of_row = (
        _attention(model, counts, length) for length in (tokens.prompt, tokens.length)
    )
    prefill = tokens.prompts * (tokens.prompt * body + of_prompt + head)
    return prefill + tokens.responses * (body + head) + tokens.rows * (of_row - of_prompt)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a step on one device: operations, and bytes moved and sent, at least."""

    name: str
    flops: float
    moved: float
    sent: float

    def seconds(self, chip, network: float) -> dict[str, float]:
        """By what limits it: 'compute', 'memory', 'network'; they may overlap entirely."""
        return {
            "compute": self.flops / chip.flops,
            "memory": self.moved / chip.bandwidth,
            "network": self.sent / network,
        }


def update_phase(workload: Workload, arrays: Arrays, sent: float) -> Phase:
    """Teachers' forward, student forward and backward, loss and optimizer."""
    operations = flops(workload, arrays) | {"generation": 0.0}
    tokens, mesh, student = workload.tokens, workload.mesh, arrays.student_counts
    compute = _itemsize(workload)
    passes = 2 if workload.config.policy.activation_checkpointing == "none" else 3
    gradients = bytes_per_device(arrays.state.trainable)
    per_microbatch: float = workload.times_asked * (
        passes * student.used * compute + 2 * gradients  # which are added up
    )
    per_microbatch += sum(each.share * n.used_bytes for each, n in arrays.computed_teachers)
    kept = (
        workload.times_asked
        * 2
        * student.depth
        * student.width
        * compute
        * tokens.total
        / axis_parts(mesh, "token")
    )
    # Weights and moments are read and written, gradients read.
    updated = bytes_per_device((arrays.state.trainable, arrays.state.opt_state), fetched=True)
    moved = tokens.microbatches * per_microbatch + kept + 2 * updated + gradients
    return Phase("update", sum(operations.values()) / mesh.size, moved, sent)


def generation_phase(workload: Workload, arrays: Arrays, sent: dict[str, float]) -> Phase:
    """A refit, prefill, and one decode step after the other until all rows are full.

    `sent`: bytes that every device sends in a prefill, and in a call of the decode loop.
    """
    tokens, mesh, sampler = workload.tokens, workload.sampler_mesh, arrays.sampler
    assert mesh is not None and sampler is not None  # the workload samples
    parts, weights = batch_parts(mesh), bytes_per_device(sampler.weights)
    _, prompts, _ = sampler.prefill
    rows = -(-tokens.rows // parts)
    steps = tokens.response * -(-rows // sampler.slots)
    prefills = -(-tokens.prompts // (parts * prompts))
    of_row = (tokens.prompt + tokens.response / 2) * sampler.token_bytes + 2 * sampler.state_bytes
    cached = rows * tokens.response * of_row
    moved = (steps + prefills) * weights + cached
    kept = 0 if workload.samples_apart else arrays.student_counts.own * _itemsize(workload)
    refit = max(weights - kept, 0)
    total_sent = refit + prefills * sent["prefill"] + steps / STEPS_PER_CALL * sent["decode"]
    operations = _generation(workload, arrays.student_counts)
    return Phase("generation", operations / mesh.size, moved, total_sent)


# ------------------------------------------------------------- without a compiler: estimates


def estimated_sent(workload: Workload, arrays: Arrays) -> dict[str, float]:
    """Bytes that a device sends in a run of each program, as GSPMD usually partitions it."""
    tokens, student, times = workload.tokens, arrays.student_counts, workload.times_asked
    compute, parts = _itemsize(workload), axis_parts(workload.mesh, "token")
    copies = parts // axis_parts(workload.mesh, "embed")  # of each weight
    gathered = times * 2 * (student.used - student.own) * compute
    gradients = (
        times * FLOAT32 * (student.used - student.own + 2 * student.own * (copies - 1) / copies)
    )
    passes = 3 if workload.config.policy.activation_checkpointing == "full" else 2
    summed = times * passes * student.summed * compute
    # Once more for the gradients of what the others' tokens have read.
    fetched = times * (passes + 1) * sum(_fetched(workload.student, workload)) * compute
    for teacher, counts in arrays.computed_teachers:
        size = teacher.share * teacher.itemsize
        gathered += (counts.used - counts.own) * size
        summed += counts.summed * size
        fetched += sum(_fetched(teacher.facts, workload)) * size
    update = tokens.microbatches * (gathered + gradients)
    rows = tokens.rows / batch_parts(workload.mesh)
    sent = {"update": update + 2 * summed * tokens.total / parts + fetched * rows}
    if sampler := arrays.sampler:
        _, prompts, length = sampler.prefill
        per_token = 2 * sampler.counts.summed * compute
        sent |= {"prefill": per_token * prompts * length}
        sent |= {"decode": per_token * sampler.slots * STEPS_PER_CALL}
    return sent


def _fetched(model: ModelConfig, workload: Workload) -> list[float]:
    """Numbers of a row that a device fetches from those that have positions before its own, by
    layer: keys and values in reach, or what all make of a state.
    """
    mesh, length = workload.mesh, workload.tokens.length
    parts, made = axis_parts(mesh, "position"), []
    for kind in (model.kinds[layer] for layer in model.layers):
        if sizes := kind.recurrent:
            widths = sizes.key_width * (sizes.key_width + sizes.value_width)
            heads, numbers = sizes.value_heads, 2 * (parts - 1) * widths  # in float32
        else:
            assert kind.attention is not None
            reach = min((kind.attention.window or length) - 1, length - length // parts)
            heads, numbers = kind.num_kv_heads, 2 * reach * kind.head_width
        made.append(numbers * heads / axis_parts(mesh, "act_heads") if parts > 1 else 0.0)
    return made


def estimated_temporaries(workload: Workload, arrays: Arrays, platform: str) -> dict[str, float]:
    """Bytes that a device needs for each program beside weights, moments, batch and cache."""
    made = {"update": _update_temporaries(workload, arrays, platform)}
    if sampler := arrays.sampler:
        compute, counts = _itemsize(workload), sampler.counts
        _, prompts, length = sampler.prefill
        scores = FLOAT32 * counts.used_of_head / counts.width
        # What one layer makes of a token, and its keys and values in all layers.
        of_token = compute * counts.kept / counts.depth + sampler.token_bytes
        made |= {
            "prefill": prompts * (length * of_token + sampler.state_bytes + scores),
            "decode": 2 * sampler.slots * scores,
        }
    return made


def _update_temporaries(workload: Workload, arrays: Arrays, platform: str) -> float:
    """Gradients twice (a microbatch's, and their sum), what the backward pass keeps of every
    layer, and the larger of one layer at work and the two heads at work.
    """
    config, tokens, compute = workload.config, workload.tokens, _itemsize(workload)
    student = arrays.student_counts
    at_once = tokens.total / tokens.microbatches / axis_parts(workload.mesh, "token")
    rows = at_once * axis_parts(workload.mesh, "position") / tokens.length
    gradients = bytes_per_device(arrays.state.trainable) * (2 if tokens.microbatches > 1 else 1)
    inputs = student.depth * student.width
    saved = inputs + student.made + student.attended
    numbers = {"none": student.kept, "dots": saved, "full": inputs}
    kept = numbers[config.policy.activation_checkpointing] * compute * at_once
    at_work = [
        2 * student.kept * compute * at_once + (FLOAT32 + 2 * compute) * student.used_of_layers
    ]
    # One state for every chunk, where a recurrent layer is at work.
    states = [
        sizes.value_heads * sizes.key_width * sizes.value_width
        for kind in workload.student.kinds.values()
        if (sizes := kind.recurrent)
    ]
    if states:
        at_work[0] += student.depth * FLOAT32 * max(states) * at_once / CHUNK
    cut = axis_parts(workload.mesh, "position") > 1
    if platform == "gpu" and config.policy.sequence_packing.enabled and not cut:
        # What cuDNN's backward pass takes for one packed row; the factor was measured on an H100.
        at_work[0] += 8 * student.attended * tokens.length * (MOST_SEGMENTS + 1)
    at_work[0] /= student.depth
    # And the gradients of what a layer fetches.
    at_work[0] += 2 * max(_fetched(workload.student, workload)) * compute * rows
    heads = (FLOAT32 + compute) * student.used_of_head
    heads_t = [0]
    for teacher, counts in arrays.computed_teachers:
        size = teacher.itemsize
        layers = counts.kept * size * at_once + 2 * size * counts.used_of_layers
        fetched = max(_fetched(teacher.facts, workload)) * size * rows
        at_work.append(layers / counts.depth + fetched)
        heads_t.append(size * counts.used_of_head)
    heads += max(heads_t)
    return gradients + kept + arrays.fetched + max(*at_work, heads)


def _itemsize(workload: Workload) -> int:
    return jnp.dtype(workload.config.policy.precision).itemsize
