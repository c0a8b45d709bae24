"""Losses and their gradients for one block of tokens, whose logits exist.

The vocabulary may be sharded: a block then holds this shard's columns, and what is summed over the
vocabulary is summed over the shards, a few numbers per token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence import topk
from distill.kernels.linear_divergence.sweeps import (
    Statistics,
    Sweeps,
    gradient_products,
    relative_to,
    weighted,
)
from distill.kernels.linear_divergence.token_losses import RowLoss, TokenValues


@dataclasses.dataclass(frozen=True)
class Block:
    """Logits of c tokens over this shard's columns, and what belongs to the tokens.

    `teacher` is its logits float32 (c, v), a `TopK`, or None; `statistics` are those of the whole
    vocabulary at `temperature`; `targets_c` counts from this shard's
    first column (no column matches where the target is elsewhere). The vocabulary's last shard may
    have fewer columns than the array: `num_columns` exist, of `vocab_size` in all.
    """

    logits_s_cv: jax.Array
    teacher: Any
    statistics: Statistics
    temperature: float
    targets_c: jax.Array
    first_column: jax.Array | int
    num_columns: jax.Array
    vocab_size: int
    vocab_axes: tuple[str, ...]

    @property
    def logits_t_cv(self) -> jax.Array | None:
        return None if isinstance(self.teacher, topk.TopK) else self.teacher

    def sum(self, tree):
        """Sum over the shards of the vocabulary."""
        return jax.lax.psum(tree, self.vocab_axes) if self.vocab_axes else tree

    def max(self, tree):
        return jax.lax.pmax(tree, self.vocab_axes) if self.vocab_axes else tree


def values(losses: tuple, sweeps: Sweeps, block: Block) -> TokenValues:
    """The values per token; `divergence` has a row for each of the losses, (len(losses), c)."""
    divergence_nc = jnp.stack([_sums(loss, sweeps, block)[0] for loss in losses])
    return _token_values(divergence_nc, block)


def values_and_gradients(
    loss, sweeps: Sweeps, block: Block, weights_c, hidden_s_cd, head_s_dv, head_gradient_dv
):
    """(values per token, head_gradient_dv with the block's part added, hidden states' gradient).

    Gradients are of sum_c weights_c * loss_c, float32, from this shard's columns.
    """
    model = hidden_s_cd, head_s_dv, head_gradient_dv
    is_row_loss, has_top_k = isinstance(loss, RowLoss), isinstance(block.teacher, topk.TopK)
    if is_row_loss or has_top_k:
        gradient_of = _row_gradient if is_row_loss else topk.gradient
        divergence_c, gradient_cv = gradient_of(loss, block, weights_c)
        gradients = gradient_products(gradient_cv.astype(hidden_s_cd.dtype), *model)
    else:
        divergence_c, slope_sum_c = _sums(loss, sweeps, block)
        rows = *_operands(block), slope_sum_c, weights_c
        gradients = sweeps.gradient_products(loss, *rows, *model)
    return _token_values(divergence_c, block), *gradients


def combined(local: Statistics, temperature: float, vocab_axes: tuple[str, ...]) -> Statistics:
    """Statistics over the whole vocabulary from those of its shards: one maximum and one sum."""
    if not vocab_axes:
        return local
    totals = {name: value for name, value in vars(local).items() if value is not None}
    maxima = {model: totals[f"max_{model}"] for model in "st" if f"max_{model}" in totals}
    totals = relative_to(jax.lax.pmax(maxima, vocab_axes), totals, temperature)
    sums = {name: value for name, value in totals.items() if not name.startswith("max")}
    return Statistics(**totals | jax.lax.psum(sums, vocab_axes))


def _operands(block: Block):
    logits = block.logits_s_cv, block.logits_t_cv
    return *logits, block.targets_c, block.num_columns, block.statistics


def _sums(loss, sweeps: Sweeps, block: Block):
    """(loss, sum of slopes) per token; the second is None where no one needs it."""
    if isinstance(loss, RowLoss):
        return loss.values(*_whole_rows(block)), None
    if isinstance(block.teacher, topk.TopK):
        return topk.losses(loss, block), None
    sums = loss.sums(block.statistics)
    if sums is None:
        sums = block.sum(sweeps.term_sums(loss, *_operands(block)))
    return sums


def _token_values(divergence, block: Block):
    statistics, temperature = block.statistics, block.temperature
    log_prob_s = statistics.target_s - temperature * statistics.max_s
    log_prob_s -= jnp.log(statistics.plain_sum_s)
    if isinstance(block.teacher, topk.TopK):
        log_prob_t = topk.target_log_probs(block)
    elif statistics.max_t is None:
        log_prob_t = jnp.zeros_like(log_prob_s)
    else:
        log_prob_t = statistics.target_t - temperature * statistics.max_t
        log_prob_t -= jnp.log(statistics.plain_sum_t)
    has_target_c = block.targets_c + block.first_column >= 0
    log_probs = (jnp.where(has_target_c, x_c, 0.0) for x_c in (log_prob_s, log_prob_t))
    return TokenValues(divergence, *log_probs)


def _whole_rows(block: Block):
    """(logits_s, logits_t, targets) over the whole vocabulary: a row loss may mix any columns."""

    def gather(logits_cv):
        if block.vocab_axes:
            logits_cv = jax.lax.all_gather(logits_cv, block.vocab_axes, axis=1, tiled=True)
        return logits_cv[:, : block.vocab_size]

    logits_s_cv, logits_t_cv = gather(block.logits_s_cv), gather(block.logits_t_cv)
    return logits_s_cv, logits_t_cv, block.targets_c + block.first_column


def _row_gradient(loss: RowLoss, block: Block, weights_c):
    logits_s_cv, logits_t_cv, targets_c = _whole_rows(block)
    losses_c, pull_back = jax.vjp(
        lambda logits_cv: loss.values(logits_cv, logits_t_cv, targets_c), logits_s_cv
    )
    (gradient_cv,) = pull_back(jnp.ones_like(losses_c))
    gradient_cv = weighted(gradient_cv, weights_c)
    width = block.logits_s_cv.shape[1]
    # This shard's columns of it; behind the vocabulary's end there are zeros.
    gradient_cv = jnp.pad(gradient_cv, ((0, 0), (0, width)))
    return losses_c, jax.lax.dynamic_slice_in_dim(gradient_cv, block.first_column, width, axis=1)
