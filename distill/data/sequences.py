"""Sequences of unequal length with named columns: prompts with responses, or whole dialogues.

A column is declared once. Joining, selecting, laying out in rows, sharding and saving then treat it
like any other: a plugin's column travels from a rollout to the loss without code of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from distill.base.errors import UserError


@dataclasses.dataclass(frozen=True)
class Column:
    """What is known of every token, or of every sequence.

    Attributes:
      dtype: of a value; None: as the values come.
      fill: stands where nothing is known, padding included.
      per_token: one value for each token; False: one for each sequence.
      optional: rows have it only if their batch has: for vectors, whose width the batch decides.
    """

    dtype: DTypeLike | None
    fill: float = 0
    per_token: bool = True
    optional: bool = False


_columns = {
    "tokens": Column(np.int32),
    # In the loss; 0 for the tokens of prompts and environments, which are not trained on.
    "weight": Column(np.float32),
    "sampled": Column(bool),  # the student wrote the token
    "log_prob": Column(np.float32),  # when it was sampled, at temperature 1, untruncated
    "advantage": Column(np.float32),
    # The sequence stands in the rows of an earlier teacher, too, and was counted there.
    "repeated": Column(bool),
    # The teacher's likeliest tokens in the token's place; -1 where fewer are known.
    "teacher_ids": Column(np.int32, fill=-1, optional=True),
    "teacher_log_probs": Column(np.float32, optional=True),
    # The hidden state from which the teacher predicts the token, in the teacher's dtype.
    "teacher_hidden": Column(None, optional=True),
    # Of what a teacher with another tokenizer reads: the position in the student's sequence of the
    # first token of the same bytes, -1 for none; and how many of its tokens have the bytes that are
    # cut otherwise, 0 where both cut one token.
    "piece": Column(np.int32, fill=-1, optional=True),
    "piece_size": Column(np.int32, optional=True),
    # The experts with which the sampler predicted the token, of all layers; see `models.routes`.
    "routed_experts": Column(np.int16, fill=-1, optional=True),
    "row": Column(np.int64, per_token=False),  # of the dataset
    "index": Column(np.int64, per_token=False),  # in the endless stream of the data
    "truncated": Column(bool, per_token=False),  # the length limit ended it
    "reward": Column(np.float32, per_token=False),
}


def declare_column(name: str, column: Column) -> None:
    """Makes `name` known; UserError if it is known as something else."""
    if _columns.setdefault(name, column) != column:
        raise UserError(f"column {name!r} is {_columns[name]}: choose another name for {column}")


def get_column(name: str) -> Column:
    """What was declared as `name`; UserError when nothing was."""
    if name not in _columns:
        raise UserError(
            f"column {name!r} is not declared: the known ones are {', '.join(_columns)} (declare "
            "your own with distill.data.sequences.declare_column, in a module that plugins names)"
        )
    return _columns[name]


def columns_of_rows(names: Iterable[str]) -> list[str]:
    """The per-token columns that rows of a batch with columns `names` have.

    They are the same for all batches, so that one program runs them all.
    """
    return [n for n, c in _columns.items() if c.per_token and (n in names or not c.optional)]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Host arrays of b sequences, whose tokens stand one sequence behind the other.

    Attributes:
      lengths_b: tokens of each sequence. Validity comes from here, never from ids: the id that pads
        may be that of an EOS.
      columns: by name, an array of all tokens or of all sequences; a scalar stands for all.
    """

    lengths_b: np.ndarray
    columns: Mapping[str, Any]

    def __post_init__(self):
        typed = {name: self._whole(name, values) for name, values in self.columns.items()}
        object.__setattr__(self, "columns", typed)

    def __len__(self) -> int:
        return len(self.lengths_b)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column; where it was never set, its fill."""
        return self.columns[name] if name in self.columns else self._whole(name)

    def split(self, name: str) -> list[np.ndarray]:
        """A per-token column, cut into the sequences."""
        return np.split(self[name], np.cumsum(self.lengths_b))[:-1]

    def with_columns(self, **columns: ArrayLike) -> Sequences:
        return Sequences(self.lengths_b, {**self.columns, **columns})

    def take(self, index_b: np.ndarray) -> Sequences:
        """The sequences of these numbers, which may repeat."""
        lengths_b = self.lengths_b[index_b]
        starts_b = (np.cumsum(self.lengths_b) - self.lengths_b)[index_b]
        return self._select(
            lengths_b, np.repeat(starts_b, lengths_b) + positions(lengths_b), index_b
        )

    def first(self, lengths_b: np.ndarray) -> Sequences:
        """The first tokens of each sequence."""
        kept = positions(self.lengths_b) < np.repeat(lengths_b, self.lengths_b)
        return self._select(np.minimum(lengths_b, self.lengths_b), kept, slice(None))

    def behind(self, lengths_b: np.ndarray) -> Sequences:
        """What stands behind the first tokens of each sequence."""
        kept = positions(self.lengths_b) >= np.repeat(lengths_b, self.lengths_b)
        return self._select(np.maximum(self.lengths_b - lengths_b, 0), kept, slice(None))

    def prompts(self) -> Sequences:
        """What stands before the first token that is trained on."""
        weights = [weight_t != 0 for weight_t in self.split("weight")]
        return self.first(np.array([w_t.argmax() if w_t.any() else len(w_t) for w_t in weights]))

    def join(self, more: Sequences) -> Sequences:
        """Every sequence with that of `more` behind it, as a response stands behind its prompt.

        What both know of a whole sequence, `more` decides.
        """
        alternately = np.arange(2 * len(self)).reshape(2, -1).T.reshape(-1)
        both = concatenate([self, more]).take(alternately)
        of_sequences = {
            name: values
            for name, values in {**self.columns, **more.columns}.items()
            if not get_column(name).per_token
        }
        return Sequences(self.lengths_b + more.lengths_b, {**both.columns, **of_sequences})

    def arrays(self) -> dict[str, np.ndarray]:
        """All that `Sequences.of_arrays` needs."""
        return {"lengths_b": self.lengths_b, **self.columns}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Sequences:
        return cls(arrays["lengths_b"], {n: a for n, a in arrays.items() if n != "lengths_b"})

    @classmethod
    def of_tokens(cls, tokens: Sequence[Any], **columns: Any) -> Sequences:
        """From the ids of each sequence."""
        lengths_b = np.array([len(tokens_t) for tokens_t in tokens], np.int32)
        return cls(lengths_b, {"tokens": np.concatenate([[], *tokens]), **columns})

    def _select(self, lengths_b: np.ndarray, token_i, sequence_i) -> Sequences:
        return Sequences(
            lengths_b,
            {
                name: values[token_i if get_column(name).per_token else sequence_i]
                for name, values in self.columns.items()
            },
        )

    def _whole(self, name: str, values: ArrayLike | None = None, *vector: int) -> np.ndarray:
        """The values of a column, `vector` numbers each, as its declaration says."""
        column = get_column(name)
        number = self.lengths_b.sum() if column.per_token else len(self)
        values = np.asarray(column.fill if values is None else values, column.dtype)
        if not values.ndim:
            return np.full((number, *vector), values)
        if len(values) != number:
            raise ValueError(f"column {name!r} has {len(values)} values for {number}")
        return values


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """All sequences of all parts; columns that a part lacks are filled."""

    def whole(name: str) -> np.ndarray:
        vector = next(part.columns[name].shape[1:] for part in parts if name in part.columns)
        return np.concatenate(
            [part._whole(name, part.columns.get(name), *vector) for part in parts]
        )

    names = dict.fromkeys(name for part in parts for name in part.columns)
    lengths_b = np.concatenate([part.lengths_b for part in parts])
    return Sequences(lengths_b, {name: whole(name) for name in names})


def positions(lengths_b: np.ndarray) -> np.ndarray:
    """Of all tokens in their sequences, from 0."""
    return np.arange(lengths_b.sum()) - np.repeat(np.cumsum(lengths_b) - lengths_b, lengths_b)
