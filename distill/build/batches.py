"""The source of every step's batch, and the shapes of its microbatches."""

from __future__ import annotations

import functools

from jax.sharding import Mesh

from distill.batches.source import BatchSource
from distill.build.devices import (
    put_batch,
)
from distill.build.layout import build_layout
from distill.build.sampler import build_sampling_params
from distill.config.schema import Config
from distill.data.prompts import Prompts
from distill.rollout.base import RolloutBackend
from distill.teachers.server import ServerTeacher


def build_batches(
    config: Config,
    prompts: Prompts,
    iterator,
    backend: RolloutBackend,
    mesh: Mesh,
    remote_teacher: ServerTeacher | None,
) -> BatchSource:
    """The source of every step's batch; `iterator` stands where the run begins or goes on."""
    distillation = config.distillation
    params = build_sampling_params(config)
    # Without sampling, rows need no room beyond the longest response.
    width = params.max_length if distillation.lambda_ > 0 else prompts.response_width
    return BatchSource(
        iterator,
        backend,
        functools.partial(put_batch, mesh),
        score=None if remote_teacher is None else remote_teacher.score,
        params=params,
        num_generations=distillation.generate_strategy.num_generations,
        seed=config.seed,
        lambda_=distillation.lambda_,
        per_sample=distillation.mix == "sample",
        layout=build_layout(config, prompts.prompt_width + width, mesh),
        pad_id=prompts.pad_id,
    )
