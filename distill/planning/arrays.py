"""The arrays that a run holds, as shapes on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from distill.base.sharding import HOST_MEMORY, AnyMesh, bytes_per_device, stacked_sharding
from distill.batches.rows import Batch, Rows, make_batch
from distill.build.data import teacher_prompts
from distill.build.devices import build_layout
from distill.build.models import abstract_model, abstract_state, student_options
from distill.build.optimizer import optimizer_of
from distill.build.sampler import engine_sizes, sampler_weights
from distill.build.teachers import abstract_teacher, part_of_state
from distill.config.method import OneTeacher
from distill.config.schema import all_teachers, ema_decay
from distill.data.sequences import Sequences
from distill.models import routes
from distill.models.decoding import abstract_loop_weights
from distill.models.facts import ModelConfig
from distill.models.model import Model
from distill.planning.counts import Counts, count
from distill.planning.workload import Workload
from distill.sampling.cache import Cache, map_arrays
from distill.sampling.engine import Engine
from distill.sampling.schedule import prompt_bucket, prompts_per_prefill
from distill.step import TrainState


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Shapes and layouts of what samples; the engine itself is not run.

    The prefill is the largest: parts, prompts, tokens.
    """

    engine: Engine
    weights: Any
    loop_weights: Any
    cache: Cache
    prefill: tuple[int, int, int]
    counts: Counts

    @property
    def slots(self) -> int:
        """Of every part."""
        return jax.tree.leaves(self.cache)[0].shape[2]

    @property
    def token_bytes(self) -> float:
        """Bytes per device of the cache, for each token that a slot has room for."""
        return self._bytes_of_slot(True) / self.engine.config.cache_size

    @property
    def state_bytes(self) -> float:
        """Bytes per device of what each slot has whatever its length."""
        return self._bytes_of_slot(False)

    def _bytes_of_slot(self, positions: bool) -> float:
        def chosen(array, axes):
            return array if (axes.position is not None) == positions else None

        return bytes_per_device(map_arrays(chosen, self.cache)) / self.slots


