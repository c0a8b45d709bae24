"""Objectives by the names of their keys, for benchmarks and tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from distill.config import method
from distill.losses.objective import Objective, make_objective


def objective_of(
    kl_type: str = "forward",
    *,
    importance_clip: float = 0.0,
    own_importance_clip: float = 0.0,
    top_k_teacher: bool = False,
    other_ids: bool = False,
    chunk: int | None = None,
    **keys: Any,
) -> Objective:
    """`make_objective`, with keys of `distillation` and of its `objective`.

    `importance_clip` is that of all terms, the own one of the policy gradient alone.
    """
    names = {field.name for field in dataclasses.fields(method.Objective)}
    parts = {name: keys.pop(name) for name in names & keys.keys()}
    own = method.Objective(importance_clip=own_importance_clip, **parts)
    return make_objective(
        method.Distillation(kl_type=kl_type, objective=own, **keys),
        importance_clip=importance_clip,
        top_k_teacher=top_k_teacher,
        other_ids=other_ids,
        chunk=chunk,
    )
