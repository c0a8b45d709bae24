"""Columns of sequences: joined, selected, cut and saved alike, against lists of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.base.errors import UserError
from distill.data.sequences import Column, Sequences, concatenate, declare_column, get_column

declare_column("test_value", Column(np.float32, fill=-7))
declare_column("test_vector", Column(np.int32, fill=-2, optional=True))
declare_column("test_fact", Column(np.int64, fill=-3, per_token=False))

TOKEN = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 9),
        "weight": st.sampled_from([0.0, 1.0]),
        "test_value": st.floats(-9, 9, width=32),
        "test_vector": st.lists(st.integers(0, 9), min_size=2, max_size=2),
    }
)
# Rows of (what is known of the sequence, its tokens), empty ones among them.
ROW = st.tuples(st.integers(0, 99), st.lists(TOKEN, max_size=5))
ROWS = st.lists(ROW, min_size=1, max_size=6)


def sequences_of(rows, names=("weight", "test_value", "test_vector")) -> Sequences:
    tokens = [token for _, tokens in rows for token in tokens]
    columns = {
        name: np.array([token[name] for token in tokens], float).reshape(
            len(tokens), *[2] * (name == "test_vector")
        )
        for name in ("tokens", *names)
    }
    lengths_b = np.array([len(tokens) for _, tokens in rows])
    return Sequences(lengths_b, columns | {"test_fact": [fact for fact, _ in rows]})


def rows_of(sequences: Sequences):
    names = [name for name in sequences.columns if get_column(name).per_token]
    split = {name: sequences.split(name) for name in names}
    return [
        (fact, [{n: split[n][b][t].tolist() for n in names} for t in range(length)])
        for b, (fact, length) in enumerate(
            zip(sequences["test_fact"].tolist(), sequences.lengths_b, strict=True)
        )
    ]


@given(ROWS, st.data())
@settings(deadline=None)
def test_selecting_is_selecting_from_lists(rows, data):
    sequences = sequences_of(rows)
    assert rows_of(sequences) == rows
    assert rows_of(Sequences.of_arrays(sequences.arrays())) == rows
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    assert rows_of(sequences.take(np.array(index, int))) == [rows[i] for i in index]
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=len(rows), max_size=len(rows)))
    cut = [(fact, tokens[:n]) for (fact, tokens), n in zip(rows, lengths, strict=True)]
    assert rows_of(sequences.first(np.array(lengths))) == cut

    def prompt(tokens):
        trained = [t for t, token in enumerate(tokens) if token["weight"]]
        return tokens[: trained[0]] if trained else tokens

    assert rows_of(sequences.prompts()) == [(fact, prompt(tokens)) for fact, tokens in rows]


@given(st.lists(st.tuples(ROW, ROW), min_size=1, max_size=6))
@settings(deadline=None)
def test_what_a_part_lacks_is_filled(pairs):
    """The first part knows only its tokens; the second decides what holds for the sequence."""
    before, after = zip(*pairs, strict=True)
    ours, theirs = sequences_of(before, names=()), sequences_of(after)
    unknown = {"weight": 0.0, "test_value": -7.0, "test_vector": [-2, -2]}
    filled = [(fact, [token | unknown for token in tokens]) for fact, tokens in before]
    assert rows_of(concatenate([ours, theirs])) == filled + list(after)
    assert rows_of(ours.join(theirs)) == [
        (fact, start + end) for (_, start), (fact, end) in zip(filled, after, strict=True)
    ]


def test_columns_are_declared_and_have_the_right_size():
    with pytest.raises(
        UserError, match="'test_unknown' is not declared: the known ones are tokens, weight"
    ):
        Sequences.of_tokens([[1, 2]], test_unknown=1)
    with pytest.raises(UserError, match="choose another name"):
        declare_column("log_prob", Column(np.int32))
    with pytest.raises(ValueError, match="'log_prob' has 3 values for 2"):
        Sequences.of_tokens([[1, 2]], log_prob=[0, 0, 0])
    assert Sequences.of_tokens([[1, 2]], weight=1)["weight"].dtype == np.float32