@dataclasses.dataclass(frozen=True)
class TeacherArrays:
    """Shapes and layouts of a teacher on the mesh.

    `share`: of the rows, what it is asked about. A model without parameters is the state's own, and
    one without counts has only its output head here.
    """

    facts: ModelConfig
    model: Model
    counts: Counts | None
    itemsize: int
    share: float


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Shapes and layouts of what a run holds; no teacher or sampler where none is here."""

    student: Model
    state: TrainState
    teachers: dict[str, TeacherArrays]
    batch: Batch
    sampler: Sampler | None
    student_counts: Counts

    @property
    def computed_teachers(self) -> list[tuple[TeacherArrays, Counts]]:
        """Those of which more than the output head is here."""
        return [(each, each.counts) for each in self.teachers.values() if each.counts]

    @property
    def weights_of_teachers(self) -> list[Any]:
        """Of each model once: several teachers may be one."""
        models = {id(each.model): each.model for each in self.teachers.values()}
        return [model.params for model in models.values()]

    @property
    def fetched(self) -> int:
        """Bytes per device of the largest teacher that the step fetches."""
        sizes = [
            bytes_per_device(params, fetched=True) - bytes_per_device(params)
            for params in self.weights_of_teachers
            if not bytes_per_device(params)  # others are streamed layer by layer
        ]
        return max(sizes, default=0)


def make_arrays(workload: Workload, mesh: AnyMesh, sampler_mesh: AnyMesh) -> Arrays:
    """All arrays of a run on meshes that may be described or abstract.

    Raises:
      UserError: a mesh does not divide the models.
    """
    config = workload.config
    options = student_options(config.policy)
    student = abstract_model(workload.student, "the student", mesh, **options)
    optimizer = optimizer_of(config)
    averages = ema_decay(config) > 0
    state = abstract_state(student, workload.student, optimizer, mesh, config.policy, averages)
    return Arrays(
        student,
        state,
        _abstract_teachers(workload, student, state, mesh),
        _abstract_batch(workload, mesh),
        _abstract_sampler(workload, student, sampler_mesh) if workload.samples else None,
        count(workload.student, student.params),
    )


def _abstract_teachers(
    workload: Workload, student: Model, state: TrainState, mesh: AnyMesh
) -> dict[str, TeacherArrays]:
    config, made, teachers = workload.config, {}, {}
    sections = all_teachers(config).items()
    in_host = (each for _, each in sections if each.offload == "host" and not each.scores)
    # A single one is fetched before the step.
    several_hosted = len({(each.model, each.storage) for each in in_host}) > 1
    for (name, section), facts, share in zip(
        sections, workload.teachers, workload.shares, strict=True
    ):
        if facts is None:
            continue
        stored = section.model, section.storage
        in_state = part_of_state(config, section) is not None
        if stored not in made and in_state:
            average = getattr(state, "average", None) if section.model == "ema" else None
            made[stored] = Model(student.graph, average)
        elif stored not in made:
            made[stored] = abstract_teacher(config, section, facts, mesh)
            if section.offload == "host" and several_hosted:
                made[stored] = _in_host_memory(made[stored])
        model = made[stored]
        params = student.params if in_state else model.params
        counts = None if section.scores else count(facts, params)
        size = jnp.dtype(section.dtype).itemsize
        teachers[name] = TeacherArrays(facts, model, counts, size, share)
    return teachers


def _in_host_memory(model: Model) -> Model:
    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(sharding=x.sharding.with_memory_kind(HOST_MEMORY))

    return dataclasses.replace(model, params=jax.tree.map(placed, model.params))


def _abstract_sampler(workload: Workload, student: Model, mesh: AnyMesh) -> Sampler:
    config, tokens = workload.config, workload.tokens
    engine = Engine(
        student.graph,
        dataclasses.replace(
            engine_sizes(config.policy), records_routes=config.policy.records_routes
        ),
        eos_ids=(0,),
        pad_id=0,
        vocab_size=workload.vocab_size,
    )
    weights = sampler_weights(config.policy, student, mesh)
    repeats = config.distillation.generate_strategy.num_generations
    abstract_mesh = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(abstract_mesh):
        parts, slots = engine.slots_for(weights, tokens.rows)
        size = prompt_bucket(tokens.prompt)
        return Sampler(
            engine,
            weights,
            abstract_loop_weights(nnx.merge(student.graph, weights)),
            engine.slots.abstract_cache(weights, parts, slots),
            (parts, prompts_per_prefill(size, slots, repeats), size),
            count(workload.student, weights),
        )


def _abstract_batch(workload: Workload, mesh: AnyMesh) -> Batch:
    """A batch of full rows: the longest prompts, with responses up to the limit."""
    config = workload.config
    rows, length = config.policy.train_global_batch_size, config.policy.max_total_sequence_length
    response = config.distillation.generate_strategy.max_length
    prompts = Sequences.of_tokens([np.zeros(length - response)] * rows)
    layout, views = build_layout(config.policy, length, mesh), teacher_prompts(config)
    batch: list[Rows] = []
    for number, (name, teacher) in enumerate((all_teachers(config) or {"": OneTeacher()}).items()):
        columns: dict[str, int | np.ndarray] = {"weight": 1}
        if teacher.backend == "vllm":
            known = rows * response, teacher.vllm.top_k + 1  # and the sampled token
            columns |= {name: np.zeros(known) for name in ("teacher_ids", "teacher_log_probs")}
        sequences = prompts.join(Sequences.of_tokens([np.zeros(response)] * rows, **columns))
        by_scores = teacher.backend == "vllm" or teacher.scores  # which have read it before
        differs = name in views and views[name].differs and not by_scores
        view = sequences if differs else None  # as long at most
        if teacher.alignment != "none":
            view = sequences.with_columns(piece=-1, piece_size=0)
        made = make_batch(sequences, layout=layout, pad_id=0, view=view, teacher=number)
        if teacher.scores and (facts := workload.teachers[number]):
            for part in made:  # shapes: the arrays would be large
                shape = *part.tokens_bt.shape, facts.model_width
                hidden: Any = jax.ShapeDtypeStruct(shape, teacher.dtype)
                part.columns["teacher_hidden"] = hidden
        if config.policy.records_routes:
            for part in made:
                shape = *part.tokens_bt.shape, routes.width(workload.student)
                picked: Any = jax.ShapeDtypeStruct(shape, routes.DTYPE)
                part.columns["routed_experts"] = picked
        batch += made

    def placed(x: np.ndarray | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stacked_sharding(mesh, x.shape))

    return jax.tree.map(placed, tuple(batch))
