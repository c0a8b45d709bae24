"""What a run keeps and logs."""

from __future__ import annotations

from pathlib import Path

from distill.base import processes
from distill.config.parse import to_flat_dict
from distill.config.schema import Config
from distill.data.base import DatasetInterface
from distill.run.checkpoint import Checkpoints, SaveSchedule
from distill.run.health import Health
from distill.run.progress import Progress
from distill.run.writers import MetricsWriter, NoWriter


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


def build_progress(
    config: Config, workdir: Path, dataset: DatasetInterface, schedule, step: int, record: dict
) -> Progress:
    """The run's log, from `step` on; `record` is that of its checkpoint, {} at the start."""
    logger, distillation = config.logger, config.distillation
    writer = (
        MetricsWriter(
            workdir,
            resume_step=step,
            resume_size=record.get("log_size", 0),
            wandb_project=logger.wandb_project if logger.wandb_enabled else None,
            config=to_flat_dict(config),
        )
        if processes.is_first()
        else NoWriter()
    )
    progress = Progress(
        writer,
        schedule,
        first_step=step,
        max_steps=distillation.max_steps,
        logging_steps=distillation.logging_steps,
        max_log_prob_gap=config.policy.generation.max_log_prob_gap,
        max_skipped_steps=distillation.max_skipped_steps,
        health=Health(logger.warn, quiet_steps=logger.warn.every * distillation.logging_steps),
        names=lambda rows: [dataset[int(row)].id for row in dict.fromkeys(rows.tolist())],
        show_bar=logger.progress_bar and processes.is_first(),
    )
    if record:
        progress.restore(record["progress"])
    return progress
