"""The configuration schema: every key, its default, its unit and what it may be.

The two largest sections have files of their own, policy.py and method.py.
`default_config()` gives the ml_collections ConfigDict that `configs/*.py` start from;
`parse_config()` turns a ConfigDict into frozen dataclasses or raises one clear line.
This module imports no JAX, so that configs stay cheap to load."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from distill.config.keys import LONGEST, MOST_GB, MOST_ROWS, content, fixed, free, key, section
from distill.config.method import Distillation, Environment, OneTeacher, Reward, Teacher, Teachers
from distill.config.policy import PRECISIONS, Policy

WRITERS = ("tensorboard", "trackio", "wandb")
# What checkpoints are compared by, and whether more is better.
ACCURACY = "eval/student/accuracy"
BEST_METRICS = {
    ACCURACY: True,
    "eval/student/forward_kl": False,
    "eval/student/reverse_kl": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    name: str = content("", "dataset of held-out prompts; '' is data.name")
    path: str = content("", "its local file or folder; '' is data.path when the name is the same")
    split: str = content("validation", "its split")
    max_samples: int = content(512, "held-out prompts evaluated; 0: no evaluation", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    name: str = content(
        "arithmetic",
        "arithmetic, csv, gsm8k, hf, json, jsonl, math_cl, parquet, tfds, or one that a plugin "
        "registers",
    )
    path: str = content("", "local file, pattern or folder; for name=hf a hub id or ID@REVISION")
    split: str = content("train", "split to train on")
    max_samples: int | None = content(None, "first n examples only, for debugging", low=1)
    shuffle: bool = fixed(False, "reshuffle every epoch; False keeps the curriculum's order")
    holdout_fraction: float = content(
        0.02, "unique prompts held out as split 'validation'", low=0, high=0.5
    )
    max_bad_rows: float = free(
        0.01, "share of rows that are skipped if unusable; more are an error", low=0, high=1
    )
    subset: str = content(
        "", "configuration of a hub dataset, for hf; hinted, tools or distinct, for arithmetic"
    )
    prompt_column: str = content("prompt", "for files, hf and tfds; NAME.FIELD is inside a column")
    response_column: str = content(
        "response", "for files, hf and tfds; NAME.FIELD is inside a column"
    )
    answer_column: str = content("answer", "for files, hf and tfds; NAME.FIELD is inside a column")
    keep_truncated: bool = key(
        True, "train on responses marked as cut off, without an end token; False: leave them out"
    )
    system_prompt: str = content("", "system message of the chat template; '' is none")
    prompt_template: str = content("", "text with {problem}; '' is the dataset's own")
    chat_template: str = content(
        "", "'' is the student's, none for plain text, or the name of one of its several"
    )
    template_arguments: tuple[str, ...] = content(
        (), "NAME=VALUE, variables of the chat template such as enable_thinking=False"
    )
    special_tokens: str = content(
        "text", "what special tokens are that the data spells", choices=("text", "control")
    )
    validation: Validation = section(Validation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    batch_size: int = free(
        64, "responses whose divergences are computed at once", low=1, high=MOST_ROWS
    )
    max_length: int = key(0, "response tokens; 0: as in generate_strategy", low=0, high=LONGEST)
    grading: str = key(
        "auto",
        "how responses are graded: auto (by the dataset, else by the answer), math, exact, choice, "
        "or one that a plugin registers",
    )
    answer_timeout: float = key(5.0, "seconds per response for math-verify", low=0.1)
    metrics: tuple[str, ...] = key((), "metrics of the responses that a plugin registers")


_devices = functools.partial(free, low=-1, high=MOST_ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    data: int = _devices(-1, "devices over which batches are split; -1 takes the rest")
    fsdp: int = _devices(1, "devices over which batches and weights are split")
    tensor: int = _devices(1, "devices over which heads and vocabulary are split")
    context: int = _devices(
        1,
        "devices over which the positions of a row are split, and weights; must divide "
        "policy.max_total_sequence_length",
    )
    expert: int = _devices(
        1,
        "devices over which batches, experts and other weights are split; tokens go to their "
        "experts' devices",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    keep: int = free(2, "newest checkpoints kept", low=1, high=MOST_ROWS)
    save_minutes: float = free(
        0.0, "a checkpoint is also due this long after the last; 0: off", low=0
    )
    best_metric: str = free(
        "", "evaluation whose best checkpoint is kept too; '': none", choices=("", *BEST_METRICS)
    )
    on_torn: str = free(
        "stop",
        "newest checkpoint is damaged: stop, or set it aside for the previous",
        choices=("stop", "previous"),
    )
    allow_changes: tuple[str, ...] = free(
        (), "keys and contents that may differ from the checkpoint's, from here on"
    )
    export_format: str = free(
        "merged",
        "what a student with adapters is exported as: merged into its base, or peft's folder",
        choices=("merged", "peft"),
    )
    export_dtype: str = free("bfloat16", "dtype of the exported student", choices=PRECISIONS)
    export_shard_size: float = free(
        5.0, "GB per file of the exported student", low=1e-6, high=MOST_GB
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warn:
    """When a step is worth a line on the console; 0 switches a warning off."""

    loss_spike: float = free(5.0, "loss, in medians of its size in the last 50 steps", low=0)
    length_spike: float = free(
        2.0, "mean length of sampled responses, in medians of the last 50 steps", low=0
    )
    truncated: float = free(0.5, "share of sampled responses cut at the limit", low=0, high=1)
    truncated_rise: float = free(
        0.25, "rise of that share over the run's first 10 steps", low=0, high=1
    )
    repetition: float = free(0.5, "share of 4-grams that repeat within a response", low=0, high=1)
    low_entropy: float = free(
        0.0, "estimated entropy per sampled token, nats, warned of when below", low=0
    )
    every: int = free(50, "log lines between two warnings of one kind", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logger:
    writers: tuple[str, ...] = free(
        ("tensorboard",), "where numbers go beside metrics.jsonl: tensorboard, trackio, wandb"
    )
    project: str = free("distill", "project of trackio and wandb")
    step_metrics: tuple[str, ...] = free((), "metrics of every step that a plugin registers")
    progress_bar: bool = free(True, "show a progress bar")
    warn: Warn = section(Warn)


class PluginKeys(dict[str, Any]):
    """Keys `plugin.NAME` that a data source or a backend of the user's own declares."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = fixed(0, "seed of everything random", low=0)
    plugins: tuple[str, ...] = key(
        (), "modules that are imported first and register the user's own parts"
    )
    plugin: PluginKeys = dataclasses.field(default_factory=PluginKeys)
    preflight: bool = free(True, "check before the first step that everything agrees")
    compilation_cache: str = free(
        "default",
        "folder of compiled programs, which later runs load; 'default': in the user's cache folder "
        "or JAX_COMPILATION_CACHE_DIR; 'off': none",
    )
    distillation: Distillation = section(Distillation)
    reward: Reward = section(Reward)
    policy: Policy = section(Policy)
    teacher: Teacher = section(Teacher)
    teachers: Teachers = dataclasses.field(default_factory=Teachers)
    data: Data = section(Data)
    evaluation: Evaluation = section(Evaluation)
    environment: Environment = section(Environment)
    mesh: MeshSizes = section(MeshSizes)
    checkpointing: Checkpointing = section(Checkpointing)
    logger: Logger = section(Logger)


class SchemaKey(NamedTuple):
    """A key of the schema: its dotted name, its field, its type and the section that has it."""

    name: str
    field: dataclasses.Field
    kind: Any
    section: type


def schema_keys(section: Any = Config, prefix: str = "") -> Iterator[SchemaKey]:
    """All of them in their order; those of named teachers once, as `teachers.NAME`."""
    kinds = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from schema_keys(kind, f"{prefix}{field.name}.")
        elif kind is Teachers:
            yield from schema_keys(OneTeacher, f"{prefix}{field.name}.NAME.")
        elif kind is not PluginKeys:  # declared by nobody yet
            yield SchemaKey(prefix + field.name, field, kind, section)


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
