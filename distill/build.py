"""Builders that turn the parsed config into parts; shared by the trainer and the command lines."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distill import build_vllm, processes
from distill import optimizer as optimizers
from distill.checkpoint import Checkpoints, SaveSchedule
from distill.config import KNOWN_BACKENDS, Config, to_flat_dict, tokens_per_microbatch
from distill.data.base import DatasetInterface, dataset_options, get_dataset
from distill.data.packing import Layout, Shape
from distill.data.pipeline import make_train_iterator
from distill.data.prompts import Prompts, tokenize_prompts
from distill.errors import UserError
from distill.evaluate import Evaluator, Model
from distill.evaluation_metrics import get_metric
from distill.health import Health
from distill.losses.objective import Objective, make_objective
from distill.metrics import MetricsWriter, NoWriter, Progress
from distill.microbatch import Batch
from distill.models.config import ModelConfig
from distill.models.hf import load_model_config, load_params
from distill.models.hub import resolve_model
from distill.models.transformer import Transformer
from distill.reporting.tokens import MOST_ANSWERS, RolloutRecorder
from distill.rollout.base import BackendParts, RolloutBackend, get_backend
from distill.rollout.batches import BatchSource
from distill.rollout.in_process import JaxBackend
from distill.rollout.vllm.teacher import VllmTeacher
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sharding import (
    HOST_MEMORY,
    RULES,
    SAMPLER_RULES,
    batch_parts,
    check_host_memory,
    make_mesh,
    make_sampler_mesh,
    named_sharding,
    optimizer_shardings,
    param_shardings,
    replicated,
    stacked_sharding,
)
from distill.step import TrainState
from distill.tokenizer import check_same_vocabulary, end_ids, load_tokenizer, vocabulary_size

# Keys of the config's data section that a source may take.
_DATA_KEYS = {
    "holdout_fraction",
    "max_bad_rows",
    "subset",
    "prompt_column",
    "response_column",
    "answer_column",
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that student and teacher share.

    Attributes:
      tokenizer: the student's.
      size: ids in use; output heads may be padded beyond it.
      end_ids: ids that end an answer.
    """

    tokenizer: object
    size: int
    end_ids: tuple[int, ...]


def import_plugins(config: Config) -> None:
    """Imports the user's modules, which register parts by name, and looks for those named.

    Raises:
      UserError: a module cannot be imported, or none registers a backend or metric of the config.
    """
    for name in config.plugins:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"plugins names {name!r}, which cannot be imported ({error}): it must be a module "
                "on PYTHONPATH"
            ) from None
    if config.policy.generation.backend not in KNOWN_BACKENDS:
        get_backend(config.policy.generation.backend)
    for name in config.evaluation.metrics:
        get_metric(name)


def build_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The trainer's mesh of all `devices`, by default JAX's; batches must be split over it."""
    devices, sampler_devices = split_devices(config, devices)
    _check_processes(config)
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    except UserError as error:
        if not sampler_devices:
            raise
        raise UserError(
            f"{error} (policy.generation.colocated gives {len(sampler_devices)} of "
            f"{len(devices) + len(sampler_devices)} devices to the sampler, {len(devices)} remain)"
        ) from None
    parts = batch_parts(mesh)
    policy = config.policy
    build_layout(config, policy.max_total_sequence_length, mesh)  # says so if no row fits
    if policy.train_micro_batch_size % parts and not policy.cut_by_tokens:
        micro = -(-policy.train_micro_batch_size // parts) * parts
        count = -(-policy.train_global_batch_size // micro)
        raise UserError(
            f"policy.train_micro_batch_size={policy.train_micro_batch_size} does not divide over "
            f"{parts} devices (mesh data x fsdp): try train_micro_batch_size={micro} with "
            f"train_global_batch_size={count * micro}"
        )
    if config.evaluation.batch_size % parts:
        raise UserError(
            f"evaluation.batch_size={config.evaluation.batch_size} does not divide over {parts} "
            f"devices (mesh data x fsdp): try {-(-config.evaluation.batch_size // parts) * parts}"
        )
    return mesh


def _check_processes(config: Config) -> None:
    """Refuses what several processes cannot do."""
    if jax.process_count() == 1:
        return
    if not processes.several():
        raise UserError(
            f"{jax.process_count()} processes see each other's devices, but cannot speak to each "
            "other: pass --coordinator_address, --num_processes and --process_id"
        )
    generation, teacher = config.policy.generation, config.teacher
    for key, backend in (("policy.generation", generation.backend), ("teacher", teacher.backend)):
        if backend == "vllm":
            raise UserError(
                f"{key}.backend=vllm works within one process, and {jax.process_count()} were "
                "started: use the devices themselves, or one process"
            )


def build_sampler_mesh(
    config: Config, mesh: Mesh, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Where the jax backend samples: on the trainer's `mesh`, or on others of all `devices`."""
    _, devices = split_devices(config, devices)
    return make_sampler_mesh(mesh, devices) if devices else mesh


