"""Bodies of the kernels in pallas_tpu.py: one block of tokens and columns, sums carried across.

A grid of (token blocks, vocabulary blocks), the latter innermost. Within a block, strips of 16
tokens are walked one vector register's width of columns (128 lanes) at a time, so that intermediate
values stay in registers. Sums over the vocabulary are kept lane by lane, and lanes are combined
once at the end of a row, by the formula that also combines shards (sweeps.relative_to).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distill.kernels.linear_divergence.head import capped
from distill.kernels.linear_divergence.sweeps import (
    MASKED,
    add_columns,
    relative_to,
    weigh_slopes,
)
from distill.kernels.linear_divergence.token_losses import TermSum, terms_and_slopes

LANES = 128
STRIP = 16  # tokens; the rows of one bfloat16 register, two of float32


def products_kernel(
    num_columns_ref, *refs, soft_caps: tuple, names: tuple[str, ...], temperature: float
):
    num_models = 2 if "max_t" in names else 1
    hidden_refs, head_refs = refs[:num_models], refs[num_models : 2 * num_models]
    targets_ref = refs[2 * num_models]
    # Logits, table, sums. Inputs before them may be the memory that the logits are written into.
    outputs = refs[-(num_models + 1 + len(names)) :]
    logits_refs = outputs[:num_models]
    models = zip(hidden_refs, head_refs, soft_caps, logits_refs, strict=True)
    for hidden_ref, head_ref, soft_cap, logits_ref in models:
        logits = jnp.dot(hidden_ref[...], head_ref[...], preferred_element_type=jnp.float32)
        logits_ref[...] = capped(logits, soft_cap)
    operands = *logits_refs, targets_ref, *outputs[num_models:]
    statistics_kernel(num_columns_ref, *operands, names=names, temperature=temperature)


def statistics_kernel(num_columns_ref, *refs, names: tuple[str, ...], temperature: float):
    *logits_refs, targets_ref, table_ref = refs[: -len(names)]
    block = _block_columns(logits_refs[0])
    totals = dict(zip(names, refs[-len(names) :], strict=True))
    models = "st"[: len(logits_refs)]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for name, total_ref in totals.items():
            total_ref[...] = jnp.full_like(total_ref, MASKED if name.startswith("max") else 0.0)

    def update(rows):
        """Adds the columns of this block to the sums of a strip of tokens, lane by lane."""
        total = {name: ref[rows, :] for name, ref in totals.items()}
        columns = list(_columns(block, targets_ref[rows, :]))
        raw = {
            model: [ref[rows, lanes] for lanes, *_ in columns]
            for model, ref in zip(models, logits_refs, strict=True)
        }
        exists = [column < num_columns_ref[0] for _, column, _ in columns]
        scaled = {
            model: [
                jnp.where(there, x / temperature, MASKED)
                for there, x in zip(exists, raw[model], strict=True)
            ]
            for model in models
        }
        total = add_columns(total, scaled, temperature)
        for model in models:
            for (_, _, is_target), x in zip(columns, raw[model], strict=True):
                total[f"target_{model}"] += jnp.where(is_target, x, 0.0)
        for name, ref in totals.items():
            ref[rows, :] = total[name]

    def combine(rows):
        """The lanes into the first one, then all sums into the table."""
        total = {name: ref[rows, :] for name, ref in totals.items()}
        maxima = {model: jnp.max(total[f"max_{model}"], axis=1, keepdims=True) for model in models}
        total = relative_to(maxima, total, temperature)
        _write_table(
            table_ref,
            rows,
            [x if name.startswith("max") else _lane_sum(x) for name, x in total.items()],
        )

    _for_each_strip(table_ref, update)
    pl.when(_is_last_block())(lambda: _for_each_strip(table_ref, combine))


def term_sums_kernel(num_columns_ref, *refs, loss: TermSum):
    *operand_refs, table_ref = refs[: -2 * len(loss.terms)]
    *logits_refs, targets_ref, rows_ref = operand_refs
    sums_refs = refs[-2 * len(loss.terms) :]  # of the terms, then of their slopes
    block = _block_columns(logits_refs[0])

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in sums_refs:
            ref[...] = jnp.zeros_like(ref)

    def update(rows):
        sums = [ref[rows, :] for ref in sums_refs]
        for lanes, column, is_target in _columns(block, targets_ref[rows, :]):
            log_q, log_p = _log_probs(logits_refs, rows_ref[rows, :], rows, lanes, loss.temperature)
            terms, slopes = terms_and_slopes(loss, log_p, log_q, is_target)
            exists = column < num_columns_ref[0]
            sums = [
                total + jnp.where(exists, x, 0.0)
                for total, x in zip(sums, terms + slopes, strict=True)
            ]
        for ref, total in zip(sums_refs, sums, strict=True):
            ref[rows, :] = total

    def combine(rows):
        _write_table(table_ref, rows, [_lane_sum(ref[rows, :]) for ref in sums_refs])

    _for_each_strip(table_ref, update)
    pl.when(_is_last_block())(lambda: _for_each_strip(table_ref, combine))


def gradient_kernel(num_columns_ref, *refs, loss: TermSum, soft_cap: float | None):
    *logits_refs, targets_ref, rows_ref, gradient_ref = refs
    block = _block_columns(logits_refs[0])

    def write(rows):
        operands = rows_ref[rows, :]
        first = range(2 * len(logits_refs), operands.shape[1], 2)
        factors = [(operands[:, i : i + 1], operands[:, i + 1 : i + 2]) for i in first]
        for lanes, column, is_target in _columns(block, targets_ref[rows, :]):
            log_q, log_p = _log_probs(logits_refs, operands, rows, lanes, loss.temperature)
            _, slopes = terms_and_slopes(loss, log_p, log_q, is_target)
            place = logits_refs[0][rows, lanes], soft_cap, column, num_columns_ref[0]
            gradient = weigh_slopes(slopes, log_q, factors, *place)
            gradient_ref[rows, lanes] = gradient.astype(gradient_ref.dtype)

    _for_each_strip(gradient_ref, write)


def gradient_products_kernel(
    num_columns_ref, *refs, loss: TermSum, soft_cap: float | None, upcast: bool
):
    *operand_refs, hidden_ref, head_ref, sum_ref, head_gradient_ref, hidden_gradient_ref, dz_ref = (
        refs
    )
    gradient_kernel(num_columns_ref, *operand_refs, dz_ref, loss=loss, soft_cap=soft_cap)
    first_column, _ = _block_columns(dz_ref)
    column = first_column + jax.lax.broadcasted_iota(jnp.int32, head_ref.shape, 1)
    # Behind the head's end there may be anything, NaN too.
    head = jnp.where(column < num_columns_ref[0], head_ref[...], 0).astype(head_ref.dtype)
    operands = [dz_ref[...].astype(head_ref.dtype), head, hidden_ref[...]]
    if upcast:  # XLA's CPU backend, where kernels are interpreted, refuses these bfloat16 products
        operands = [x.astype(jnp.float32) for x in operands]
    gradient, head, hidden = operands

    @pl.when(pl.program_id(1) == 0)
    def _start():
        hidden_gradient_ref[...] = jnp.zeros_like(hidden_gradient_ref)

    hidden_gradient_ref[...] += jax.lax.dot_general(
        gradient, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    head_gradient_ref[...] = sum_ref[...] + jnp.dot(
        hidden, gradient, preferred_element_type=jnp.float32
    )


def _for_each_strip(block_ref, function) -> None:
    def step(i, _):
        function(pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP))

    jax.lax.fori_loop(0, block_ref.shape[0] // STRIP, step, None)


def _block_columns(block_ref) -> tuple[jax.Array, int]:
    """Number of a block's first column, and of its columns; to be asked outside of any loop."""
    return pl.program_id(1) * block_ref.shape[1], block_ref.shape[1]


