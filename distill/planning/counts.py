"""What a model's weights add up to, counted from the shapes of its parameters on a mesh.

A family of models is known here by its parameters alone: their logical axes say what a matrix
takes, what it makes, and what is gathered before it is used; their layouts say what a device holds.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import jax
from flax import nnx

from distill.base.sharding import RULES, WIDTH
from distill.models import expert_exchange
from distill.models.facts import ModelConfig

_STREAM = ("embed", "expert_embed")  # the width of the residual stream


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over a model's matrices; without norms and biases, which are a thousandth.

    Attributes:
      depth: layers.
      width: of the residual stream.
      weights: of all matrices, on all devices.
      layer_weights: of those of the layers, all that a token is multiplied with.
      attention_width: numbers that attention results in per token, of all layers and devices.
      own: weights that a device keeps.
      used: weights that a device multiplies with: its own, and what it gathers over the width.
      used_bytes: those, as they are stored.
      used_of_layers, used_of_head: parts of them.
      made: numbers per token that a device makes in the layers: results of products.
      kept: those, and what the products take.
      attended: those of them in which attention results.
      summed: numbers per token that are summed over devices, times the share of the others; and
        what goes to experts on other devices, as often as a token is sent.
    """

    depth: int
    width: int
    weights: int
    layer_weights: int
    attention_width: int
    own: int
    used: int
    used_bytes: int
    used_of_layers: int
    used_of_head: int
    made: int
    kept: int
    attended: int
    summed: float


def count(config: ModelConfig, params: nnx.State) -> Counts:
    """Of a model's parameters, arrays or shapes with layouts, some of them perhaps in 8 bits."""
    sums: collections.Counter[str] = collections.Counter()
    for path, param in nnx.to_flat_state(params):
        axes = param.get_metadata()["logical_axes"]
        if len(axes) - axes.count("layers") < 2 or str(path[-1]).endswith("bias"):
            continue
        weights, *scales = jax.tree.leaves(param.get_value())
        used = _used(weights, axes)
        sums["weights"] += weights.size
        sums["own"] += math.prod(weights.sharding.shard_shape(weights.shape))
        sums["used"] += math.prod(used)
        for x in (weights, *scales):
            sums["used_bytes"] += math.prod(_used(x, axes)) * x.dtype.itemsize
        if "layers" in axes:
            sums["used_of_layers"] += math.prod(used)
            if "expert" in axes and axes[-1] == "expert_embed":
                devices = weights.shape[axes.index("expert")] // used[axes.index("expert")]
                sums.update(_exchanged(config, devices, weights.shape[0] * weights.shape[-1]))
            shape, used = (_of_picked(config, axes, sizes) for sizes in (weights.shape, used))
            sums["layer_weights"] += math.prod(shape)
            together = weights.sharding.mesh.shape[WIDTH] if "mlp" in axes else 1
            sums.update(_per_token(axes, shape, used, together))
        else:  # the head, which a tied model has in its embedding
            sums["used_of_head"] = math.prod(used)
    names = [field.name for field in dataclasses.fields(Counts)][2:]
    return Counts(config.num_layers, config.model_width, *(sums[name] for name in names))


def _exchanged(config: ModelConfig, devices: int, width: int) -> dict[str, float]:
    """Numbers per token that go to experts cut over so many devices, of layers of this width."""
    if devices == 1 or config.experts is None:
        return {}
    sent = expert_exchange.sent(devices, config.experts.per_token)
    return {"summed": width * sent, "kept": width * devices}  # with room for all


def _used(x, axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """Of an array's shape, what a device computes with: whole over the width, else its shard."""
    shard = x.sharding.shard_shape(x.shape)
    return tuple(
        whole if axis in _STREAM else part
        for axis, whole, part in zip(axes, x.shape, shard, strict=True)
    )


def _of_picked(config: ModelConfig, axes: tuple[str | None, ...], shape) -> tuple[int, ...]:
    """A shape, with no more experts than a token passes."""
    picked = config.experts.per_token if config.experts else 0
    return tuple(
        picked if axis == "expert" else size for axis, size in zip(axes, shape, strict=True)
    )


def _per_token(axes: tuple[str | None, ...], shape, used, together: int) -> dict[str, float]:
    """Numbers per token of all layers that a stack of matrices has to do with.

    `together`: of so many devices, each takes the tokens of all, which are gathered before.
    """
    layers = shape[axes.index("layers")]
    inner = [i for i, axis in enumerate(axes) if axis not in ("layers", *_STREAM)]
    if axes[-1] not in _STREAM:
        from_stream = not set(axes).isdisjoint(_STREAM)
        made = layers * math.prod(used[i] for i in (inner if from_stream else inner[1:]))
        return {"made": made, "kept": made}
    # Back to the residual stream: what it takes is no product's result, nor is the norm's before.
    everywhere, here = (layers * math.prod(sizes[i] for i in inner) for sizes in (shape, used))
    width = layers * shape[-1]
    if "expert" in axes:  # each of which has a copy of the token, and a result of its own
        width *= shape[axes.index("expert")]
    shares = together * (1 - here / everywhere) + (together - 1) / 2  # a sum is sent twice
    summed = layers * shape[-1] * shares
    numbers = {"made": width, "kept": 2 * width + here, "summed": summed}
    if "heads" in axes:
        numbers |= {"attention_width": everywhere, "attended": here}
    return numbers


def cut_sizes(params: nnx.State, mesh_axis: str) -> list[int]:
    """Dimensions of parameters that a mesh axis splits."""
    return [
        size
        for _, param in nnx.to_flat_state(params)
        for name, size in zip(
            param.get_metadata()["logical_axes"],
            jax.tree.leaves(param.get_value())[0].shape,
            strict=True,
        )
        if name and mesh_axis in (RULES[name] or ())
    ]
