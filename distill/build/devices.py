"""The meshes of trainer and sampler, the shapes of microbatches, and how batches get there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distill.base import processes
from distill.base.errors import UserError
from distill.base.mesh import make_mesh, make_row_mesh, make_sampler_mesh
from distill.base.sharding import (
    AnyMesh,
    axis_parts,
    batch_axes,
    batch_parts,
    named_sharding,
    round_up,
    stacked_sharding,
)
from distill.batches.packing import Layout, Shape
from distill.batches.rows import Batch
from distill.config.policy import Colocated, Generation, Policy, tokens_per_microbatch
from distill.config.schema import Config


def build_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The trainer's mesh of all `devices`, by default JAX's; batches must be split over it."""
    devices, sampler_devices = split_devices(config.policy.generation, devices)
    if jax.process_count() > 1 and not processes.several():
        raise UserError(
            f"{jax.process_count()} processes see each other's devices, but cannot speak to each "
            "other: pass --coordinator_address, --num_processes and --process_id"
        )
    try:
        mesh = make_mesh(devices=devices, **vars(config.mesh))
    except UserError as error:
        if not sampler_devices:
            raise
        raise UserError(
            f"{error} (policy.generation.colocated gives {len(sampler_devices)} of "
            f"{len(devices) + len(sampler_devices)} devices to the sampler, {len(devices)} remain)"
        ) from None
    parts = batch_parts(mesh)
    policy = config.policy
    build_layout(policy, policy.max_total_sequence_length, mesh)  # says so if no row fits
    if policy.train_micro_batch_size % parts and not policy.cut_by_tokens:
        micro = round_up(policy.train_micro_batch_size, parts)
        count = -(-policy.train_global_batch_size // micro)
        raise UserError(
            f"policy.train_micro_batch_size={policy.train_micro_batch_size} does not divide over "
            f"{parts} devices ({batch_axes()}): try train_micro_batch_size={micro} with "
            f"train_global_batch_size={count * micro}"
        )
    if config.evaluation.batch_size % parts:
        raise UserError(
            f"evaluation.batch_size={config.evaluation.batch_size} does not divide over {parts} "
            f"devices ({batch_axes()}): try {round_up(config.evaluation.batch_size, parts)}"
        )
    return mesh


def build_sampler_mesh(
    generation: Generation, mesh: Mesh, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Where the jax backend samples: on devices of the trainer's `mesh`, or others of `devices`.

    Positions are not cut there: a decode step has one.
    """
    _, own = split_devices(generation, devices)
    if not own and not generation.has_own_layout:
        return make_row_mesh(mesh)
    # In the trainer's order: a refit is one program over the devices of both meshes.
    devices = own or list(mesh.devices.flat)
    return make_sampler_mesh(mesh, devices, generation.tensor, generation.width)


def split_devices(
    generation: Generation, devices: Sequence[jax.Device] | None
) -> tuple[list[jax.Device], list[jax.Device]]:
    """Devices of the trainer, and those of a sampler that has its own: the last of each process.

    With `whole_processes` they are all of the last ones.
    """
    whole, is_plan = generation.colocated.whole_processes, devices is not None
    devices = list(devices or jax.devices())
    if generation.backend != "jax" or generation.colocated.enabled:
        return devices, []
    key, number = "policy.generation.colocated", jax.process_count()
    if whole and number == 1 and not is_plan:
        raise UserError(
            f"{key}.whole_processes=True gives the last processes to the sampler, and there is "
            f"only this one: start several, or set {key}.whole_processes=False"
        )
    if len(devices) < (2 if whole else 2 * number):
        raise UserError(
            f"{key}.enabled=False splits the devices between trainer and sampler, and there is "
            f"only 1{' of a process' * (number > 1)}: use {key}.enabled=True"
        )
    count = generation.colocated.sampler_devices or len(devices) // 2
    if count >= len(devices):
        raise UserError(
            f"{key}.sampler_devices={count} leaves none of {len(devices)} devices to the trainer: "
            f"choose at most {len(devices) - 1}, or 0 for half of them"
        )
    if number == 1:
        return devices[:-count], devices[-count:]
    unit = len(devices) // number if whole else number
    if count % unit or (len(devices) - count) % count:
        fitting = [n for n in range(unit, len(devices), unit) if len(devices) % n == 0]
        gives = "the last ones give the sampler all" if whole else "each gives the sampler as many"
        raise UserError(
            f"{key}.sampler_devices={count} does not suit {number} processes with {len(devices)} "
            f"devices: {gives}, and the trainer has a multiple of that; choose "
            f"{' or '.join(map(str, fitting))}"
        )
    if whole:
        devices.sort(key=lambda device: device.process_index)
        return devices[:-count], devices[-count:]
    of_processes = [[x for x in devices if x.process_index == i] for i in range(number)]
    share = count // number
    trainer = [device for each in of_processes for device in each[:-share]]
    return trainer, [device for each in of_processes for device in each[-share:]]


def in_all_processes(config: Config) -> Config:
    """A config that gives no process to the sampler; batches are split over as many more."""
    policy, mesh = config.policy, config.mesh
    if not policy.generation.colocated.whole_processes:
        return config
    generation = dataclasses.replace(policy.generation, colocated=Colocated())
    if -1 not in vars(mesh).values():
        mesh = dataclasses.replace(mesh, data=-1)
    policy = dataclasses.replace(policy, generation=generation)
    return dataclasses.replace(config, policy=policy, mesh=mesh)


def build_layout(policy: Policy, longest: int, mesh: AnyMesh, view_excess: int = 0) -> Layout:
    """The microbatches of a batch whose sequences have at most `longest` tokens.

    What the teacher reads may be `view_excess` tokens longer.

    Raises:
      UserError: the mesh divides neither rows nor their lengths.
    """
    unit, length = axis_parts(mesh, "position"), policy.max_total_sequence_length
    if length % unit:
        raise UserError(
            f"policy.max_total_sequence_length={length} does not divide over mesh.context={unit} "
            f"devices: try {round_up(length, unit)}"
        )
    layout = _of_students(policy, longest, mesh)
    shapes = (Shape(shape.rows, round_up(shape.length, unit)) for shape in layout.shapes)
    return dataclasses.replace(
        layout, shapes=tuple(shapes), view_excess=round_up(view_excess, unit)
    )


def _of_students(policy: Policy, longest: int, mesh: AnyMesh) -> Layout:
    parts, budget = batch_parts(mesh), tokens_per_microbatch(policy)
    if policy.sequence_packing.enabled:
        length = policy.max_total_sequence_length
        return Layout((Shape(_rows(budget, length, parts), length),), packed=True)
    if not policy.dynamic_batching.enabled:
        return Layout((Shape(policy.train_micro_batch_size, longest),))
    unit = policy.dynamic_batching.sequence_length_round
    halves = (-(-longest // (2**halvings * unit)) * unit for halvings in range(3))
    lengths = sorted({min(length, longest) for length in halves})
    return Layout(tuple(Shape(_rows(budget, length, parts), length) for length in lengths))


def _rows(budget: int, length: int, parts: int) -> int:
    """Rows of `length` tokens within the budget, as many on every part of the mesh."""
    rows = budget // length // parts * parts
    if not rows:
        raise UserError(
            f"microbatches of {budget} tokens hold no row of {length} tokens on each of {parts} "
            f"devices ({batch_axes()}): set train_mb_tokens to at least {parts * length}"
        )
    return rows


def make_put(mesh: Mesh) -> Callable[[np.ndarray | jax.Array], jax.Array]:
    """Function that places a batch, which every process has whole, on the mesh."""

    def put(rows: np.ndarray | jax.Array) -> jax.Array:
        return _placed(rows, named_sharding(mesh, "batch", *[None] * (rows.ndim - 1)))

    return put


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Places a batch that every process holds: the rows of each microbatch over the mesh."""
    return jax.tree.map(lambda x: _placed(x, stacked_sharding(mesh, x.shape)), batch)


def _placed(given: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array on the mesh: a process cuts the shards that its own devices hold."""
    whole = np.asarray(given)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
