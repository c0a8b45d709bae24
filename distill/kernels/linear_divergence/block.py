"""Losses and their gradients for one block of tokens, whose logits exist.

The vocabulary may be sharded: a block then holds this shard's columns, and what is summed over the
vocabulary is summed over the shards, a few numbers per token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence import topk
from distill.kernels.linear_divergence.sweeps import (
    Logits,
    Projection,
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

    `logits.targets_c` counts from this shard's first column (no column matches where the target is
    elsewhere), and `logits.num_columns` of this shard's exist, of `vocab_size` in all: the
    vocabulary's last shard may have fewer than the array. `top_k` stands for a teacher without
    logits; `statistics` are those of the whole vocabulary at `temperature`.
    """

    logits: Logits
    top_k: topk.TopK | None
    statistics: Statistics
    temperature: float
    first_column: jax.Array | int
    vocab_size: int
    vocab_axes: tuple[str, ...]

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
    loss, sweeps: Sweeps, block: Block, weights_c, student: Projection, head_gradient_dv
):
    """(values per token, head_gradient_dv with the block's part added, hidden states' gradient).

    Gradients are of sum_c weights_c * loss_c, float32, from this shard's columns.
    """
    is_row_loss = isinstance(loss, RowLoss)
    if is_row_loss or block.top_k is not None:
        gradient_of = _row_gradient if is_row_loss else topk.gradient
        divergence_c, gradient_cv = gradient_of(loss, block, weights_c)
        gradient_cv = gradient_cv.astype(student.hidden_cd.dtype)
        gradients = gradient_products(gradient_cv, student, head_gradient_dv)
    else:
        divergence_c, slope_sum_c = _sums(loss, sweeps, block)
        rows = block.logits, block.statistics, slope_sum_c, weights_c
        gradients = sweeps.gradient_products(loss, *rows, student, head_gradient_dv)
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


def _sums(loss, sweeps: Sweeps, block: Block):
    """(loss, sum of slopes) per token; the second is None where no one needs it."""
    if isinstance(loss, RowLoss):
        return loss.values(*_whole_rows(block)), None
    if block.top_k is not None:
        return topk.losses(loss, block), None
    sums = loss.sums(block.statistics)
    if sums is None:
        sums = block.sum(sweeps.term_sums(loss, block.logits, block.statistics))
    return sums


def _token_values(divergence, block: Block):
    statistics, temperature = block.statistics, block.temperature
    log_prob_s = statistics.target_s - temperature * statistics.max_s
    log_prob_s -= jnp.log(statistics.plain_sum_s)
    if block.top_k is not None:
        log_prob_t = topk.target_log_probs(block)
    elif statistics.max_t is None:
        log_prob_t = jnp.zeros_like(log_prob_s)
    else:
        log_prob_t = statistics.target_t - temperature * statistics.max_t
        log_prob_t -= jnp.log(statistics.plain_sum_t)
    has_target_c = block.logits.targets_c + block.first_column >= 0
    log_probs = (jnp.where(has_target_c, x_c, 0.0) for x_c in (log_prob_s, log_prob_t))
    return TokenValues(divergence, *log_probs)


def _whole_rows(block: Block):
    """(logits_s, logits_t, targets) over the whole vocabulary: a row loss may mix any columns."""

    def gather(logits_cv):
        if block.vocab_axes:
            logits_cv = jax.lax.all_gather(logits_cv, block.vocab_axes, axis=1, tiled=True)
        return logits_cv[:, : block.vocab_size]

    logits_s_cv, logits_t_cv = map(gather, block.logits.models)
    return logits_s_cv, logits_t_cv, block.logits.targets_c + block.first_column


def _row_gradient(loss: RowLoss, block: Block, weights_c):
    logits_s_cv, logits_t_cv, targets_c = _whole_rows(block)
    losses_c, pull_back = jax.vjp(
        lambda logits_cv: loss.values(logits_cv, logits_t_cv, targets_c), logits_s_cv
    )
    (gradient_cv,) = pull_back(jnp.ones_like(losses_c))
    gradient_cv = weighted(gradient_cv, weights_c)
    width = block.logits.student_cv.shape[1]
    # This shard's columns of it; behind the vocabulary's end there are zeros.
    gradient_cv = jnp.pad(gradient_cv, ((0, 0), (0, width)))
    return losses_c, jax.lax.dynamic_slice_in_dim(gradient_cv, block.first_column, width, axis=1)
