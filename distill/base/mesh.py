"""Meshes of devices: the trainer's, and the sampler's own."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from distill.base.errors import UserError
from distill.base.sharding import (
    MESH_AXES,
    RULES,
    SAMPLER_RULES,
    WIDTH,
    all_axes,
    axes_of,
    num_shards,
)


def mesh_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The sizes of a mesh over `count` devices; one may be -1 and takes what is left.

    `sizes` has those of the axes that differ from `MESH_AXES`, by name.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    if unknown := sorted(sizes.keys() - all_axes().keys()):
        raise ValueError(f"a mesh has no axis {unknown[0]!r}, only {', '.join(MESH_AXES)}")
    filled = all_axes() | dict(sizes)
    fixed = math.prod(size for size in filled.values() if size != -1)
    free = [name for name, size in filled.items() if size == -1]
    given = _as_keys({name: filled[name] for name in MESH_AXES})
    if len(free) > 1 or any(size < 1 and size != -1 for size in filled.values()):
        raise UserError(f"{given}: sizes are positive, and at most one is -1 (takes the rest)")
    if free and count % fixed == 0:
        filled[free[0]] = count // fixed
    if math.prod(filled.values()) != count:
        example = dict.fromkeys(MESH_AXES, 1) | {next(iter(MESH_AXES)): count}
        raise UserError(
            f"{given} does not match {count} devices: {' x '.join(MESH_AXES)} must be {count}, "
            f"e.g. {_as_keys(example)}"
        )
    return filled


def make_mesh(*sizes: int, devices=None, **named: int) -> Mesh:
    """Mesh over `devices`, by default all, with sizes in the order of `MESH_AXES` or by name.

    See `mesh_sizes`. Devices that share rows stand side by side, as `make_row_mesh` needs it.
    """
    devices = jax.devices() if devices is None else devices
    given = dict(zip(MESH_AXES, sizes, strict=False)) | named
    shape = mesh_sizes(given, len(devices))
    major = next(iter(shape)), *axes_of(RULES["position"])
    shape = {axis: shape[axis] for axis in dict.fromkeys((*major, *shape))}
    shape["tensor"] = shape.pop("tensor")  # side by side: they exchange something in every product
    return Mesh(np.asarray(devices).reshape(tuple(shape.values())), tuple(shape), _types(shape))


def make_row_mesh(mesh: Mesh) -> Mesh:
    """The same devices in the same order, of which those that share rows have rows of their own."""
    return make_mesh(devices=mesh.devices.reshape(-1), **row_mesh_sizes(mesh.shape))


def row_mesh_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of `make_row_mesh` of a mesh of these sizes."""
    rows, positions = next(iter(MESH_AXES)), axes_of(RULES["position"])
    at_once = math.prod(sizes[axis] for axis in positions)
    return dict(sizes) | dict.fromkeys(positions, 1) | {rows: sizes[rows] * at_once}


def make_abstract_mesh(*sizes: int, **named: int) -> AbstractMesh:
    """A mesh without devices, for the shapes of shards; sizes that are not given are 1."""
    shape = dict.fromkeys(all_axes(), 1) | dict(zip(MESH_AXES, sizes, strict=False)) | named
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=_types(shape))


def _types(axes: Collection[str]) -> tuple[AxisType, ...]:
    return (AxisType.Auto,) * len(axes)


def _as_keys(sizes: Mapping[str, int]) -> str:
    return " ".join(f"mesh.{name}={size}" for name, size in sizes.items())


def use_row_mesh() -> contextlib.AbstractContextManager[Any]:
    """Within it, `make_row_mesh` of the current mesh (`jax.set_mesh`) is the current one."""
    if num_shards("position") == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(make_row_mesh(jax.sharding.get_mesh()))


