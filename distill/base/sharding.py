"""Logical axis rules, and the layouts that follow from them: the only file that names mesh axes.

Models and losses speak of logical axes ('embed', 'heads', 'batch'); `RULES` says which mesh axes
hold each of them. A further axis is a row of `MESH_AXES`, an entry of `RULES` and a config key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from distill.base.errors import UserError

# axis of the mesh -> its size where none is given; -1 takes the devices that are left
MESH_AXES = {"data": -1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1}
# Of the sampler's meshes alone: rows are split over it and, within an MLP, its width.
WIDTH = "width"
HOST_MEMORY = "pinned_host"
# TPUs whose slices have three dimensions, the fewest devices of which one gather is done in stages,
# and those of a stage.
KINDS_OF_CUBES = ("TPU v4", "TPU v5", "TPU7x")
SMALLEST_CUBE, STAGE = 64, 4
AnyMesh = Mesh | AbstractMesh  # for layouts, which need no devices

# logical axis -> mesh axes that shard it (None: replicated)
RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "context", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_width": None,
    "ffn": "tensor",
    "mlp": ("tensor", "width"),
    "state_heads": "tensor",
    "state_channels": "tensor",
    "expert": "expert",
    "expert_embed": ("fsdp", "context"),  # of the matrices of experts
    "router": None,
    "gate_up": None,
    "rank": None,
    # activations
    "batch": ("data", "fsdp", "expert", "width"),
    "mlp_batch": ("data", "fsdp", "expert"),
    "position": "context",
    "token": ("data", "fsdp", "context", "expert", "width"),
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_ffn": "tensor",
    "act_mlp": ("tensor", "width"),
    "act_vocab": "tensor",
}


# A teacher that is split over all devices: nothing of it is updated, so that copies only cost.
SPREAD_RULES = RULES | {
    "embed": ("data", "fsdp", "context", "expert"),
    "expert_embed": ("data", "fsdp", "context"),
}

# The sampler's copy of the student: every step reads all weights, so they are gathered once per
# refit instead of once per token. Experts stay on their devices.
SAMPLER_RULES = RULES | {"embed": None, "expert_embed": None}


def all_axes() -> dict[str, int]:
    """The axes that every mesh has, a sampler's own among them."""
    return MESH_AXES | {WIDTH: 1}


def partition_spec(logical_axes: Sequence[str | None], rules=RULES) -> PartitionSpec:
    """Mesh axes for the dimensions of one array; two of them may not share a mesh axis."""
    spec = [rules[name] if name is not None else None for name in logical_axes]
    holder: dict[str, str | None] = {}
    for name, entry in zip(logical_axes, spec, strict=True):
        for axis in axes_of(entry):
            if axis in holder:
                raise ValueError(
                    f"logical axes {holder[axis]!r} and {name!r} of one array are both on the one "
                    f"mesh axis {axis!r}: change the table in "
                    f"distill/base/sharding.py, or name another axis in {tuple(logical_axes)}"
                )
            holder[axis] = name
    return PartitionSpec(*spec)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a table or a partition spec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins the layout of an activation under the current mesh (`jax.set_mesh`); else a no-op."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def gathers_in_stages(logical_axis: str) -> bool:
    """Whether one gather along the axis may span all three dimensions of a slice of TPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.device_kind not in KINDS_OF_CUBES:
        return False
    axes, shards = mesh_axes(logical_axis), num_shards(logical_axis)
    return len(axes) == 1 and shards >= SMALLEST_CUBE and shards % STAGE == 0


def gather_in_stages(x: jax.Array, logical_axes: Sequence[str | None], gathered: str) -> jax.Array:
    """An array, gathered along a logical axis that one mesh axis holds: over `STAGE` devices first.

    XLA gathers over a whole cube of TPUs by an all-reduce of arrays filled with zeros, which sends
    twice the bytes.
    """
    [axis], shape = mesh_axes(gathered), dict[str, int]()
    for name, size in jax.sharding.get_abstract_mesh().shape.items():
        shape |= {name: size // STAGE, "stage": STAGE} if name == axis else {name: size}
    # The same devices in the same order, with one more axis.
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape))
    whole = partition_spec(logical_axes)
    for left in axis, None:
        entries = zip(logical_axes, whole, strict=True)
        spec = PartitionSpec(*(left if name == gathered else entry for name, entry in entries))
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return x


def constrain_whole(arrays):
    """Pins a jitted function's results to every device: any process can read them then."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), arrays)


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """Axes of the current mesh (`jax.set_mesh`), longer than 1, that hold a logical axis.

    ValueError for a mesh that was made with other axes than `make_mesh`'s.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    if missing := [axis for axis in all_axes() if axis not in mesh.shape]:
        raise ValueError(
            f"the current mesh has the axes {', '.join(mesh.axis_names)} and lacks "
            f"{', '.join(missing)}: make it with distill.base.mesh.make_mesh"
        )
    return tuple(axis for axis in axes_of(RULES[logical_axis]) if mesh.shape[axis] > 1)


def num_shards(logical_axis: str) -> int:
    """Parts into which the current mesh cuts a logical axis."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in mesh_axes(logical_axis))


