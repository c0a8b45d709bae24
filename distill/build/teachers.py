"""Builds the teacher that runs here: in 8 bits or not, in the devices' memory or the hosts'."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distill.base.sharding import (
    HOST_MEMORY,
    RULES,
    SPREAD_RULES,
    check_host_memory,
    constrain,
    in_host_memory,
    on_device_memory,
)
from distill.batches.rows import padded_rows
from distill.build.devices import make_put
from distill.build.models import abstract_model, build_model, frozen_options
from distill.config.schema import Config
from distill.data.prompts import Prompts
from distill.kernels.linear_divergence import per_token_divergences
from distill.losses.divergences import get_divergence
from distill.models.checkpoints.load import load_model_config
from distill.models.facts import ModelConfig
from distill.models.model import Model
from distill.models.quantization import abstract_quantized, quantize

Keep = Callable[[str, nnx.Variable], nnx.Variable]


def build_teacher(
    config: Config,
    folder: Path | None,
    mesh: Mesh,
    prompts: Prompts | None = None,
    vocab_size: int | None = None,
) -> Model | None:
    """The teacher on the mesh; None for hard labels and for one behind servers.

    Args:
      config: how it is stored.
      folder: its Hugging Face folder.
      mesh: where it goes.
      prompts: text on which an 8-bit teacher is compared with itself in bfloat16; None: it is not.
      vocab_size: ids in use, for that comparison.

    Raises:
      UserError: the platform cannot offload, or the folder is not as it should be.
    """
    if folder is None or config.teacher.backend != "local":
        return None
    teacher = config.teacher
    if teacher.offload != "none":
        check_host_memory(mesh, "teacher.offload")
    load = functools.partial(build_model, folder, mesh, **teacher_options(config))
    keep = _keep(teacher.precision, teacher.offload, load_model_config(folder)[0])
    if teacher.precision == "int8" and prompts is not None:
        # The one in bfloat16 may be larger than the devices: it is streamed from host memory.
        full = load(finish=_offload_layers)
        return _quantize_and_compare(full, keep, mesh, config, prompts, vocab_size)
    model = load(finish=keep)
    return _placed(model.graph, model.params, teacher.offload)


def teacher_options(config: Config) -> dict[str, Any]:
    """Of `abstract_model`."""
    rules = SPREAD_RULES if config.teacher.split_over_data else RULES
    return frozen_options(config.policy, config.teacher.dtype) | dict(rules=rules)


def abstract_teacher(config: Config, model_config: ModelConfig, mesh) -> Model:
    """Shapes of a teacher on the mesh, where the train step takes it from."""
    model = abstract_model(model_config, "the teacher", mesh, **teacher_options(config))
    streamed = config.teacher.offload == "layers"  # one offloaded as a whole is fetched before

    def keep(path: tuple, param: nnx.Variable) -> nnx.Variable:
        name = "/".join(map(str, path))
        if config.teacher.precision == "int8":
            param = abstract_quantized(model_config, name, param)
        if streamed and _is_streamed(name, param):
            return param.replace(jax.tree.map(in_host, param.get_value()))
        return param

    def in_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(sharding=x.sharding.with_memory_kind(HOST_MEMORY))

    flat = [(path, keep(path, param)) for path, param in nnx.to_flat_state(model.params)]
    return dataclasses.replace(model, params=nnx.from_flat_state(flat))


def _placed(graph: nnx.GraphDef, params: nnx.State, offload: str) -> Model:
    return Model(graph, params, on_device_memory(params) if offload == "host" else None)


def _keep(precision: str, offload: str, model_config: ModelConfig) -> Keep:
    """What is done with a parameter once it is loaded."""

    def keep(name: str, param: nnx.Variable) -> nnx.Variable:
        if precision == "int8":
            param = quantize(model_config, name, param)
        if offload == "host":
            return param.replace(jax.tree.map(in_host_memory, param.get_value()))
        return _offload_layers(name, param) if offload == "layers" else param

    return keep


def _offload_layers(name: str, param: nnx.Variable) -> nnx.Variable:
    """The layers' weights to host memory; norms are small, and the rest is used as a whole."""
    if not _is_streamed(name, param):
        return param
    return param.replace(jax.tree.map(in_host_memory, param.get_value()))


def _is_streamed(name: str, param: nnx.Variable) -> bool:
    return name.startswith("layers/") and param.get_value().ndim > 2


def _quantize_and_compare(
    full: Model, keep: Keep, mesh: Mesh, config: Config, prompts: Prompts, vocab_size: int
) -> Model:
    """The model in 8 bits, and its divergence from itself on a batch of prompts."""
    size = config.evaluation.batch_size
    texts = prompts.sequences(np.arange(size) % len(prompts)).prompts()
    (rows,) = padded_rows(texts, size, prompts.prompt_width, prompts.pad_id)
    tokens_bt, lengths_b = map(make_put(mesh), (rows.tokens_bt, rows.lengths_b))
    before_btd = _hidden(full.graph, full.params, tokens_bt)
    flat, graph = dict(nnx.to_flat_state(full.params)), full.graph
    del full
    quantized = []
    for path in list(flat):  # each is freed when it is replaced
        param = flat.pop(path)
        value = param.get_value()
        param = param.replace(jax.device_put(value, on_device_memory(value)))
        quantized.append((path, keep("/".join(path), param)))
    model = _placed(graph, nnx.from_flat_state(quantized), config.teacher.offload)
    kl = _mean_divergence(graph, model.fetch(), before_btd, tokens_bt, lengths_b, vocab_size)
    return dataclasses.replace(model, quantization_kl=float(kl))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: nnx.GraphDef, params: nnx.State, tokens_bt: jax.Array) -> jax.Array:
    # Padding stands behind the prompts, where no earlier token sees it.
    return nnx.merge(graph, params)(tokens_bt)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _mean_divergence(graph, params, before_btd, tokens_bt, lengths_b, vocab_size: int) -> jax.Array:
    """KL(before || now), nats per prompt token."""
    model = nnx.merge(graph, params)
    now_td, before_td = (
        constrain(hidden_btd.reshape(-1, hidden_btd.shape[-1]), "token", "act_embed")
        for hidden_btd in (model(tokens_bt), before_btd)
    )
    [kl_t] = per_token_divergences(
        now_td,
        model.head(),
        before_td,
        model.head(),
        divergences=(get_divergence("forward"),),
        temperature=1.0,
        vocab_size=vocab_size,
    )
    valid_bt = jnp.arange(tokens_bt.shape[1]) < lengths_b[:, None]
    return jnp.where(valid_bt.reshape(-1), kl_t, 0.0).sum() / lengths_b.sum()
