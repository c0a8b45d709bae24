"""The training run, read from top to bottom: build, resume, loop, evaluate, export.

`train(config, workdir)` is everything that `python -m distill.main` does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill import build
from distill.checkpoint import Checkpoints, check_same_run
from distill.config import RESUMABLE_CHANGES, Config, parse_config, to_flat_dict
from distill.data.pipeline import PromptBatch
from distill.data.prompts import Prompts
from distill.errors import UserError
from distill.evaluate import Model, format_table
from distill.losses.objective import lambda_coin, sample_coins
from distill.metrics import import_wandb, write_atomically
from distill.models.hf import export_model, load_model_config
from distill.models.hub import read_json, resolve_model
from distill.rollout.base import RolloutBackend
from distill.sampling.request import Rollout, RolloutRequest
from distill.scratch import make_missing_models
from distill.step import Batch, make_batch, make_train_step


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
    with jax.set_mesh(mesh):
        # ------------------------------------------------------------------------------- data
        dataset, validation = build.build_dataset(config), build.build_validation(config)
        config = make_missing_models(config, workdir, supervise=run)
        student_folder, teacher_folder = find_models(config)
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
        teacher = teacher_folder and build.build_frozen_model(
            config, teacher_folder, mesh, config.teacher.precision
        )
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
        )
        student = Model(graph, shapes.params)
        backend = build.build_backend(config, student, vocabulary, mesh, sampler_mesh)
        batches = BatchSource(config, prompts, backend, build.make_put(mesh))

        # ----------------------------------------------------------------------------- resume
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpointing.keep)
        results: dict[str, dict[str, Any]] = {}
        if step:
            state = None  # makes room for the restored one
            state = checkpoints.restore(step, shapes)
            iterator.set_state(record["iterator"])
            results = record["results"]
        writer = build.build_writer(config, workdir, step, flat_config)
        progress = build.build_progress(config, writer, schedule, step)
        progress.say(f"data: {prompts.summary()}")

        def evaluate(role: str, model: Model) -> None:
            if evaluator is not None:
                results[role] = dataclasses.asdict(evaluator(model, teacher))
                progress.evaluation(step, role, results[role])

        # ------------------------------------------------------------------------------- loop
        if "base" not in results:
            evaluate("base", Model(graph, state.params))
        if teacher and "teacher" not in results:
            evaluate("teacher", teacher)
        backend.start()
        max_steps = config.distillation.max_steps
        while step < max_steps:
            progress.begin_step(step, state)
            with progress.phase("generate") as finish:
                batch, _ = finish(batches.next(iterator, step, state.params))
            with progress.phase("train") as finish:
                state, metrics = train_step(state, teacher and teacher.params, batch)
                finish(metrics)
            step += 1
            progress.end_step(step, metrics)
            if _is_due(step, config.distillation.eval_steps, max_steps):
                evaluate("student", Model(graph, state.params))
            if _is_due(step, config.distillation.save_steps, max_steps):
                progress.flush()
                position = iterator.get_state()
                # A copy of the results: the save goes on beside the loop.
                record = dict(config=flat_config, iterator=position, results=dict(results))
                checkpoints.save(step, state, record)
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
        student_folder, teacher_folder = find_models(parsed)
        vocabulary = build.build_vocabulary(student_folder, teacher_folder)
        evaluator = build.build_evaluator(parsed, validation, vocabulary, mesh)
        teacher = teacher_folder and build.build_frozen_model(
            parsed, teacher_folder, mesh, parsed.teacher.precision
        )
        student = build.build_frozen_model(parsed, student_folder, mesh, parsed.policy.precision)
        models = {"student": student, "teacher": teacher} if teacher else {"student": student}
        return {
            role: dataclasses.asdict(evaluator(model, teacher)) for role, model in models.items()
        }


class BatchSource:
    """Makes the batch of a step: from the student's own answers or from the fixed data.

    Args:
      config: lambda_, mix, seed, and how answers are sampled.
      prompts: their responses are the fixed data.
      backend: samples the answers.
      put: places host rows on the mesh.
    """

    def __init__(self, config: Config, prompts: Prompts, backend: RolloutBackend, put):
        self._distillation, self._seed = config.distillation, config.seed
        self._params = build.build_sampling_params(config)
        self._backend, self._put = backend, put
        self._pad_id = prompts.pad_id
        # Without sampling, rows need no room beyond the longest response.
        self._response_width = (
            self._params.max_length if config.distillation.lambda_ > 0 else prompts.response_width
        )
        self._make_batch = jax.jit(functools.partial(make_batch, pad_id=prompts.pad_id))

    def next(self, iterator, step: int, student_params) -> tuple[Batch, dict[str, float]]:
        """The batch of update `step` (counted from 0), and what sampling it measured."""
        prompts = next(iterator)
        repeats = self._distillation.generate_strategy.num_generations
        rows = jax.tree.map(lambda x: np.repeat(x, repeats, axis=0), prompts)
        coins_b = self._on_policy(step, rows.index_b)
        measured: dict[str, float] = {}
        if not coins_b.any():
            rollout = self._fixed(rows)
        else:
            self._backend.refit(student_params, version=step)
            request = RolloutRequest(
                tuple(
                    tokens_p[:length]
                    for tokens_p, length in zip(
                        prompts.prompt_tokens_bp, prompts.prompt_lengths_b, strict=True
                    )
                ),
                prompts.index_b,
                self._params,
                num_generations=repeats,
                seed=self._seed,
                step=step,
            )
            rollout, measured = self._backend.generate(request)
            if not coins_b.all():
                rollout = _select_rows(coins_b, rollout, self._fixed(rows))
        arrays = rows.prompt_tokens_bp, rows.prompt_lengths_b, rollout, coins_b
        return self._make_batch(*jax.tree.map(self._put, arrays)), measured

    def _on_policy(self, step: int, index_b: np.ndarray) -> np.ndarray:
        lambda_ = self._distillation.lambda_
        if self._distillation.mix == "sample":
            return np.asarray(sample_coins(self._seed, step, index_b.astype(np.uint32), lambda_))
        return np.full(len(index_b), lambda_coin(self._seed, step, lambda_))

    def _fixed(self, prompts: PromptBatch) -> Rollout:
        """The data's own responses in the form of a rollout."""
        tokens_br = prompts.response_tokens_br
        missing = self._response_width - tokens_br.shape[1]
        tokens_br = np.pad(tokens_br, ((0, 0), (0, max(missing, 0))), constant_values=self._pad_id)[
            :, : self._response_width
        ]
        zeros_br = np.zeros(tokens_br.shape, np.float32)
        return Rollout(
            tokens_br=tokens_br,
            lengths_b=prompts.response_lengths_b,
            log_probs_br=zeros_br,
            sampled_log_probs_br=zeros_br,
            stopped_b=np.ones(len(tokens_br), bool),
        )


def _select_rows(coins_b: np.ndarray, sampled: Rollout, fixed: Rollout) -> Rollout:
    """Row by row the sampled response where the coin says so, else the fixed one."""

    def select(ours, theirs):
        return np.where(coins_b.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)

    return jax.tree.map(select, sampled, fixed)


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
        check_same_run(record["config"], to_flat_dict(config), RESUMABLE_CHANGES)
    return step or 0, record


def find_models(config: Config) -> tuple[Path, Path | None]:
    """Local folders of student and teacher; no teacher for hard labels."""
    student = resolve_model(config.policy.model_name)
    if config.distillation.hard_labels or not config.distillation.teacher_model_path:
        return student, None
    return student, resolve_model(config.distillation.teacher_model_path)


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
