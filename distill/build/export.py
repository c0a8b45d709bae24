"""The student of a run or of a checkpoint, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from distill.base import processes
from distill.base.errors import UserError
from distill.build.run import build_checkpoints
from distill.build.session import Session
from distill.config.changes import check_changes, find_changes
from distill.config.parse import to_flat_dict
from distill.config.schema import BEST_METRICS
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.export_adapter import check_modules, export_adapter
from distill.models.checkpoints.hub import (
    base_folder,
    is_hub_id,
    read_json,
    split_revision,
    tokenizer_folder,
)
from distill.models.checkpoints.source import load_model_config, open_source
from distill.models.lora import merged
from distill.reporting.model_card import model_card
from distill.run.checkpoint import Checkpoints
from distill.step import TrainState


def export_student(session: Session, folder: Path, state: TrainState, card: str) -> None:
    """Writes the student as a Hugging Face folder, or its adapters as peft's, with a card."""
    source, checkpointing = open_source(session.student_folder), session.config.checkpointing
    if source.quantization is not None and processes.is_first():
        kind = source.quantization["quant_method"]
        print(f"{source.folder} is in {kind}; exported in {checkpointing.export_dtype}")
    tokenizer = tokenizer_folder(session.student_folder)
    if checkpointing.export_format == "peft":
        check_export(session)
        named = session.config.policy.model_name
        hub_id, revision = None, None
        if is_hub_id(named.partition("@")[0]):
            hub_id, revision = split_revision(named)
        export_adapter(
            folder,
            session.student.params,
            state.trainable,
            source.config,
            session.config.policy.lora,
            base=dict(base_model_name_or_path=hub_id or str(source.folder), revision=revision),
            name=source.name,
            tokenizer=tokenizer,
            card=card,
        )
        return
    path = source.folder / "generation_config.json"
    generation_config = read_json(path) if path.exists() else {}
    export_model(
        folder,
        merged(state.params, checkpointing.export_dtype),
        source.config,
        source.hf_config,
        tokenizer,
        jnp.dtype(checkpointing.export_dtype),
        {**generation_config, "eos_token_id": list(session.vocabulary.end_ids)},
        source,
        max_shard_bytes=checkpointing.export_shard_size * 1e9,
        card=card,
    )


def check_export(session: Session) -> None:
    """Raises UserError if what the student will be exported as cannot be."""
    if session.config.checkpointing.export_format != "peft":
        return
    folder, base = session.student_folder, base_folder(session.student_folder)
    if folder != base:
        raise UserError(
            f"checkpointing.export_format=peft adapts a model, and {folder} is an adapter of {base}"
            " itself: set export_format=merged"
        )
    check_modules(load_model_config(folder)[0], session.state_shapes.trainable)


def export_saved(session: Session, folder: Path, checkpoint: str) -> int:
    """`export_student` for a checkpoint of the session's run; returns its step.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or the config is of another run.
    """
    config = session.config
    checkpoints = build_checkpoints(config, session.workdir)

    def find() -> int:
        step = _find_step(checkpoints, checkpoint, config.checkpointing.best_metric)
        if damage := checkpoints.damage(step):
            raise UserError(
                f"the checkpoint {checkpoints.path(step)} is damaged ({damage}): put back a copy "
                "of it, or pass another --checkpoint"
            )
        return step

    step = processes.from_first(find)
    record = checkpoints.record(step)
    changes = find_changes(record["config"], to_flat_dict(config))
    check_changes(changes, config.checkpointing.allow_changes)
    state = session.restore_state(checkpoints, step)
    card = model_card(record["config"], _results_at(step, record), step, record.get("history", ()))
    export_student(session, folder, state, card)
    return step


def _results_at(step: int, record: dict[str, Any]) -> dict[str, Any]:
    """Evaluations that a checkpoint holds, but not that of an earlier student."""
    results = record["results"]
    if record["evaluated"] == step:
        return results
    return {role: result for role, result in results.items() if role != "student"}


def _find_step(checkpoints: Checkpoints, checkpoint: str, best_metric: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(
            f"there is no checkpoint in {checkpoints.folder}: pass the --workdir of a run that has "
            "saved one (distillation.save_steps)"
        )
    if checkpoint == "best":
        if not best_metric:
            raise UserError(
                f"--checkpoint=best needs to know by what: pass --config.checkpointing.best_metric="
                f"{'|'.join(BEST_METRICS)}, or --checkpoint={steps[-1]}"
            )
        step = checkpoints.best()
        if step is None:
            raise UserError(
                f"no checkpoint was made at a step with {best_metric}: pass --checkpoint=STEP, one "
                f"of {', '.join(map(str, steps))}"
            )
        return step
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"--checkpoint={checkpoint} is not there: pass best, or one of {there}")
    return int(checkpoint)
