"""Mesh and logical axis rules: the only file that names mesh axes.

Models and losses speak of logical axes ('embed', 'heads', 'batch'); `RULES` says which mesh axes
hold each of them. Nothing else in the project mentions 'data', 'fsdp' or 'tensor'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from distill.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes that shard it (None: replicated)
RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_width": None,
    "ffn": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "position": None,
    "token": ("data", "fsdp"),
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_ffn": "tensor",
    "act_vocab": "tensor",
}


# The sampler's copy of the student: every turn reads all weights, so they are gathered over fsdp
# once per refit instead of once per token.
SAMPLER_RULES = RULES | {"embed": None}


def mesh_sizes(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, int, int]:
    """The sizes of a mesh over `count` devices; one may be -1 and takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: sizes are positive, and at most one is -1 (takes the rest)")
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise UserError(
            f"mesh {sizes} does not match {count} devices: "
            f"data x fsdp x tensor must be {count}, e.g. data={count} fsdp=1 tensor=1"
        )
    return tuple(sizes.values())


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Mesh over `devices`, by default all; see `mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_sizes(data, fsdp, tensor, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def make_abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """A mesh without devices, for the shapes of shards."""
    return AbstractMesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def sampler_mesh_sizes(tensor: int, count: int) -> tuple[int, int, int]:
    """Sizes of the mesh of a sampler with `count` devices: weights are cut as the trainer's, rows
    over the rest.

    Cut alike, every shard of a refit is a copy from one device to another.

    Raises:
      UserError: the trainer's tensor axis does not divide the number of devices.
    """
    if count % tensor:
        raise UserError(
            f"a sampler of {count} devices cannot split weights {tensor} ways as the "
            f"trainer does (mesh.tensor={tensor}): give it a multiple of {tensor} devices, or "
            f"choose a mesh.tensor that divides {count}"
        )
    return count // tensor, 1, tensor


def make_sampler_mesh(trainer_mesh: Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """Mesh of a sampler with its own devices; see `sampler_mesh_sizes`."""
    sizes = sampler_mesh_sizes(trainer_mesh.shape["tensor"], len(devices))
    return make_mesh(*sizes, devices)


def copy_to_mesh(arrays, mesh: Mesh):
    """The arrays on another mesh of this process with the same partition specs."""
    layout = jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), arrays)
    return jax.device_put(arrays, layout)


def partition_spec(logical_axes: Sequence[str | None], rules=RULES) -> PartitionSpec:
    """Mesh axes for the dimensions of one array; two of them may not share a mesh axis."""
    spec = [rules[name] if name is not None else None for name in logical_axes]
    used = [
        axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)
    ]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(logical_axes)} put two dimensions on one mesh axis")
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins the layout of an activation under the current mesh (`jax.set_mesh`); else a no-op."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """Axes of the current mesh (`jax.set_mesh`), longer than 1, that hold a logical axis.

    ValueError for a mesh that was made with other axes than `make_mesh`'s.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    if missing := [axis for axis in MESH_AXES if axis not in mesh.shape]:
        raise ValueError(
            f"the current mesh has the axes {', '.join(mesh.axis_names)} and lacks "
            f"{', '.join(missing)}: make it with distill.sharding.make_mesh"
        )
    axes = RULES[logical_axis] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def num_shards(logical_axis: str) -> int:
    """Parts into which the current mesh cuts a logical axis."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in mesh_axes(logical_axis))


def named_sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(logical_axes))


def batch_parts(mesh: Mesh) -> int:
    """Number of device groups over which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(params, mesh: Mesh, rules=RULES):
    """Layout of every parameter, from the `logical_axes` of its nnx.Param; same tree as `params`.

    Raises:
      UserError: a dimension is not divisible by the mesh axes that shard it.
    """

    def sharding(path, param: nnx.Variable):
        spec = partition_spec(param.get_metadata()["logical_axes"], rules)
        for size, axes in zip(param.get_value().shape, spec, strict=True):
            parts = math.prod(
                mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ())
            )
            if size % parts:
                name = "/".join(str(getattr(key, "key", key)) for key in path)
                raise UserError(
                    f"parameter {name} has a dimension of {size}, which mesh axis {axes} of size "
                    f"{parts} does not divide: choose a divisor of {size}"
                )
        return param.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        sharding, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def optimizer_shardings(optimizer, abstract_state, params, mesh: Mesh):
    """Layout of an optax state: moments like their parameters, counters replicated."""
    layout = jax.tree.map(lambda param: param.sharding, params)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract_state,
        layout,
        transform_non_params=lambda _: replicated(mesh),
    )
