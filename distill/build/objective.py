"""The objective of a config."""

from __future__ import annotations

from distill.config.schema import Config, all_teachers
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
