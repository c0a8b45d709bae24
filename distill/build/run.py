"""What only a training run has: its batches, its log and its checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from distill.base import processes
from distill.batches.source import BatchSource
from distill.build.devices import put_batch
from distill.build.layout import build_layout
from distill.build.optimizer import build_schedule
from distill.build.sampler import build_sampling_params
from distill.build.session import Session
from distill.config.parse import to_flat_dict
from distill.config.schema import Config
from distill.data.pipeline import make_train_iterator
from distill.run.checkpoint import Checkpoints, SaveSchedule
from distill.run.health import Health
from distill.run.progress import Progress
from distill.run.writers import MetricsWriter
from distill.run.writers.json_lines import JsonLines
from distill.run.writers.tensorboard import TensorBoard
from distill.run.writers.weights_and_biases import WeightsAndBiases


def build_batches(session: Session, position: Any = None) -> BatchSource:
    """The source of every step's batch; `position` is where the data go on, None the beginning."""
    config, prompts = session.config, session.prompts
    distillation, policy = config.distillation, config.policy
    params = build_sampling_params(distillation.generate_strategy)
    repeats = distillation.generate_strategy.num_generations
    iterator = make_train_iterator(
        prompts,
        batch_size=policy.train_global_batch_size // repeats,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    if position is not None:
        iterator.set_state(position)
    # Without sampling, rows need no room beyond the longest response.
    width = params.max_length if session.samples else prompts.response_width
    source = BatchSource(
        iterator,
        session.backend,
        functools.partial(put_batch, session.mesh),
        score=session.teacher.score,
        params=params,
        num_generations=repeats,
        seed=config.seed,
        lambda_=distillation.lambda_,
        per_sample=distillation.mix == "sample",
        layout=build_layout(policy, prompts.prompt_width + width, session.mesh),
        pad_id=prompts.pad_id,
    )
    session.cleanup.callback(source.close)
    return source


def build_checkpoints(config: Config, workdir: Path) -> Checkpoints:
    checkpointing = config.checkpointing
    return Checkpoints(
        workdir / "checkpoints", keep=checkpointing.keep, best_metric=checkpointing.best_metric
    )


def build_save_schedule(config: Config) -> SaveSchedule:
    return SaveSchedule(
        every_steps=config.distillation.save_steps,
        every_minutes=config.checkpointing.save_minutes,
        max_steps=config.distillation.max_steps,
    )


def build_progress(session: Session, step: int, record: dict[str, Any]) -> Progress:
    """The run's log, from `step` on; `record` is that of its checkpoint, {} at the start."""
    config, dataset = session.config, session.dataset
    logger, distillation = config.logger, config.distillation
    writer = MetricsWriter()
    if processes.is_first():
        workdir, size = session.workdir, record.get("log_size", 0)
        others: list[TensorBoard | WeightsAndBiases] = [TensorBoard(workdir, step)]
        if logger.wandb_enabled:
            others.append(WeightsAndBiases(workdir, logger.wandb_project, to_flat_dict(config)))
        writer = MetricsWriter(JsonLines(workdir, size), *others)
    progress = Progress(
        writer,
        build_schedule(config.policy.optimizer, distillation.max_steps),
        first_step=step,
        max_steps=distillation.max_steps,
        logging_steps=distillation.logging_steps,
        max_log_prob_gap=config.policy.generation.max_log_prob_gap,
        max_skipped_steps=distillation.max_skipped_steps,
        health=Health(logger.warn, quiet_steps=logger.warn.every * distillation.logging_steps),
        names=lambda rows: [dataset[int(row)].id for row in dict.fromkeys(rows.tolist())],
        show_bar=logger.progress_bar and processes.is_first(),
    )
    session.cleanup.callback(progress.abandon)
    if record:
        progress.restore(record["progress"])
    return progress
