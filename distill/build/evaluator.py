"""What evaluates models on held-out prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distill.base.errors import UserError
from distill.build.environment import MakeDialogues
from distill.build.sampler import build_engine
from distill.config.schema import ACCURACY, Config, all_teachers
from distill.data.base import DatasetInterface
from distill.data.prompts import Prompts
from distill.data.tokenizer import Vocabulary
from distill.evaluation.evaluator import Evaluator
from distill.teachers.alignment import Alignment

# Evaluations of responses up to this length are short beside the compilation of their programs.
SHORT_RESPONSE = 128


def build_evaluator(
    config: Config,
    validation: DatasetInterface,
    prompts: Prompts,
    vocabulary: Vocabulary,
    alignments: Mapping[str, Alignment],
    *,
    put: Callable[[np.ndarray | jax.Array], jax.Array],
    batch_size: int,
    dialogues: MakeDialogues | None,
) -> Evaluator:
    """Asks the models for responses to `prompts`, those of `validation`.

    Raises:
      UserError: the best checkpoint is that of the highest accuracy, and nothing has an answer.
    """
    max_length = config.evaluation.max_length or config.distillation.generate_strategy.max_length

    def build(prompts: Prompts, vocabulary: Vocabulary, **of_teachers: Any) -> Evaluator:
        return Evaluator(
            validation,
            prompts,
            vocabulary,
            dataclasses.replace(config.evaluation, batch_size=batch_size),
            max_length=max_length,
            make_engine=functools.partial(
                build_engine,
                config.policy,
                vocabulary=vocabulary,
                few_programs=max_length <= SHORT_RESPONSE,
            ),
            put=put,
            dialogues=dialogues,
            **of_teachers,
        )

    teachers = all_teachers(config)
    by_teacher = dict(zip(teachers, prompts.by_teacher, strict=False))
    evaluator = build(
        prompts,
        vocabulary,
        teachers={name: each.weight for name, each in teachers.items()},
        shared={name: each.shared for name, each in alignments.items()},
        own={
            name: build(by_teacher[name].of_view(each.teacher.pad_id), each.teacher)
            for name, each in alignments.items()
        },
    )
    if config.checkpointing.best_metric == ACCURACY and not evaluator.num_graded:
        raise UserError(
            f"checkpointing.best_metric={ACCURACY} needs answers, and the validation data has "
            "none: set data.answer_column, or choose eval/student/forward_kl"
        )
    return evaluator
