"""Which parts of an objective do not go together, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distill.base.errors import UserError
from distill.config.method import Distillation, OneTeacher
from distill.config.policy import KNOWN_BACKENDS
from distill.config.schema import Config, all_teachers, named_teachers, teacher_key


def check_objective(config: Config) -> None:
    """Raises UserError, one line, for what would estimate nothing, or has no lower bound."""
    _check_advantages(config)
    _check_targets(config.distillation)
    _check_references(config.distillation, named_teachers(config))


def _check_advantages(config: Config) -> None:
    """Refuses combinations whose expected gradient is zero, or not that of what they estimate."""
    distillation, generation = config.distillation, config.policy.generation
    objective, strategy = distillation.objective, distillation.generate_strategy
    function, reads = config.reward.function, objective.reads_advantages
    key = "distillation.objective"
    if reads and not function and generation.backend in KNOWN_BACKENDS:
        raise UserError(
            f"{key} reads the tokens' advantages, but nothing makes any: set reward.function, or "
            f"choose a plugin's backend that computes them (policy.generation.backend="
            f"{generation.backend} does not)"
        )
    if reads and function and strategy.num_generations == 1:
        raise UserError(
            f"reward.function={function} with distillation.generate_strategy.num_generations=1: a "
            "reward less the mean of its group is always 0 in a group of one; sample 2 or more"
        )
    estimates = objective.reward_advantage or objective.teacher_advantage
    spans = [n for n, each in all_teachers(config).items() if each.alignment == "spans"]
    if distillation.lambda_ == 0 and spans:
        raise UserError(
            f"{teacher_key(spans[0], 'alignment')}=spans is about responses that the student "
            "samples, and distillation.lambda_=0 samples none: set it to dense, or raise lambda_"
        )
    if distillation.lambda_ == 0 and (estimates or function):
        raise UserError(
            "reward.function and the advantages of distillation.objective are about responses that "
            "the student samples, and distillation.lambda_=0 samples none: raise it"
        )
    _check_ratios(config, bool(estimates or spans))
    if not (estimates or spans):
        return
    named = f"{key}.reward_advantage and teacher_advantage"
    if not estimates:
        named = f"{teacher_key(spans[0], 'alignment')}=spans"
    # A sampled token stands for the distribution that is differentiated only if it came from it.
    for name, value, needed in (
        ("kl_temperature", distillation.kl_temperature, 1.0),
        ("generate_strategy.temperature", strategy.temperature, 1.0),
        ("generate_strategy.decoding_method", strategy.decoding_method, "sample"),
        ("generate_strategy.top_k", strategy.top_k, 0),
        ("generate_strategy.top_p", strategy.top_p, 1.0),
        ("generate_strategy.min_p", strategy.min_p, 0.0),
    ):
        if value != needed:
            raise UserError(
                f"distillation.{name}={value} biases the policy gradient of {named}, since tokens "
                f"are not sampled from the distribution that is trained: set it to {needed}"
            )
    if generation.async_steps and not (generation.importance_clip or objective.importance_clip):
        raise UserError(
            f"policy.generation.async_steps={generation.async_steps} biases the policy gradient, "
            f"since older weights sampled the tokens: set {key}.importance_clip, such as 2, or "
            "async_steps=0"
        )
    if "advantage" in objective.weights:
        raise UserError(
            f"{key}.weights=advantage multiplies every term, so that a response worse than its "
            "group would be pushed away from the teacher: reward_advantage has its own, leave it "
            "out"
        )


def _check_ratios(config: Config, estimates: bool) -> None:
    objective, of_all = config.distillation.objective, config.policy.generation.importance_clip
    key, clip = "distillation.objective", objective.importance_clip
    if clip and (of_all or clip < 1 or not estimates):
        raise UserError(
            f"{key}.importance_clip={clip} weighs the tokens of the policy gradient alone: give "
            f"{key}.reward_advantage or teacher_advantage a weight, let it be at least 1, and "
            "leave policy.generation.importance_clip, which weighs all terms, at 0"
        )
    if objective.ratio_clip and not (estimates and max(clip, of_all) >= 1 + objective.ratio_clip):
        raise UserError(
            f"{key}.ratio_clip={objective.ratio_clip} clips the ratio of a policy gradient: give "
            f"{key}.reward_advantage or teacher_advantage a weight, and {key}.importance_clip at "
            f"least {1 + objective.ratio_clip:g}, which multiplies by the ratio"
        )


def _check_targets(distillation: Distillation) -> None:
    objective, key = distillation.objective, "distillation.objective"
    if objective.target_pace and objective.target_start == 1:
        raise UserError(
            f"{key}.target_pace={objective.target_pace} is of a target that moves from the student "
            f"to the teacher: set {key}.target_start, such as 0.4"
        )
    reads = objective.divergence or objective.teacher_advantage
    if objective.proximal_share < 1 and (not reads or distillation.hard_labels):
        raise UserError(
            f"{key}.proximal_share={objective.proximal_share} mixes the student into the teacher: "
            f"give {key}.divergence or teacher_advantage a weight, or set it to 1"
        )


def _check_references(distillation: Distillation, teachers: Mapping[str, OneTeacher]) -> None:
    """Only of the reverse KL is a sum with negative weights a divergence from one target.

    sum_k w_k KL(q || p_k) is KL(q || prod_k p_k^w_k / Z) - log Z where the weights sum up to 1:
    ExOPD (arXiv:2602.12125) is two teachers with weights 1.25 and -0.25. The forward KL times a
    negative weight has no lower bound.
    """
    objective, key = distillation.objective, "distillation.objective"
    kl_type = distillation.kl_type if objective.divergence else "reverse"
    for name, teacher in teachers.items():
        if not math.isfinite(teacher.weight) or teacher.weight == 0:
            raise UserError(f"teachers.{name}.weight={teacher.weight} must be a number but 0")
        if teacher.weight > 0:
            continue
        for each, value, needed in (
            ("distillation.kl_type", kl_type, ("reverse",)),
            ("distillation.kl_type_on_data", distillation.kl_type_on_data, ("", "reverse")),
            ("distillation.hard_labels", distillation.hard_labels, (False,)),
            (f"teachers.{name}.alignment", teacher.alignment, ("none",)),
            (f"{key}.divergence_clip", objective.divergence_clip, (0.0,)),
            (f"{key}.ratio_clip", objective.ratio_clip, (0.0,)),
            (f"{key}.entropy_threshold", objective.entropy_threshold, (0.0,)),
            (f"{key}.target_start", objective.target_start, (1.0,)),
            (f"{key}.proximal_share", objective.proximal_share, (1.0,)),
            (f"{key}.terms", objective.terms, ((),)),
        ):
            if value not in needed:
                raise UserError(
                    f"teachers.{name}.weight={teacher.weight} moves the student away from a "
                    f"teacher, which is sound for the reverse KL alone: {each}={value} does not go "
                    f"with it; set it to {needed[-1]!r}"
                )
