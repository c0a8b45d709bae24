"""What only a training run has: its batches, its log and its checkpoints."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill.base import processes
from distill.base.errors import UserError
from distill.batches.source import Asked, BatchSource
from distill.build.contents import find_contents
from distill.build.devices import build_layout, put_batch
from distill.build.optimizer import build_schedule
from distill.build.sampler import build_sampling_params
from distill.build.session import Session
from distill.build.teachers import abstract_teacher
from distill.config.changes import Changes, check_changes, find_changes
from distill.config.parse import digest, to_flat_dict
from distill.config.schema import Config, Logger, all_teachers
from distill.data.pipeline import make_train_iterator
from distill.models.checkpoints.source import load_model_config
from distill.run.checkpoint import Checkpoints, SaveSchedule
from distill.run.health import Health
from distill.run.progress import Progress
from distill.run.saver import find_beginning
from distill.run.writers import (
    HostedRun,
    JsonLines,
    MetricsWriter,
    TensorBoard,
    import_logger,
    open_run,
)


def describe_run(session: Session, step: int) -> Iterator[str]:
    """What a run is and where, line by line."""
    config, mesh = session.config, session.mesh
    optimizer, max_steps = config.policy.optimizer, config.distillation.max_steps
    device = mesh.devices.flat[0].device_kind
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    after = {"constant": "then constant"}.get(
        optimizer.schedule, f"then {optimizer.schedule} down to 0 at step {max_steps}"
    )
    yield f"run: {session.workdir}, config {digest(to_flat_dict(config))}, JAX {jax.__version__}"
    yield f"steps: {step} of {max_steps} made; devices: {mesh.size} x {device}, mesh {sizes}"
    of_adapters = ""
    if rank := config.policy.lora.rank:
        trained = _weights(session.state_shapes.trainable)
        of_adapters = f"; {trained} of adapters of rank {rank} are trained"
    total = _weights(session.student.params)
    yield f"student: {config.policy.model_name}, {total} weights{of_adapters}"
    for name, teacher in all_teachers(config).items():
        if teacher.in_state:
            of = f"the student's own weights ({teacher.model})"
        elif teacher.backend == "local":
            facts = load_model_config(session.teacher_folders[name])[0]
            params = abstract_teacher(config, teacher, facts, mesh).params
            by = f", by {teacher.scores}" if teacher.scores else ""
            of = f"{teacher.model}, {_weights(params)} weights, {teacher.precision}{by}"
        else:
            continue
        yield f"teacher{name and f' {name}'}: {of}"
    yield (
        f"learning rate: up to {optimizer.learning_rate:.2e} at step {optimizer.warmup_steps}, "
        f"{after}; next {float(build_schedule(optimizer, max_steps)(step)):.2e}"
    )


def _weights(params: Any) -> str:
    count = float(sum(math.prod(x.shape) for x in jax.tree.leaves(params)))
    for unit in ("", " thousand", " million"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} billion"


def identify_run(
    session: Session, step: int, record: dict[str, Any], changes: Changes
) -> tuple[dict[str, Any], dict[str, Any], Changes]:
    """What the run is, what is known of it, and all that has changed since its checkpoint."""
    identity: dict[str, Any] = dict(
        config=to_flat_dict(session.config), contents=find_contents(session)
    )
    if step:
        of_contents = find_changes(record.get("contents", {}), identity["contents"])
        check_changes(of_contents, session.config.checkpointing.allow_changes)
        changes = changes | of_contents
        if "validation" in changes:  # numbers of other prompts, beside which no new ones can stand
            record = record | dict(results={}, evaluated=0)
    else:
        record = find_beginning(session.workdir, identity)
    entries = [dict(step=step, changes=changes)] if changes else []
    identity["history"] = [*record.get("history", []), *entries]
    kept = dict(checked=record.get("checked"), run_id=record.get("run_id", secrets.token_hex(4)))
    return identity | kept, record, changes


def build_batches(session: Session, position: Any = None) -> BatchSource:
    """The source of every step's batch; `position` is where the data go on, None the beginning."""
    config, prompts = session.config, session.prompts
    distillation, policy = config.distillation, config.policy
    params = build_sampling_params(distillation.generate_strategy)
    repeats = distillation.generate_strategy.num_generations
    of_a_prompt = repeats + (distillation.mix == "both")
    iterator = make_train_iterator(
        prompts,
        batch_size=policy.train_global_batch_size // of_a_prompt,
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
        teachers=[_asked(session, name, width) for name in session.teachers],
        reward=session.reward,
        dialogues=session.dialogues(session.dataset),
        weigh=session.weighing,
        params=params,
        num_generations=repeats,
        seed=config.seed,
        lambda_=distillation.lambda_,
        mix=distillation.mix,
        async_steps=policy.generation.async_steps,
        max_steps=distillation.max_steps,
        pad_id=prompts.pad_id,
    )
    session.cleanup.callback(source.close)
    return source


def _asked(session: Session, name: str, width: int) -> Asked:
    """What a teacher is asked of batches whose responses have `width` tokens at most."""
    number = list(session.teachers).index(name)
    prompts, section = session.prompts.by_teacher[number], all_teachers(session.config).get(name)
    teacher = session.teachers[name]
    longest = session.prompts.prompt_width + width
    return Asked(
        build_layout(session.config.policy, longest, session.mesh, prompts.view_excess),
        about=lambda sequences: np.isin(sequences["row"], prompts.rows),
        weight=section.weight if section else 1.0,
        score=teacher.score if teacher.by_scores else None,
        view=prompts.view,
    )


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


def check_loggers(logger: Logger) -> None:
    """Raises UserError unless the packages of all writers are here."""
    for name in set(logger.writers) - {"tensorboard"}:
        import_logger(name)


def open_loggers(session: Session, step: int, run_id: str) -> list[HostedRun]:
    """What is told of the run elsewhere: asked before models are loaded, since it may refuse.

    A run that goes on does so without it.
    """
    logger, opened = session.config.logger, []
    for name in logger.writers:
        if name == "tensorboard" or not processes.is_first():
            continue
        try:
            settings = logger.project, run_id, to_flat_dict(session.config)
            opened.append(open_run(name, session.workdir, *settings))
        except UserError as error:
            if not step:
                raise
            print(f"WARNING: {error}; the run goes on without it", flush=True)
    return opened


def build_progress(
    session: Session, step: int, record: dict[str, Any], loggers: Sequence[HostedRun] = ()
) -> Progress:
    """The run's log, from `step` on; `record` is that of its checkpoint, {} at the start."""
    config, dataset = session.config, session.dataset
    logger, distillation = config.logger, config.distillation
    writer = MetricsWriter()
    if processes.is_first():
        workdir, size = session.workdir, record.get("log_size", 0)
        boards = [TensorBoard(workdir, step)] if "tensorboard" in logger.writers else []
        writer = MetricsWriter(JsonLines(workdir, size), *boards, *loggers)
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
