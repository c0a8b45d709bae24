"""How much the tokens of a response count, by their place in it and by what they are.

Made on the host, in the column `weight`: what it leaves out is neither computed by the output heads
nor counted in the number of tokens by which the loss is divided.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from distill.base.errors import UserError
from distill.config.method import Objective
from distill.data.sequences import Sequences


def make_weighing(objective: Objective, vocab: dict[str, int]) -> Callable[[Sequences], Sequences]:
    """`weigh` as an objective asks for it; UserError for a token that the vocabulary lacks."""
    if unknown := [token for token in objective.skip_tokens if token not in vocab]:
        raise UserError(
            f"distillation.objective.skip_tokens names {unknown[0]!r}, which is no token of the "
            "student's tokenizer: write it as tokenizer.json does, such as <think>"
        )
    return functools.partial(
        weigh,
        horizon=objective.horizon,
        discount=objective.position_discount,
        skipped=[vocab[token] for token in objective.skip_tokens],
    )


def weigh(
    sequences: Sequences, *, horizon: int = 0, discount: float = 1.0, skipped: Sequence[int] = ()
) -> Sequences:
    """The sequences with weights discount^i, i being the token's number in the loss, from 0.

    0 from number `horizon` on (0: no horizon), and for the ids `skipped`. A horizon is the loss of
    "Fast and Effective On-policy Distillation from Reasoning Prefixes" (arXiv:2602.15260) and of
    truncated OPD (arXiv:2605.31490); to end sampling there too, set max_length. The discount is
    plainly geometric.
    """
    if not horizon and discount == 1 and not len(skipped):
        return sequences
    weight = sequences["weight"].astype(np.float64)
    before = np.cumsum(weight != 0) - (weight != 0)
    starts_b = np.cumsum(sequences.lengths_b) - sequences.lengths_b
    number = before - np.repeat(before[starts_b], sequences.lengths_b)
    weight *= float(discount) ** number
    if horizon:
        weight[number >= horizon] = 0
    weight[np.isin(sequences["tokens"], skipped)] = 0
    return sequences.with_columns(weight=weight)
