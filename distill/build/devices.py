"""The meshes of trainer and sampler, and how batches get onto them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distill.base import processes
from distill.base.errors import UserError
from distill.base.mesh import make_mesh, make_row_mesh, make_sampler_mesh
from distill.base.sharding import (
    batch_axes,
    batch_parts,
    named_sharding,
    round_up,
    stacked_sharding,
)
from distill.batches.rows import Batch
from distill.build.layout import build_layout
from distill.config.policy import Generation
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
