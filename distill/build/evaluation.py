"""What examines models on the held-out prompts."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from distill.base.sharding import (
    batch_parts,
)
from distill.build.data import (
    Vocabulary,
    build_prompts,
)
from distill.build.devices import (
    make_put,
)
from distill.build.objective import build_objective
from distill.build.sampler import build_engine
from distill.config.schema import Config
from distill.data.base import DatasetInterface
from distill.data.prompts import Prompts
from distill.evaluation.evaluator import Evaluator
from distill.evaluation.recorder import MOST_ANSWERS, RolloutRecorder


def build_evaluator(
    config: Config, dataset: DatasetInterface, vocabulary: Vocabulary, mesh: Mesh
) -> Evaluator:
    strategy = config.distillation.generate_strategy
    return Evaluator(
        dataset,
        build_prompts(config, dataset, vocabulary.tokenizer),
        vocabulary.tokenizer,
        max_length=config.evaluation.max_length or strategy.max_length,
        make_engine=lambda graph: build_engine(config, graph, vocabulary),
        vocab_size=vocabulary.size,
        batch_size=config.evaluation.batch_size,
        put=make_put(mesh),
        answer_timeout=config.evaluation.answer_timeout,
        metrics=config.evaluation.metrics,
    )


def build_recorder(
    config: Config,
    workdir: Path,
    dataset: DatasetInterface,
    prompts: Prompts,
    vocabulary: Vocabulary,
    mesh: Mesh,
) -> RolloutRecorder:
    """Writes held-out answers token by token; as many at once as fit in the evaluation."""
    parts = batch_parts(mesh)
    return RolloutRecorder(
        workdir,
        dataset,
        prompts,
        vocabulary.tokenizer,
        objective=build_objective(config),
        vocab_size=vocabulary.size,
        batch_size=min(config.evaluation.batch_size, -(-MOST_ANSWERS // parts) * parts),
        put=make_put(mesh),
    )
