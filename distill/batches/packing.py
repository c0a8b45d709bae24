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
    """What microbatches a batch is cut into.

    Attributes:
      shapes: from the shortest rows to the longest, which hold any sequence.
      packed: several sequences may share a row, at most MOST_SEGMENTS.
    """

    shapes: tuple[Shape, ...]
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the sequences of one shape stand.

    By their numbers in the batch: rows, counted through all microbatches, and the positions of
    their first tokens.
    """

    sequence_i: np.ndarray
    row_i: np.ndarray
    start_i: np.ndarray


def place(lengths_b: np.ndarray, layout: Layout) -> list[Placement]:
    """One placement for each of the layout's shapes; a function of the lengths alone."""
    if layout.packed:
        (shape,) = layout.shapes
        return [_pack(lengths_b, shape.length)]
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
    return Placement(sequence_i, np.arange(len(sequence_i)), np.zeros(len(sequence_i), np.int64))


def _pack(lengths_b: np.ndarray, capacity: int) -> Placement:
    """Each sequence, from the longest on, into the first row that has room for it.

    First-fit decreasing: at most 11/9 of the fewest possible rows, and one (Dosa, "The tight bound
    of first fit decreasing bin-packing algorithm", 2007), unless rows reach MOST_SEGMENTS
    before they are full.
    """
    free_r = np.full(len(lengths_b), capacity)
    sequences_r = np.zeros(len(lengths_b), np.int64)
    row_b, start_b = np.zeros((2, len(lengths_b)), np.int64)
    for i in np.argsort(-lengths_b, kind="stable"):
        has_room_r = (free_r >= lengths_b[i]) & (sequences_r < MOST_SEGMENTS)
        row_b[i] = np.argmax(has_room_r)
        start_b[i] = capacity - free_r[row_b[i]]
        free_r[row_b[i]] -= lengths_b[i]
        sequences_r[row_b[i]] += 1
    return Placement(np.arange(len(lengths_b)), row_b, start_b)
