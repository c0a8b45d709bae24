"""What the models see of sequences: rows of tokens, already cut into microbatches.

Made on the host, in numpy. Which token a position predicts is settled here and nowhere else, for
training, evaluation and report, for padded rows and packed ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.base.sharding import constrain
from distill.batches.packing import Layout, Placement, place
from distill.data.sequences import Sequences, columns_of_rows, get_column, positions
from distill.teachers.spans import match


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What the teacher reads of a microbatch's sequences, where it has prompts of its own.

    A row has the sequences of the student's row, so that the index map is a gather within it.

    Attributes:
      index_bt: for a position of the student, the one at which the teacher predicts the same token
        of the response; where the student's predicts none, 0 or any other.
      targets_bt: of a teacher with another tokenizer, the tokens that its positions predict.
      span_bt: those of them in a span have its number, as in `teachers.spans`; others 0.
    """

    tokens_bt: jax.Array
    positions_bt: jax.Array | None
    segment_ids_bt: jax.Array | None
    index_bt: jax.Array
    targets_bt: jax.Array | None = None
    span_bt: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a microbatch; a batch has them stacked, (m, b, t) instead of (b, t).

    Arrays of numpy on the host, of JAX on the mesh.

    Attributes:
      tokens_bt: one or several sequences to a row, then padding.
      positions_bt: of tokens in their sequences. None: every row is one sequence.
      segment_ids_bt: numbers of the sequences in a row, from 1, padding being 0; None likewise.
      columns: by name, what is known of the token that a position predicts, which is the next of
        its sequence; (b, t) or (b, t, k). 'tokens' are the targets, 'weight' is not 0 where they
        are trained on; where nothing is predicted, a column has its fill. With a teacher of another
        tokenizer there is 'span', see `teachers.spans`.
      lengths_b: tokens of a row, padding not counted.
      sequences_b, sampled_b, truncated_b: a row's sequences that are not repeated, those of them
        that the student sampled, and those of the sampled that stopped at the length limit.
      view: what the teacher reads; None: the same tokens.
      teacher: the number of the one that is asked.
    """

    tokens_bt: jax.Array
    positions_bt: jax.Array | None
    segment_ids_bt: jax.Array | None
    columns: dict[str, jax.Array]
    lengths_b: jax.Array
    sequences_b: jax.Array
    sampled_b: jax.Array
    truncated_b: jax.Array
    view: View | None = None
    teacher: int = dataclasses.field(default=0, metadata=dict(static=True))

    @property
    def targets_bt(self) -> jax.Array:
        """The tokens that positions predict."""
        return self.columns["tokens"]

    @property
    def mask_bt(self) -> jax.Array:
        """Whether a target is trained on."""
        return self.columns["weight"] != 0

    @property
    def counted_bt(self) -> jax.Array:
        """Those of them that count once, whichever teachers are asked about them."""
        return self.mask_bt & ~self.columns["repeated"]

    @property
    def filled_bt(self) -> jax.Array:
        """Whether a position holds a token, no padding."""
        return jnp.arange(self.tokens_bt.shape[-1]) < self.lengths_b[..., None]


# Rows of each shape of each teacher's layout, stacked. The last of the microbatches may be empty.
Batch = tuple[Rows, ...]


def make_batch(
    sequences: Sequences,
    *,
    layout: Layout,
    pad_id: int,
    view: Sequences | None = None,
    teacher: int = 0,
    most: int | None = None,
) -> Batch:
    """Lays out the sequences that a teacher is asked about; host arrays in, host arrays out.

    It reads `view` in place of them: other prompts before the same responses. There is room for
    `most` sequences, so that all batches have one shape; None: these. ValueError for a sequence
    that is longer than the longest rows.
    """
    lengths_b = sequences.lengths_b
    if lengths_b.max(initial=0) > layout.shapes[-1].length:
        raise ValueError(
            f"a sequence of {lengths_b.max()} tokens in rows of {layout.shapes[-1].length}"
        )
    batch = []
    placements = place(lengths_b, layout, None if view is None else view.lengths_b)
    for shape, placement in zip(layout.shapes, placements, strict=True):
        number = -(-(most or len(lengths_b)) // shape.rows)  # whatever the lengths
        placed = sequences.take(placement.sequence_i)
        rows = _fill(placed, placement, number * shape.rows, shape.length, layout.packed, pad_id)
        if view is not None:
            seen = view.take(placement.sequence_i)
            rows = _with_view(rows, placed, seen, placement, layout.view_excess, pad_id)
        stacked = jax.tree.map(lambda x, size=shape.rows: x.reshape(-1, size, *x.shape[1:]), rows)
        batch.append(dataclasses.replace(stacked, teacher=teacher))
    return tuple(batch)


def teacher_hidden(model, rows: Rows) -> jax.Array:
    """A teacher's final hidden states in the places of the student's, (b, t, d)."""
    known = rows.columns.get("teacher_hidden")
    return in_student_places(view_hidden(model, rows), rows) if known is None else known


def view_hidden(model, rows: Rows) -> jax.Array:
    """A teacher's final hidden states of what it reads, (b, t, d)."""
    read = rows if rows.view is None else rows.view
    return model(read.tokens_bt, read.positions_bt, read.segment_ids_bt)


