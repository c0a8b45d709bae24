"""Losses and their gradients for one block of tokens, whose logits exist.

The vocabulary may be sharded: a block then holds this shard's columns, and what is summed over the
vocabulary is summed over the shards, a few numbers per token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence.head import through_cap
from distill.kernels.linear_divergence.shared import SharedOutcomes
from distill.kernels.linear_divergence.sweeps import (
    Logits,
    PerTerm,
    Projection,
    Statistics,
    Sweeps,
    XlaSweeps,
    gradient,
    gradient_products,
    log_probs,
    relative_to,
    weighted,
)
from distill.kernels.linear_divergence.token_losses import (
    DivergenceTerm,
    RowLoss,
    TermSum,
    TokenStatistics,
    TokenValues,
    kls,
    term_weights,
    weighted_sum,
)
from distill.kernels.linear_divergence.topk import TopK


@dataclasses.dataclass(frozen=True)
class Block:
    """Logits of c tokens over this shard's columns, and what belongs to the tokens.

    `logits.targets_c` counts from this shard's first column (no column matches where the target is
    elsewhere), and `logits.num_columns` of this shard's exist, of `vocab_size` in all: the
    vocabulary's last shard may have fewer than the array. `outcomes` stand for a teacher whose
    logits are not the student's, column by column; `statistics` are those of the whole vocabulary
    at `temperature`.
    """

    logits: Logits
    outcomes: TopK | SharedOutcomes | None
    statistics: Statistics
    temperature: float
    first_column: jax.Array | int
    vocab_size: int
    vocab_axes: tuple[str, ...]

    def sum(self, tree):
        """Sum over the shards of the vocabulary."""
        return jax.lax.psum(tree, self.vocab_axes) if self.vocab_axes else tree

    def log_q(self, logits_cx) -> jax.Array:
        """The student's log-probabilities, of its logits at temperature 1."""
        statistics = self.statistics
        return log_probs(logits_cx, self.temperature, statistics.max_s, statistics.sum_s)


def values(loss, sweeps: Sweeps, block: Block, weights_c, columns) -> tuple:
    """(TokenValues, weighted loss) of each token; `columns` are what weights are made from."""
    log_probs = _target_log_probs(block)
    weights = _term_weights(loss, block, weights_c, columns, log_probs)
    terms: tuple[jax.Array, ...]
    if isinstance(loss, RowLoss):
        terms = (loss.values(*_whole_rows(block)),)
    elif block.outcomes is not None:
        terms, _ = _outcome_gradient(loss, block, weights)
    else:
        terms = tuple(term_c for term_c, _ in _sums(loss, sweeps, block))
    return TokenValues(terms, *log_probs), weighted_sum(weights, terms)


def values_and_gradients(
    loss, sweeps: Sweeps, block: Block, weights_c, columns, student: Projection, head_gradient_dv
):
    """(values and loss as above, head_gradient_dv with the block's part added, hidden states'
    gradient).

    Gradients are of the sum of the losses, float32, from this shard's columns.
    """
    log_probs = _target_log_probs(block)
    weights = _term_weights(loss, block, weights_c, columns, log_probs)
    if isinstance(loss, RowLoss) or block.outcomes is not None:
        gradient_of = _row_gradient if isinstance(loss, RowLoss) else _outcome_gradient
        terms, gradient_cv = gradient_of(loss, block, weights)
        gradient_cv = through_cap(gradient_cv, block.logits.student_cv, block.logits.soft_cap)
        gradient_cv = gradient_cv.astype(student.hidden_cd.dtype)
        gradients = gradient_products(gradient_cv, student, head_gradient_dv)
    else:
        sums = _sums(loss, sweeps, block)
        terms = tuple(term_c for term_c, _ in sums)
        rows = block.logits, block.statistics, _factors(sums, weights)
        gradients = sweeps.gradient_products(loss, *rows, student, head_gradient_dv)
    return (TokenValues(terms, *log_probs), weighted_sum(weights, terms)), *gradients


def combined(local: Statistics, temperature: float, vocab_axes: tuple[str, ...]) -> Statistics:
    """Statistics over the whole vocabulary from those of its shards: one maximum and one sum."""
    if not vocab_axes:
        return local
    totals = {name: value for name, value in vars(local).items() if value is not None}
    maxima = {model: totals[f"max_{model}"] for model in "st" if f"max_{model}" in totals}
    totals = relative_to(jax.lax.pmax(maxima, vocab_axes), totals, temperature)
    sums = {name: value for name, value in totals.items() if not name.startswith("max")}
    return Statistics(**totals | jax.lax.psum(sums, vocab_axes))