def split_devices(
    config: Config, devices: Sequence[jax.Device] | None
) -> tuple[list[jax.Device], list[jax.Device]]:
    """Devices of the trainer, and those of a sampler that has its own."""
    devices, generation = list(devices or jax.devices()), config.policy.generation
    if generation.backend != "jax" or generation.colocated.enabled:
        return devices, []
    key = "policy.generation.colocated"
    if jax.process_count() > 1:
        raise UserError(
            f"{key}.enabled=False works within one process, and {jax.process_count()} were "
            f"started: weights cannot be copied between devices of different processes; use "
            f"{key}.enabled=True, or one process"
        )
    if len(devices) < 2:
        raise UserError(
            f"{key}.enabled=False splits the devices between trainer and sampler, and there is "
            f"only 1: use {key}.enabled=True"
        )
    count = generation.colocated.sampler_devices or len(devices) // 2
    if count >= len(devices):
        raise UserError(
            f"{key}.sampler_devices={count} leaves none of {len(devices)} devices to the trainer: "
            f"choose at most {len(devices) - 1}, or 0 for half of them"
        )
    return devices[:-count], devices[-count:]


def make_put(mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
    """Function that places a batch, which every process has whole, on the mesh."""

    def put(rows: np.ndarray) -> jax.Array:
        rows = np.asarray(rows)
        sharding = named_sharding(mesh, "batch", *[None] * (rows.ndim - 1))
        # Of what its own devices hold, a process cuts its shards.
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return put


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Places a batch that every process holds: the rows of each microbatch over the mesh."""

    def put(stacked: np.ndarray) -> jax.Array:
        sharding = stacked_sharding(mesh, stacked.ndim)
        return jax.make_array_from_callback(stacked.shape, sharding, lambda index: stacked[index])

    return jax.tree.map(put, batch)


def find_models(config: Config) -> tuple[Path, Path | None]:
    """Local folders of student and teacher; no teacher for hard labels."""
    student = resolve_model(config.policy.model_name)
    if config.distillation.hard_labels or not config.distillation.teacher_model_path:
        return student, None
    return student, resolve_model(config.distillation.teacher_model_path)


def build_vocabulary(student_folder: Path, teacher_folder: Path | None) -> Vocabulary:
    """The student's tokenizer; the ids at which either model ends an answer.

    A base model and an instruction-tuned one of one family end their answers differently: what
    the student learns from the teacher must end its answers too.
    """
    tokenizer = load_tokenizer(student_folder)
    ends = set(end_ids(tokenizer, student_folder))
    if teacher_folder is not None:
        teacher_tokenizer = load_tokenizer(teacher_folder)
        check_same_vocabulary(tokenizer, teacher_tokenizer)
        ends.update(end_ids(teacher_tokenizer, teacher_folder))
    return Vocabulary(tokenizer, vocabulary_size(tokenizer), tuple(sorted(ends)))


def build_dataset(config: Config) -> DatasetInterface:
    """The data to train on."""
    data = config.data
    return get_dataset(
        data.name,
        data.split,
        seed=config.seed,
        max_samples=data.max_samples,
        path=data.path or None,
        **_source_options(config, data.name),
    )


def build_validation(config: Config) -> DatasetInterface | None:
    """The held-out prompts; None when data.validation.max_samples is 0."""
    data, validation = config.data, config.data.validation
    if validation.max_samples == 0:
        return None
    name = validation.name or data.name
    path = validation.path or (data.path if name == data.name else "")
    return get_dataset(
        name,
        validation.split,
        seed=config.seed,
        max_samples=validation.max_samples,
        path=path or None,
        **_source_options(config, name),
    )


def _source_options(config: Config, name: str) -> dict[str, object]:
    """The keys of `data` that the source has a parameter for."""
    return {key: getattr(config.data, key) for key in dataset_options(name) & _DATA_KEYS}


def build_prompts(
    config: Config, dataset: DatasetInterface, tokenizer, *, needs_responses: bool = False
) -> Prompts:
    """Tokenized prompts that leave room for a response of full length."""
    max_length = config.distillation.generate_strategy.max_length
    return tokenize_prompts(
        dataset,
        tokenizer,
        max_prompt_length=config.policy.max_total_sequence_length - max_length,
        max_response_length=max_length,
        needs_responses=needs_responses,
        system_prompt=config.data.system_prompt,
        prompt_template=config.data.prompt_template,
    )


def check_same_data(prompts: Prompts) -> None:
    """Raises UserError unless all processes have read the same prompts: each holds all of them."""
    if processes.several():
        processes.check_same("data", {"digest of the prompts": prompts.digest()})


def abstract_model(
    config: ModelConfig,
    source: str | Path,
    mesh: Mesh,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    max_length: int,
    rules=RULES,
) -> Model:
    """A model's graph, and the shapes of its parameters on the mesh: nothing is loaded.

    Args:
      config: sizes and variants.
      source: where they come from, for errors.
      mesh: where the parameters go.
      dtype: of the computation.
      param_dtype: of the stored weights.
      remat: what the backward pass recomputes.
      max_length: positions that will be used.
      rules: which mesh axes split the parameters.
    """
    if max_length > config.max_positions:
        raise UserError(
            f"policy.max_total_sequence_length={max_length} exceeds the {config.max_positions} "
            f"positions of the model in {source}: lower it"
        )

    def construct():
        return Transformer(
            config,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            remat=remat,
            rngs=nnx.Rngs(0),
        )

    graph, shapes = nnx.split(nnx.eval_shape(construct), nnx.Param)
    return Model(graph, on_mesh(shapes, param_shardings(shapes, mesh, rules)))


def on_mesh(shapes, shardings):
    """The tree of shapes, each with its layout."""
    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes, shardings
    )


def build_model(
    folder: Path,
    mesh: Mesh,
    *,
    finish: Callable[[str, nnx.Variable], nnx.Variable] | None = None,
    **options,
) -> Model:
    """Reads a Hugging Face folder, each weight straight to its shards.

    Args:
      folder: config.json and safetensors.
      mesh: where the parameters go.
      finish: see `load_params`.
      **options: those of `abstract_model`.
    """
    config, _ = load_model_config(folder)
    model = abstract_model(config, folder, mesh, **options)
    shardings = jax.tree.map(lambda x: x.sharding, model.params)
    dtype = jnp.dtype(options["param_dtype"])
    params = load_params(folder, config, model.params, shardings, dtype, finish)
    return Model(model.graph, params)


def student_options(config: Config) -> dict[str, Any]:
    """Of `abstract_model`, for the model that is trained: float32 master weights."""
    policy = config.policy
    return dict(
        dtype=policy.precision,
        param_dtype="float32",
        remat=policy.activation_checkpointing,
        max_length=policy.max_total_sequence_length,
    )


def frozen_options(config: Config, precision: str) -> dict[str, Any]:
    """Of `abstract_model`, for a model that is not trained: stored as it computes."""
    return dict(
        dtype=precision,
        param_dtype=precision,
        remat="none",
        max_length=config.policy.max_total_sequence_length,
    )


def build_student(config: Config, folder: Path, mesh: Mesh) -> Model:
    return build_model(folder, mesh, **student_options(config))


def build_frozen_model(config: Config, folder: Path, mesh: Mesh, precision: str) -> Model:
    return build_model(folder, mesh, **frozen_options(config, precision))


def teacher_dtype(config: Config) -> str:
    """What the teacher computes in."""
    return "bfloat16" if config.teacher.precision == "int8" else config.teacher.precision


def build_objective(config: Config) -> Objective:
    distillation = config.distillation
    implementation = distillation.loss_implementation
    return make_objective(
        distillation.kl_type,
        mixed_kl_weight=distillation.mixed_kl_weight,
        jsd_beta=distillation.jsd_beta,
        skew_alpha=distillation.skew_alpha,
        temperature=distillation.kl_temperature,
        temperature_squared=distillation.kl_temperature_squared,
        hard_labels=distillation.hard_labels,
        top_k_teacher=config.teacher.backend == "vllm",
        implementation=None if implementation == "auto" else implementation,
    )


def abstract_state(config: Config, student: Model, optimizer, mesh: Mesh) -> TrainState:
    """Shapes of the train state on the mesh, moments laid out like the student's parameters."""
    opt_state = jax.eval_shape(optimizer.init, student.params)
    memory = HOST_MEMORY if config.policy.optimizer.offload == "host" else "device"
    layout = optimizer_shardings(optimizer, opt_state, student.params, mesh, memory)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step, student.params, on_mesh(opt_state, layout))


