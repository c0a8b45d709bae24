"""A layer's weights, gathered before they are used where the compiler would send too much."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from distill.base.sharding import gather_in_stages, gathers_in_stages, in_device_memory
from distill.models import lora
from distill.models.primitives import matrix_axes


def gathered(layer: nnx.State, dtype: jax.typing.DTypeLike, recomputed: bool) -> nnx.State:
    """One layer's parameters; matrices as they compute, and whole, where `gathers_in_stages`.

    `recomputed`: whether the backward pass computes the layer once more. Where it does not, it
    would keep the whole matrices of all layers, so only what has no gradient is gathered here.
    """

    def gather(param: nnx.Variable) -> nnx.Variable:
        axes = param.get_metadata()["logical_axes"]
        width = next((axis for axis in axes if axis in ("embed", "expert_embed")), None)
        if width is None or matrix_axes(axes) is None or not gathers_in_stages(width):
            return param
        weight = lora.weight(in_device_memory(param.get_value()), dtype)
        return param.replace(_gather(weight, axes[1:], width, recomputed))

    return jax.tree.map(gather, layer, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight: jax.Array, axes: tuple[str | None, ...], width: str, recomputed: bool):
    """The gradient is not gathered: it is summed to where the weight was."""
    return gather_in_stages(weight, axes, width)


_gather.defvjp(
    lambda weight, *how: (gather_in_stages(weight, *how[:2]) if how[-1] else weight, None),
    lambda axes, width, recomputed, _, gradient: (gradient,),
)
