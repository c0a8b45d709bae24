"""Rows of one sequence each, in their order: what is evaluated, not trained on."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from distill.base.sharding import num_shards, round_up
from distill.batches.packing import Layout, Shape
from distill.batches.rows import Rows, make_batch
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.sampling.request import Rollout


def rows_of(prompts: Prompts, rollout: Rollout, batch_size: int) -> Iterator[Rows]:
    """All prompts with anybody's responses, in their order, so many at a time."""
    sequences = rollout.sequences(prompts.sequences(range(len(prompts))))
    width = prompts.prompt_width + rollout.tokens_br.shape[1]
    return padded_rows(
        sequences, batch_size, width, prompts.pad_id, prompts.view(sequences), prompts.view_excess
    )


def padded_rows(
    sequences: Sequences,
    rows: int,
    length: int,
    pad_id: int,
    view: Sequences | None = None,
    view_excess: int = 0,
) -> Iterator[Rows]:
    """Rows of one sequence each, in their order, so many at a time; the last may be empty.

    The current mesh divides their length, which `length` may not be.
    """
    unit = num_shards("position")
    length, view_excess = round_up(length, unit), round_up(view_excess, unit)
    layout = Layout((Shape(rows, length),), view_excess=view_excess)
    for start in range(0, len(sequences), rows):
        some = np.arange(len(sequences))[start : start + rows]
        seen = None if view is None else view.take(some)
        (stacked,) = make_batch(sequences.take(some), layout=layout, pad_id=pad_id, view=seen)
        yield jax.tree.map(lambda x: x[0], stacked)


def of_responses(rows: Rows, values_btx: jax.Array, width: int) -> jax.Array:
    """Of rows of one sequence: `width` positions from the first that is trained on, (b, r, ...)."""
    start_b1 = jnp.argmax(rows.mask_bt, axis=1)[:, None]
    index_br = start_b1 + jnp.arange(width)
    index_brx = index_br.reshape(*index_br.shape, *[1] * (values_btx.ndim - 2))
    return jnp.take_along_axis(values_btx, index_brx, axis=1)
