"""A teacher by its scores on disk, and what these must be of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from distill.base.files import local_path
from distill.build.models import build_head
from distill.config.method import OneTeacher
from distill.data.prompts import Prompts
from distill.data.scores import Scores
from distill.models.checkpoints.fingerprint import fingerprint
from distill.teachers.cached import CachedTeacher


def build_cached_teacher(
    section: OneTeacher, folder: Path | None, mesh: Mesh, prompts: Prompts, options: dict[str, Any]
) -> CachedTeacher:
    """The teacher of a key `scores`; with its output head, where it isn't behind servers.

    `prompts` are those that it is asked about, and `options` those of `build_head`.

    Raises:
      UserError: the scores are not there, damaged, or of another teacher or other data.
    """
    lengths_r = [len(tokens) for tokens in prompts.response_tokens or []]
    identity = identify_scores(section, folder, prompts)
    scores = Scores(local_path(section.scores), identity, lengths_r)
    head = None
    if section.backend == "local":
        assert folder is not None  # only servers have none
        head = build_head(folder, mesh, **options)
    return CachedTeacher(scores, prompts.rows, head)


def identify_scores(teacher: OneTeacher, folder: Path | None, prompts: Prompts) -> dict[str, Any]:
    """What scores depend on, by what a message would call it."""
    by_kind: dict[str, Any] = {"teacher": teacher.model or "server"}
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