def dividing(logical_axis: str, size: int) -> str | None:
    """The axis where the current mesh divides an array's size; None: that stays whole."""
    return logical_axis if size % num_shards(logical_axis) == 0 else None


def flatten_tokens(x_btx: jax.Array) -> jax.Array:
    """`merge_tokens`, its layout pinned: what follows the tokens is whole."""
    return constrain(merge_tokens(x_btx), "token", *[None] * (x_btx.ndim - 2))


def merge_tokens(x_btx: jax.Array) -> jax.Array:
    """(b, t, ...) as (tokens, ...), each device's own beside each other: none is sent."""
    rows, row, columns, column = _token_cuts(x_btx.shape[:2])
    rest = x_btx.shape[2:]
    if columns > 1:
        x_btx = x_btx.reshape(rows, row, columns, column, *rest).swapaxes(1, 2)
    return x_btx.reshape(-1, *rest)


def split_tokens(x_nx: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`merge_tokens` of an array (b, t, ...), undone; `shape` is (b, t)."""
    rows, row, columns, column = _token_cuts(shape)
    rest = x_nx.shape[1:]
    if columns > 1:
        x_nx = x_nx.reshape(rows, columns, row, column, *rest).swapaxes(1, 2)
    return x_nx.reshape(*shape, *rest)


def _token_cuts(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Parts of the rows and rows of a part, parts of the positions and positions of a part."""
    cuts = [num_shards(axis) for axis in ("batch", "position")]
    if any(size % parts for size, parts in zip(shape, cuts, strict=True)):
        cuts = [1, 1]
    (rows, columns), (batch, length) = cuts, shape
    return rows, batch // rows, columns, length // columns


def round_up(value: int, multiple: int) -> int:
    """To what so many parts can share evenly."""
    return -(-value // multiple) * multiple


def named_sharding(mesh: AnyMesh, *logical_axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(logical_axes))


def stacked_sharding(mesh: AnyMesh, shape: Sequence[int]) -> NamedSharding:
    """Layout of microbatches (m, b, t, ...) or (m, b): each is cut over the mesh."""
    axes: list[str | None] = [None, "batch", *[None] * (len(shape) - 2)]
    if len(shape) > 2 and shape[2] % axis_parts(mesh, "position") == 0:
        axes[2] = "position"
    return named_sharding(mesh, *axes)


def batch_axes() -> str:
    """The mesh axes over which the rows of a batch are split, in words."""
    return f"mesh {' x '.join(axes_of(RULES['mlp_batch']))}"


def batch_parts(mesh: AnyMesh) -> int:
    """Number of device groups over which the rows of a batch are split."""
    return axis_parts(mesh, "batch")


def axis_parts(mesh: AnyMesh, logical_axis: str) -> int:
    """Number of parts into which the mesh cuts a logical axis."""
    return math.prod(mesh.shape[axis] for axis in axes_of(RULES[logical_axis]))


def inner_sharding(stacked: Sharding, num_axes: int) -> Sharding:
    """Layout of one entry of an array with so many leading axes, as of layers and experts."""
    if not isinstance(stacked, NamedSharding):
        return stacked
    return NamedSharding(
        stacked.mesh, PartitionSpec(*stacked.spec[num_axes:]), memory_kind=stacked.memory_kind
    )


def in_host_memory(array: jax.Array) -> jax.Array:
    """The array in the pinned memory of the hosts whose devices held it; cut in the same way."""
    return jax.device_put(array, array.sharding.with_memory_kind(HOST_MEMORY))


def on_device_memory(arrays):
    """Layouts of the arrays, or of their copies in the devices' memory."""
    return jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), arrays)


