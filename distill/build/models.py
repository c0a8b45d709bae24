"""Student and train state: graphs, shapes on a mesh, weights straight to their shards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distill.base.errors import UserError
from distill.base.sharding import (
    HOST_MEMORY,
    RULES,
    AnyMesh,
    optimizer_shardings,
    param_shardings,
    replicated,
)
from distill.config.policy import Policy
from distill.models.checkpoints.load import load_head, load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.models.lora import abstract_adapters, make_adapters
from distill.models.model import Model
from distill.models.quantization import quantize, quantized_shapes
from distill.models.transformer import Transformer
from distill.step import AveragedState, TrainState


def abstract_model(
    config: ModelConfig,
    source: str | Path,
    mesh: AnyMesh,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    max_length: int,
    replays: bool = False,
    rules=RULES,
) -> Model:
    """A model's graph, and the shapes of its parameters on the mesh: nothing is loaded.

    `source` is where the config comes from, for errors; `max_length` are the positions that will be
    used.
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
            replays=replays,
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

    `finish` is that of `load_params`, `options` are those of `abstract_model`.
    """
    config, _ = load_model_config(folder)
    model = abstract_model(config, folder, mesh, **options)
    shardings = jax.tree.map(lambda x: x.sharding, model.params)
    dtype = jnp.dtype(options["param_dtype"])
    params = load_params(folder, config, model.params, shardings, dtype, finish)
    return Model(model.graph, params)


def head_only(model: Model) -> Model:
    """The shapes of a model's output head, and nothing else of it."""
    network = nnx.merge(model.graph, model.params)
    kept = "embedding" if network.config.tied else "output_head"
    for name in {path[0] for path, _ in nnx.to_flat_state(model.params)} - {kept}:
        delattr(network, str(name))
    return Model(*nnx.split(network, nnx.Param))


def build_head(folder: Path, mesh: Mesh, **options) -> Model:
    """`build_model` of the output head alone; no other weight is read."""
    config, _ = load_model_config(folder)
    model = head_only(abstract_model(config, folder, mesh, **options))
    shardings = jax.tree.map(lambda x: x.sharding, model.params)
    dtype = jnp.dtype(options["param_dtype"])
    return Model(model.graph, load_head(folder, config, model.params, shardings, dtype))


def check_router(policy: Policy, config: ModelConfig) -> None:
    """Raises UserError if the student has no router for what is asked of one."""
    if policy.records_routes and config.experts is None:
        raise UserError(
            f"policy.router_replay={policy.router_replay} is for a mixture of experts, and a "
            f"student of the family {config.family} is none: set it to off"
        )
    if policy.router_aux_loss and (config.experts is None or config.experts.scores != "softmax"):
        raise UserError(
            f"policy.router_aux_loss={policy.router_aux_loss} is for routers that give "
            f"probabilities, and a student of the family {config.family} has none: set it to 0"
        )


def student_options(policy: Policy) -> dict[str, Any]:
    """Of `abstract_model`, for the student: float32 master weights, or the base of adapters."""
    return dict(
        dtype=policy.precision,
        param_dtype=policy.precision if policy.lora.rank else "float32",
        remat=policy.activation_checkpointing,
        max_length=policy.max_total_sequence_length,
        replays=policy.router_replay == "replay",
    )


def frozen_options(policy: Policy, precision: str) -> dict[str, Any]:
    """Of `abstract_model`, for a model that is not trained: stored as it computes."""
    return dict(
        dtype=precision,
        param_dtype=precision,
        remat="none",
        max_length=policy.max_total_sequence_length,
    )


def load_student(folder: Path, mesh: Mesh, policy: Policy) -> nnx.State:
    """The student's parameters before the first update; with adapters, what stays frozen."""
    finish = None
    if policy.lora.base_dtype == "int8":
        finish = functools.partial(quantize, load_model_config(folder)[0])
    return build_model(folder, mesh, finish=finish, **student_options(policy)).params


def abstract_state(
    student: Model,
    config: ModelConfig,
    optimizer,
    mesh: AnyMesh,
    policy: Policy,
    averages: bool = False,
) -> TrainState:
    """Shapes of the train state on the mesh, moments laid out like what is trained.

    Args:
      config: of the student.
      averages: whether a moving average of what is trained is kept.
    """
    trainable: nnx.State = student.params
    frozen: nnx.State = nnx.State({})
    if policy.lora.rank:
        shapes = abstract_adapters(student.params, policy.lora)
        trainable, frozen = on_mesh(shapes, param_shardings(shapes, mesh)), student.params
        if policy.lora.base_dtype == "int8":
            frozen = quantized_shapes(config, frozen)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    memory = HOST_MEMORY if policy.optimizer.offload == "host" else "device"
    layout = optimizer_shardings(opt_state, trainable, mesh, memory)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(
        step,  # type: ignore[arg-type]  # a shape where the state has the array
        trainable,
        on_mesh(opt_state, layout),
        frozen,
    )
    return AveragedState(**vars(state), average=trainable) if averages else state


def first_state(params: nnx.State, optimizer, shapes: TrainState, seed: int) -> TrainState:
    """The train state before the first update, laid out like `shapes`; `seed`: of adapters."""
    layout = jax.tree.map(lambda x: x.sharding, shapes)
    frozen: nnx.State = nnx.State({})
    if shapes.frozen:
        params, frozen = make_adapters(shapes.trainable, seed), params
    opt_state = jax.jit(optimizer.init, out_shardings=layout.opt_state)(params)
    step = jax.device_put(np.zeros((), np.int32), layout.step)
    state = TrainState(step, params, opt_state, frozen)
    if not isinstance(shapes, AveragedState):
        return state
    # Not the same arrays: an update donates all of the state.
    return AveragedState(**vars(state), average=jax.tree.map(jnp.copy, params))