def _columns(block, targets_c1):
    """Per register's width of a block: its lanes, their column numbers, and which are targets."""
    first_column, num_columns = block
    lane = jax.lax.broadcasted_iota(jnp.int32, (targets_c1.shape[0], LANES), 1)
    for start in range(0, num_columns, LANES):
        column = first_column + start + lane
        yield pl.ds(start, LANES), column, column == targets_c1


def _log_probs(logits_refs, operands, rows, lanes, temperature: float):
    """(log_q, log_p) of a strip's lanes; log_p is None without a teacher."""
    log_q, log_p = None, None
    for i, ref in enumerate(logits_refs):
        largest, log_sum = operands[:, 2 * i : 2 * i + 1], operands[:, 2 * i + 1 : 2 * i + 2]
        log_prob = (ref[rows, lanes] / temperature - largest) - log_sum
        log_q, log_p = (log_prob, None) if i == 0 else (log_q, log_prob)
    return log_q, log_p


def _write_table(table_ref, rows, columns: list) -> None:
    lane = jax.lax.broadcasted_iota(jnp.int32, (STRIP, LANES), 1)
    table = jnp.zeros((STRIP, LANES), jnp.float32)
    for i, column in enumerate(columns):
        table = jnp.where(lane == i, column, table)
    table_ref[rows, :] = table


def _lane_sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _is_last_block():
    return pl.program_id(1) == pl.num_programs(1) - 1
