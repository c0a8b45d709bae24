"""One optimizer update: student and teachers together in one jitted, sharded function.

The batch comes in microbatches of one teacher each, walked by a loop for each teacher. The
objective is the sum over tokens, and over the teachers that are asked about them, of weight times
token loss, divided by the global number of response tokens, each counted once. Gradients are summed
in float32, so that the update does not depend on how the batch was cut.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from distill.base.sharding import in_device_memory, in_memory_of, is_in_host_memory
from distill.batches.rows import (
    Batch,
    Rows,
    in_student_places,
    num_filled,
    teacher_hidden,
    view_hidden,
)
from distill.kernels.linear_divergence import SharedIds, TokenStatistics, TopK
from distill.kernels.linear_divergence.token_losses import TokenWeight
from distill.losses.interpolation import interpolated
from distill.losses.objective import Objective
from distill.losses.weights import TruncatedImportance, token_weights
from distill.models import moe
from distill.models.lora import attach

Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The student and all that its updates need.

    Attributes:
      step: batches seen, skipped ones included; the optimizer counts its own updates.
      trainable: parameters or adapters (`models.lora`) that updates change, float32; gradients
        and `opt_state` are of them.
      opt_state: of the optimizer.
      frozen: parameters that no update changes, stored as they come; none in full training.
    """

    step: jax.Array
    trainable: Params
    opt_state: optax.OptState
    frozen: Params = dataclasses.field(default_factory=lambda: nnx.State({}))

    @property
    def params(self) -> Params:
        """All parameters of the student, as its graph takes them."""
        return whole_params(self.trainable, self.frozen)

    @property
    def saved(self) -> TrainState:
        """What a checkpoint holds: what is frozen is loaded again from where it came."""
        return dataclasses.replace(self, frozen=nnx.State({}))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AveragedState(TrainState):
    """A train state with the moving average of its trainable parameters, float32."""

    average: Params = None


def whole_params(trainable: Params, frozen: Params) -> Params:
    """One tree of both; differentiable by the trainable ones."""
    return attach(frozen, trainable) if frozen else trainable


@dataclasses.dataclass(frozen=True)
class TeacherInStep:
    """What the step is compiled for, of one teacher.

    Attributes:
      graph: its network; None for hard labels, and where batches bring its scores.
      from_state: what of the state its parameters are; None: they are an argument of the step.
      name: what its own metrics are called by; '' has none.
      shared: what it has of the student's ids, where it has another tokenizer.
      spans: whether it is then asked about spans that it cuts otherwise.
    """

    graph: nnx.GraphDef | None = None
    from_state: Callable[[TrainState], Params] | None = None
    name: str = ""
    shared: SharedIds | None = None
    spans: bool = False


