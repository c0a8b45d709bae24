"""The training run: `run` is the loop and the export, `set_up` is all that comes before.

`train(config, workdir)` is everything that `python -m distill.main` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.errors import RunStopped, UserError, printable
from distill.base.files import write_atomically
from distill.base.status import busy
from distill.batches.source import BatchSource
from distill.build.batches import build_batches
from distill.build.data import (
    Vocabulary,
    build_dataset,
    build_iterator,
    build_prompts,
    build_validation,
    build_vocabulary,
    check_same_data,
)
from distill.build.devices import build_mesh, build_sampler_mesh
from distill.build.evaluation import build_evaluator, build_recorder
from distill.build.models import build_frozen_model, build_optimizer, build_state, find_models
from distill.build.objective import build_objective
from distill.build.plugins import import_plugins
from distill.build.run import build_checkpoints, build_progress, build_save_schedule
from distill.build.sampler import build_backend
from distill.build.scratch import make_missing_models
from distill.build.servers import build_remote_teacher
from distill.build.teachers import build_teacher
from distill.checks.checks import Subject
from distill.checks.run import preflight
from distill.config.parse import parse_config, to_flat_dict
from distill.config.schema import Config
from distill.evaluation.evaluator import format_table
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.hub import read_json
from distill.models.checkpoints.load import load_model_config
from distill.models.model import Model
from distill.reporting.facts import write_facts
from distill.reporting.model_card import model_card
from distill.reporting.page import REPORT, write_report
from distill.rollout.base import RolloutBackend
from distill.run.checkpoint import shapes_on_mesh
from distill.run.interrupts import Interrupts
from distill.run.progress import Progress
from distill.run.saver import HeldOut, Saver, find_progress, how_to_go_on
from distill.run.workdir import claim_workdir
from distill.run.writers import import_wandb
from distill.step import TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run produced.

    Attributes:
      results: {'base'|'student'|'teacher': evaluation fields}, as in results.json.
      student: folder of the exported student.
      steps: optimizer updates made in all.
    """

    results: dict[str, dict[str, Any]]
    student: Path
    steps: int


def train(config: ConfigDict, workdir: str | Path, interrupts: Interrupts | None = None) -> Result:
    """Distils as `config` says, continuing the run in `workdir` if there is one.

    Args:
      config: from `distill.config.default_config()`, edited.
      workdir: checkpoints, metrics.jsonl, tensorboard, results.json, the exported student, and
        report.html.
      interrupts: handles signals; without it nobody does, and KeyboardInterrupt ends the run with
        what its last checkpoint has.

    Raises:
      UserError: whatever the user can fix, in one line.
      RunStopped: the run cannot go on soundly, in one line.
      RunInterrupted: `interrupts` was signalled, and everything is saved.
    """
    parsed = parse_config(config)
    processes.check_same("config", to_flat_dict(parsed))
    return run(parsed, Path(workdir).expanduser().resolve(), interrupts or Interrupts())


class Parts(NamedTuple):
    """What the loop and the export work with; no teacher where it is not on the mesh."""

    student_folder: Path
    vocabulary: Vocabulary
    graph: nnx.GraphDef
    teacher: Model | None
    train_step: Callable
    backend: RolloutBackend
    batches: BatchSource
    progress: Progress
    held_out: HeldOut
    saver: Saver


