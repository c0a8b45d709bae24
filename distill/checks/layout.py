"""Where arrays lie, and whether they fit."""

from __future__ import annotations

import os

import jax

from distill.base.sharding import bytes_per_device, num_shards
from distill.build.sampler import sampler_weights
from distill.build.session import Session
from distill.checks import Problem
from distill.models.quantization import without_scales
from distill.step import TrainState

LARGE_BYTES = 1 << 20  # an array from here on must not be on every device


def check_layout(session: Session, state: TrainState) -> str:
    """No large array is whole on every device of a mesh that should split it."""
    parts = num_shards("embed") * num_shards("ffn")
    if parts == 1:
        return "every device holds all weights: the mesh splits batches only"
    # The scales of an 8-bit teacher are whole along what their channels sum over.
    arrays = {
        f"teacher {name}".strip(): without_scales(teacher.model.params)
        for name, teacher in session.teachers.items()
        if teacher.model is not None
    }
    # Adapters are small, and along their rank whole; what they are of must be split.
    arrays = {"student and optimizer": without_scales(state.frozen) or state} | arrays
    for owner, tree in arrays.items():
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            if array.nbytes >= LARGE_BYTES and array.sharding.is_fully_replicated:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise Problem(
                    f"{owner}: {name} ({array.nbytes / 1e6:.0f} MB) is not split, so every device "
                    f"holds all of it, though the mesh splits weights {parts} ways: give it "
                    "logical axes that distill/base/sharding.py maps to mesh axes"
                )
    return f"all arrays of 1 MB and more are split, weights {parts} ways"


def check_memory(session: Session, state: TrainState) -> str:
    """What every step will hold at least fits the device's memory.

    Weights, moments, gradients, the sampler's copy and its cache. Activations and logits come on
    top: this is a lower bound.
    """
    policy, teachers = session.config.policy, 0.0
    # Several may be one model; one that is fetched for a step is there then.
    for model in {
        id(model): model for each in session.teachers.values() if (model := each.model)
    }.values():
        teachers += bytes_per_device(model.params, fetched=model.on_devices is not None)
    needs: dict[str, float] = {
        "student and optimizer": bytes_per_device(state),
        "teacher": teachers,
        "gradients": bytes_per_device(state.trainable),
    }
    generation = policy.generation
    if session.samples and generation.backend == "jax" and generation.colocated.enabled:
        weights = sampler_weights(policy, session.student, session.sampler_mesh)
        needs["sampler"] = bytes_per_device(weights)
        engine = session.build_engine(session.student.graph)
        rows = policy.train_global_batch_size
        with jax.set_mesh(session.sampler_mesh):
            _, slots = engine.slots_for(session.student.params, rows)
            needs["cache"] = slots * engine.slots.slot_bytes(session.student.params)
    total, limit = sum(needs.values()), device_memory()
    listed = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in needs.items())
    if limit is not None and total > limit:
        raise Problem(
            f"a step needs at least {total / 1e9:.3g} GB per device ({listed}) of "
            f"{limit / 1e9:.3g} GB: raise mesh.fsdp, mesh.expert or mesh.tensor, or lower "
            "policy.generation.cache_memory"
        )
    bound = "an unknown limit" if limit is None else f"{limit / 1e9:.3g} GB"
    return f"at least {total / 1e9:.3g} GB per device ({listed}) of {bound}, without activations"


def device_memory() -> int | None:
    """Bytes that a device has for this process; None if nobody says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return None
