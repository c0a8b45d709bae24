"""Tokens that a teacher with another tokenizer cuts alike or otherwise: in rows, and in the loss.

In a row, a span is called by the place of its first token, from 1 (no row begins with one). The
column `span` has that of a token in a span, 0 where both cut the same token, and -1 where the
teacher reads none.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from distill.data.sequences import Sequences, positions
from distill.kernels.linear_divergence.token_losses import TokenWeight

# Which tokens a teacher with another tokenizer cuts alike, or in spans, or does not read.
CUTS: dict[str, TokenWeight] = {
    "cut_alike": lambda _, columns: jnp.equal(columns.get("span", 0), 0),
    "in_spans": lambda _, columns: jnp.greater(columns.get("span", 0), 0),
    "left_out": lambda _, columns: jnp.less(columns.get("span", 0), 0),
}


def match(
    sequences: Sequences, view: Sequences, start_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Alignment.recut` has found, for rows in which the sequences begin at `start_b`.

    Returns:
      For the student's token *before* one that the view has, the position there; the span of each
      of the student's tokens; and that of each of the view's, 0 outside of spans.
    """
    starts_b = np.cumsum(sequences.lengths_b) - sequences.lengths_b
    piece, size = view["piece"], view["piece_size"]
    token_n = np.repeat(starts_b, view.lengths_b) + piece
    alike_n = (piece >= 0) & (size == 0)
    span, index = np.full((2, sequences.lengths_b.sum()), -1, np.int32)
    span[token_n[alike_n]] = 0
    index[token_n[alike_n] - 1] = positions(view.lengths_b)[alike_n] - 1
    in_spans = np.flatnonzero(size > 0)
    first = in_spans[np.unique(token_n[in_spans], return_index=True)[1]]
    members = np.repeat(token_n[first], size[first]) + positions(size[first])
    span[members] = np.repeat(piece[first], size[first])
    span += np.where(span > 0, np.repeat(start_b, sequences.lengths_b), 0)
    of_view = np.where(size > 0, piece + np.repeat(start_b, view.lengths_b), 0)
    return np.maximum(index, 0), span, of_view.astype(np.int32)


def columns_of_spans(
    span_bt: jax.Array,
    span_of_view_bt: jax.Array,
    log_prob_s: Callable[[jax.Array], jax.Array],
    log_prob_t: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Columns of the tokens in spans; 0 elsewhere.

    `span_log_ratio` is log p - log q of the whole span, `span_log_prob` the token's part of log p.
    Of student and teacher, each `log_prob` gives that of the targets which have a weight.
    """
    span_bt = jnp.maximum(span_bt, 0)
    in_span_bt = span_bt > 0
    log_p_bt = log_prob_t((span_of_view_bt > 0).astype(jnp.float32))
    log_q_bt = log_prob_s(in_span_bt.astype(jnp.float32))

    def summed(values_t, called_t):
        return jnp.zeros(span_bt.shape[1]).at[called_t].add(jnp.where(called_t > 0, values_t, 0.0))

    def of_span(values_bt, called_bt):
        sums_bs = jax.vmap(summed)(values_bt, called_bt)
        return jnp.where(in_span_bt, jnp.take_along_axis(sums_bs, span_bt, axis=1), 0.0)

    log_p_bt, log_q_bt = of_span(log_p_bt, span_of_view_bt), of_span(log_q_bt, span_bt)
    number_bt = jnp.maximum(of_span(jnp.ones(span_bt.shape), span_bt), 1.0)
    return {"span_log_ratio": log_p_bt - log_q_bt, "span_log_prob": log_p_bt / number_bt}