def _sums(loss: TermSum, sweeps: Sweeps, block: Block) -> PerTerm:
    """Of every term, sum of f and sum of slopes."""
    sums = [term.sums(block.statistics, block.temperature) for term in loss.terms]
    terms = tuple(term for term, known in zip(loss.terms, sums, strict=True) if known is None)
    if terms:
        swept = dataclasses.replace(loss, terms=terms)
        found = iter(block.sum(sweeps.term_sums(swept, block.logits, block.statistics)))
        sums = [next(found) if known is None else known for known in sums]
    return sums


def _factors(sums: PerTerm, weights: tuple[jax.Array, ...]) -> PerTerm:
    """What the gradient takes: slope sum and weight of every term."""
    return [(slope_sum_c, w_c) for (_, slope_sum_c), w_c in zip(sums, weights, strict=True)]


def _target_log_probs(block: Block) -> tuple[jax.Array, jax.Array]:
    """Student's and teacher's log-probability of the targets, 0 where there is none."""
    statistics, temperature = block.statistics, block.temperature
    log_prob_s = statistics.target_s - temperature * statistics.max_s
    log_prob_s -= jnp.log(statistics.plain_sum_s)
    if block.outcomes is not None:
        targets_c = block.logits.targets_c + block.first_column
        log_prob_t = block.outcomes.log_prob_t(targets_c, block.vocab_size)
    elif statistics.max_t is None:
        log_prob_t = jnp.zeros_like(log_prob_s)
    else:
        log_prob_t = statistics.target_t - temperature * statistics.max_t
        log_prob_t -= jnp.log(statistics.plain_sum_t)
    has_target_c = block.logits.targets_c + block.first_column >= 0
    return jnp.where(has_target_c, log_prob_s, 0.0), jnp.where(has_target_c, log_prob_t, 0.0)


def _term_weights(loss, block: Block, weights_c, columns, log_probs) -> tuple[jax.Array, ...]:
    statistics, known = block.statistics, list(log_probs)
    if statistics.max_t is not None:
        known += kls(statistics)
    if statistics.entropy_t is not None:
        known.append(jnp.log(statistics.sum_t) - statistics.entropy_t / statistics.sum_t)
    return term_weights(loss, weights_c, TokenStatistics(*known), columns)


def _whole_rows(block: Block):
    """(logits_s, logits_t, targets) over the whole vocabulary: a row loss may mix any columns."""

    def gather(logits_cv):
        if block.vocab_axes:
            logits_cv = jax.lax.all_gather(logits_cv, block.vocab_axes, axis=1, tiled=True)
        return logits_cv[:, : block.vocab_size]

    logits_s_cv, logits_t_cv = map(gather, block.logits.models)
    return logits_s_cv, logits_t_cv, block.logits.targets_c + block.first_column


def _outcome_gradient(loss: TermSum, block: Block, weights):
    """Terms and the gradient by the logits: divergences over the teacher's outcomes, all other
    terms over the vocabulary, without a teacher."""
    terms, gradient_cv = [], 0.0
    for term, weights_c in zip(loss.terms, weights, strict=True):
        if isinstance(term.function, DivergenceTerm):
            assert block.outcomes is not None
            term_c, added_cv = block.outcomes.gradient(term.function, block, weights_c)
        else:
            alone = dataclasses.replace(loss, terms=(term,))
            [(term_c, slope_sum_c)] = _sums(alone, XlaSweeps(), block)
            logits = dataclasses.replace(block.logits, soft_cap=None)  # the sum goes through it
            rows = logits, block.statistics, [(slope_sum_c, weights_c)]
            added_cv = gradient(alone, *rows, dtype=jnp.float32)
        terms.append(term_c)
        gradient_cv += added_cv
    return tuple(terms), gradient_cv


def _row_gradient(loss: RowLoss, block: Block, weights):
    logits_s_cv, logits_t_cv, targets_c = _whole_rows(block)
    losses_c, pull_back = jax.vjp(
        lambda logits_cv: loss.values(logits_cv, logits_t_cv, targets_c), logits_s_cv
    )
    (gradient_cv,) = pull_back(jnp.ones_like(losses_c))
    gradient_cv = weighted(gradient_cv, *weights)
    width = block.logits.student_cv.shape[1]
    # This shard's columns of it; behind the vocabulary's end there are zeros.
    gradient_cv = jnp.pad(gradient_cv, ((0, 0), (0, width)))
    gradient_cv = jax.lax.dynamic_slice_in_dim(gradient_cv, block.first_column, width, axis=1)
    return (losses_c,), gradient_cv
