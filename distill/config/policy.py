"""The section `policy`: the student, and how it is trained and sampled from."""

from __future__ import annotations

import dataclasses
import functools

from distill.config.keys import LONGEST, MOST_GB, MOST_ROWS, content, fixed, free, key, section

KNOWN_BACKENDS = ("jax", "vllm")
PRECISIONS = ("bfloat16", "float32")
OWN_LAYOUT = "policy.generation"  # has the sizes of the sampler's mesh
ALL_LINEAR = "all-linear"
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: str = fixed("adamw", "what makes steps of gradients", choices=OPTIMIZERS)
    learning_rate: float = key(2e-5, "peak learning rate", low=0)
    schedule: str = key("constant", "after warm-up", choices=("constant", "cosine", "linear"))
    warmup_steps: int = key(10, "linear warm-up, in updates", low=0)
    beta1: float = key(
        0.9, "decay of the first moment, sgd's momentum; adafactor has none", low=0, high=1
    )
    beta2: float = key(
        0.999, "decay of the second moment (adamw, muon), or of lion's only one", low=0, high=1
    )
    eps: float = key(1e-8, "epsilon: adamw, muon", low=0)
    weight_decay: float = key(0.01, "decoupled decay of matrices (not norms or biases)", low=0)
    max_grad_norm: float = key(1.0, "clip the global gradient norm; 0 is off", low=0)
    offload: str = free("none", "where moments are between updates", choices=("none", "host"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colocated:
    enabled: bool = free(True, "sampler and trainer share all devices; False: it has its own")
    sampler_devices: int = free(
        0, "devices of a sampler with its own; 0: half of all", low=0, high=MOST_ROWS
    )
    whole_processes: bool = free(
        False, "they are all those of the last processes, which only sample"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmServers:
    """vLLM servers and how long they are waited for."""

    urls: tuple[str, ...] = free((), "servers that are running, such as http://127.0.0.1:8000")
    api_key_variable: str = free("", "NAME of the environment variable with the servers' API key")
    request_timeout: float = free(600.0, "seconds a server may take for one reply", low=0.1)
    retry_timeout: float = free(
        300.0, "seconds a failing server is tried again, such as one that restarts", low=0
    )
    start_timeout: float = free(600.0, "seconds a server may take until it is up", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmSampler(VllmServers):
    """Servers that sample the student's responses."""

    python: str = free("", "interpreter with vLLM, to start one server here; '' uses urls")
    server_args: tuple[str, ...] = free((), "more arguments for that server")
    weights_dir: str = free("", "refits pass through it, servers read it; '': vllm in the workdir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmTeacher(VllmServers):
    """Servers that score tokens with the teacher."""

    top_k: int = key(20, "likeliest tokens known per position; others are one bucket", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    backend: str = key("jax", "what samples rollouts: jax (here), vllm, or a plugin's own")
    max_log_prob_gap: float = free(
        0.1, "stop when sampler and trainer disagree by more (mean |nats| per token)", low=0
    )
    async_steps: int = key(
        0,
        "updates by which rollouts may be stale; from 1 on: sample during training",
        low=0,
        high=8,
    )
    importance_clip: float = key(
        0.0, "weigh tokens by new / sampler's probability, at most this; 0: off", low=0
    )
    num_slots: int = free(
        0, "responses decoded at once; 0: what cache_memory holds", low=0, high=MOST_ROWS
    )
    cache_memory: float = free(
        4.0, "GB per device for keys and values, jax backend", low=0.001, high=MOST_GB
    )
    cache_dtype: str = key(
        "auto", "keys and values; auto: policy.precision", choices=("auto", "int8")
    )
    precision: str = key(
        "auto",
        "weights; auto: policy.precision; int8: matrices of layers",
        choices=("auto", "int8"),
    )
    tensor: int = free(
        0,
        "devices that the sampler splits weights over, jax backend; 0: mesh.tensor",
        low=0,
        high=MOST_ROWS,
    )
    width: int = free(
        1, "by how much more it splits MLPs, as where there are few kv heads", low=1, high=MOST_ROWS
    )
    colocated: Colocated = section(Colocated)
    vllm: VllmSampler = section(VllmSampler)

    @property
    def has_own_layout(self) -> bool:
        """Whether the sampler splits weights in another way than the trainer."""
        return self.tensor > 0 or self.width > 1

    @property
    def num_held(self) -> int:
        """Copies of the student's weights that a sampler holds: one for each batch under way."""
        return max(1, self.async_steps)


_tokens_at_once = functools.partial(
    free,
    0,
    "tokens at once over the whole mesh; 0: train_micro_batch_size full rows",
    low=0,
    high=10**9,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequencePacking:
    """Several sequences in one row of max_total_sequence_length."""

    enabled: bool = free(False, "fill rows with sequences behind each other")
    train_mb_tokens: int = _tokens_at_once()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicBatching:
    """One sequence in a row, but rows of three lengths: short ones many at a time."""

    enabled: bool = free(False, "cut batches by tokens instead of rows")
    train_mb_tokens: int = _tokens_at_once()
    sequence_length_round: int = free(
        64, "rows have a multiple of this many tokens", low=1, high=LONGEST
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Trains small adapters of a frozen student; `rank=0` trains all of its weights."""

    rank: int = fixed(0, "columns of an adapter's factors; 0: no adapters", low=0, high=LONGEST)
    alpha: float = fixed(32.0, "an adapter's product is multiplied by alpha / rank", low=1e-6)
    targets: tuple[str, ...] = fixed(
        (ALL_LINEAR,), "adapted matrices of the layers, such as q_proj; all-linear: every one"
    )
    base_dtype: str = fixed(
        "auto",
        "dtype of the frozen weights; auto: policy.precision; int8: matrices in 8 bits (QLoRA)",
        choices=("auto", "int8"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    model_name: str = content("", "folder, hub id (ID@REVISION) or embedded:NAME")
    max_total_sequence_length: int = key(
        2048, "prompt and response tokens at most", low=2, high=LONGEST
    )
    precision: str = key(
        "bfloat16", "compute dtype; weights that are trained are float32", choices=PRECISIONS
    )
    train_global_batch_size: int = fixed(
        64, "sequences per update, all hosts", low=1, high=MOST_ROWS
    )
    train_micro_batch_size: int = free(
        8, "sequences at once over the whole mesh", low=1, high=MOST_ROWS
    )
    sequence_packing: SequencePacking = section(SequencePacking)
    dynamic_batching: DynamicBatching = section(DynamicBatching)
    activation_checkpointing: str = free(
        "dots", "what the backward pass recomputes", choices=("none", "dots", "full")
    )
    router_aux_loss: float = key(
        0.0, "weight of the loss that evens out a mixture's routing; 0: there is none", low=0
    )
    router_replay: str = key(
        "off",
        "experts that the sampler picked: unknown, compared with the trainer's, or used by it",
        choices=("off", "compare", "replay"),
    )
    lora: Lora = section(Lora)
    optimizer: Optimizer = section(Optimizer)
    generation: Generation = section(Generation)

    @property
    def records_routes(self) -> bool:
        """Whether the sampler says which experts it picked."""
        return self.router_replay != "off"

    @property
    def cut_by_tokens(self) -> bool:
        """Whether microbatches are so many tokens rather than train_micro_batch_size rows."""
        return self.sequence_packing.enabled or self.dynamic_batching.enabled


def tokens_per_microbatch(policy: Policy) -> int:
    """Where batches are cut by tokens: how many are computed at once, over the whole mesh."""
    keys = policy.sequence_packing if policy.sequence_packing.enabled else policy.dynamic_batching
    rows = policy.train_micro_batch_size * policy.max_total_sequence_length
    return keys.train_mb_tokens or rows


def microbatch_values(policy: Policy, rows: int) -> dict[str, int]:
    """The key that says how much is computed at once, with its value for `rows` full rows."""
    for name in ("sequence_packing", "dynamic_batching"):
        keys = getattr(policy, name)
        if keys.enabled and keys.train_mb_tokens:
            tokens = rows * policy.max_total_sequence_length
            return {f"policy.{name}.train_mb_tokens": tokens}
    return {"policy.train_micro_batch_size": rows}


def rows_per_microbatch(policy: Policy) -> int:
    """Rows of full length that are computed at once, over the whole mesh."""
    if not policy.cut_by_tokens:
        return policy.train_micro_batch_size
    return max(tokens_per_microbatch(policy) // policy.max_total_sequence_length, 1)
