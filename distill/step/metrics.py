"""What is logged of a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill.batches.rows import Batch, num_filled
from distill.step.loss import TeacherInStep
from distill.teachers.spans import CUTS

Evaluated = tuple[jax.Array, dict[str, Any]]  # loss and sums, as `make_loss` gives them


def describe(
    batch: Batch,
    teachers: Sequence[TeacherInStep],
    evaluated: Evaluated,
    by_teacher: Sequence[Evaluated],
    total: jax.Array,
    own_metrics: Collection[str],
) -> dict[str, jax.Array]:
    """Scalars on the device, of a batch of `total` response tokens.

    Losses and log-probabilities are in nats per token; the gap is that between sampler's and
    trainer's. Importance weights are means over the sampled tokens, 1 without any.
    """
    loss, sums = evaluated
    sampled_tokens = sums["sampled_tokens"]
    asked = [
        jnp.asarray(sum(part.mask_bt.sum() for part in batch if part.teacher == number))
        for number in range(len(teachers))
    ]
    # Of a token, on average. Division by what is always 1 would round what is divided.
    times_asked = jnp.maximum(sum(asked), 1) / total if len(teachers) > 1 else 1.0
    measured = {name: sums[name] / times_asked for name in own_metrics} | {
        "loss": loss,
        "tokens": total,
        **_describe_rows(batch, total),
        **describe_load(sums["expert_load"]),
        "log_prob_gap": sums["gap_sum"] / jnp.maximum(sampled_tokens, 1.0),
        "log_prob_gap_max": sums["gap_max"],
        "student_log_prob": sums["student_log_prob"],
        "teacher_log_prob": sums["teacher_log_prob"] / times_asked,
    }
    if "router_aux_loss" in sums:
        measured["router_aux_loss"] = sums["router_aux_loss"]
    if "routes_missed" in sums:
        routed_tokens = jnp.maximum(sums["routed_tokens"], 1.0)
        measured["routing_disagreement"] = sums["routes_missed"] / routed_tokens
    if "importance_weight" in sums:
        mean = sums["importance_weight"] / jnp.maximum(sampled_tokens, 1.0)
        measured["importance_weight"] = jnp.where(sampled_tokens > 0, mean, 1.0)
        measured["importance_clipped"] = sums["importance_clipped"] / jnp.maximum(
            sampled_tokens, 1.0
        )
    for teacher, of_teacher, tokens in zip(teachers, by_teacher, asked, strict=True):
        measured |= _describe_teacher(teacher, of_teacher, tokens, total)
    return measured


def _describe_teacher(
    teacher: TeacherInStep, evaluated: Evaluated, tokens: jax.Array, total: jax.Array
) -> dict[str, jax.Array]:
    """What is logged of one teacher; means over the tokens it was asked about."""
    loss, sums = evaluated
    role, own = f"teacher/{teacher.name}".rstrip("/"), jnp.maximum(tokens, 1)
    measured = {}
    if teacher.shared is not None:
        measured = {f"{role}/{cut}": sums[cut] * total / own for cut in CUTS}
    if teacher.name:
        measured |= {
            f"{role}/tokens": tokens,
            f"{role}/share": tokens / total,
            f"{role}/loss": loss * total / own,
            f"{role}/log_prob": sums["teacher_log_prob"] * total / own,
        }
    return measured


def _describe_rows(batch: Batch, total: jax.Array) -> dict[str, jax.Array]:
    """Means over the sequences, and the padded share of what was computed."""
    sequences = jnp.maximum(sum(part.sequences_b.sum() for part in batch), 1)
    computed = sum(num_filled(part) * math.prod(part.tokens_bt.shape[1:]) for part in batch)
    tokens = sum(part.lengths_b.sum() for part in batch)
    return {
        "response_length": total / sequences,
        "truncated": sum(part.truncated_b.sum() for part in batch) / sequences,
        "on_policy": sum(part.sampled_b.sum() for part in batch) / sequences,
        "padding": 1 - tokens / jnp.maximum(computed, 1),
    }


def describe_load(expert_load: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What is logged of a mixture's load, by kind of layer load_le; nothing if there is none."""
    if not expert_load:
        return {}
    load_le = jnp.concatenate(list(expert_load.values()))
    share_le = load_le / load_le.sum(axis=1, keepdims=True)
    return {"expert_share_max": share_le.max(), "experts_idle": jnp.mean(load_le == 0)}
