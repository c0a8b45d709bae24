"""What the student learns from: a teacher in the step, or one that is known by scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from distill.data.sequences import Sequences
from distill.models.model import Model


class Teacher:
    """A teacher that says nothing, which is right for hard labels; the others override this.

    One *in the step* has a model: the train step is compiled for its `graph` and computes with what
    `fetch` returns, or with the part of the train state that `from_state` chooses. Evaluation and
    report compare with its model, too. One *by scores* has none: it is asked about every batch,
    once that is sampled and before the step.
    """

    by_scores = False
    model: Model | None = None
    from_state: Callable[[Any], Any] | None = None

    @property
    def graph(self) -> nnx.GraphDef | None:
        """Of the model in the step."""
        return None if self.model is None else self.model.graph

    def fetch(self) -> Any:
        """Its weights, where they can be used; a copy lives as long as the caller holds it."""
        return None if self.model is None else self.model.fetch()

    def at(self, state: Any) -> Model | None:
        """The model in the step, as it is at a train state."""
        return self.model

    def lasting(self, state: Any) -> Model | None:
        """The model in the step, if it is the same at all states."""
        return self.model

    def start(self) -> None:
        """Checks what the teacher needs, such as servers; UserError unless it is there and fits."""

    def score(self, sequences: Sequences) -> Mapping[str, np.ndarray]:
        """Columns with what a teacher by scores knows of the sequences; none of one in the step.

        RunStopped: it cannot be asked any more.
        """
        return {}

    def measured(self) -> dict[str, float]:
        """Metrics to log once, before the first step."""
        return {}


class OwnTeacher(Teacher):
    """The student itself: a part of the train state, computed with by the student's graph.

    `stays`: no update changes that part.
    """

    def __init__(
        self, graph: nnx.GraphDef, from_state: Callable[[Any], Any], *, stays: bool = False
    ):
        self._graph, self.from_state, self._stays = graph, from_state, stays

    def lasting(self, state: Any) -> Model | None:
        return self.at(state) if self._stays else None

    @property
    def graph(self) -> nnx.GraphDef:
        return self._graph

    def at(self, state: Any) -> Model:
        assert self.from_state is not None
        return Model(self._graph, self.from_state(state))
