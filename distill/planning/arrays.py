"""The arrays that a run holds, as shapes on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from distill.base.sharding import (
    SAMPLER_RULES,
    AnyMesh,
    bytes_per_device,
    param_shardings,
    stacked_sharding,
)
from distill.batches.rows import Batch, make_batch
from distill.build.data import teacher_prompt
from distill.build.layout import build_layout
from distill.build.models import (
    abstract_model,
    abstract_state,
    on_mesh,
    student_options,
)
from distill.build.optimizer import build_optimizer
from distill.build.sampler import engine_sizes
from distill.build.teachers import abstract_teacher
from distill.config.schema import own_teacher
from distill.data.sequences import Sequences
from distill.models.decoding import abstract_loop_weights
from distill.models.model import Model
from distill.planning.counts import Counts, count
from distill.planning.workload import Workload
from distill.sampling.cache import Cache, map_arrays
from distill.sampling.engine import Engine
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
class Arrays:
    """Shapes and layouts of what a run holds; no teacher or sampler where none is here."""

    student: Model
    state: TrainState
    teacher: Model | None
    batch: Batch
    sampler: Sampler | None
    student_counts: Counts
    teacher_counts: Counts | None


def make_arrays(workload: Workload, mesh: AnyMesh, sampler_mesh: AnyMesh) -> Arrays:
    """All arrays of a run on meshes that may be described or abstract.

    Raises:
      UserError: a mesh does not divide the models.
    """
    config = workload.config
    options = student_options(config.policy)
    student = abstract_model(workload.student, "the student", mesh, **options)
    optimizer = build_optimizer(config.policy.optimizer, config.distillation.max_steps)
    teacher = teacher_counts = None
    own = own_teacher(config)
    averages = own == "ema"
    state = abstract_state(student, workload.student, optimizer, mesh, config.policy, averages)
    if own:
        teacher = Model(student.graph, getattr(state, "average", None))
        teacher_counts = count(workload.student, student.params)
    elif workload.teacher:
        teacher = abstract_teacher(config, workload.teacher, mesh)
        if not config.teacher.scores:  # of which only the output head is here
            teacher_counts = count(workload.teacher, teacher.params)
    return Arrays(
        student,
        state,
        teacher,
        _abstract_batch(workload, mesh),
        _abstract_sampler(workload, student, sampler_mesh) if workload.samples else None,
        count(workload.student, student.params),
        teacher_counts,
    )


def _abstract_sampler(workload: Workload, student: Model, mesh: AnyMesh) -> Sampler:
    config, tokens = workload.config, workload.tokens
    engine = Engine(
        student.graph,
        engine_sizes(config.policy),
        eos_ids=(0,),
        pad_id=0,
        vocab_size=workload.vocab_size,
    )
    # What a refit gives; see `rollout.in_process.JaxBackend`.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, config.policy.precision), student.params
    )
    weights = on_mesh(shapes, param_shardings(shapes, mesh, SAMPLER_RULES))
    repeats = config.distillation.generate_strategy.num_generations
    abstract_mesh = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(abstract_mesh):
        return Sampler(
            engine,
            weights,
            abstract_loop_weights(nnx.merge(student.graph, weights)),
            engine.abstract_cache(weights, tokens.rows),
            engine.prefill_shape(weights, tokens.rows, repeats, tokens.prompt),
            count(workload.student, weights),
        )


def _abstract_batch(workload: Workload, mesh: AnyMesh) -> Batch:
    """A batch of full rows: the longest prompts, with responses up to the limit."""
    config = workload.config
    rows, length = config.policy.train_global_batch_size, config.policy.max_total_sequence_length
    response = config.distillation.generate_strategy.max_length
    columns: dict[str, int | np.ndarray] = {"weight": 1}
    if config.teacher.backend == "vllm":
        known = rows * response, config.teacher.vllm.top_k + 1  # and the sampled token
        columns |= {name: np.zeros(known) for name in ("teacher_ids", "teacher_log_probs")}
    prompts = Sequences.of_tokens([np.zeros(length - response)] * rows)
    responses = Sequences.of_tokens([np.zeros(response)] * rows, **columns)
    layout = build_layout(config.policy, length, mesh)
    sequences = prompts.join(responses)
    view = sequences if teacher_prompt(config) else None  # as long at most
    batch = make_batch(sequences, layout=layout, pad_id=0, view=view)

    def placed(x: np.ndarray | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stacked_sharding(mesh, x.ndim))

    if config.teacher.scores and workload.teacher:  # shapes: the arrays would be large
        width, dtype = workload.teacher.model_width, config.teacher.dtype
        for part in batch:
            shape = *part.tokens_bt.shape, width
            hidden: Any = jax.ShapeDtypeStruct(shape, dtype)
            part.columns["teacher_hidden"] = hidden
    return jax.tree.map(placed, batch)