def make_loss(
    student: nnx.GraphDef,
    teacher: nnx.GraphDef | None,
    objective: Objective,
    *,
    vocab_size: int,
    metrics: Mapping[str, TokenWeight] | None = None,
    router_aux_loss: float = 0.0,
    shared: SharedIds | None = None,
) -> Callable[[Params, Params, Rows, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns `loss_fn(params, teacher_params, rows, total, share, picks_e) -> (loss, sums)`.

    The arguments are those of `make_train_step`; `total` is the number of response tokens of the
    whole batch, by which the loss is divided, and `share` the teacher's of the target, None: all.
    `picks_e`, of the whole batch, are what the router's own loss needs; None: there is none.
    `shared` is for a teacher with another tokenizer, and `objective` is then an aligned one.
    Differentiable by `params`. The sums of microbatches add up, but for `gap_max`, a maximum.
    """

    def loss_fn(params, teacher_params, rows: Rows, total, share=None, picks_e=None):
        columns, mask_bt, counted_bt = rows.columns, rows.mask_bt, rows.counted_bt
        model, hidden_t, head_t = nnx.merge(student, params), None, None
        arrays = rows.tokens_bt, rows.positions_bt, rows.segment_ids_bt
        hidden_s, expert_load = model.with_load(*arrays, rows.filled_bt)
        head_s, experts = model.head(), model.config.experts
        if teacher is not None:
            model = nnx.merge(teacher, teacher_params)
            head_t = model.head()
            if shared is None:
                hidden_t = teacher_hidden(model, rows)
            else:
                read_t = jax.lax.stop_gradient(view_hidden(model, rows))
                hidden_t = in_student_places(read_t, rows)
                student_logits = jax.lax.stop_gradient((hidden_s, head_s))
                columns = columns | _of_spans(
                    objective, rows, student_logits, (read_t, head_t), vocab_size, shared.size_t
                )
            if share is not None:
                pairs = hidden_s, head_s, hidden_t, head_t
                hidden_t, head_t = interpolated(*pairs, share, vocab_size)
        weights_bt = token_weights(columns["weight"], total)
        sampled_bt = counted_bt & columns["sampled"]
        scores = None
        if "teacher_ids" in columns:
            scores = TopK(columns["teacher_ids"], columns["teacher_log_probs"])
        loss, values = objective(
            hidden_s,
            head_s,
            jax.lax.stop_gradient(hidden_t),
            jax.lax.stop_gradient(head_t),
            rows.targets_bt,
            weights_bt,
            vocab_size=vocab_size,
            scores=scores,
            columns=columns,
            shared=shared,
        )
        log_prob_t = values.log_prob_t
        if shared is not None:
            log_prob_t = jnp.where(columns["span"] == 0, log_prob_t, columns["span_log_prob"])
        known = TokenStatistics(values.log_prob_s, log_prob_t)
        sums = {}
        if picks_e is not None:
            scores_e = moe.add_layers(expert_load).scores_e
            sums["router_aux_loss"] = moe.balance_loss(scores_e, picks_e, experts.per_token)
            loss += router_aux_loss * sums["router_aux_loss"]
        for name, metric in (metrics or {}).items():
            sums[name] = jnp.sum(metric(known, columns) * mask_bt) / total
        if clip := objective.importance_clip:
            importance_bt = TruncatedImportance(clip)(known, columns)
            sums["importance_weight"] = jnp.where(sampled_bt, importance_bt, 0.0).sum()
            sums["importance_clipped"] = jnp.sum(sampled_bt & (importance_bt >= clip))
        gap_bt = jnp.abs(values.log_prob_s - columns["log_prob"])
        gap_bt = jnp.where(sampled_bt, gap_bt, 0.0)
        return loss, sums | {
            "expert_load": {kind: each.picks_e for kind, each in expert_load.items()},
            "gap_sum": gap_bt.sum(),
            "gap_max": gap_bt.max(),
            "sampled_tokens": sampled_bt.sum().astype(jnp.float32),
            "student_log_prob": (values.log_prob_s * counted_bt).sum() / total,
            "teacher_log_prob": (log_prob_t * mask_bt).sum() / total,
        }

    return loss_fn


def _of_spans(
    objective: Objective,
    rows: Rows,
    student: tuple[jax.Array, Any],
    teacher: tuple[jax.Array, Any],
    vocab_size: int,
    vocab_size_t: int,
) -> dict[str, jax.Array]:
    """Columns of the tokens in spans, from hidden states and heads; 0 elsewhere.

    `span_log_ratio` is log p - log q of the whole span, `span_log_prob` the token's part of log p.
    """
    view, span_bt = rows.view, jnp.maximum(rows.columns["span"], 0)
    assert view is not None and view.targets_bt is not None and view.span_bt is not None
    is_read_bt, in_span_bt = (x_bt > 0 for x_bt in (view.span_bt, span_bt))
    log_p_bt = objective.log_probs(
        *teacher, view.targets_bt, is_read_bt.astype(jnp.float32), vocab_size=vocab_size_t
    )
    log_q_bt = objective.log_probs(
        *student, rows.targets_bt, in_span_bt.astype(jnp.float32), vocab_size=vocab_size
    )

    def summed(values_t, called_t):
        return jnp.zeros(span_bt.shape[1]).at[called_t].add(jnp.where(called_t > 0, values_t, 0.0))

    def of_span(values_bt, called_bt):
        sums_bs = jax.vmap(summed)(values_bt, called_bt)
        return jnp.where(in_span_bt, jnp.take_along_axis(sums_bs, span_bt, axis=1), 0.0)

    log_p_bt, log_q_bt = of_span(log_p_bt, view.span_bt), of_span(log_q_bt, span_bt)
    number_bt = jnp.maximum(of_span(jnp.ones(span_bt.shape), span_bt), 1.0)
    return {"span_log_ratio": log_p_bt - log_q_bt, "span_log_prob": log_p_bt / number_bt}


# Which tokens a teacher with another tokenizer cuts alike, or in spans, or does not read.
_CUTS: dict[str, TokenWeight] = {
    "cut_alike": lambda _, columns: jnp.equal(columns.get("span", 0), 0),
    "in_spans": lambda _, columns: jnp.greater(columns.get("span", 0), 0),
    "left_out": lambda _, columns: jnp.less(columns.get("span", 0), 0),
}


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
      objective: per-token loss summed with weights.
      optimizer: optax chain.
      vocab_size: ids shared by all models; rows of a head beyond it are ignored.
      metrics: of the user's own, by name; their means over the response tokens are added.
      state_shardings: layout of the new state, None for a single device.
      ema_decay: share that the average of an AveragedState keeps of itself in an update.
      router_aux_loss: weight of `moe.balance_loss` in the loss; of the whole batch, whose picks are
        counted before, by a forward pass of their own.

    Metrics are scalars on the device: loss (nats per token, weighted), grad_norm, update_norm,
    tokens, response_length, truncated, on_policy, padding (share of the computed tokens), the gap
    between sampler's and trainer's log-probabilities, skipped, and with importance weights the mean
    weight of sampled tokens (1 without any) and the share of them whose weight is clipped. Of a
    mixture of experts: the largest share of a layer's picks that one expert got, and the share of
    experts that no token picked. Of each teacher with another tokenizer: shares of its tokens that
    both cut alike, in spans, and left out. Of each named teacher: tokens it was asked about, their
    share, and the loss and its log-probability per one of them. Of a target between student and
    teacher, the teacher's share. A step whose loss or gradient norm is not finite is skipped (1,
    else 0): of the state, only `step` changes.
    """
    # Of all teachers or none: the sums of their microbatches are added up.
    cuts = _CUTS if any(each.shared is not None for each in teachers) else {}
    options: Any = dict(
        vocab_size=vocab_size,
        metrics={**(metrics or {}), **cuts},
        router_aux_loss=router_aux_loss,
    )
    losses = [
        make_loss(
            student,
            each.graph,
            objective if each.shared is None else objective.aligned(each.spans),
            shared=each.shared,
            **options,
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
        sampled_tokens = sums["sampled_tokens"]
        asked = [_num_tokens(batch, number) for number in range(len(teachers))]
        # Of a token, on average. Division by what is always 1 would round what is divided.
        times_asked = jnp.maximum(sum(asked), 1) / total if len(teachers) > 1 else 1.0
        measured = {name: sums[name] / times_asked for name in metrics or {}} | {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "skipped": 1.0 - finite,
            "tokens": total,
            **_describe(batch, total),
            **describe_load(sums["expert_load"]),
            "log_prob_gap": sums["gap_sum"] / jnp.maximum(sampled_tokens, 1.0),
            "log_prob_gap_max": sums["gap_max"],
            "student_log_prob": sums["student_log_prob"],
            "teacher_log_prob": sums["teacher_log_prob"] / times_asked,
        }
        if share is not None:
            measured["target_share"] = share
        if router_aux_loss:
            measured["router_aux_loss"] = sums["router_aux_loss"]
        for teacher, of_teacher, tokens in zip(teachers, by_teacher, asked, strict=True):
            role, own = f"teacher/{teacher.name}".rstrip("/"), jnp.maximum(tokens, 1)
            if teacher.shared is not None:
                measured |= {f"{role}/{cut}": of_teacher[1][cut] * total / own for cut in cuts}
            if teacher.name:
                measured |= _describe_teacher(teacher.name, of_teacher, tokens, total)
        if objective.importance_clip:
            mean = sums["importance_weight"] / jnp.maximum(sampled_tokens, 1.0)
            measured["importance_weight"] = jnp.where(sampled_tokens > 0, mean, 1.0)
            clipped = sums["importance_clipped"] / jnp.maximum(sampled_tokens, 1.0)
            measured["importance_clipped"] = clipped
        new = dataclasses.replace(
            state, step=state.step + 1, trainable=trainable, opt_state=opt_state
        )
        if isinstance(new, AveragedState):
            moved = optax.incremental_update(trainable, new.average, 1 - ema_decay)
            kept = jax.tree.map(lambda x, old: jnp.where(finite, x, old), moved, new.average)
            new = dataclasses.replace(new, average=kept)
        return new, measured

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _count_picks(student: nnx.GraphDef, params: Params, batch: Batch) -> jax.Array:
    """For how many tokens of the batch, in all layers, each of the student's experts is picked."""

    def count(rows: Rows) -> jax.Array:
        model = nnx.merge(student, params)
        arrays = rows.tokens_bt, rows.positions_bt, rows.segment_ids_bt
        return moe.add_layers(model.with_load(*arrays, rows.filled_bt)[1]).picks_e

    def one(part: Rows, number) -> Rows:
        return jax.tree.map(lambda x: x[number], part)

    picks_e: Any = 0
    for part in batch:
        picks = functools.partial(lambda part, i, so_far_e: so_far_e + count(one(part, i)), part)
        nothing_e = jax.tree.map(jnp.zeros_like, jax.eval_shape(count, one(part, 0)))
        picks_e += jax.lax.fori_loop(0, num_filled(part), picks, nothing_e)
    return picks_e


def _sum_over_microbatches(evaluate: Callable, batch: Batch, params_of: Sequence[Params]):
    """Sums of `evaluate(teacher, params, microbatch)`, ((loss, sums), grads), over those filled.

    Their number is known when the step runs, not when it is compiled: one program for all batches.
    `params_of`: of each teacher; those that are in host memory are fetched while it is walked.

    Returns:
      (loss, sums) of each teacher's microbatches, and the gradients of all.
    """

    def one(microbatches: Rows, number) -> Rows:
        return jax.tree.map(lambda x: x[number], microbatches)

    if len(batch) == 1 and len(batch[0].tokens_bt) == 1:
        of_teacher, grads = evaluate(0, params_of[0], one(batch[0], 0))
        return [of_teacher], grads  # nothing to add up, and no room for the sum

    def walk(number: int, params: Params, carry):
        for part in batch:
            if part.teacher != number:
                continue

            def add(i, carry, part=part):
                so_far, grads = carry
                more, more_grads = evaluate(number, params, one(part, i))
                return _add(so_far, more), jax.tree.map(jnp.add, grads, more_grads)

            carry = jax.lax.fori_loop(0, num_filled(part), add, carry)
        return carry

    def first(params: Params, microbatch: Rows):
        fetched = in_device_memory(params) if _is_all_in_host_memory(params) else params
        return evaluate(0, fetched, microbatch)

    shapes = jax.eval_shape(first, params_of[0], one(batch[0], 0))
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


def _num_tokens(batch: Batch, teacher: int) -> jax.Array:
    """Response tokens that a teacher is asked about."""
    return jnp.asarray(sum(part.mask_bt.sum() for part in batch if part.teacher == teacher))


def _describe_teacher(
    name: str, of_teacher: tuple[jax.Array, Any], tokens: jax.Array, total: jax.Array
) -> dict[str, jax.Array]:
    """What is logged of one of several teachers; means over the tokens it was asked about."""
    loss, sums = of_teacher
    own = jnp.maximum(tokens, 1)
    return {
        f"teacher/{name}/tokens": tokens,
        f"teacher/{name}/share": tokens / total,
        f"teacher/{name}/loss": loss * total / own,
        f"teacher/{name}/log_prob": sums["teacher_log_prob"] * total / own,
    }


def _describe(batch: Batch, total: jax.Array) -> dict[str, jax.Array]:
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