def run(config: Config, workdir: Path, interrupts: Interrupts) -> Result:
    """`train` for a parsed config."""
    with contextlib.ExitStack() as cleanup:
        parts, step, state = set_up(config, workdir, interrupts, cleanup)
        graph, teacher, batches = parts.graph, parts.teacher, parts.batches
        progress, held_out, saver = parts.progress, parts.held_out, parts.saver

        # ------------------------------------------------------------------------------- loop
        if "base" not in held_out.results:
            held_out.evaluate("base", step, Model(graph, state.params))
        if teacher and "teacher" not in held_out.results:
            held_out.evaluate("teacher", step, teacher)
        max_steps, eval_steps = config.distillation.max_steps, config.distillation.eval_steps
        while True:
            evaluating = step == max_steps or (eval_steps > 0 and step % eval_steps == 0)
            # One that a signal prevented or spoilt is made up for when the run goes on.
            if evaluating and held_out.evaluated < step and not interrupts.agree():
                with saver.saving_on(RunStopped, step=step, state=state):
                    held_out.evaluate("student", step, Model(graph, state.params))
            stopping = interrupts.agree_by_first()
            if stopping or (step and saver.is_due(step)):
                saver.save(step, state, batches.position)
            if stopping or step == max_steps:
                break
            progress.begin_step(step, state)
            with saver.saving_on(RunStopped, UserError, step=step, state=state):
                with progress.phase("generate") as finish:
                    batch, measured = finish(batches.next(step, state.params))
                    if config.policy.generation.async_steps and step + 1 < max_steps:
                        batches.sample_ahead(step + 1, state.params)
            with progress.phase("train") as finish:
                state, metrics = parts.train_step(state, teacher and teacher.fetch(), batch)
                finish(metrics)
            step += 1
            interrupts.hold()
            progress.end_step(step, metrics, measured, batches.rows)
            saver.checkpoints.check()
            if reason := progress.too_many_skipped:
                saver.save_and_stop(step, state, batches.position, RunStopped(reason))
        progress.close()
        saver.checkpoints.close()
        interrupts.release()
        if stopping:
            raise interrupts.stop(how_to_go_on(step))
        parts.backend.stop()

        # ----------------------------------------------------------------------------- export
        folder, results = workdir / "student", held_out.results
        card = model_card(saver.flat_config, results, step)
        with busy("exporting the student"):
            export_student(
                config, folder, parts.student_folder, state.params, parts.vocabulary, card
            )
        if results:
            print(format_table(results))
        print(f"student: {folder}", flush=True)
        if processes.is_first():
            _write_results(workdir, results)
        return Result(results, folder, step)


def set_up(
    config: Config, workdir: Path, interrupts: Interrupts, cleanup: contextlib.ExitStack
) -> tuple[Parts, int, TrainState]:
    """(parts, step, state) of a run that begins or goes on; `cleanup` ends whatever was begun."""
    import_plugins(config)
    objective = build_objective(config)
    mesh = build_mesh(config)
    sampler_mesh = build_sampler_mesh(config, mesh)
    flat_config = to_flat_dict(config)
    if config.logger.wandb_enabled:
        import_wandb()
    cleanup.enter_context(claim_workdir(workdir))
    cleanup.enter_context(jax.set_mesh(mesh))
    checkpoints = build_checkpoints(config, workdir)
    cleanup.callback(checkpoints.close)
    step, record = find_progress(checkpoints, flat_config, config.checkpointing.on_torn)
    updates_remain = step < config.distillation.max_steps

    # ----------------------------------------------------------------------------------- data
    dataset, validation = build_dataset(config), build_validation(config)
    supervise = functools.partial(run, interrupts=interrupts)
    config = make_missing_models(config, workdir, supervise)
    student_folder, teacher_folder = find_models(config)
    vocabulary = build_vocabulary(student_folder, teacher_folder)
    needs_responses = config.distillation.lambda_ < 1
    with busy("tokenizing the data"):
        prompts = build_prompts(
            config, dataset, vocabulary.tokenizer, needs_responses=needs_responses
        )
    check_same_data(prompts)
    iterator = build_iterator(config, prompts)
    evaluator = recorder = None
    if validation is not None:
        evaluator = build_evaluator(config, validation, vocabulary, mesh)
        recorder = build_recorder(config, workdir, validation, evaluator.prompts, vocabulary, mesh)

    # --------------------------------------------------------------------------------- models
    compared_on = None if step else prompts  # once per run
    with busy("loading the teacher"):
        teacher = build_teacher(config, teacher_folder, mesh, compared_on, vocabulary.size)
    optimizer, schedule = build_optimizer(config)
    with busy("loading the student"):
        graph, state = build_state(config, student_folder, optimizer, mesh)
    shapes = shapes_on_mesh(state)
    train_step = make_train_step(
        graph,
        teacher.graph if teacher else None,
        objective,
        optimizer,
        vocab_size=vocabulary.size,
        state_shardings=jax.tree.map(lambda x: x.sharding, state),
        importance_clip=config.policy.generation.importance_clip,
    )
    student = Model(graph, shapes.params)
    folders = dict(student_folder=student_folder, workdir=workdir)
    backend = build_backend(config, student, vocabulary, mesh, sampler_mesh, **folders)
    cleanup.callback(backend.stop)
    remote_teacher = build_remote_teacher(config, vocabulary)
    if updates_remain:
        # Servers that will not do are told before anything takes time.
        if remote_teacher is not None:
            remote_teacher.start()
        backend.start()

    # --------------------------------------------------------------------------------- resume
    if step:
        state = None  # makes room for the restored one
        with busy(f"restoring step {step}"):
            state = checkpoints.restore(step, shapes)
        iterator.set_state(record["iterator"])
    if config.preflight and updates_remain:
        subject = Subject(
            config=config,
            mesh=mesh,
            dataset=dataset,
            prompts=prompts,
            vocabulary=vocabulary,
            teacher_folder=teacher_folder,
            graph=graph,
            state=state,
            teacher=teacher,
            objective=objective,
            backend=backend,
            step=step,
        )
        preflight(subject, print)
    batches = build_batches(config, prompts, iterator, backend, mesh, remote_teacher)
    cleanup.callback(batches.close)
    if step and (ahead := checkpoints.arrays(step)):
        batches.take_up(step, ahead, record["measured_ahead"])
    progress = build_progress(config, workdir, dataset, schedule, step, record)
    cleanup.callback(progress.abandon)
    if processes.is_first():
        write_facts(workdir, flat_config)
    progress.say(f"data: {prompts.summary()}")
    if teacher and teacher.quantization_kl is not None:
        progress.quantization(step, teacher.quantization_kl)
    if evaluator is not None:
        progress.say(f"validation data: {evaluator.prompts.summary()}")
    so_far = record.get("results", {}), record.get("evaluated", 0)
    held_out = HeldOut(evaluator, recorder, teacher, progress, interrupts, *so_far)
    saves = build_save_schedule(config)
    saver = Saver(checkpoints, saves, batches, progress, held_out, interrupts, flat_config)
    parts = Parts(
        student_folder=student_folder,
        vocabulary=vocabulary,
        graph=graph,
        teacher=teacher,
        train_step=train_step,
        backend=backend,
        batches=batches,
        progress=progress,
        held_out=held_out,
        saver=saver,
    )
    return parts, step, state


