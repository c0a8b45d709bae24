"""One optimizer update: student and teachers together in one jitted, sharded function.

The batch comes in microbatches of one teacher each, walked by a loop for each teacher. The
objective is the sum over tokens, and over the teachers that are asked about them, of weight times
token loss, divided by the global number of response tokens, each counted once. Gradients are summed
in float32, so that the update does not depend on how the batch was cut.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from distill.base.sharding import in_device_memory, in_memory_of, is_in_host_memory
from distill.batches.rows import Batch, Rows, num_filled
from distill.kernels.linear_divergence.token_losses import TokenWeight
from distill.losses.objective import Objective
from distill.models import moe
from distill.step.loss import TeacherInStep, make_loss
from distill.step.metrics import describe
from distill.step.state import AveragedState, Params, TrainState, whole_params
from distill.teachers.spans import CUTS


def make_train_step(
    student: nnx.GraphDef,
    teachers: Sequence[TeacherInStep],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    vocab_size: int,
    metrics: Mapping[str, TokenWeight] | None = None,
    state_shardings: Any = None,
    ema_decay: float = 0.0,
    router_aux_loss: float = 0.0,
) -> Callable[[TrainState, Sequence[Params], Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns jitted `step(state, teacher_params, batch) -> (state, metrics)`; donates `state`.

    Args:
      student: graph of the trained model, whose parameters are `state.params`.
      teachers: in the order of their numbers in the batch, and of `teacher_params`, which are None
        where a teacher has no graph or is a part of the state.
      vocab_size: ids shared by all models; rows of a head beyond it are ignored.
      metrics: of the user's own, by name; their means over the response tokens are added.
      state_shardings: layout of the new state, None for a single device.
      ema_decay: share that the average of an AveragedState keeps of itself in an update.
      router_aux_loss: weight of `moe.balance_loss` in the loss; of the whole batch, whose picks are
        counted before, by a forward pass of their own.

    Metrics are those of `metrics.describe`, grad_norm, update_norm and target_share. A step whose
    loss or gradient norm is not finite is skipped (1, else 0): of the state, only `step` changes.
    """
    # Of all teachers or none: the sums of their microbatches are added up.
    cuts = CUTS if any(each.shared is not None for each in teachers) else {}
    losses = [
        make_loss(
            student,
            each.graph,
            objective if each.shared is None else objective.aligned(each.spans),
            vocab_size=vocab_size,
            metrics={**(metrics or {}), **cuts},
            router_aux_loss=router_aux_loss,
            shared=each.shared,
        )
        for each in teachers
    ]
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, teacher_params: Sequence[Params], batch: Batch):
        total = sum(jnp.sum(part.counted_bt) for part in batch)
        total = jnp.maximum(total, 1).astype(jnp.float32)
        share = objective.target.share(state.step, state.opt_state)
        params_of = [
            each.from_state(state) if each.from_state else given
            for each, given in zip(teachers, teacher_params, strict=True)
        ]
        picks_e = _count_picks(student, state.params, batch) if router_aux_loss else None

        def evaluate(number: int, params_t: Params, microbatch: Rows):
            def loss_of(trainable):
                params = whole_params(trainable, state.frozen)
                return losses[number](params, params_t, microbatch, total, share, picks_e)

            return jax.value_and_grad(loss_of, has_aux=True)(state.trainable)

        by_teacher, grads = _sum_over_microbatches(evaluate, batch, params_of)
        loss, sums = functools.reduce(_add, by_teacher)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        update = _update_from_host if is_in_host_memory(state.opt_state) else _update
        trainable, opt_state, update_norm = update(optimizer, grads, state, finite, loss)
        measured = describe(batch, teachers, (loss, sums), by_teacher, total, metrics or ())
        measured |= dict(grad_norm=grad_norm, update_norm=update_norm, skipped=1.0 - finite)
        if share is not None:
            measured["target_share"] = share
        new = dataclasses.replace(
            state, step=state.step + 1, trainable=trainable, opt_state=opt_state
        )
        if isinstance(new, AveragedState):
            new = _averaged(new, finite, ema_decay)
        return new, measured

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _averaged(state: AveragedState, finite: jax.Array, decay: float) -> AveragedState:
    """With the new trainable parameters in the average, unless they are no good."""
    moved = optax.incremental_update(state.trainable, state.average, 1 - decay)
    kept = jax.tree.map(lambda x, old: jnp.where(finite, x, old), moved, state.average)
    return dataclasses.replace(state, average=kept)


