"""The objective of a config."""

from __future__ import annotations

from distill.config.schema import Config
from distill.losses.objective import Objective, make_objective


def build_objective(config: Config) -> Objective:
    distillation = config.distillation
    implementation = distillation.loss_implementation
    return make_objective(
        distillation.kl_type,
        mixed_kl_weight=distillation.mixed_kl_weight,
        jsd_beta=distillation.jsd_beta,
        skew_alpha=distillation.skew_alpha,
        temperature=distillation.kl_temperature,
        temperature_squared=distillation.kl_temperature_squared,
        hard_labels=distillation.hard_labels,
        terms=distillation.objective.terms,
        weights=distillation.objective.weights,
        importance_clip=config.policy.generation.importance_clip,
        top_k_teacher=config.teacher.backend == "vllm",
        implementation=None if implementation == "auto" else implementation,
    )
