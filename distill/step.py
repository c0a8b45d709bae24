"""One optimizer update: student and teacher together in one jitted, sharded function.

The batch is split into microbatches walked by `lax.scan`; gradients are summed in float32 and
normalised by the global number of response tokens, so the update does not depend on the split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from distill.losses.objective import (
    Objective,
    TopKScores,
    gather_positions,
    importance_weights,
    response_window,
    token_weights,
)
from distill.sampling.request import Rollout, to_sequences
from distill.sharding import constrain, in_device_memory, in_memory_of, is_in_host_memory

Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: float32 master weights, optimizer state, number of steps.

    `step` counts batches, skipped ones included; the optimizer counts its own updates.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences to learn from.

    Attributes:
      tokens_bt: prompt and response contiguous, right-padded.
      prompt_lengths_b: prompt tokens per row.
      lengths_b: prompt and response tokens per row.
      log_probs_br: the sampler's untruncated log-probabilities of the response tokens.
      on_policy_b: whether the student sampled the response.
      truncated_b: whether the response stopped at the length limit.
      scores: what is known of a teacher that is not here; None when the teacher is.
    """

    tokens_bt: jax.Array
    prompt_lengths_b: jax.Array
    lengths_b: jax.Array
    log_probs_br: jax.Array
    on_policy_b: jax.Array
    truncated_b: jax.Array
    scores: TopKScores | None = None


def make_batch(
    prompts_bp: jax.Array,
    prompt_lengths_b: jax.Array,
    rollout: Rollout,
    on_policy_b: jax.Array,
    scores: TopKScores | None = None,
    *,
    pad_id: int,
) -> Batch:
    """Joins prompts and responses into rows of length P + R; jittable."""
    tokens_bt, lengths_b = to_sequences(prompts_bp, prompt_lengths_b, rollout, pad_id)
    return Batch(
        tokens_bt,
        prompt_lengths_b,
        lengths_b,
        rollout.log_probs_br,
        on_policy_b,
        on_policy_b & ~rollout.stopped_b,
        scores,
    )


