"""The teacher of a config: here on the mesh, behind servers, or none for hard labels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from distill.base.sharding import RULES, SPREAD_RULES, AnyMesh, check_host_memory
from distill.batches.rows import padded_rows
from distill.build.devices import make_put
from distill.build.models import abstract_model, build_model, frozen_options, head_only
from distill.config.schema import Config, own_teacher
from distill.data.prompts import Prompts
from distill.data.tokenizer import Vocabulary
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.models.model import Model
from distill.step import whole_params
from distill.teachers.base import OwnTeacher, Teacher
from distill.teachers.local import Texts, abstract_stored, load_teacher
from distill.teachers.server import ServerTeacher

# What of the train state a teacher is that is the student.
FROM_STATE: dict[str, Callable[[Any], Any]] = {
    "self": lambda state: state.params,
    "ema": lambda state: whole_params(state.average, state.frozen),
}


def build_teacher(
    config: Config,
    folder: Path | None,
    mesh: Mesh,
    vocabulary: Vocabulary,
    student: Callable[[], Model],
    compared_on: Prompts | None = None,
) -> Teacher:
    """The teacher, loaded from its folder if it is here, but not yet started.

    `compared_on`: text on which one in 8 bits is compared with itself in bfloat16; None: it is not.

    Raises:
      UserError: the platform cannot offload, or the folder is not as it should be.
    """
    section = config.teacher
    if not config.distillation.has_teacher:
        return Teacher()
    if section.backend == "vllm":
        return ServerTeacher(section.vllm, vocabulary, config.policy.max_total_sequence_length)
    if own := own_teacher(config):
        return OwnTeacher(student().graph, FROM_STATE[own])
    if section.offload != "none":
        check_host_memory(mesh, "teacher.offload")
    assert folder is not None  # hard labels and servers have none
    texts = None
    if compared_on is not None and section.precision == "int8":
        size = config.evaluation.batch_size
        prompts = compared_on.sequences(np.arange(size) % len(compared_on)).prompts()
        (rows,) = padded_rows(prompts, size, compared_on.prompt_width, compared_on.pad_id)
        texts = Texts(*map(make_put(mesh), (rows.tokens_bt, rows.lengths_b)))
    return load_teacher(
        functools.partial(build_model, folder, mesh, **teacher_options(config)),
        load_model_config(folder)[0],
        precision=section.precision,
        offload=section.offload,
        compared_on=texts,
        vocab_size=vocabulary.size,
    )


def abstract_teacher(config: Config, model_config: ModelConfig, mesh: AnyMesh) -> Model:
    """Shapes of a teacher on the mesh, where the train step takes it from."""
    model = abstract_model(model_config, "the teacher", mesh, **teacher_options(config))
    section = config.teacher
    if section.scores:
        return head_only(model)
    return abstract_stored(
        model, model_config, precision=section.precision, offload=section.offload
    )


def teacher_options(config: Config) -> dict[str, Any]:
    """Of `abstract_model`."""
    rules = SPREAD_RULES if config.teacher.split_over_data else RULES
    return frozen_options(config.policy, config.teacher.dtype) | dict(rules=rules)