def build_state(config: Config, folder: Path, optimizer, mesh: Mesh):
    """(graph, first train state) of the student."""
    if config.policy.optimizer.offload == "host":
        check_host_memory(mesh, "policy.optimizer.offload")
    student = build_student(config, folder, mesh)
    abstract = abstract_state(config, student, optimizer, mesh)
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=layout.opt_state)(student.params)
    step = jax.device_put(jnp.zeros((), jnp.int32), layout.step)
    return student.graph, TrainState(step, student.params, opt_state)


def build_optimizer(config: Config):
    """The optax chain, and the schedule for the log."""
    values = config.policy.optimizer
    schedule = optimizers.make_schedule(
        values.learning_rate, values.schedule, values.warmup_steps, config.distillation.max_steps
    )
    optimizer = optimizers.make_optimizer(
        schedule,
        beta1=values.beta1,
        beta2=values.beta2,
        eps=values.eps,
        weight_decay=values.weight_decay,
        max_grad_norm=values.max_grad_norm,
    )
    return optimizer, schedule


def build_sampling_params(config: Config) -> SamplingParams:
    strategy = config.distillation.generate_strategy
    return SamplingParams(
        max_length=strategy.max_length,
        greedy=strategy.decoding_method == "greedy",
        temperature=strategy.temperature,
        top_k=strategy.top_k,
        top_p=strategy.top_p,
        min_p=strategy.min_p,
    )


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