def make_loss(
    student: nnx.GraphDef,
    teacher: nnx.GraphDef | None,
    objective: Objective,
    *,
    vocab_size: int,
    importance_clip: float = 0.0,
) -> Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns `loss_fn(params, teacher_params, batch, total) -> (loss, sums)` of a microbatch.

    The arguments are those of `make_train_step`; `total` is the number of response tokens of the
    whole batch, by which the loss is divided. Differentiable by `params`.
    """

    def loss_fn(params, teacher_params, batch: Batch, total):
        response_size = batch.log_probs_br.shape[1]
        window = response_window(
            batch.tokens_bt, batch.prompt_lengths_b, batch.lengths_b, response_size
        )

        def evaluate(graph, params):
            model = nnx.merge(graph, params)
            valid_bt = jnp.arange(batch.tokens_bt.shape[1]) < batch.lengths_b[:, None]
            hidden_btd = model(batch.tokens_bt, segment_ids_bt=valid_bt.astype(jnp.int32))
            return gather_positions(hidden_btd, window.index_br), model.head()

        hidden_s, head_s = evaluate(student, params)
        hidden_t, head_t = (None, None) if teacher is None else evaluate(teacher, teacher_params)
        weights_br = token_weights(window.mask_br, total)
        sampled_br = window.mask_br & batch.on_policy_b[:, None]
        sums = {}
        if importance_clip:
            importance_br = importance_weights(
                objective.log_probs(hidden_s, head_s, window.targets_br, vocab_size=vocab_size),
                batch.log_probs_br,
                sampled_br,
                importance_clip,
            )
            weights_br *= importance_br
            sums["importance_weight"] = jnp.where(sampled_br, importance_br, 0.0).sum()
            sums["importance_clipped"] = jnp.sum(sampled_br & (importance_br >= importance_clip))
        loss, values = objective(
            hidden_s,
            head_s,
            jax.lax.stop_gradient(hidden_t),
            jax.lax.stop_gradient(head_t),
            window.targets_br,
            weights_br,
            vocab_size=vocab_size,
            scores=batch.scores,
        )
        gap_br = jnp.where(sampled_br, jnp.abs(values.log_prob_s - batch.log_probs_br), 0.0)
        return loss, sums | {
            "gap_sum": gap_br.sum(),
            "gap_max": gap_br.max(),
            "sampled_tokens": sampled_br.sum().astype(jnp.float32),
            "student_log_prob": (values.log_prob_s * window.mask_br).sum() / total,
            "teacher_log_prob": (values.log_prob_t * window.mask_br).sum() / total,
        }

    return loss_fn


def make_train_step(
    student: nnx.GraphDef,
    teacher: nnx.GraphDef | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int,
    vocab_size: int,
    state_shardings: Any = None,
    importance_clip: float = 0.0,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns jitted `step(state, teacher_params, batch) -> (state, metrics)`; donates `state`.

    Args:
      student: graph of the trained model, whose parameters are `state.params`.
      teacher: graph of the frozen model; None (with `teacher_params=None`) for hard labels, and
        where batches bring the teacher's scores.
      objective: per-token loss summed with weights.
      optimizer: optax chain.
      num_microbatches: divides the batch size.
      vocab_size: ids shared by both models; rows of a head beyond it are ignored.
      state_shardings: layout of the new state, None for a single device.
      importance_clip: weigh sampled tokens by `importance_weights` of at most this; 0: by 1. Costs
        a forward pass of the student's head.

    Metrics are scalars on the device: loss (nats per token, weighted), grad_norm, update_norm,
    tokens, response_length, truncated, the gap between sampler's and trainer's log-probabilities,
    skipped, and with importance_clip the mean weight of sampled tokens (1 without any) and the
    share of them whose weight is clipped. A step whose loss or gradient norm is not finite is
    skipped (1, else 0): of the state, only `step` changes.
    """
    loss_fn = make_loss(
        student, teacher, objective, vocab_size=vocab_size, importance_clip=importance_clip
    )

    def train_step(state: TrainState, teacher_params, batch: Batch):
        lengths_b = batch.lengths_b - batch.prompt_lengths_b
        total = jnp.maximum(lengths_b.sum(), 1).astype(jnp.float32)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

        def accumulate(carry, microbatch):
            loss, grads = carry
            (more_loss, aux), more_grads = value_and_grad(
                state.params, teacher_params, microbatch, total
            )
            return (loss + more_loss, jax.tree.map(jnp.add, grads, more_grads)), aux

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (loss, grads), aux = jax.lax.scan(
            accumulate, (jnp.zeros(()), zeros), _split(batch, num_microbatches)
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        update = _update_from_host if is_in_host_memory(state.opt_state) else _update
        params, opt_state, update_norm = update(optimizer, grads, state, finite)
        sampled_tokens = aux["sampled_tokens"].sum()
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "skipped": 1.0 - finite,
            "tokens": total,
            "response_length": lengths_b.mean(dtype=jnp.float32),
            "truncated": batch.truncated_b.mean(dtype=jnp.float32),
            "on_policy": batch.on_policy_b.mean(dtype=jnp.float32),
            "log_prob_gap": aux["gap_sum"].sum() / jnp.maximum(sampled_tokens, 1.0),
            "log_prob_gap_max": aux["gap_max"].max(),
            "student_log_prob": aux["student_log_prob"].sum(),
            "teacher_log_prob": aux["teacher_log_prob"].sum(),
        }
        if importance_clip:
            mean = aux["importance_weight"].sum() / jnp.maximum(sampled_tokens, 1.0)
            metrics["importance_weight"] = jnp.where(sampled_tokens > 0, mean, 1.0)
            clipped = aux["importance_clipped"].sum() / jnp.maximum(sampled_tokens, 1.0)
            metrics["importance_clipped"] = clipped
        return TrainState(state.step + 1, params, opt_state), metrics

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _split(batch: Batch, parts: int) -> Batch:
    """Rows b -> (parts, b / parts), such that every part lies on all devices."""

    def split(x):
        # A device holds contiguous rows: taking every parts-th row moves nothing between devices.
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, batch)


def _update(optimizer, grads, state: TrainState, finite: jax.Array):
    """Parameters, optimizer state, norm of the update; the old ones if the gradient is no good."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Part of the loop that writes the new values, which has read the old ones anyway: free.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    return params, opt_state, jnp.where(finite, optax.tree.norm(updates), 0.0)


def _update_from_host(optimizer, grads, state: TrainState, finite: jax.Array):
    """`_update` with an optimizer state that comes from host memory and returns there.

    In a branch: XLA would otherwise copy the state to the devices at the start of the step, and
    hold it there together with the activations.
    """

    def update(grads, params, held_state):
        updates, opt_state = optimizer.update(grads, in_device_memory(held_state), params)
        new_params = optax.apply_updates(params, updates)
        return new_params, in_memory_of(opt_state, held_state), optax.tree.norm(updates)

    def skip(grads, params, held_state):
        return params, held_state, jnp.zeros(())

    return jax.lax.cond(finite, update, skip, grads, state.params, state.opt_state)