def _write_results(workdir: Path, results: dict[str, dict[str, Any]]) -> None:
    """`results.json` and the report, without which a run is finished all the same."""
    if results:
        write_atomically(workdir / "results.json", json.dumps(results, indent=2) + "\n")
    try:
        write_report([workdir], workdir / REPORT)
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        print(f"no report ({reason}): python -m distill.report {workdir}", flush=True)
    else:
        print(f"report: {workdir / REPORT}", flush=True)


def evaluate_checkpoint(config: ConfigDict, model_path: str) -> dict[str, dict[str, Any]]:
    """Evaluates any Hugging Face checkpoint, and the config's teacher if it names one.

    Returns:
      {'student': evaluation fields, 'teacher': evaluation fields}.
    """
    config = config.copy_and_resolve_references()
    config.policy.model_name = model_path
    parsed = parse_config(config)
    import_plugins(parsed)
    mesh = build_mesh(parsed)
    with jax.set_mesh(mesh):
        validation = build_validation(parsed)
        if validation is None:
            raise UserError("data.validation.max_samples=0 leaves nothing to evaluate: raise it")
        student_folder, teacher_folder = find_models(parsed)
        vocabulary = build_vocabulary(student_folder, teacher_folder)
        evaluator = build_evaluator(parsed, validation, vocabulary, mesh)
        print(f"validation data: {evaluator.prompts.summary()}")
        with busy("loading the models"):
            teacher = build_teacher(parsed, teacher_folder, mesh)
            precision = parsed.policy.precision
            student = build_frozen_model(parsed, student_folder, mesh, precision)
        models = {"student": student, "teacher": teacher} if teacher else {"student": student}
        results = {}
        for role, model in models.items():
            with busy(f"evaluating the {role}"):
                results[role] = evaluator(model, teacher).to_dict()
        return results


def export_student(
    config: Config,
    folder: Path,
    student_folder: Path,
    params,
    vocabulary: Vocabulary,
    card: str,
) -> None:
    """Writes the student as a Hugging Face folder, with its card."""
    model_config, hf_config = load_model_config(student_folder)
    path = student_folder / "generation_config.json"
    generation_config = read_json(path) if path.exists() else {}
    export_model(
        folder,
        params,
        model_config,
        hf_config,
        vocabulary.tokenizer,
        jnp.dtype(config.checkpointing.export_dtype),
        {**generation_config, "eos_token_id": list(vocabulary.end_ids)},
        max_shard_bytes=config.checkpointing.export_shard_size * 1e9,
        card=card,
    )
