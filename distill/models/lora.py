"""LoRA (2106.09685): a frozen matrix plus a product of two narrow ones, which are trained.

Adapters are a tree beside the parameters: a matrix at PATH has its factors at PATH/a and PATH/b. A
layer merges them where it uses the matrix, once per layer and pass. So all families have one code
path, and trainer, sampler and export compute with the same rounded weights. The price is the
matrix's gradient, which a separate product with the factors would not need.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax.sharding import Sharding

from distill.base.errors import UserError
from distill.config.policy import ALL_LINEAR, Lora
from distill.models.primitives import matrix_axes
from distill.models.quantization import dequantize

Path = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """base + scale * a @ b, for every index of the leading axes.

    Attributes:
      base: (leading..., inputs..., outputs...), perhaps in 8 bits.
      a: (leading..., inputs..., rank).
      b: (leading..., rank, outputs...).
      scale: alpha / rank.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})


def is_stored(x: Any) -> bool:
    """Whether it is a weight that is no plain array."""
    return isinstance(x, Adapted | qwix.QArray)


def weight(value: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The weights to compute with, of a parameter's value."""
    if not isinstance(value, Adapted):
        return dequantize(value, jnp.dtype(dtype))
    a, b = value.a, value.b
    base = dequantize(value.base, a.dtype)
    number = math.prod(base.shape[: a.ndim + b.ndim - 2 - base.ndim])
    # With an axis that counts matrices even if there is one: remat=dots keeps no such product.
    product = jax.lax.dot_general(
        a.reshape(number, -1, a.shape[-1]),
        b.reshape(number, a.shape[-1], -1),
        (((2,), (1,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (base + value.scale * product.reshape(base.shape)).astype(dtype)


def merged(params: nnx.State, dtype: jax.typing.DTypeLike) -> nnx.State:
    """The parameters as plain arrays: those that are not yet, in `dtype`."""

    def merge(value):
        if not is_stored(value):
            return value
        held = value.base if isinstance(value, Adapted) else value
        return _merge(value, jnp.dtype(dtype), jax.tree.leaves(held)[0].sharding)

    return jax.tree.map(merge, params, is_leaf=is_stored)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _merge(value, dtype: jnp.dtype, place: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight(value, dtype), place)


def attach(frozen: nnx.State, trainable: nnx.State) -> nnx.State:
    """One tree of all parameters, in which adapters stand at their matrices."""
    flat = dict(nnx.to_flat_state(frozen))
    factors: dict[Path, dict[str, nnx.Variable]] = {}
    for path, param in nnx.to_flat_state(trainable):
        if path[:-1] in flat:
            factors.setdefault(path[:-1], {})[str(path[-1])] = param
        else:
            flat[path] = param
    for path, each in factors.items():
        a, b = each["a"], each["b"]
        scale = a.get_metadata()["scale"]
        value = Adapted(flat[path].get_value(), a.get_value(), b.get_value(), scale)
        flat[path] = flat[path].replace(value)
    return nnx.from_flat_state(list(flat.items()))


def abstract_adapters(params: nnx.State, lora: Lora) -> nnx.State:
    """Shapes of the adapters of a model, from those of its parameters, in float32.

    Raises:
      UserError: a target is no matrix of the layers, or a matrix has a side below the rank.
    """
    matrices = {
        path: (param, axes)
        for path, param in nnx.to_flat_state(params)
        if (axes := matrix_axes(param.get_metadata()["logical_axes"]))
    }
    flat: list[tuple[Path, nnx.Variable]] = []
    for path in _targets(list(matrices), lora):
        param, (leading, inputs) = matrices[path]
        shape, axes = param.get_value().shape, param.get_metadata()["logical_axes"]
        middle = leading + inputs
        _check_rank(lora, path, math.prod(shape[leading:middle]), math.prod(shape[middle:]))
        factors = {
            "a": ((*shape[:middle], lora.rank), (*axes[:middle], "rank")),
            "b": (
                (*shape[:leading], lora.rank, *shape[middle:]),
                (*axes[:leading], "rank", *axes[middle:]),
            ),
        }
        for name, (sizes, names) in factors.items():
            made = jax.ShapeDtypeStruct(sizes, jnp.float32)
            scale = lora.alpha / lora.rank
            flat.append(((*path, name), nnx.Param(made, logical_axes=names, scale=scale)))
    return nnx.from_flat_state(flat)


def _targets(paths: list[Path], lora: Lora) -> list[Path]:
    """Of the layers' matrices, those that are adapted."""
    names = sorted({path[-1] for path in paths})
    if unknown := [each for each in lora.targets if each not in (*names, ALL_LINEAR)]:
        raise UserError(
            f"policy.lora.targets names {unknown[0]}: the student's layers have the matrices "
            f"{', '.join(names)}; {ALL_LINEAR} stands for all"
        )
    everything = ALL_LINEAR in lora.targets
    return [path for path in paths if everything or path[-1] in lora.targets]


def _check_rank(lora: Lora, path: Path, inputs: int, outputs: int) -> None:
    if lora.rank > min(inputs, outputs):
        raise UserError(
            f"policy.lora.rank={lora.rank} exceeds a side of {'/'.join(map(str, path))}, a matrix "
            f"of {inputs} x {outputs}: lower it, or leave {path[-1]} out of policy.lora.targets"
        )


def make_adapters(shapes: nnx.State, seed: int) -> nnx.State:
    """Adapters that change nothing yet: b is zero, and a as peft begins it.

    What they are depends on the seed and the shapes alone, not on their layouts.
    """
    layout = jax.tree.map(lambda x: x.sharding, shapes)

    def make():
        made = []
        for number, (path, param) in enumerate(nnx.to_flat_state(shapes)):
            shape = param.get_value().shape
            if path[-1] == "b":
                value = jnp.zeros(shape, jnp.float32)
            else:
                leading, _ = matrix_axes(param.get_metadata()["logical_axes"]) or (0, 0)
                bound = 1 / math.sqrt(math.prod(shape[leading:-1]))
                key = jax.random.fold_in(jax.random.key(seed), number)
                value = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
            made.append((path, param.replace(value)))
        return nnx.from_flat_state(made)

    return jax.jit(make, out_shardings=layout)()
