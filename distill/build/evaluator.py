"""What evaluates models on held-out prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from distill.base.errors import UserError
from distill.base.sharding import batch_parts, round_up
from distill.build.devices import make_put
from distill.build.environment import MakeDialogues
from distill.build.sampler import build_engine
from distill.config.schema import ACCURACY, Config, all_teachers
from distill.data.base import DatasetInterface
from distill.data.prompts import Prompts
from distill.data.tokenizer import Vocabulary
from distill.evaluation.evaluator import Evaluator
from distill.evaluation.token_values import TokenReader
from distill.kernels.linear_divergence import SharedIds
from distill.losses.objective import Objective
from distill.sampling.schedule import SHORT_RESPONSE
from distill.teachers.alignment import Alignment


def build_evaluator(
    config: Config,
    validation: DatasetInterface,
    prompts: Prompts,
    vocabulary: Vocabulary,
    alignments: Mapping[str, Alignment],
    *,
    objective: Objective,
    mesh: Mesh,
    dialogues: MakeDialogues | None,
) -> Evaluator:
    """Asks the models for responses to `prompts`, those of `validation`.

    Raises:
      UserError: the best checkpoint is that of the highest accuracy, and nothing has an answer.
    """
    max_length = config.evaluation.max_length or config.distillation.generate_strategy.max_length

    batch_size = rows_at_once(len(prompts), config.evaluation.batch_size, batch_parts(mesh))

    def build(
        prompts: Prompts, vocabulary: Vocabulary, shared: Mapping[str, SharedIds], **rest: Any
    ) -> Evaluator:
        return Evaluator(
            validation,
            prompts,
            vocabulary,
            config.evaluation,
            max_length=max_length,
            make_engine=functools.partial(
                build_engine,
                config.policy,
                vocabulary=vocabulary,
                few_programs=max_length <= SHORT_RESPONSE,
            ),
            read=TokenReader(
                objective,
                vocab_size=vocabulary.size,
                batch_size=batch_size,
                put=make_put(mesh),
                shared=shared,
            ),
            dialogues=dialogues,
            **rest,
        )

    teachers = all_teachers(config)
    by_teacher = dict(zip(teachers, prompts.by_teacher, strict=False))
    evaluator = build(
        prompts,
        vocabulary,
        {name: each.shared for name, each in alignments.items()},
        teachers={name: each.weight for name, each in teachers.items()},
        own={
            name: build(by_teacher[name].of_view(each.teacher.pad_id), each.teacher, {})
            for name, each in alignments.items()
        },
    )
    if config.checkpointing.best_metric == ACCURACY and not evaluator.num_graded:
        raise UserError(
            f"checkpointing.best_metric={ACCURACY} needs answers, and the validation data has "
            "none: set data.answer_column, or choose eval/student/forward_kl"
        )
    return evaluator


def rows_at_once(count: int, most: int, parts: int) -> int:
    """Rows of equal batches that hold `count`, so that few rows are no whole batch."""
    return round_up(-(-count // -(-count // most)), parts)
