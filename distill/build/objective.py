"""The objective of a config, and what tokens count in it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from distill.base.errors import UserError
from distill.batches.weighing import weigh
from distill.config import method
from distill.config.schema import Config, all_teachers
from distill.data.sequences import Sequences
from distill.losses.objective import Objective, make_objective


def build_objective(config: Config) -> Objective:
    teachers = all_teachers(config).values()
    return make_objective(
        config.distillation,
        importance_clip=config.policy.generation.importance_clip,
        top_k_teacher=any(each.backend == "vllm" for each in teachers),
        other_ids=any(each.alignment != "none" for each in teachers),
    )


def build_weighing(
    objective: method.Objective, vocab: dict[str, int]
) -> Callable[[Sequences], Sequences]:
    """`weigh` as the section asks for it; UserError for a token that the vocabulary lacks."""
    if unknown := [token for token in objective.skip_tokens if token not in vocab]:
        raise UserError(
            f"distillation.objective.skip_tokens names {unknown[0]!r}, which is no token of the "
            "student's tokenizer: write it as tokenizer.json does, such as <think>"
        )
    return functools.partial(
        weigh,
        horizon=objective.horizon,
        discount=objective.position_discount,
        skipped=[vocab[token] for token in objective.skip_tokens],
    )