def in_student_places(hidden_btd: jax.Array, rows: Rows) -> jax.Array:
    if rows.view is None:
        return hidden_btd
    # Any position of the row may be meant: devices that share it gather it.
    hidden_btd = constrain(hidden_btd, "batch", None, "act_embed")
    return constrain(
        jnp.take_along_axis(hidden_btd, rows.view.index_bt[..., None], axis=1),
        "batch",
        "position",
        "act_embed",
    )


def in_place_of(sequences: Sequences, view: Sequences) -> np.ndarray:
    """Position in its view of every token: the same of the response; of a prompt, 0 at least."""
    ahead_b = view.lengths_b - sequences.lengths_b
    return np.maximum(positions(sequences.lengths_b) + np.repeat(ahead_b, sequences.lengths_b), 0)


def num_filled(microbatches: Rows) -> jax.Array:
    """How many of stacked microbatches have sequences: they come first."""
    return (microbatches.lengths_b > 0).any(axis=1).sum()


def _fill(
    sequences: Sequences, placement: Placement, rows: int, length: int, packed: bool, pad_id: int
) -> Rows:
    """The sequences in the places that `placement` gives them."""
    lengths_b, row_b = sequences.lengths_b, placement.row_i
    place_n = _places(lengths_b, row_b, placement.start_i, length)
    known = columns_of_rows(sequences.columns)

    def count(values_b) -> Any:
        return np.bincount(row_b, values_b, rows).astype(np.int32)

    def of_any_token(name: str) -> np.ndarray:
        return np.array([values_t.any() for values_t in sequences.split(name)], bool)

    counted_b = ~of_any_token("repeated")
    sampled_b = of_any_token("sampled") & counted_b
    return Rows(
        **_tokens(sequences, row_b, place_n, (rows, length), packed, pad_id),
        columns={
            name: _of_targets(
                sequences, sequences[name], place_n, get_column(name).fill, (rows, length)
            )
            for name in known
        },
        lengths_b=count(lengths_b),
        sequences_b=count(counted_b),
        sampled_b=count(sampled_b),
        truncated_b=count(sampled_b & sequences["truncated"]),
    )


def _with_view(
    rows: Rows,
    sequences: Sequences,
    view: Sequences,
    placement: Placement,
    view_excess: int,
    pad_id: int,
) -> Rows:
    """The rows with what the teacher reads in their place."""
    number, length = rows.tokens_bt.shape
    shape, row_b = (number, length + view_excess), placement.row_i
    place_n = _places(view.lengths_b, row_b, placement.view_start_i, shape[1])
    of_student_n = _places(sequences.lengths_b, row_b, placement.start_i, length)
    aligned, packed = "piece" in view.columns, rows.positions_bt is not None
    pad_id = 0 if aligned else pad_id  # the student's may be no id of the teacher
    tokens = _tokens(view, row_b, place_n, shape, packed, pad_id)
    more, columns = {}, rows.columns
    if aligned:
        index_n, span_n, span_of_view_n = match(sequences, view, placement.start_i)
        more["targets_bt"] = _of_targets(view, view["tokens"], place_n, 0, shape)
        more["span_bt"] = _of_targets(view, span_of_view_n, place_n, 0, shape)
        span_bt = _of_targets(sequences, span_n, of_student_n, -1, (number, length))
        columns = {**columns, "span": span_bt}
    else:
        index_n = in_place_of(sequences, view)
    index_n = index_n + np.repeat(placement.view_start_i, sequences.lengths_b)
    index_bt = _spread(index_n.astype(np.int32), of_student_n, 0, (number, length))
    seen = View(**tokens, index_bt=index_bt, **more)
    return dataclasses.replace(rows, columns=columns, view=seen)


def _of_targets(
    sequences: Sequences, values_n: np.ndarray, place_n: np.ndarray, fill: float, shape
) -> Any:
    """A position predicts the next token of its sequence, whose first nothing predicts."""
    is_target_n = positions(sequences.lengths_b) > 0
    return _spread(values_n[is_target_n], place_n[is_target_n] - 1, fill, shape)


def _tokens(
    sequences: Sequences,
    row_b: np.ndarray,
    place_n: np.ndarray,
    shape: tuple[int, int],
    packed: bool,
    pad_id: int,
) -> dict[str, Any]:
    """Tokens, and where several sequences share a row, their positions and numbers."""
    lengths_b = sequences.lengths_b
    number_b = np.zeros(len(row_b), np.int32)
    number_b[np.argsort(row_b, kind="stable")] = positions(np.bincount(row_b)) + 1
    position_n, number_n = positions(lengths_b).astype(np.int32), np.repeat(number_b, lengths_b)
    return dict(
        tokens_bt=_spread(sequences["tokens"], place_n, pad_id, shape),
        positions_bt=_spread(position_n, place_n, 0, shape) if packed else None,
        segment_ids_bt=_spread(number_n, place_n, 0, shape) if packed else None,
    )


def _places(
    lengths_b: np.ndarray, row_b: np.ndarray, start_b: np.ndarray, length: int
) -> np.ndarray:
    """Where every token stands in rows of `length`, counted through all of them."""
    return np.repeat(row_b * length + start_b, lengths_b) + positions(lengths_b)


def _spread(values_n: np.ndarray, place_n: np.ndarray, fill: float, shape: tuple[int, int]) -> Any:
    spread_n = np.full((shape[0] * shape[1], *values_n.shape[1:]), fill, values_n.dtype)
    spread_n[place_n] = values_n
    return spread_n.reshape(*shape, *values_n.shape[1:])
