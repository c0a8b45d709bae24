"""A teacher on the trainer's mesh: in 8 bits or not, in the devices' memory or the hosts'."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import HOST_MEMORY, flatten_tokens, in_host_memory, on_device_memory
from distill.kernels.linear_divergence import per_token_divergences
from distill.losses.divergences import get_divergence
from distill.models.facts import ModelConfig
from distill.models.model import Model
from distill.models.quantization import quantize, quantized_shapes, with_each
from distill.teachers.base import Teacher

Keep = Callable[[str, nnx.Variable], nnx.Variable]


class Texts(NamedTuple):
    """Right-padded rows of tokens on the mesh, and their lengths."""

    tokens_bt: jax.Array
    lengths_b: jax.Array


class LocalTeacher(Teacher):
    """A teacher in the step, on the mesh, or in host memory and fetched or streamed from there.

    `quantization_kl`: KL(bfloat16 || these weights), nats per token; None if not measured.
    """

    def __init__(self, model: Model, quantization_kl: float | None = None):
        self.model, self.quantization_kl = model, quantization_kl

    def measured(self) -> dict[str, float]:
        kl = self.quantization_kl
        return {} if kl is None else {"quantization_kl": kl}


def load_teacher(
    load: Callable[..., Model],
    model_config: ModelConfig,
    *,
    precision: str,
    offload: str,
    compared_on: Texts | None = None,
    vocab_size: int = 0,
) -> LocalTeacher:
    """Loads a teacher as it is stored between steps.

    Args:
      load: reads the model; `finish` is what becomes of each parameter once it is there.
      precision: int8 stores matrices in 8 bits; anything else stores what is loaded.
      offload: none, host (as a whole, fetched for a step) or layers (streamed within it).
      compared_on: for one in 8 bits, texts on which it is compared with itself in bfloat16.
    """
    keep = _keep(model_config, precision, offload)
    if compared_on is None:
        return LocalTeacher(_placed(load(finish=keep), offload))
    # The one in bfloat16 may be larger than the devices: it is streamed from host memory.
    full = load(finish=_keep(model_config, "bfloat16", "layers"))
    graph, before_btd = full.graph, _hidden(full.graph, full.params, compared_on.tokens_bt)
    flat = dict(nnx.to_flat_state(full.params))
    del full
    quantized = []
    for path in list(flat):  # each is freed when it is replaced
        param = flat.pop(path)
        value = param.get_value()
        param = param.replace(jax.device_put(value, on_device_memory(value)))
        quantized.append((path, keep("/".join(map(str, path)), param)))
    model = _placed(Model(graph, nnx.from_flat_state(quantized)), offload)
    kl = _mean_divergence(graph, model.fetch(), before_btd, *compared_on, vocab_size)
    return LocalTeacher(model, float(kl))


def abstract_stored(
    model: Model, model_config: ModelConfig, *, precision: str, offload: str
) -> Model:
    """Shapes of a loaded teacher, where the train step takes it from, from those of the model."""

    def in_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(sharding=x.sharding.with_memory_kind(HOST_MEMORY))

    def keep(name: str, param: nnx.Variable) -> nnx.Variable:
        if offload == "layers" and _is_streamed(name, param):  # as a whole, it is fetched before
            return param.replace(jax.tree.map(in_host, param.get_value()))
        return param

    params = quantized_shapes(model_config, model.params) if precision == "int8" else model.params
    return dataclasses.replace(model, params=with_each(keep, params))


def _keep(model_config: ModelConfig, precision: str, offload: str) -> Keep:
    """What is done with a parameter once it is loaded."""

    def keep(name: str, param: nnx.Variable) -> nnx.Variable:
        if precision == "int8":
            param = quantize(model_config, name, param)
        if offload == "host" or (offload == "layers" and _is_streamed(name, param)):
            return param.replace(jax.tree.map(in_host_memory, param.get_value()))
        return param

    return keep


def _is_streamed(name: str, param: nnx.Variable) -> bool:
    """Whether it is a layers' matrix; norms are small, and the rest is used as a whole."""
    return name.startswith("layers/") and param.get_value().ndim > 2


def _placed(model: Model, offload: str) -> Model:
    """The model with the layout in which a step uses it, if it is fetched for that."""
    used = on_device_memory(model.params) if offload == "host" else None
    return dataclasses.replace(model, on_devices=used)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: nnx.GraphDef, params: nnx.State, tokens_bt: jax.Array) -> jax.Array:
    # Padding stands behind the texts, where no earlier token sees it.
    return nnx.merge(graph, params)(tokens_bt)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _mean_divergence(graph, params, before_btd, tokens_bt, lengths_b, vocab_size: int) -> jax.Array:
    """KL(before || now), nats per token of the texts."""
    model = nnx.merge(graph, params)
    now_td, before_td = map(flatten_tokens, (model(tokens_bt), before_btd))
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
    return jnp.where(flatten_tokens(valid_bt), kl_t, 0.0).sum() / lengths_b.sum()