def sampler_mesh_sizes(
    trainer: Mapping[str, int], count: int, tensor: int = 0, width: int = 1
) -> dict[str, int]:
    """Sizes of the mesh of a sampler with `count` devices; `trainer` has those of the trainer's.

    Weights are cut `tensor` ways, by default as the trainer's, and MLPs also `width` ways; rows
    over the rest.

    Raises:
      UserError: the number of devices is no multiple of what the weights are cut into.
    """
    cutting_weights = axes_of(SAMPLER_RULES["expert"])
    cutting_rows = axes_of(RULES["mlp_batch"]) + axes_of(RULES["position"])
    over_rows, *others = (axis for axis in cutting_rows if axis not in cutting_weights)
    kept = {axis: trainer[axis] for axis in MESH_AXES if axis not in (over_rows, *others)}
    kept |= {"tensor": tensor or trainer["tensor"], WIDTH: width}
    cut = math.prod(kept.values())
    if count % cut:
        given, keys = f"policy.generation.tensor={tensor} .width={width}", "tensor and width"
        if not tensor and width == 1:
            cutting = {axis: size for axis, size in kept.items() if size > 1}
            given, keys = _as_keys(cutting), " x ".join(f"mesh.{axis}" for axis in cutting)
        raise UserError(
            f"a sampler of {count} devices cannot split weights {cut} ways ({given}): give it a "
            f"multiple of {cut} devices, or choose a {keys} that divides {count}"
        )
    sizes = kept | dict.fromkeys(others, 1) | {over_rows: count // cut}
    return {axis: sizes[axis] for axis in all_axes()}


def make_sampler_mesh(
    trainer_mesh: Mesh, devices: Sequence[jax.Device], tensor: int = 0, width: int = 1
) -> Mesh:
    """Mesh of a sampler with a layout or devices of its own; see `sampler_mesh_sizes`."""
    sizes = sampler_mesh_sizes(trainer_mesh.shape, len(devices), tensor, width)
    return make_mesh(devices=devices, **sizes)


def make_staging_mesh(trainer_mesh: Mesh, sampler_mesh: Mesh) -> Mesh:
    """Where weights are laid out that go to a sampler's own devices in `copy_to_mesh`.

    Of several processes, that is on devices of the trainer in the sampler's layout. Where a process
    has some of both, the sampler's find their shards on the trainer's. Copies are on the others.
    """
    if jax.process_count() == 1:
        return trainer_mesh
    shape, axes = (*sampler_mesh.devices.shape, -1), (*sampler_mesh.axis_names, "copy")
    return Mesh(trainer_mesh.devices.reshape(shape), axes, _types(axes))


def copy_to_mesh(arrays, mesh: Mesh):
    """The arrays, on `make_staging_mesh`, on the sampler's mesh with the same partition specs."""
    layout = jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), arrays)
    held = jax.tree.leaves(arrays)[0].sharding.device_set
    if jax.process_count() == 1 or held == set(mesh.devices.flat):
        return jax.device_put(arrays, layout)
    # JAX copies nothing between devices of different processes: the program before this did.
    return jax.tree.map(_copy_shards, arrays, layout)


def _copy_shards(array: jax.Array, layout: NamedSharding) -> jax.Array:
    assert isinstance(array.sharding, NamedSharding)
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    pairs = zip(array.sharding.mesh.devices[..., 0].flat, layout.mesh.devices.flat, strict=True)
    copies = [jax.device_put(shards[here], there) for here, there in pairs if here in shards]
    return jax.make_array_from_single_device_arrays(array.shape, layout, copies)


def send_to_mesh(arrays, mesh: Mesh) -> None:
    """Arrays on `make_staging_mesh` go to a sampler whose processes have none of its devices.

    Those call `receive_on_mesh` at the same time: this is a collective of all processes.
    """
    for array in jax.tree.leaves(arrays):
        staging, spec = array.sharding.mesh, array.sharding.spec
        stacked = _stack(array, NamedSharding(staging, PartitionSpec(None, *spec)))
        _pass(stacked, staging, mesh)


def receive_on_mesh(shapes, staging: Mesh):
    """What the trainer's processes send; shapes and layouts are those on the sampler's mesh."""

    def receive(shape) -> jax.Array:
        mesh, spec = shape.sharding.mesh, shape.sharding.spec
        layout = NamedSharding(mesh, PartitionSpec(None, *spec))
        passed = _pass(_zeros((1, *shape.shape), shape.dtype, layout), staging, mesh)
        stacked = jax.make_array_from_single_device_arrays(
            (1, *shape.shape), layout, [shard.data for shard in passed.addressable_shards]
        )
        return _unstack(stacked, shape.sharding)

    return jax.tree.map(receive, shapes)


def _pass(stacked: jax.Array, staging: Mesh, mesh: Mesh) -> jax.Array:
    """Of arrays (1, ...) on either mesh, (copies, ...) on both, of which the sampler has the last.

    JAX copies nothing between processes by itself that all platforms have.
    """
    devices = np.concatenate([staging.devices, mesh.devices[..., None]], axis=-1)
    joint = Mesh(devices, staging.axis_names, _types(staging.axis_names))
    assert isinstance(stacked.sharding, NamedSharding)
    layout = NamedSharding(joint, PartitionSpec("copy", *stacked.sharding.spec[1:]))
    shape = devices.shape[-1], *stacked.shape[1:]
    shards = [shard.data for shard in stacked.addressable_shards]
    whole = jax.make_array_from_single_device_arrays(shape, layout, shards)
    with jax.set_mesh(joint):
        return jax.block_until_ready(_first_to_last(whole, layout))  # little is held at once


@functools.partial(jax.jit, static_argnums=1)
def _first_to_last(whole: jax.Array, layout: NamedSharding) -> jax.Array:
    mesh, spec = layout.mesh, layout.spec

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def permute(shard):
        return jax.lax.ppermute(shard, "copy", [(0, mesh.shape["copy"] - 1)])

    return permute(whole)


@functools.partial(jax.jit, static_argnums=1)
def _stack(array: jax.Array, layout: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array[None], layout)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(stacked: jax.Array, layout: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(stacked[0], layout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype, layout: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), layout)
