"""Which row and position every sequence of a batch gets.

Rows come in microbatches, whose shapes are few and fixed: the train step is compiled once. How many
microbatches a batch fills depends on its lengths.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from distill.kernels.attention import MOST_SEGMENTS


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a microbatch: `rows` over the whole mesh, of `length` tokens each."""

    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What microbatches a batch is cut into, from the shortest rows to the longest, which hold any
    sequence; the rows that a teacher reads are longer by `view_excess`."""

    shapes: tuple[Shape, ...]
    packed: bool = False
    view_excess: int = 0


@dataclasses.dataclass(frozen=True)
class Placement:
    """Of the sequences of one shape: their numbers in the batch, their rows, counted through all
    microbatches, and where they start there, and in the rows that a teacher reads."""

    sequence_i: np.ndarray
    row_i: np.ndarray
    start_i: np.ndarray
    view_start_i: np.ndarray


def place(
    lengths_b: np.ndarray, layout: Layout, view_lengths_b: np.ndarray | None = None
) -> list[Placement]:
    """One placement for each of the layout's shapes; a function of the lengths alone.

    What a teacher reads is at most `layout.view_excess` longer; None: the same.
    """
    if layout.packed:
        (shape,) = layout.shapes
        lengths_bk = np.stack([lengths_b, lengths_b if view_lengths_b is None else view_lengths_b])
        return [_pack(lengths_bk.T, np.array([shape.length, shape.length + layout.view_excess]))]
    # The longest first: what does not fill a microbatch of long rows is filled up with shorter.
    waiting = np.argsort(-lengths_b, kind="stable")
    placements = []
    for i in reversed(range(len(layout.shapes))):
        rows = layout.shapes[i].rows
        too_long = int((lengths_b[waiting] > layout.shapes[i - 1].length).sum()) if i else None
        taken = len(waiting) if too_long is None else -(-too_long // rows) * rows
        placements.append(_in_rows_of_their_own(waiting[:taken]))
        waiting = waiting[taken:]
    return placements[::-1]


def _in_rows_of_their_own(sequence_i: np.ndarray) -> Placement:
    sequence_i = np.sort(sequence_i)  # as the data are ordered
    start_i = np.zeros(len(sequence_i), np.int64)
    return Placement(sequence_i, np.arange(len(sequence_i)), start_i, start_i)


def _pack(lengths_bk: np.ndarray, capacity_k: np.ndarray) -> Placement:
    """Each sequence, from the longest on, into the first row that has room for it and its view.

    First-fit decreasing: at most 11/9 of the fewest possible rows, and one (Dosa, "The tight bound
    of first fit decreasing bin-packing algorithm", 2007), unless rows reach MOST_SEGMENTS
    before they are full.
    """
    number = len(lengths_bk)
    free_rk = np.tile(capacity_k, (number, 1))
    sequences_r, row_b = np.zeros((2, number), np.int64)
    start_bk = np.zeros((number, len(capacity_k)), np.int64)
    for i in np.argsort(-lengths_bk[:, 0], kind="stable"):
        has_room_r = (free_rk >= lengths_bk[i]).all(axis=1) & (sequences_r < MOST_SEGMENTS)
        row_b[i] = np.argmax(has_room_r)
        start_bk[i] = capacity_k - free_rk[row_b[i]]
        free_rk[row_b[i]] -= lengths_bk[i]
        sequences_r[row_b[i]] += 1
    return Placement(np.arange(number), row_b, *start_bk.T)
