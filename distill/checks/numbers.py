"""Numbers that must agree: one loss computed in several ways, on responses of the sampler."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distill.base.sharding import HOST_MEMORY, constrain_whole, on_device_memory
from distill.batches.packing import Layout
from distill.batches.rows import Rows, make_batch
from distill.build.devices import build_layout, make_put
from distill.build.sampler import build_sampling_params
from distill.build.session import Session
from distill.checks import Problem
from distill.config.method import Distillation
from distill.config.schema import Config
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.data.tokenizer import response_end
from distill.kernels.platform import platform
from distill.losses.objective import make_objective
from distill.models.checkpoints.keys import mapped_params
from distill.models.checkpoints.source import load_model_config
from distill.rollout.base import generate_checked
from distill.sampling.request import RolloutRequest
from distill.step import TrainState, make_loss, whole_params
from distill.teachers.alignment import Alignment

RESPONSE_TOKENS = 16
# Of a student that is its own teacher, as shares of what a teacher with half its logits gives: the
# gradient's rounding, where products are of float32 and where they are of 16 bits. A divergence is
# smaller: it grows with the square of what it is given.
ROUNDED_GRADIENT = {True: 1e-3, False: 0.1}
ROUNDED_LOSS = {True: 1e-4, False: 1e-2}
# Mean nats per token between two exact float32 computations of the same model.
FLOAT32_GAP = 2e-4


def check_weights(session: Session, state: TrainState) -> str:
    """All weights of the models that are here are finite."""
    models = {"student": (session.student_folder, state.params)}
    for name, teacher in session.teachers.items():
        if teacher.model is not None:
            role = f"teacher {name}".strip()
            models[role] = session.teacher_folders[name], teacher.model.params
    for role, (folder, params) in models.items():
        mapped = mapped_params(load_model_config(folder)[0], params)
        for names in _looked_at_together(mapped):
            values = {name: mapped[name][1] for name in names}
            leading = tuple((name, len(mapped[name][0].stacked)) for name in names)
            on_devices = jax.device_put(values, on_device_memory(values))
            for name, answers in jax.device_get(_finite(on_devices, leading)).items():
                finite = np.logical_and.reduce(answers)
                for index, key in mapped[name][0].tensors(finite.shape):
                    if not finite[index]:
                        raise Problem(
                            f"the {role}'s {key} has entries that are not finite: download "
                            f"{folder} again, or take another model"
                        )
    return "all finite"


def _looked_at_together(mapped: dict[str, tuple[Any, Any]]) -> list[list[str]]:
    """Parameters on the devices, by one program; each of those in host memory, by itself."""

    def in_host(name: str) -> bool:
        leaves = jax.tree.leaves(mapped[name][1])
        return any(x.sharding.memory_kind == HOST_MEMORY for x in leaves)

    return [
        [name for name in mapped if not in_host(name)],
        *([name] for name in mapped if in_host(name)),
    ]


@functools.partial(jax.jit, static_argnums=1)
def _finite(
    values: dict[str, Any], leading: tuple[tuple[str, int], ...]
) -> dict[str, list[jax.Array]]:
    """Of every array, whether its entries are, for each index of so many leading axes."""

    def of_array(array: jax.Array, axes: int) -> jax.Array:
        return jnp.isfinite(array).all(axis=tuple(range(axes, array.ndim)))

    return constrain_whole(
        {name: [of_array(x, axes) for x in jax.tree.leaves(values[name])] for name, axes in leading}
    )


def check_numbers(session: Session, state: TrainState) -> str:
    """The train step's own loss on responses that the sampler has just given.

    With the student as its own teacher, loss and gradient are zero; the log-probabilities that the
    step computes are the sampler's; what stands behind a row's end changes nothing, and neither
    does packing. A teacher with other prompts is asked for the student's tokens, and would be
    noticed to be asked one position late.
    """
    sequences = short_sequences(session, state)
    padded = laid_out(session, session.prompts, sequences, packed=False)
    own_teacher = session.objective.divergence is not None
    loss_fn = make_loss(
        session.student.graph,
        session.student.graph if own_teacher else None,
        session.objective.alone if own_teacher else make_objective(Distillation(hard_labels=True)),
        vocab_size=session.vocabulary.size,
    )
    params = state.params

    def loss_of(trainable, frozen, teacher_params, rows: Rows):
        total = jnp.maximum(rows.mask_bt.sum(), 1).astype(jnp.float32)
        loss, sums = loss_fn(whole_params(trainable, frozen), teacher_params, rows, total)
        del sums["expert_load"]  # of a mixture: no number
        return loss, sums

    @jax.jit
    def measure(*args):
        (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(*args)
        return constrain_whole((loss, sums, optax.tree.norm(grads)))

    # Packed rows take a program of their own; their gradient is not looked at.
    measure_without_gradient = jax.jit(
        lambda *args: constrain_whole((*loss_of(*args), jnp.zeros(())))
    )

    def evaluate(rows: Rows, teacher_params=params if own_teacher else None, measure=measure):
        batch = jax.tree.map(make_put(session.mesh), rows)
        measured = measure(state.trainable, state.frozen, teacher_params, batch)
        return jax.tree.map(float, jax.device_get(measured))

    loss, sums, gradient = evaluate(padded)
    details = []
    for prompts, alignment in session.asked:
        about = np.flatnonzero(np.isin(sequences["row"], prompts.rows))
        if prompts.view_tokens is not None and len(about):
            details.append(_check_view(session, prompts, sequences.take(about), alignment))
    if own_teacher:
        if "routed_experts" in padded.columns:  # a teacher does not replay them
            loss, _, gradient = evaluate(_without_routes(padded))
        other_loss, _, other_gradient = evaluate(padded, _half_logits(session, params))
        exact = _is_exact(session.config)
        details.append(_check_zero(exact, loss, other_loss, gradient, other_gradient))
        if padded.view is not None:
            shifted, *_ = evaluate(_late(padded))
            details.append(_check_shift(exact, shifted, loss, other_loss))
    if session.samples:
        details.append(_check_gap(session, sums))
    details.append(_check_padding(sums, evaluate(_stirred(padded))[1]))
    if session.config.policy.sequence_packing.enabled:
        packed = laid_out(session, session.prompts, sequences, packed=True)
        _, packed_sums, _ = evaluate(packed, measure=measure_without_gradient)
        details.append(_check_packing(session, sums, packed_sums))
    return "; ".join(details)


def short_sequences(session: Session, state: TrainState) -> Sequences:
    """The first prompts with short responses, sampled where any are.

    The sampler is asked for a whole batch, so that it compiles what the run will need anyway.
    """
    config = session.config
    repeats = config.distillation.generate_strategy.num_generations
    number = config.policy.train_global_batch_size // repeats
    prompts = session.prompts.sequences(np.arange(number) % len(session.prompts))
    sequences = prompts.take(np.repeat(np.arange(number), repeats))
    starts_b = sequences.prompts().lengths_b
    if session.samples:
        step = int(state.step)
        session.backend.refit(state.params, version=step)
        request = RolloutRequest(
            tuple(prompts.prompts().split("tokens")),
            np.arange(number),
            build_sampling_params(config.distillation.generate_strategy),
            num_generations=repeats,
            version=step,
            seed=config.seed,
            step=step,
            max_lengths=np.full(len(sequences), RESPONSE_TOKENS, np.int32),
        )
        rollout, _ = generate_checked(session.backend, request)
        sequences = rollout.sequences(sequences)
    return sequences.first(starts_b + RESPONSE_TOKENS)


def laid_out(
    session: Session,
    prompts: Prompts,
    sequences: Sequences,
    *,
    packed: bool,
    view: Sequences | None = None,
) -> Rows:
    """As many sequences as a microbatch surely holds, in one microbatch, on the host.

    A teacher with other `prompts` reads `view`; None: the student's tokens, by the way of a view.
    """
    if prompts.view_tokens is not None and view is None:
        view = sequences
    longest = max(session.prompts.prompt_width + RESPONSE_TOKENS, int(sequences.lengths_b.max()))
    shape = build_layout(session.config.policy, longest, session.mesh).shapes[-1]
    if not packed:
        shape = dataclasses.replace(shape, length=longest)
    some = np.arange(len(sequences))[: shape.rows]
    batch = make_batch(
        sequences.take(some),
        layout=Layout((shape,), packed, prompts.view_excess),
        pad_id=prompts.pad_id,
        view=view and view.take(some),
    )
    return jax.tree.map(lambda x: x[0], batch[0])


def _without_routes(rows: Rows) -> Rows:
    """The rows as if the sampler had not said what it picked."""
    column: Any = np.full_like(rows.columns["routed_experts"], -1)
    return dataclasses.replace(rows, columns={**rows.columns, "routed_experts": column})


def _stirred(rows: Rows) -> Rows:
    """The rows with other tokens behind their ends."""
    behind_bt = np.arange(rows.tokens_bt.shape[1]) >= rows.lengths_b[:, None]
    tokens_bt: Any = np.where(behind_bt, rows.tokens_bt[:, :1], rows.tokens_bt)
    return dataclasses.replace(rows, tokens_bt=tokens_bt)


def _half_logits(session: Session, params: nnx.State) -> nnx.State:
    """The parameters of a teacher that differs: its final norm is half as wide."""
    offset = nnx.merge(session.student.graph, params).config.norm_offset
    other = jax.tree.map(lambda x: x, params)
    halved = jax.jit(lambda norm: jax.tree.map(lambda w_d: (w_d - offset) / 2, norm))
    other["final_norm"] = halved(params["final_norm"])
    return other


def _check_zero(
    exact: bool, loss: float, other_loss: float, gradient: float, other_gradient: float
) -> str:
    """Whether loss and gradient are zero beside those that another teacher gives."""
    if not (
        abs(loss) <= ROUNDED_LOSS[exact] * abs(other_loss)
        and gradient <= ROUNDED_GRADIENT[exact] * other_gradient
    ):
        raise Problem(
            f"with the student as its own teacher the loss is {loss:.3g} and its gradient "
            f"{gradient:.3g} instead of 0 (with half the teacher's logits {other_loss:.3g} and "
            f"{other_gradient:.3g}): distillation.kl_type is no divergence (what is not zero "
            "for equal distributions is registered with register_loss), or the loss is computed "
            "wrongly; try distillation.loss_implementation=reference"
        )
    return f"own teacher: loss {loss:.1e}, gradient {gradient:.1e}"


def _late(rows: Rows) -> Rows:
    """The rows with a teacher that is asked one position late."""
    assert rows.view is not None
    last = rows.view.tokens_bt.shape[1] - 1
    index_bt: Any = np.minimum(rows.view.index_bt + 1, last)
    late = dataclasses.replace(rows.view, index_bt=index_bt)
    return dataclasses.replace(rows, view=late)


def _check_shift(exact: bool, shifted: float, loss: float, other_loss: float) -> str:
    """Whether the loss tells a shift by one position from none."""
    if not abs(shifted) > abs(loss) + ROUNDED_LOSS[exact] * abs(other_loss):
        raise Problem(
            f"with its own teacher one position late the loss is {shifted:.3g}, as without a "
            "shift: what the teacher says at a position is not what the loss compares there"
        )
    return f"one position late {shifted:.1e}"


def _check_view(
    session: Session, prompts: Prompts, sequences: Sequences, alignment: Alignment | None
) -> str:
    """Whether the teacher's next tokens are the student's, wherever that is trained.

    In another tokenizer, they are their pairs where both cut alike.
    """
    packed = session.config.policy.sequence_packing.enabled
    view = prompts.view(sequences)
    rows: Any = laid_out(session, prompts, sequences, packed=packed, view=view)
    next_bt = np.roll(rows.view.tokens_bt, -1, axis=1)
    asked_bt = np.take_along_axis(next_bt, rows.view.index_bt, axis=1)
    expected_bt, compared_bt = rows.targets_bt, rows.mask_bt
    if alignment is not None:
        compared_bt = compared_bt & (rows.columns["span"] == 0)
        end = response_end(alignment.teacher.tokenizer)
        ends_bt = np.isin(rows.targets_bt, alignment.student.end_ids)
        expected_bt = np.where(ends_bt, end, alignment.pairs_v[rows.targets_bt])
    wrong, number = int((compared_bt & (asked_bt != expected_bt)).sum()), int(compared_bt.sum())
    if wrong:
        raise Problem(
            f"{wrong} of {number} response tokens are not what the teacher "
            "predicts in their place: its prompts and the responses are joined wrongly"
        )
    return f"the teacher is asked for the student's {number} tokens"


def _check_gap(session: Session, sums: dict[str, float]) -> str:
    generation = session.config.policy.generation
    gap = sums["gap_sum"] / max(sums["sampled_tokens"], 1)
    exact = (
        _is_exact(session.config)
        and generation.backend == "jax"
        and generation.cache_dtype == generation.precision == "auto"
    )
    limit = min(FLOAT32_GAP, generation.max_log_prob_gap) if exact else generation.max_log_prob_gap
    if not gap <= limit:
        raise Problem(
            f"sampler and trainer give the same tokens log-probabilities {gap:.3g} nats apart "
            f"(at most {limit:g}): the sampler has other weights (a refit that did not arrive), "
            "computes in another precision, or the trainer looks at other positions"
        )
    return f"sampler and trainer {gap:.1e} nats apart"


def _is_exact(config: Config) -> bool:
    """Whether products are of float32: by default, accelerators round their operands."""
    # JAX adds its options to the class as it defines them.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    unrounded = precision in ("highest", "float32")
    return config.policy.precision == "float32" and (platform() == "cpu" or unrounded)


def _check_padding(sums: dict[str, float], other: dict[str, float]) -> str:
    ours, theirs = sums["student_log_prob"], other["student_log_prob"]
    if not math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-6):
        raise Problem(
            f"what stands behind a row's end changes the mean log-probability from {ours:.6f} to "
            f"{theirs:.6f}: padding is attended to or trained on"
        )
    return "padding has no influence"


def _check_packing(session: Session, sums: dict[str, float], packed: dict[str, float]) -> str:
    ours, theirs = sums["student_log_prob"], packed["student_log_prob"]
    exact = _is_exact(session.config)
    if not math.isclose(ours, theirs, rel_tol=1e-4 if exact else 1e-2, abs_tol=1e-5):
        raise Problem(
            f"packed rows have a mean log-probability of {theirs:.6f}, padded ones of {ours:.6f}: "
            "sequences that share a row see each other; set policy.sequence_packing.enabled=False"
        )
    return "packed rows are as padded ones"
