"""The training run, read from top to bottom: build, resume, loop, evaluate, export.

`train(config, workdir)` is everything that `python -m distill.main` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from distill import build
from distill.build_vllm import build_remote_teacher
from distill.checkpoint import Checkpoints, check_same_run
from distill.config import Config, parse_config, resumable_changes, to_flat_dict
from distill.errors import RunStopped, UserError
from distill.evaluate import Model, format_table
from distill.metrics import import_wandb, write_atomically
from distill.models.hf import export_model, load_model_config
from distill.models.hub import read_json
from distill.preflight import Subject, preflight
from distill.scratch import make_missing_models
from distill.step import make_train_step


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


def train(config: ConfigDict, workdir: str | Path) -> Result:
    """Distils as `config` says, continuing the run in `workdir` if there is one.

    Args:
      config: from `distill.config.default_config()`, edited.
      workdir: checkpoints, metrics.jsonl, tensorboard, results.json and the exported student.

    Raises:
      UserError: whatever the user can fix, in one line.
    """
    return run(parse_config(config), Path(workdir).expanduser().resolve())


def run(config: Config, workdir: Path) -> Result:
    """`train` for a parsed config."""
    build.import_plugins(config)
    objective = build.build_objective(config)
    mesh = build.build_mesh(config)
    sampler_mesh = build.build_sampler_mesh(config, mesh)
    step, record = find_progress(config, workdir)
    flat_config = to_flat_dict(config)
    if config.logger.wandb_enabled:
        import_wandb()
    with jax.set_mesh(mesh), contextlib.ExitStack() as cleanup:
        # ------------------------------------------------------------------------------- data
        dataset, validation = build.build_dataset(config), build.build_validation(config)
        config = make_missing_models(config, workdir, supervise=run)
        student_folder, teacher_folder = build.find_models(config)
        vocabulary = build.build_vocabulary(student_folder, teacher_folder)
        prompts = build.build_prompts(
            config, dataset, vocabulary.tokenizer, needs_responses=config.distillation.lambda_ < 1
        )
        iterator = build.build_iterator(config, prompts)
        evaluator = (
            None
            if validation is None
            else build.build_evaluator(config, validation, vocabulary, mesh)
        )

        # ----------------------------------------------------------------------------- models
        teacher = build.build_teacher(config, teacher_folder, mesh)
        optimizer, schedule = build.build_optimizer(config)
        graph, state = build.build_state(config, student_folder, optimizer, mesh)
        shapes = jax.tree.map(_shape_on_mesh, state)
        train_step = make_train_step(
            graph,
            teacher.graph if teacher else None,
            objective,
            optimizer,
            num_microbatches=config.policy.train_global_batch_size
            // config.policy.train_micro_batch_size,
            vocab_size=vocabulary.size,
            state_shardings=jax.tree.map(lambda x: x.sharding, state),
            importance_clip=config.policy.generation.importance_clip,
        )
        student = Model(graph, shapes.params)
        folders = dict(student_folder=student_folder, workdir=workdir)
        backend = build.build_backend(config, student, vocabulary, mesh, sampler_mesh, **folders)
        cleanup.callback(backend.stop)
        remote_teacher = build_remote_teacher(config, vocabulary)
        if step < config.distillation.max_steps:
            # Servers that will not do are told before anything takes time.
            if remote_teacher is not None:
                remote_teacher.start()
            backend.start()

        # ----------------------------------------------------------------------------- resume
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpointing.keep)
        results: dict[str, dict[str, Any]] = {}
        if step:
            state = None  # makes room for the restored one
            state = checkpoints.restore(step, shapes)
            iterator.set_state(record["iterator"])
            results = record["results"]
        if config.preflight and step < config.distillation.max_steps:
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
        batches = build.build_batches(config, prompts, iterator, backend, mesh, remote_teacher)
        cleanup.callback(batches.close)
        writer = build.build_writer(config, workdir, step, flat_config)
        progress = build.build_progress(config, writer, schedule, step)
        progress.say(f"data: {prompts.summary()}")
        if evaluator is not None:
            progress.say(f"validation data: {evaluator.prompts.summary()}")

        def evaluate(role: str, model: Model) -> None:
            if evaluator is not None:
                results[role] = dataclasses.asdict(evaluator(model, teacher))
                progress.evaluation(step, role, results[role])

        def save(position: Any) -> None:
            progress.flush()
            # A copy of the results: the save goes on beside the loop.
            record = dict(config=flat_config, iterator=position, results=dict(results))
            checkpoints.save(step, state, record)

        # ------------------------------------------------------------------------------- loop
        if "base" not in results:
            evaluate("base", Model(graph, state.params))
        if teacher and "teacher" not in results:
            evaluate("teacher", teacher)
        max_steps, save_steps = config.distillation.max_steps, config.distillation.save_steps
        async_steps = config.policy.generation.async_steps
        while step < max_steps:
            progress.begin_step(step, state)
            position = batches.position
            try:
                with progress.phase("generate") as finish:
                    batch, measured = finish(batches.next(step, state.params))
                    # Nothing is sampled ahead over a checkpoint: what follows depends on it alone.
                    if async_steps and not _is_due(step + 1, save_steps, max_steps):
                        batches.sample_ahead(step + 1, state.params)
            except (RunStopped, UserError) as error:
                if not step:  # before the first update there is nothing to go on from
                    raise
                save(position)  # what was sampled but not trained on is sampled again
                checkpoints.close()
                saved = f"step {step} is saved: the same command goes on from it"
                raise type(error)(f"{error} ({saved})") from error
            with progress.phase("train") as finish:
                state, metrics = train_step(state, teacher and teacher.params, batch)
                finish(metrics)
            step += 1
            progress.end_step(step, metrics, measured)
            if _is_due(step, config.distillation.eval_steps, max_steps):
                evaluate("student", Model(graph, state.params))
            if _is_due(step, save_steps, max_steps):
                save(batches.position)
        backend.stop()
        progress.close()
        checkpoints.close()

        # ----------------------------------------------------------------------------- export
        folder = export_student(config, workdir, student_folder, state.params, vocabulary)
        if results:
            write_atomically(workdir / "results.json", json.dumps(results, indent=2) + "\n")
            print(format_table(results))
        print(f"student: {folder}", flush=True)
        return Result(results, folder, step)


def evaluate_checkpoint(config: ConfigDict, model_path: str) -> dict[str, dict[str, Any]]:
    """Evaluates any Hugging Face checkpoint, and the config's teacher if it names one.

    Returns:
      {'student': evaluation fields, 'teacher': evaluation fields}.
    """
    config = config.copy_and_resolve_references()
    config.policy.model_name = model_path
    parsed = parse_config(config)
    build.import_plugins(parsed)
    mesh = build.build_mesh(parsed)
    with jax.set_mesh(mesh):
        validation = build.build_validation(parsed)
        if validation is None:
            raise UserError("data.validation.max_samples=0 leaves nothing to evaluate: raise it")
        student_folder, teacher_folder = build.find_models(parsed)
        vocabulary = build.build_vocabulary(student_folder, teacher_folder)
        evaluator = build.build_evaluator(parsed, validation, vocabulary, mesh)
        print(f"validation data: {evaluator.prompts.summary()}")
        teacher = build.build_teacher(parsed, teacher_folder, mesh)
        student = build.build_frozen_model(parsed, student_folder, mesh, parsed.policy.precision)
        models = {"student": student, "teacher": teacher} if teacher else {"student": student}
        return {
            role: dataclasses.asdict(evaluator(model, teacher)) for role, model in models.items()
        }


def find_progress(config: Config, workdir: Path) -> tuple[int, dict[str, Any]]:
    """Step and record of the newest checkpoint in `workdir`; (0, {}) for a new run.

    Raises:
      UserError: the checkpoint belongs to a run with another config.
    """
    folder = workdir / "checkpoints"
    if not folder.exists():
        return 0, {}
    checkpoints = Checkpoints(folder, keep=config.checkpointing.keep)
    step = checkpoints.latest()
    record = checkpoints.record(step) if step is not None else {}
    checkpoints.close()
    if record:
        check_same_run(record["config"], to_flat_dict(config), resumable_changes(config))
    return step or 0, record


def export_student(
    config: Config, workdir: Path, student_folder: Path, params, vocabulary: build.Vocabulary
) -> Path:
    """Writes the student as a Hugging Face folder."""
    model_config, hf_config = load_model_config(student_folder)
    path = student_folder / "generation_config.json"
    generation_config = read_json(path) if path.exists() else {}
    folder = workdir / "student"
    export_model(
        folder,
        params,
        model_config,
        hf_config,
        vocabulary.tokenizer,
        jnp.dtype(config.checkpointing.export_dtype),
        {**generation_config, "eos_token_id": list(vocabulary.end_ids)},
    )
    return folder


def _shape_on_mesh(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _is_due(step: int, every: int, max_steps: int) -> bool:
    return step == max_steps or (every > 0 and step % every == 0)
