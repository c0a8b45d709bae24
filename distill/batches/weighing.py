"""How much the tokens of a response count, by their place in it and by what they are.

Made on the host, in the column `weight`: what it leaves out is neither computed by the output heads
nor counted in the number of tokens by which the loss is divided.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.data.sequences import Sequences


def weigh(
    sequences: Sequences, *, horizon: int = 0, discount: float = 1.0, skipped: Sequence[int] = ()
) -> Sequences:
    """The sequences with weights discount^i, i being the token's number in the loss, from 0.

    They are 1e-24 at least; 0 from number `horizon` on (0: no horizon), and for the ids `skipped`.
    A horizon is the loss of "Fast and Effective On-policy Distillation from Reasoning Prefixes"
    (arXiv:2602.15260) and of truncated OPD (arXiv:2605.31490); to end sampling there too, set
    max_length. The discount is plainly geometric.
    """
    if not horizon and discount == 1 and not len(skipped):
        return sequences
    weight = sequences["weight"].astype(np.float64)
    before = np.cumsum(weight != 0) - (weight != 0)
    starts_b = np.cumsum(sequences.lengths_b) - sequences.lengths_b
    number = before - np.repeat(before[starts_b], sequences.lengths_b)
    # What underflows would not be counted; in float32 the loss divides it by the number of tokens.
    weight *= np.maximum(float(discount) ** number, 1e-24)
    if horizon:
        weight[number >= horizon] = 0
    weight[np.isin(sequences["tokens"], skipped)] = 0
    return sequences.with_columns(weight=weight)