def _count_picks(student: nnx.GraphDef, params: Params, batch: Batch) -> jax.Array:
    """For how many tokens of the batch, in all layers, each of the student's experts is picked."""

    def count(rows: Rows) -> jax.Array:
        model = nnx.merge(student, params)
        arrays = rows.tokens_bt, rows.positions_bt, rows.segment_ids_bt
        sampled_btm = rows.columns.get("routed_experts")
        return moe.add_layers(model.with_load(*arrays, rows.filled_bt, sampled_btm)[1]).picks_e

    picks_e: Any = 0
    for part in batch:
        picks = functools.partial(
            lambda part, i, so_far_e: so_far_e + count(_microbatch(part, i)), part
        )
        nothing_e = jax.tree.map(jnp.zeros_like, jax.eval_shape(count, _microbatch(part, 0)))
        picks_e += jax.lax.fori_loop(0, num_filled(part), picks, nothing_e)
    return picks_e


def _sum_over_microbatches(evaluate: Callable, batch: Batch, params_of: Sequence[Params]):
    """Sums of `evaluate(teacher, params, microbatch)`, ((loss, sums), grads), over those filled.

    Their number is known when the step runs, not when it is compiled: one program for all batches.
    Parameters in host memory are fetched while that teacher's are walked. Returns (loss, sums) of
    each teacher's microbatches, and the gradients of all.
    """

    if len(batch) == 1 and len(batch[0].tokens_bt) == 1:
        of_teacher, grads = evaluate(0, params_of[0], _microbatch(batch[0], 0))
        return [of_teacher], grads  # nothing to add up, and no room for the sum

    def walk(number: int, params: Params, carry):
        for part in batch:
            if part.teacher != number:
                continue

            def add(i, carry, part=part):
                so_far, grads = carry
                more, more_grads = evaluate(number, params, _microbatch(part, i))
                return _add(so_far, more), jax.tree.map(jnp.add, grads, more_grads)

            carry = jax.lax.fori_loop(0, num_filled(part), add, carry)
        return carry

    def first(params: Params, microbatch: Rows):
        fetched = in_device_memory(params) if _is_all_in_host_memory(params) else params
        return evaluate(0, fetched, microbatch)

    shapes = jax.eval_shape(first, params_of[0], _microbatch(batch[0], 0))
    nothing, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    by_teacher = []
    for number, params in enumerate(params_of):
        carry = nothing, grads
        if _is_all_in_host_memory(params):
            # In a branch, for the reason of `_update_from_host`: no two are fetched at once.
            carry = jax.lax.cond(
                sum(num_filled(part) for part in batch if part.teacher == number) > 0,
                lambda params, carry, number=number: walk(number, in_device_memory(params), carry),
                lambda params, carry: carry,
                params,
                carry,
            )
        else:
            carry = walk(number, params, carry)
        of_teacher, grads = carry
        by_teacher.append(of_teacher)
    return by_teacher, grads


def _microbatch(stacked: Rows, number) -> Rows:
    return jax.tree.map(lambda x: x[number], stacked)


def _is_all_in_host_memory(params: Params) -> bool:
    """Not so of those that are streamed: some of them are small, and stay on the devices."""
    leaves = jax.tree.leaves(params)
    return bool(leaves) and all(is_in_host_memory(x) for x in leaves)


def _add(so_far, more):
    """(loss, sums) of two parts of a batch."""
    (loss, sums), (more_loss, more_sums) = so_far, more
    highest = jnp.maximum(sums["gap_max"], more_sums["gap_max"])
    sums = jax.tree.map(jnp.add, sums, more_sums) | {"gap_max": highest}
    return loss + more_loss, sums


def _update(optimizer, grads, state: TrainState, finite: jax.Array, loss: jax.Array):
    """Trainable parameters, optimizer state, norm of the update; the old ones if it is no good."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, value=loss)
    trainable = optax.apply_updates(state.trainable, updates)
    # Part of the loop that writes the new values, which has read the old ones anyway: free.
    trainable, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (trainable, opt_state),
        (state.trainable, state.opt_state),
    )
    return trainable, opt_state, jnp.where(finite, optax.tree.norm(updates), 0.0)


def _update_from_host(optimizer, grads, state: TrainState, finite: jax.Array, loss: jax.Array):
    """`_update` with an optimizer state that comes from host memory and returns there.

    In a branch: XLA would otherwise copy the state to the devices at the start of the step, and
    hold it there together with the activations.
    """

    def update(grads, trainable, held_state):
        on_device = in_device_memory(held_state)
        updates, opt_state = optimizer.update(grads, on_device, trainable, value=loss)
        new_trainable = optax.apply_updates(trainable, updates)
        return new_trainable, in_memory_of(opt_state, held_state), optax.tree.norm(updates)

    def skip(grads, trainable, held_state):
        return trainable, held_state, jnp.zeros(())

    return jax.lax.cond(finite, update, skip, grads, state.trainable, state.opt_state)
