"""A teacher by its scores on disk, and what these must be of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from distill.base.files import local_path
from distill.build.models import build_head
from distill.build.teachers import teacher_options
from distill.config.schema import Config
from distill.data.prompts import Prompts
from distill.data.scores import Scores
from distill.models.checkpoints.fingerprint import fingerprint
from distill.teachers.cached import CachedTeacher


def build_cached_teacher(
    config: Config, folder: Path | None, mesh: Mesh, prompts: Prompts
) -> CachedTeacher:
    """The teacher of `teacher.scores`; with its output head, where it isn't behind servers.

    Raises:
      UserError: the scores are not there, damaged, or of another teacher or other data.
    """
    lengths_r = [len(tokens) for tokens in prompts.response_tokens or []]
    identity = identify_scores(config, folder, prompts)
    scores = Scores(local_path(config.teacher.scores), identity, lengths_r)
    head = None
    if config.teacher.backend == "local":
        assert folder is not None  # only servers have none
        head = build_head(folder, mesh, **teacher_options(config))
    return CachedTeacher(scores, prompts.rows, head)


def identify_scores(config: Config, folder: Path | None, prompts: Prompts) -> dict[str, Any]:
    """What scores depend on, by what a message would call it."""
    teacher = config.teacher
    by_kind: dict[str, Any] = {"teacher": config.distillation.teacher_model_path or "server"}
    if teacher.backend == "local":
        assert folder is not None
        by_kind = {"teacher": fingerprint(folder), "teacher.precision": teacher.precision}
    else:
        by_kind["teacher.vllm.top_k"] = teacher.vllm.top_k
    # The view's prompts by themselves: else nobody would know whose prompts are others.
    view = dataclasses.replace(
        prompts, rows=np.zeros(0), prompt_tokens=prompts.view_tokens or [], response_tokens=None
    )
    data, view = (dataclasses.replace(each, view_tokens=None) for each in (prompts, view))
    return by_kind | {"data": data.digest()[:12], "view": view.digest()[:12]}
