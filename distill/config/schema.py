"""The configuration schema: every key, its default, its unit and what it may be, in one place.

`default_config()` gives the ml_collections ConfigDict that `configs/*.py` start from;
`parse_config()` turns a ConfigDict into frozen dataclasses or raises one clear line.
This module imports no JAX, so that configs stay cheap to load."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

_MOST_ROWS, _LONGEST, _MOST_GB = 10**6, 10**7, 10**6  # beyond what anybody has
KNOWN_BACKENDS = ("jax", "vllm")
ENVIRONMENTS = ("python_tool", "self_check")
# Teachers that are the student: its weights, their moving average, or those that it started from.
IN_STATE = ("self", "ema")
OF_STUDENT = (*IN_STATE, "start")
WRITERS = ("tensorboard", "trackio", "wandb")
PRECISIONS = ("bfloat16", "float32")
ALL_LINEAR = "all-linear"
_WITHOUT_TEACHER = {"cross_entropy", "policy_gradient", "advantage"}  # built-in terms and weights
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
# What checkpoints are compared by, and whether more is better.
ACCURACY = "eval/student/accuracy"
BEST_METRICS = {
    ACCURACY: True,
    "eval/student/forward_kl": False,
    "eval/student/reverse_kl": False,
}


# What a key changes that differs from the checkpoint's, and so what becomes of the run.
FREE = "free"  # nothing in the result, up to rounding: it goes on
CONTENT = "content"  # where to find what is compared by its content: see `run.contents`
NAMED = "named"  # the rest of the run: it goes on if `checkpointing.allow_changes` names the key
FIXED = "fixed"  # what the run is: it is refused


def _key(default: Any, help: str, *, choices=None, low=None, high=None, changes=NAMED) -> Any:
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "changes": changes}
    return dataclasses.field(default=default, metadata=metadata)


_free, _from, _fixed = (functools.partial(_key, changes=each) for each in (FREE, CONTENT, FIXED))


def _section(cls: type) -> Any:
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateStrategy:
    max_length: int = _key(1024, "response tokens at most, EOS counted", low=1, high=_LONGEST)
    temperature: float = _key(1.0, "sampling temperature", low=1e-4)
    decoding_method: str = _key("sample", "token choice", choices=("greedy", "sample"))
    top_k: int = _key(0, "keep the k likeliest tokens; 0 is off", low=0)
    top_p: float = _key(1.0, "keep the smallest set with this probability; 1 is off", low=0, high=1)
    min_p: float = _key(0.0, "keep tokens above this share of the likeliest's", low=0, high=1)
    num_generations: int = _fixed(1, "responses sampled per prompt", low=1, high=_MOST_ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a token's loss is: a weighted sum; names may be those that a plugin registers."""

    divergence: float = _key(1.0, "weight of the divergence from the teacher, kl_type", low=0)
    cross_entropy: float = _key(0.0, "weight of -log q of the response's token", low=0)
    teacher_advantage: float = _key(
        0.0, "weight of the policy gradient with advantage log p - log q of the token", low=0
    )
    reward_advantage: float = _key(
        0.0, "weight of the policy gradient with the rewards' advantages", low=0
    )
    ratio_clip: float = _key(
        0.0, "PPO's clip of the policy gradient's ratio, such as 0.2; 0: off", low=0
    )
    divergence_clip: float = _key(
        0.0, "most that an entry of the vocabulary adds to a token's divergence; 0: off", low=0
    )
    entropy_threshold: float = _key(
        0.0, "nats; forward KL is added where the teacher's entropy is above; 0: off", low=0
    )
    target_start: float = _key(
        1.0, "teacher's share of the target's logits at first, growing to 1; 1: off", low=0, high=1
    )
    position_discount: float = _key(
        1.0, "token i of a response counts this to the power of i", low=1e-6, high=1
    )
    horizon: int = _key(0, "tokens of a response that count, from its first; 0: all", low=0)
    skip_tokens: tuple[str, ...] = _key((), "tokens that are not trained on, such as <think>")
    terms: tuple[str, ...] = _key(
        (), "added, NAME or NAME:COEFFICIENT: cross_entropy, policy_gradient or any divergence"
    )
    weights: tuple[str, ...] = _key((), "what a token's loss is multiplied by, such as advantage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    teacher_model_path: str = _from(
        "",
        "folder, hub id (ID@REVISION) or embedded:NAME; self, ema or start: the student itself, "
        "its moving average, or what it was",
    )
    lambda_: float = _key(1.0, "probability that a batch is student-generated", low=0, high=1)
    mix: str = _key(
        "batch",
        "toss lambda_ per batch or per sample; both: every prompt with both responses",
        choices=("batch", "sample", "both"),
    )
    kl_type: str = _key(
        "forward",
        "forward, reverse, mixed, jsd, skew_forward, skew_reverse, or one that a plugin registers",
    )
    kl_type_on_data: str = _key("", "divergence on the data's responses; '' is kl_type")
    mixed_kl_weight: float = _key(0.5, "weight of forward KL in mixed", low=0, high=1)
    jsd_beta: float = _key(0.5, "weight of the teacher in the JSD mixture", low=0, high=1)
    skew_alpha: float = _key(0.1, "share of the other model in skewed KLs", low=0, high=1)
    kl_temperature: float = _key(1.0, "divides both models' logits in the loss", low=1e-4)
    kl_temperature_squared: bool = _key(False, "multiply the loss by kl_temperature squared")
    hard_labels: bool = _key(False, "cross-entropy on the fixed data (SFT); needs no teacher")
    objective: Objective = _section(Objective)
    loss_implementation: str = _free(
        "auto",
        "linear-divergence implementation",
        choices=("auto", "reference", "chunked", "pallas"),
    )
    generate_strategy: GenerateStrategy = _section(GenerateStrategy)
    max_steps: int = _key(1000, "optimizer updates", low=1)
    eval_steps: int = _free(100, "updates between evaluations; 0: only first and last", low=0)
    save_steps: int = _free(100, "updates between checkpoints; 0: only the last", low=0)
    logging_steps: int = _free(10, "updates between log lines", low=1)
    max_skipped_steps: int = _free(
        10, "steps in a row whose loss or gradient may be NaN or infinite, and skipped", low=0
    )

    @property
    def has_teacher(self) -> bool:
        """Whether anything in the objective reads one."""
        objective = self.objective
        names = {*(text.partition(":")[0] for text in objective.terms), *objective.weights}
        reads = objective.divergence or objective.teacher_advantage or names - _WITHOUT_TEACHER
        return bool(reads) and not self.hard_labels

    @property
    def reads_advantages(self) -> bool:
        """Whether anything in the objective reads the tokens' column of that name."""
        objective = self.objective
        names = {*(text.partition(":")[0] for text in objective.terms), *objective.weights}
        return bool(objective.reward_advantage or names & {"policy_gradient", "advantage"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """What responses are worth; advantages are made of it in groups of num_generations."""

    function: str = _key(
        "",
        "accuracy (1 for a right response, by evaluation.grading), environment (the sum of its "
        "replies' rewards) or a plugin's; '': none",
    )
    standardize: bool = _key(
        False, "divide advantages by the standard deviation of their group's rewards (GRPO)"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: str = _fixed("adamw", "what makes steps of gradients", choices=OPTIMIZERS)
    learning_rate: float = _key(2e-5, "peak learning rate", low=0)
    schedule: str = _key("constant", "after warm-up", choices=("constant", "cosine", "linear"))
    warmup_steps: int = _key(10, "linear warm-up, in updates", low=0)
    beta1: float = _key(
        0.9, "decay of the first moment, sgd's momentum; adafactor has none", low=0, high=1
    )
    beta2: float = _key(
        0.999, "decay of the second moment (adamw, muon), or of lion's only one", low=0, high=1
    )
    eps: float = _key(1e-8, "epsilon: adamw, muon", low=0)
    weight_decay: float = _key(0.01, "decoupled decay of matrices (not norms or biases)", low=0)
    max_grad_norm: float = _key(1.0, "clip the global gradient norm; 0 is off", low=0)
    offload: str = _free("none", "where moments are between updates", choices=("none", "host"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colocated:
    enabled: bool = _free(True, "sampler and trainer share all devices; False: it has its own")
    sampler_devices: int = _free(
        0, "devices of a sampler with its own; 0: half of all", low=0, high=_MOST_ROWS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmServers:
    """vLLM servers and how long they are waited for."""

    urls: tuple[str, ...] = _free((), "servers that are running, such as http://127.0.0.1:8000")
    api_key_variable: str = _free("", "NAME of the environment variable with the servers' API key")
    request_timeout: float = _free(600.0, "seconds a server may take for one reply", low=0.1)
    retry_timeout: float = _free(
        300.0, "seconds a failing server is tried again, such as one that restarts", low=0
    )
    start_timeout: float = _free(600.0, "seconds a server may take until it is up", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmSampler(VllmServers):
    """Servers that sample the student's responses."""

    python: str = _free("", "interpreter with vLLM, to start one server here; '' uses urls")
    server_args: tuple[str, ...] = _free((), "more arguments for that server")
    weights_dir: str = _free("", "refits pass through it, servers read it; '': vllm in the workdir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmTeacher(VllmServers):
    """Servers that score tokens with the teacher."""

    top_k: int = _key(20, "likeliest tokens known per position; others are one bucket", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    backend: str = _key("jax", "what samples rollouts: jax (here), vllm, or a plugin's own")
    max_log_prob_gap: float = _free(
        0.1, "stop when sampler and trainer disagree by more (mean |nats| per token)", low=0
    )
    async_steps: int = _key(
        0, "updates by which rollouts may be stale; 1: sample during training", low=0, high=1
    )
    importance_clip: float = _key(
        0.0, "weigh tokens by new / sampler's probability, at most this; 0: off", low=0
    )
    num_slots: int = _free(
        0, "responses decoded at once; 0: what cache_memory holds", low=0, high=_MOST_ROWS
    )
    cache_memory: float = _free(
        4.0, "GB per device for keys and values, jax backend", low=0.001, high=_MOST_GB
    )
    cache_dtype: str = _key(
        "auto", "keys and values; auto: policy.precision", choices=("auto", "int8")
    )
    colocated: Colocated = _section(Colocated)
    vllm: VllmSampler = _section(VllmSampler)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequencePacking:
    """Several sequences in one row of max_total_sequence_length."""

    enabled: bool = _free(False, "fill rows with sequences behind each other")
    train_mb_tokens: int = _free(
        0,
        "tokens at once over the whole mesh; 0: train_micro_batch_size full rows",
        low=0,
        high=10**9,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicBatching:
    """One sequence in a row, but rows of three lengths: short ones many at a time."""

    enabled: bool = _free(False, "cut batches by tokens instead of rows")
    train_mb_tokens: int = _free(
        0,
        "tokens at once over the whole mesh; 0: train_micro_batch_size full rows",
        low=0,
        high=10**9,
    )
    sequence_length_round: int = _free(
        64, "rows have a multiple of this many tokens", low=1, high=_LONGEST
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Trains small adapters of a frozen student; `rank=0` trains all of its weights."""

    rank: int = _fixed(0, "columns of an adapter's factors; 0: no adapters", low=0, high=_LONGEST)
    alpha: float = _fixed(32.0, "an adapter's product is multiplied by alpha / rank", low=1e-6)
    targets: tuple[str, ...] = _fixed(
        (ALL_LINEAR,), "adapted matrices of the layers, such as q_proj; all-linear: every one"
    )
    base_dtype: str = _fixed(
        "auto",
        "dtype of the frozen weights; auto: policy.precision; int8: matrices in 8 bits (QLoRA)",
        choices=("auto", "int8"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    model_name: str = _from("", "folder, hub id (ID@REVISION) or embedded:NAME")
    max_total_sequence_length: int = _key(
        2048, "prompt and response tokens at most", low=2, high=_LONGEST
    )
    precision: str = _key(
        "bfloat16", "compute dtype; weights that are trained are float32", choices=PRECISIONS
    )
    train_global_batch_size: int = _fixed(
        64, "sequences per update, all hosts", low=1, high=_MOST_ROWS
    )
    train_micro_batch_size: int = _free(
        8, "sequences at once over the whole mesh", low=1, high=_MOST_ROWS
    )
    sequence_packing: SequencePacking = _section(SequencePacking)
    dynamic_batching: DynamicBatching = _section(DynamicBatching)
    activation_checkpointing: str = _free(
        "dots", "what the backward pass recomputes", choices=("none", "dots", "full")
    )
    lora: Lora = _section(Lora)
    optimizer: Optimizer = _section(Optimizer)
    generation: Generation = _section(Generation)

    @property
    def cut_by_tokens(self) -> bool:
        """Whether microbatches are so many tokens rather than train_micro_batch_size rows."""
        return self.sequence_packing.enabled or self.dynamic_batching.enabled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    backend: str = _key("local", "where the teacher runs", choices=("local", "vllm"))
    vllm: VllmTeacher = _section(VllmTeacher)
    precision: str = _key(
        "bfloat16",
        "dtype of weights and compute; int8: weights in 8 bits, compute in bfloat16",
        choices=(*PRECISIONS, "int8"),
    )
    offload: str = _free(
        "none",
        "weights in host memory: host: between uses; layers: streamed layer by layer when used",
        choices=("none", "host", "layers"),
    )
    split_over_data: bool = _free(False, "split weights over mesh.data too, not only mesh.fsdp")
    ema_decay: float = _fixed(
        0.0, "of teacher_model_path=ema, the share kept in each update, such as 0.99", low=0, high=1
    )
    scores: str = _free(
        "", "folder of python -m distill.generate --scores, in place of the teacher; '': none"
    )
    system_prompt: str = _from("", "system message that the teacher reads; '' is the student's")
    prompt_template: str = _from(
        "", "text with {problem} that it reads, with {response}, {answer}; '' is the student's"
    )
    template_arguments: tuple[str, ...] = _from(
        (), "NAME=VALUE, variables of its chat template beside data.template_arguments"
    )

    @property
    def dtype(self) -> str:
        """What the teacher computes in."""
        return "bfloat16" if self.precision == "int8" else self.precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneTeacher(Teacher):
    """One of several teachers: NAME is what metrics and results call it.

    They stand in place of `teacher` and `distillation.teacher_model_path`, whose keys they share.
    """

    model: str = _from("", "what distillation.teacher_model_path may be")
    prompts: tuple[str, ...] = _key(
        (), "COLUMN=VALUE, by which rows of the data it is asked about; several: any; (): all rows"
    )
    weight: float = _key(1.0, "what its tokens' losses are multiplied by", low=1e-6)

    @property
    def in_state(self) -> bool:
        """Whether it is a part of the train state."""
        return self.model in IN_STATE

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the data by which it is asked."""
        return tuple(rule.partition("=")[0] for rule in self.prompts)


class Teachers(dict[str, OneTeacher]):
    """Sections `teachers.NAME`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    name: str = _from("", "dataset of held-out prompts; '' is data.name")
    path: str = _from("", "its local file or folder; '' is data.path when the name is the same")
    split: str = _from("validation", "its split")
    max_samples: int = _from(512, "held-out prompts evaluated; 0: no evaluation", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    name: str = _from(
        "arithmetic",
        "arithmetic, csv, gsm8k, hf, json, jsonl, math_cl, parquet, tfds, or one that a plugin "
        "registers",
    )
    path: str = _from("", "local file, pattern or folder; for name=hf a hub id or ID@REVISION")
    split: str = _from("train", "split to train on")
    max_samples: int | None = _from(None, "first n examples only, for debugging", low=1)
    shuffle: bool = _fixed(False, "reshuffle every epoch; False keeps the curriculum's order")
    holdout_fraction: float = _from(
        0.02, "unique prompts held out as split 'validation'", low=0, high=0.5
    )
    max_bad_rows: float = _free(
        0.01, "share of rows that are skipped if unusable; more are an error", low=0, high=1
    )
    subset: str = _from(
        "", "configuration of a hub dataset, for hf; hinted or tools, for arithmetic"
    )
    prompt_column: str = _from("prompt", "for files, hf and tfds; NAME.FIELD is inside a column")
    response_column: str = _from(
        "response", "for files, hf and tfds; NAME.FIELD is inside a column"
    )
    answer_column: str = _from("answer", "for files, hf and tfds; NAME.FIELD is inside a column")
    keep_truncated: bool = _key(
        True, "train on responses marked as cut off, without an end token; False: leave them out"
    )
    system_prompt: str = _from("", "system message of the chat template; '' is none")
    prompt_template: str = _from("", "text with {problem}; '' is the dataset's own")
    chat_template: str = _from(
        "", "'' is the student's, none for plain text, or the name of one of its several"
    )
    template_arguments: tuple[str, ...] = _from(
        (), "NAME=VALUE, variables of the chat template such as enable_thinking=False"
    )
    special_tokens: str = _from(
        "text", "what special tokens are that the data spells", choices=("text", "control")
    )
    validation: Validation = _section(Validation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    batch_size: int = _free(
        64, "responses whose divergences are computed at once", low=1, high=_MOST_ROWS
    )
    max_length: int = _key(0, "response tokens; 0: as in generate_strategy", low=0, high=_LONGEST)
    grading: str = _key(
        "auto",
        "how responses are graded: auto (by the dataset, else by the answer), math, exact, choice, "
        "or one that a plugin registers",
    )
    answer_timeout: float = _key(5.0, "seconds per response for math-verify", low=0.1)
    metrics: tuple[str, ...] = _key((), "metrics of the responses that a plugin registers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """What replies to the student's turns; a rollout is then a dialogue."""

    name: str = _key(
        "",
        "python_tool, self_check, or one that a plugin registers; '' is none: a response is all",
    )
    max_turns: int = _key(8, "turns of the student in a dialogue", low=1)
    timeout: float = _key(30.0, "seconds that a reply may take", low=0.1)
    max_failures: float = _key(
        0.1, "share of dialogues whose environment may fail before the run stops", low=0, high=1
    )
    call: str = _key(
        r"<tool_call>(.*?)</tool_call>\s*$",
        "for python_tool: regular expression that finds the expression in a turn",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    data: int = _free(
        -1, "devices over which batches are split; -1 takes the rest", low=-1, high=_MOST_ROWS
    )
    fsdp: int = _free(
        1, "devices over which batches and weights are split", low=-1, high=_MOST_ROWS
    )
    tensor: int = _free(
        1, "devices over which heads and vocabulary are split", low=-1, high=_MOST_ROWS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    keep: int = _free(2, "newest checkpoints kept", low=1, high=_MOST_ROWS)
    save_minutes: float = _free(
        0.0, "a checkpoint is also due this long after the last; 0: off", low=0
    )
    best_metric: str = _free(
        "", "evaluation whose best checkpoint is kept too; '': none", choices=("", *BEST_METRICS)
    )
    on_torn: str = _free(
        "stop",
        "newest checkpoint is damaged: stop, or set it aside for the previous",
        choices=("stop", "previous"),
    )
    allow_changes: tuple[str, ...] = _free(
        (), "keys and contents that may differ from the checkpoint's, from here on"
    )
    export_format: str = _free(
        "merged",
        "what a student with adapters is exported as: merged into its base, or peft's folder",
        choices=("merged", "peft"),
    )
    export_dtype: str = _free("bfloat16", "dtype of the exported student", choices=PRECISIONS)
    export_shard_size: float = _free(
        5.0, "GB per file of the exported student", low=1e-6, high=_MOST_GB
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warn:
    """When a step is worth a line on the console; 0 switches a warning off."""

    loss_spike: float = _free(5.0, "loss, in medians of the last 50 steps", low=0)
    length_spike: float = _free(
        2.0, "mean length of sampled responses, in medians of the last 50 steps", low=0
    )
    truncated: float = _free(0.5, "share of sampled responses cut at the limit", low=0, high=1)
    truncated_rise: float = _free(
        0.25, "rise of that share over the run's first 10 steps", low=0, high=1
    )
    repetition: float = _free(0.5, "share of 4-grams that repeat within a response", low=0, high=1)
    low_entropy: float = _free(
        0.0, "estimated entropy per sampled token, nats, warned of when below", low=0
    )
    every: int = _free(50, "log lines between two warnings of one kind", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logger:
    writers: tuple[str, ...] = _free(
        ("tensorboard",), "where numbers go beside metrics.jsonl: tensorboard, trackio, wandb"
    )
    project: str = _free("distill", "project of trackio and wandb")
    step_metrics: tuple[str, ...] = _free((), "metrics of every step that a plugin registers")
    progress_bar: bool = _free(True, "show a progress bar")
    warn: Warn = _section(Warn)


class PluginKeys(dict[str, Any]):
    """Keys `plugin.NAME` that a data source or a backend of the user's own declares."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = _fixed(0, "seed of everything random", low=0)
    plugins: tuple[str, ...] = _key(
        (), "modules that are imported first and register the user's own parts"
    )
    plugin: PluginKeys = dataclasses.field(default_factory=PluginKeys)
    preflight: bool = _free(True, "check before the first step that everything agrees")
    compilation_cache: str = _free(
        "default",
        "folder of compiled programs, which later runs load; 'default': in the user's cache folder "
        "or JAX_COMPILATION_CACHE_DIR; 'off': none",
    )
    distillation: Distillation = _section(Distillation)
    reward: Reward = _section(Reward)
    policy: Policy = _section(Policy)
    teacher: Teacher = _section(Teacher)
    teachers: Teachers = dataclasses.field(default_factory=Teachers)
    data: Data = _section(Data)
    evaluation: Evaluation = _section(Evaluation)
    environment: Environment = _section(Environment)
    mesh: MeshSizes = _section(MeshSizes)
    checkpointing: Checkpointing = _section(Checkpointing)
    logger: Logger = _section(Logger)


def named_teachers(config: Config) -> dict[str, OneTeacher]:
    """By name, which a single one need not have: then it is ''. Those with rules come first."""
    if not config.teachers:
        model = config.distillation.teacher_model_path
        return {"": OneTeacher(**vars(config.teacher), model=model)}
    return dict(sorted(config.teachers.items(), key=lambda named: (not named[1].prompts, named[0])))


def all_teachers(config: Config) -> dict[str, OneTeacher]:
    """Those that the objective reads: all or none, as for hard labels."""
    return named_teachers(config) if config.distillation.has_teacher else {}


def teacher_key(name: str, key: str) -> str:
    """The config's key for a teacher's `key`."""
    if name:
        return f"teachers.{name}.{key}"
    return "distillation.teacher_model_path" if key == "model" else f"teacher.{key}"


def ema_decay(config: Config) -> float:
    """Of the student's moving average; 0 if no teacher is that."""
    return max((teacher.ema_decay for teacher in all_teachers(config).values()), default=0.0)


def schema_key(key: str) -> str:
    """The key as the schema has it, which knows no teacher's name."""
    return re.sub(r"^teachers\.[^.]+", "teachers.NAME", key)


def tokens_per_microbatch(policy: Policy) -> int:
    """Where batches are cut by tokens: how many are computed at once, over the whole mesh."""
    keys = policy.sequence_packing if policy.sequence_packing.enabled else policy.dynamic_batching
    rows = policy.train_micro_batch_size * policy.max_total_sequence_length
    return keys.train_mb_tokens or rows


def microbatch_values(policy: Policy, rows: int) -> dict[str, int]:
    """The key that says how much is computed at once, with its value for `rows` full rows."""
    for section in ("sequence_packing", "dynamic_batching"):
        keys = getattr(policy, section)
        if keys.enabled and keys.train_mb_tokens:
            tokens = rows * policy.max_total_sequence_length
            return {f"policy.{section}.train_mb_tokens": tokens}
    return {"policy.train_micro_batch_size": rows}


def rows_per_microbatch(policy: Policy) -> int:
    """Rows of full length that are computed at once, over the whole mesh."""
    if not policy.cut_by_tokens:
        return policy.train_micro_batch_size
    return max(tokens_per_microbatch(policy) // policy.max_total_sequence_length, 1)