def bytes_per_device(tree, *, fetched: bool = False) -> int:
    """Of arrays or shapes, by their layouts; what is in host memory counts only if `fetched`."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if fetched or x.sharding.memory_kind != HOST_MEMORY
    )


def in_device_memory(tree):
    """Copies what is in host memory to the devices, within a jitted function."""

    def fetch(x):
        in_host = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if in_host else x

    return jax.tree.map(fetch, tree)


def is_in_host_memory(tree) -> bool:
    """Whether any array is in host memory, within a jitted function."""
    return any(jax.typeof(x).memory_space == jax.memory.Space.Host for x in jax.tree.leaves(tree))


def in_memory_of(tree, places):
    """Puts arrays into the memories in which those of `places` are, within a jitted function."""

    def put(x, place):
        space = jax.typeof(place).memory_space
        return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)

    return jax.tree.map(put, tree, places)


def check_host_memory(mesh: Mesh, key: str) -> None:
    """Raises UserError, naming the config's `key`, unless arrays can be kept in host memory."""
    device = next(x for x in mesh.devices.flat if x.process_index == jax.process_index())
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"{key} keeps arrays in {HOST_MEMORY} memory, and {device.platform} devices have only "
            f"{', '.join(kinds)}: set {key}=none"
        )


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(params, mesh: AnyMesh, rules=RULES, section: str = "mesh"):
    """Layout of every parameter, from the `logical_axes` of its nnx.Param; same tree as `params`.

    `section`: of the config, which has the mesh's sizes.

    Raises:
      UserError: a dimension is not divisible by the mesh axes that shard it; says which sizes are.
    """
    _check_divisible(params, mesh, rules, section)

    def sharding(param: nnx.Variable):
        spec = partition_spec(param.get_metadata()["logical_axes"], rules)
        return param.replace(NamedSharding(mesh, spec))

    return jax.tree.map(sharding, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _check_divisible(params, mesh: AnyMesh, rules, section: str) -> None:
    cut = [
        (path, name, size, tuple(axis for axis in axes_of(rules[name]) if mesh.shape[axis] > 1))
        for path, param in nnx.to_flat_state(params)
        for name, size in zip(
            param.get_metadata()["logical_axes"], param.get_value().shape, strict=True
        )
        if name is not None
    ]
    for path, name, size, axes in cut:
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            all_sizes = [other for _, _, other, its_axes in cut if its_axes == axes]
            common = math.gcd(mesh.size, *all_sizes)
            fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
            key = " x ".join(f"{section}.{axis}" for axis in axes if mesh.shape[axis] > 1)
            raise UserError(
                f"{'/'.join(map(str, path))} has a dimension {name!r} of {size}, which "
                f"{key}={parts} does not divide: on {mesh.size} devices, {key} of this model may "
                f"be {' or '.join(fitting)}"
            )


def optimizer_shardings(abstract_state, params, mesh: AnyMesh, memory: str = "device"):
    """Layout of an optax state: moments like their parameters, in `memory`; counters replicated.

    A moment is known by the end of its path, which is its parameter's. One that has lost an axis,
    as those of a factored matrix, is cut as the others are.
    """
    by_path = {path: x for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def layout(path, moment) -> NamedSharding:
        ends = (path[start:] for start in range(len(path)))
        param = next((by_path[end] for end in ends if end in by_path), None)
        spec = None if param is None else _spec_of_moment(param, moment.shape)
        if spec is None:
            return replicated(mesh)
        return NamedSharding(mesh, spec, memory_kind=memory)

    return jax.tree_util.tree_map_with_path(layout, abstract_state)


def _spec_of_moment(param, shape: tuple[int, ...]) -> PartitionSpec | None:
    """Of a moment of this shape, None if it is neither the parameter's nor lacks one axis of it."""
    spec = (*param.sharding.spec, *[None] * (len(param.shape) - len(param.sharding.spec)))
    if shape == param.shape:
        return PartitionSpec(*spec)
    for axis in range(len(param.shape)):
        if shape == param.shape[:axis] + param.shape[axis + 1 :]:
            return PartitionSpec(*spec[:axis], *spec[axis + 1 :])
    return None
