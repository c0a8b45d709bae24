"""Arithmetic, memory traffic and network traffic of a step, counted from shapes; per device.

The compiler's own count is no use for totals: it counts a loop's body once and knows nothing of
kernels. What is counted here is what cannot be avoided, so that times are lower bounds: every row
is full, no more than the causal half of attention, each weight read once per pass, activations of
which only what the backward pass keeps.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from distill.config.schema import rows_per_microbatch
from distill.kernels.attention import MOST_SEGMENTS
from distill.models.facts import ModelConfig
from distill.planning.subject import Subject
from distill.sampling.cache import bytes_per_token

FLOAT32 = 4
OPTIMIZER_PASSES = 7  # weights and two moments read and written, gradients read


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a step goes through: `rows` of `prompt` and `response` tokens each, all full."""

    rows: int
    prompt: int
    response: int
    prompts: int  # distinct ones: answers to one prompt share its reading
    microbatches: int

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def total(self) -> int:
        return self.rows * self.length

    @property
    def responses(self) -> int:
        return self.rows * self.response


def count_tokens(subject: Subject) -> Tokens:
    policy, strategy = subject.config.policy, subject.config.distillation.generate_strategy
    rows, response = policy.train_global_batch_size, strategy.max_length
    at_once = rows_per_microbatch(policy) // subject.sizes.parts * subject.sizes.parts
    return Tokens(
        rows=rows,
        prompt=policy.max_total_sequence_length - response,
        response=response,
        prompts=rows // strategy.num_generations,
        microbatches=-(-rows // at_once),
    )


def layer_weights(model: ModelConfig) -> int:
    """Weights of the matrices of one layer."""
    query, key = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    return model.model_width * (2 * query + 2 * key + 3 * model.ffn_width)


def num_weights(model: ModelConfig) -> int:
    """All weights but norms and biases."""
    tables = 1 if model.tied else 2
    return model.num_layers * layer_weights(model) + tables * model.vocab_size * model.model_width


def flops(subject: Subject) -> dict[str, float]:
    """Operations of a step on all devices by part; two per multiplication."""
    tokens, student, teacher = count_tokens(subject), subject.student, subject.teacher
    parts = {"teacher": _forward(teacher, tokens) if teacher else 0.0}
    forward = _forward(student, tokens)
    parts["student"] = 3 * forward
    remat = subject.config.policy.activation_checkpointing
    # A lower bound: with `dots`, cuDNN's attention, and no other, would be computed again, too.
    parts["recomputation"] = forward if remat == "full" else 0.0
    passes = 8 if subject.config.policy.generation.importance_clip else 6
    widths = passes * student.model_width + (2 * teacher.model_width if teacher else 0)
    parts["loss"] = float(tokens.responses * subject.vocab_size * widths)
    parts["generation"] = sum(_generation(subject)) if subject.samples else 0.0
    return parts


def _forward(model: ModelConfig, tokens: Tokens) -> float:
    body = 2 * model.num_layers * layer_weights(model) * tokens.total
    return body + _attention(model, tokens)


def _attention(model: ModelConfig, tokens: Tokens) -> float:
    return tokens.rows * _causal(model, tokens.length)


def _causal(model: ModelConfig, length: int) -> float:
    """Scores and weighted sums over the earlier half of all pairs of one row."""
    return 2.0 * model.num_layers * model.num_heads * model.head_width * length**2


def _generation(subject: Subject) -> tuple[float, float]:
    """Operations of reading the prompts and of all turns."""
    model, tokens = subject.student, count_tokens(subject)
    body, head = 2 * model.num_layers * layer_weights(model), 2 * model.model_width
    head *= subject.vocab_size
    reading = tokens.prompts * (tokens.prompt * body + _causal(model, tokens.prompt) + head)
    attention = _causal(model, tokens.length) - _causal(model, tokens.prompt)
    return reading, tokens.responses * (body + head) + tokens.rows * attention


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a step on one device: what it computes, moves and sends, at least.

    Attributes:
      flops: operations.
      moved: bytes to and from the device's memory.
      sent: bytes to other devices.
    """

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


def update_phase(subject: Subject, sent: float) -> Phase:
    """Teacher forward, student forward and backward, loss and optimizer."""
    counted, sizes = flops(subject), subject.sizes
    parts = (counted[name] for name in ("teacher", "student", "recomputation", "loss"))
    return Phase("update", sum(parts) / sizes.count, _update_traffic(subject), sent)


def _update_traffic(subject: Subject) -> float:
    config, tokens, sizes = subject.config, count_tokens(subject), subject.sizes
    compute = jnp.dtype(config.policy.precision).itemsize
    weights = num_weights(subject.student)
    passes = 2 if config.policy.activation_checkpointing == "none" else 3
    per_microbatch = passes * weights * compute / sizes.tensor
    per_microbatch += 2 * FLOAT32 * weights / (sizes.fsdp * sizes.tensor)  # gradients are added up
    if subject.teacher is not None:
        quantized = config.teacher.precision == "int8"
        size = 1 if quantized else jnp.dtype(config.teacher.dtype).itemsize
        per_microbatch += num_weights(subject.teacher) * size / sizes.tensor
    kept = 2 * subject.student.num_layers * subject.student.model_width * compute
    optimizer = OPTIMIZER_PASSES * FLOAT32 * weights / (sizes.fsdp * sizes.tensor)
    return tokens.microbatches * per_microbatch + tokens.total / sizes.parts * kept + optimizer


def generation_phase(
    subject: Subject, prompts: int, slots: int, reading_sent: float, turn_sent: float
) -> Phase:
    """A refit, reading the prompts, and one turn after the other until all rows are full.

    Args:
      subject: which samples; the sampler's weights are not split over fsdp.
      prompts: that every part reads at once.
      slots: of every part.
      reading_sent, turn_sent: bytes that every device sends in a reading and in a turn.
    """
    config, model, tokens = subject.config, subject.student, count_tokens(subject)
    sizes = subject.sampler
    compute = jnp.dtype(config.policy.precision).itemsize
    weights = num_weights(model) * compute / sizes.tensor
    rows = -(-tokens.rows // sizes.parts)
    waves = -(-rows // slots)
    turns = tokens.response * waves
    readings = -(-tokens.prompts // (sizes.parts * prompts))
    cached = (
        bytes_per_token(model, jnp.dtype(config.policy.precision), _int8(subject)) / sizes.tensor
    )
    read = rows * tokens.response * (tokens.prompt + tokens.response / 2) * cached
    refit = weights * (sizes.fsdp - 1) / sizes.fsdp
    operations = sum(_generation(subject)) / sizes.count
    sent = refit + readings * reading_sent + turns * turn_sent
    return Phase("generation", operations, (turns + readings) * weights + read, sent)


def _int8(subject: Subject) -> bool:
    return subject.config.policy.generation.cache_dtype == "int8"


# ------------------------------------------------------------- without a compiler: estimates


def estimated_sent(subject: Subject) -> float:
    """Bytes that a device sends in an update, as GSPMD usually partitions it."""
    config, tokens, sizes = subject.config, count_tokens(subject), subject.sizes
    compute = jnp.dtype(config.policy.precision).itemsize
    over_fsdp, over_tensor = _others(sizes.fsdp), _others(sizes.tensor)
    weights = num_weights(subject.student) / sizes.tensor
    gathered = 2 * weights * compute
    gradients = weights * FLOAT32 * over_fsdp
    gradients += 2 * weights * FLOAT32 * _others(sizes.data) / sizes.fsdp
    passes = 6 if config.policy.activation_checkpointing == "full" else 4
    summed = passes * subject.student.num_layers * subject.student.model_width * compute
    if subject.teacher is not None:
        size = jnp.dtype(config.teacher.dtype).itemsize
        gathered += num_weights(subject.teacher) / sizes.tensor * size
        summed += 2 * subject.teacher.num_layers * subject.teacher.model_width * size
    activations = 2 * over_tensor * summed * tokens.total / sizes.parts
    return tokens.microbatches * (gathered * over_fsdp + gradients) + activations


def estimated_forward_sent(subject: Subject, tokens: int) -> float:
    """Bytes that a device of the sampler sends while its part's `tokens` go through the layers."""
    model = subject.student
    compute = jnp.dtype(subject.config.policy.precision).itemsize
    summed = 2 * model.num_layers * model.model_width * compute
    return 2 * _others(subject.sampler.tensor) * summed * tokens


def estimated_temporaries(subject: Subject, platform: str) -> float:
    """Bytes that a device needs in an update beside weights, moments and batch.

    Gradients twice (a microbatch's, and their sum), what the backward pass keeps of every layer,
    and the larger of one layer at work and the two heads at work.
    """
    config, tokens, student = subject.config, count_tokens(subject), subject.student
    sizes, compute = subject.sizes, jnp.dtype(config.policy.precision).itemsize
    at_once = tokens.total / tokens.microbatches / sizes.parts
    shards = sizes.fsdp * sizes.tensor
    gradients = (2 if tokens.microbatches > 1 else 1) * FLOAT32 * num_weights(student) / shards
    whole = _layer_activations(student, sizes.tensor) * compute * at_once
    inputs = student.model_width * compute * at_once
    matrices = compute * at_once * _products(student, sizes.tensor)
    remat = config.policy.activation_checkpointing
    kept = {"none": whole, "dots": inputs + matrices, "full": inputs}[remat] * student.num_layers
    at_work = [2 * whole + _layer_copies(student, FLOAT32 + 2 * compute, sizes.tensor)]
    if platform == "gpu" and config.policy.sequence_packing.enabled:
        at_work[0] += _packed_attention(student, tokens.length, sizes.tensor)
    heads = FLOAT32 + compute
    tables = heads * student.vocab_size * student.model_width / sizes.tensor
    if subject.teacher is not None:
        size, teacher = jnp.dtype(config.teacher.dtype).itemsize, subject.teacher
        working = _layer_activations(teacher, sizes.tensor) * size * at_once
        at_work.append(working + _layer_copies(teacher, 2 * size, sizes.tensor))
        tables += size * teacher.vocab_size * teacher.model_width / sizes.tensor
    return gradients + kept + max(*at_work, tables)


def estimated_prefill_temporaries(subject: Subject, prompts: int, size: int) -> float:
    """What one layer makes of `prompts` of `size` tokens, their keys and values, and scores."""
    model, tensor = subject.student, subject.sampler.tensor
    dtype = jnp.dtype(subject.config.policy.precision)
    cached = bytes_per_token(model, dtype, _int8(subject))
    of_token = dtype.itemsize * _layer_activations(model, tensor) + cached / tensor
    return prompts * (size * of_token + FLOAT32 * model.vocab_size / tensor)


def estimated_decode_temporaries(subject: Subject, slots: int) -> float:
    """Scores of the next token."""
    return 2 * FLOAT32 * slots * subject.student.vocab_size / subject.sampler.tensor


def _packed_attention(model: ModelConfig, length: int, tensor: int) -> float:
    """What cuDNN's backward pass takes for one packed row; the factor was measured on an H100."""
    return 8 * model.num_heads * model.head_width / tensor * length * (MOST_SEGMENTS + 1)


def _layer_copies(model: ModelConfig, bytes_per_weight: int, tensor: int) -> float:
    """One layer's weights, gathered, with what belongs to each."""
    return bytes_per_weight * layer_weights(model) / tensor


def _products(model: ModelConfig, tensor: int) -> float:
    """Numbers per token that the matrix products of a layer result in."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_width
    return 2 * model.model_width + (heads + 2 * model.ffn_width) / tensor


def _layer_activations(model: ModelConfig, tensor: int) -> float:
    """Numbers per token that one layer makes; attention holds no scores."""
    return 2 * model.model_width + _products(model, tensor) + model.ffn_width / tensor


def _others(size: int) -> float:
    return (size - 1) / size
