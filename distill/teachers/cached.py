"""A teacher by the scores that it gave once: it is not loaded, or only its output head is."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from distill.data.scores import Scores
from distill.data.sequences import Sequences, get_column
from distill.models.model import Model
from distill.teachers.base import Teacher


class CachedTeacher(Teacher):
    """A teacher of fixed data alone; it has no model to compare responses with.

    Args:
      scores: of the rows of the data.
      rows: of the dataset, for which there are scores, in their order.
      head: the output head, in the step, where the scores are hidden states.
    """

    by_scores = True

    def __init__(self, scores: Scores, rows: np.ndarray, head: Model | None):
        self._scores, self._rows, self._head = scores, rows, head

    @property
    def graph(self) -> nnx.GraphDef | None:
        return None if self._head is None else self._head.graph

    def fetch(self) -> Any:
        return None if self._head is None else self._head.fetch()

    def score(self, sequences: Sequences) -> dict[str, np.ndarray]:
        """The stored scores of the tokens that are trained on, and nothing for the others."""
        kept_b = np.searchsorted(self._rows, sequences["row"])
        found = [self._scores.row(int(kept)) for kept in kept_b]
        trained_n = sequences["weight"] != 0
        columns = {}
        for name, like in self._scores.row(0).items():
            values = np.concatenate([like[:0], *(columns_b[name] for columns_b in found)])
            shape, fill = (len(trained_n), *values.shape[1:]), get_column(name).fill
            columns[name] = np.full(shape, fill, values.dtype)
            columns[name][trained_n] = values
        return columns