def build_iterator(config: Config, prompts: Prompts):
    """Endless iterator over the prompts of every step, the same in all processes."""
    policy, strategy = config.policy, config.distillation.generate_strategy
    return make_train_iterator(
        prompts,
        batch_size=policy.train_global_batch_size // strategy.num_generations,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )


def engine_sizes(config: Config) -> EngineConfig:
    generation = config.policy.generation
    return EngineConfig(
        max_length=config.policy.max_total_sequence_length,
        num_slots=generation.num_slots,
        cache_memory=generation.cache_memory * 1e9,
        int8=generation.cache_dtype == "int8",
    )


def build_engine(config: Config, graph: nnx.GraphDef, vocabulary: Vocabulary) -> Engine:
    """What samples from a model: rollouts, held-out answers, fixed data."""
    return Engine(
        graph,
        engine_sizes(config),
        eos_ids=vocabulary.end_ids,
        pad_id=vocabulary.tokenizer.pad_token_id,
        vocab_size=vocabulary.size,
    )


def build_backend(
    config: Config,
    student: Model,
    vocabulary: Vocabulary,
    mesh: Mesh,
    sampler_mesh: Mesh,
    *,
    student_folder: Path,
    workdir: Path,
) -> RolloutBackend:
    """What samples the student's answers.

    Args:
      student: its graph, and parameters or their shapes on the mesh.
      mesh: the trainer's.
      sampler_mesh: where the jax backend samples.
      student_folder: where the student came from.
      workdir: the run's.
    """
    # With lambda_=0 nothing is sampled: no server is asked for anything.
    if config.policy.generation.backend == "vllm" and config.distillation.lambda_ > 0:
        params = build_sampling_params(config)
        folders = dict(student_folder=student_folder, workdir=workdir)
        return build_vllm.build_backend(config, student, params, vocabulary, mesh, **folders)

    def build_in_process() -> JaxBackend:
        return JaxBackend(
            build_engine(config, student.graph, vocabulary),
            dtype=jnp.dtype(config.policy.precision),
            shardings=param_shardings(student.params, mesh, SAMPLER_RULES),
            mesh=sampler_mesh,
            keep_cache=not config.policy.generation.colocated.enabled,
        )

    if config.policy.generation.backend in KNOWN_BACKENDS:
        return build_in_process()
    parts = BackendParts(
        graph=student.graph,
        tokenizer=vocabulary.tokenizer,
        vocab_size=vocabulary.size,
        end_ids=vocabulary.end_ids,
        student_folder=student_folder,
        workdir=workdir,
        build_in_process=build_in_process,
    )
    return get_backend(config.policy.generation.backend)(parts)


def build_batches(
    config: Config,
    prompts: Prompts,
    iterator,
    backend: RolloutBackend,
    mesh: Mesh,
    remote_teacher: VllmTeacher | None,
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
        response_width=width,
        layout=build_layout(config, prompts.prompt_width + width, mesh),
        pad_id=prompts.pad_id,
    )


def build_layout(config: Config, longest: int, mesh: Mesh) -> Layout:
    """The microbatches of a batch; `longest` is the most tokens that a sequence can have."""
    policy, parts = config.policy, batch_parts(mesh)
    budget = tokens_per_microbatch(policy)
    if policy.sequence_packing.enabled:
        length = policy.max_total_sequence_length
        return Layout((Shape(_rows(budget, length, parts), length),), packed=True)
    if not policy.dynamic_batching.enabled:
        return Layout((Shape(policy.train_micro_batch_size, longest),))
    unit = policy.dynamic_batching.sequence_length_round
    halves = (-(-longest // (2**halvings * unit)) * unit for halvings in range(3))
    lengths = sorted({min(length, longest) for length in halves})
    return Layout(tuple(Shape(_rows(budget, length, parts), length) for length in lengths))


def _rows(budget: int, length: int, parts: int) -> int:
    """Rows of `length` tokens within the budget, as many on every part of the mesh."""
    rows = budget // length // parts * parts
    if not rows:
        raise UserError(
            f"microbatches of {budget} tokens hold no row of {length} tokens on each of {parts} "
            f"devices (mesh data x fsdp): set train_mb_tokens to at least {parts * length}"
        )
    return rows


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
