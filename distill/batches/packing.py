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

    First-fit decreasing: at most 11/9 of the fewest possible rows, and one ("The tight bound of
    first fit decreasing bin-packing algorithm", Dosa 2007), unless rows reach MOST_SEGMENTS before.
    """
    sizes_bk = np.insert(lengths_bk, 2, 1, axis=1)  # the segments of a row, too, are limited
    full_k = np.append(capacity_k, MOST_SEGMENTS)
    row_b, start_bk = np.zeros(len(sizes_bk), np.int64), np.zeros(sizes_bk.shape, np.int64)
    free_rk, used = np.tile(full_k, (len(sizes_bk), 1)), 0
    order_b = np.argsort(-lengths_bk[:, 0], kind="stable")
    changes = 1 + np.flatnonzero(np.diff(lengths_bk[order_b], axis=0).any(axis=1))
    for same_b in filter(len, np.split(order_b, changes)):  # equal ones together: they are many
        size_k, rows_rk = sizes_bk[same_b[0]], free_rk[: used + len(same_b)]
        ends_r = np.cumsum((rows_rk // size_k).min(axis=1)).clip(max=len(same_b))
        row_b[same_b] = row_i = np.searchsorted(ends_r, np.arange(len(same_b)), side="right")
        before_i = np.arange(len(same_b)) - np.append(0, ends_r)[row_i]
        start_bk[same_b] = full_k - rows_rk[row_i] + before_i[:, None] * size_k
        rows_rk -= np.diff(ends_r, prepend=0)[:, None] * size_k
        used = max(used, row_i[-1] + 1)
    return Placement(np.arange(len(row_b)), row_b, *start_bk.T[:2])
