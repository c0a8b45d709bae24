"""The loss of one microbatch: student and teacher pass it, and the objective compares them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill.batches.rows import Rows, in_student_places, teacher_hidden, view_hidden
from distill.kernels.linear_divergence import SharedIds, TokenStatistics, TopK
from distill.kernels.linear_divergence.token_losses import TokenWeight
from distill.losses.interpolation import interpolated
from distill.losses.objective import Objective
from distill.losses.weights import TruncatedImportance, token_weights
from distill.models import moe, routes
from distill.step.state import Params, TrainState
from distill.teachers.spans import columns_of_spans


@dataclasses.dataclass(frozen=True)
class TeacherInStep:
    """What the step is compiled for, of one teacher.

    It has no graph for hard labels, and where batches bring its scores. `from_state` says what of
    the state its parameters are; None: they are an argument of the step. `shared` is what it has of
    the student's ids, where it has another tokenizer, and `spans` whether it is then asked about
    what it cuts otherwise.
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
        columns, hidden_t, head_t = dict(rows.columns), None, None
        sampled_btm = columns.pop("routed_experts", None)
        model = nnx.merge(student, params)
        arrays = rows.tokens_bt, rows.positions_bt, rows.segment_ids_bt
        hidden_s, expert_load = model.with_load(*arrays, rows.filled_bt, sampled_btm)
        head_s, experts = model.head(), model.config.experts
        if teacher is not None:
            model = nnx.merge(teacher, teacher_params)
            head_t = model.head()
            if shared is None:
                hidden_t = teacher_hidden(model, rows)
            else:
                view, read_t = rows.view, jax.lax.stop_gradient(view_hidden(model, rows))
                assert view is not None and view.span_bt is not None
                hidden_t = in_student_places(read_t, rows)
                of_student, of_teacher = (
                    functools.partial(objective.log_probs, *logits, vocab_size=size)
                    for *logits, size in (
                        (*jax.lax.stop_gradient((hidden_s, head_s)), rows.targets_bt, vocab_size),
                        (read_t, head_t, view.targets_bt, shared.size_t),
                    )
                )
                spans = columns_of_spans(columns["span"], view.span_bt, of_student, of_teacher)
                columns = columns | spans
            if share is not None:
                pairs = hidden_s, head_s, hidden_t, head_t
                hidden_t, head_t = interpolated(*pairs, share, vocab_size)
        weights_bt = token_weights(columns["weight"], total)
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
        sums = _sums(objective, rows, columns, known, total, metrics or {})
        sums["expert_load"] = {kind: each.picks_e for kind, each in expert_load.items()}
        if sampled_btm is not None:
            missed_bt = moe.add_layers(expert_load).missed_bt
            sampled_bt = rows.counted_bt & columns["sampled"]
            sums |= routes.disagreement(sampled_btm, missed_bt, sampled_bt)
        if picks_e is not None:
            scores_e = moe.add_layers(expert_load).scores_e
            sums["router_aux_loss"] = moe.balance_loss(scores_e, picks_e, experts.per_token)
            loss += router_aux_loss * sums["router_aux_loss"]
        return loss, sums

    return loss_fn


def _sums(
    objective: Objective,
    rows: Rows,
    columns: Mapping[str, jax.Array],
    known: TokenStatistics,
    total: jax.Array,
    metrics: Mapping[str, TokenWeight],
) -> dict[str, Any]:
    """What is logged of a microbatch, as sums over its tokens."""
    mask_bt, counted_bt = rows.mask_bt, rows.counted_bt
    sampled_bt = counted_bt & columns["sampled"]
    sums = {
        name: jnp.sum(metric(known, columns) * mask_bt) / total for name, metric in metrics.items()
    }
    if clip := objective.importance_clip:
        importance_bt = TruncatedImportance(clip)(known, columns)
        sums["importance_weight"] = jnp.where(sampled_bt, importance_bt, 0.0).sum()
        sums["importance_clipped"] = jnp.sum(sampled_bt & (importance_bt >= clip))
    gap_bt = jnp.abs(known.log_prob_s - columns["log_prob"])
    gap_bt = jnp.where(sampled_bt, gap_bt, 0.0)
    return sums | {
        "gap_sum": gap_bt.sum(),
        "gap_max": gap_bt.max(),
        "sampled_tokens": sampled_bt.sum().astype(jnp.float32),
        "student_log_prob": (known.log_prob_s * counted_bt).sum() / total,
        "teacher_log_prob": (known.log_prob_t * mask_bt).sum() / total,
    }
