"""The objective of a config, and what tokens count in it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from distill.base.errors import UserError
from distill.batches.weighing import weigh
from distill.config import method
from distill.config.schema import Config, all_teachers
from distill.data.sequences import Sequences
from distill.losses.advantages import Advantage
from distill.losses.interpolation import Target
from distill.losses.objective import Objective, make_objective


def build_objective(config: Config) -> Objective:
    distillation, parts = config.distillation, config.distillation.objective
    implementation = distillation.loss_implementation
    return make_objective(
        distillation.kl_type,
        mixed_kl_weight=distillation.mixed_kl_weight,
        jsd_beta=distillation.jsd_beta,
        skew_alpha=distillation.skew_alpha,
        temperature=distillation.kl_temperature,
        temperature_squared=distillation.kl_temperature_squared,
        hard_labels=distillation.hard_labels,
        divergence=parts.divergence,
        kl_type_on_data=distillation.kl_type_on_data,
        divergence_clip=parts.divergence_clip,
        entropy_threshold=parts.entropy_threshold,
        proximal_share=parts.proximal_share,
        target=Target(parts.target_start, distillation.max_steps, parts.target_pace),
        cross_entropy=parts.cross_entropy,
        advantage=Advantage(
            parts.reward_advantage,
            parts.teacher_advantage,
            parts.ratio_clip,
            parts.importance_clip,
            parts.proximal_share,
        ),
        has_teacher=distillation.has_teacher,
        terms=parts.terms,
        weights=parts.weights,
        importance_clip=config.policy.generation.importance_clip,
        top_k_teacher=any(each.backend == "vllm" for each in all_teachers(config).values()),
        other_ids=any(each.alignment != "none" for each in all_teachers(config).values()),
        implementation=None if implementation == "auto" else implementation,
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
