"""Which tokens carry loss, and where sequences stand: padded, packed, rows of several lengths."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batches.packing import Layout, Shape, place
from distill.batches.rows import make_batch
from distill.data.sequences import Column, Sequences, concatenate, declare_column, get_column
from distill.kernels.attention import MOST_SEGMENTS

PAD, MOST_TOKENS = 9, 8  # an id that sequences have, as where padding is the EOS
LAYOUTS = {
    "padded": Layout((Shape(2, MOST_TOKENS),)),
    "packed": Layout((Shape(2, MOST_TOKENS),), packed=True),
    "three lengths": Layout((Shape(4, 2), Shape(2, 6), Shape(1, MOST_TOKENS))),
}
declare_column("test_number", Column(np.float32, fill=-7))
declare_column("test_pair", Column(np.int32, fill=-2, optional=True))
# Values of one token, whatever they mean; prompts, environments and responses in any order.
TOKEN = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, PAD),
        "weight": st.sampled_from([0.0, 1.0, 0.5]),
        "sampled": st.booleans(),
        "log_prob": st.floats(-9, 0, width=32),
        "test_number": st.floats(-9, 9, width=32),
        "test_pair": st.tuples(st.integers(0, 99), st.integers(0, 99)),
    }
)
DIALOGUE = st.lists(TOKEN, min_size=1, max_size=MOST_TOKENS)
DIALOGUES = st.lists(st.tuples(DIALOGUE, st.booleans()), min_size=1, max_size=12)


def sequences_of(dialogues, names=None) -> Sequences:
    tokens = [token for dialogue, _ in dialogues for token in dialogue]
    columns = {name: [token[name] for token in tokens] for name in names or tokens[0]}
    lengths_b = np.array([len(dialogue) for dialogue, _ in dialogues])
    return Sequences(lengths_b, columns | {"truncated": [cut for _, cut in dialogues]})


def rows_of(batch):
    """All rows of all microbatches, by field and column."""
    for part in batch:
        for index in np.ndindex(part.lengths_b.shape):
            fields = vars(part) | {"columns": None, "teacher": None}
            named = {name: x if x is None else x[index] for name, x in fields.items()}
            yield named | {name: x[index] for name, x in part.columns.items()}


def pieces_of(row) -> list[np.ndarray]:
    """Positions of the row's sequences."""
    ids_t = row["segment_ids_bt"]
    if ids_t is None:
        ids_t = (np.arange(len(row["tokens_bt"])) < row["lengths_b"]).astype(int)
    assert ids_t.max(initial=0) == row["sequences_b"]
    return [np.flatnonzero(ids_t == number) for number in range(1, row["sequences_b"] + 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(DIALOGUES)
@settings(deadline=None)
def test_rows_are_what_a_loop_over_tokens_says(layout, dialogues):
    """A position knows the next token of its sequence, by all columns alike, and nothing else."""
    batch = make_batch(sequences_of(dialogues), layout=LAYOUTS[layout], pad_id=PAD)
    names = list(dialogues[0][0][0])
    found = []
    for row in rows_of(batch):
        pieces = pieces_of(row)
        inside = np.concatenate([[], *pieces]).astype(int)
        outside = np.setdiff1d(np.arange(len(row["tokens_bt"])), inside)
        assert (row["tokens_bt"][outside] == PAD).all()
        assert row["lengths_b"] == len(inside)
        predicts_nothing = [*outside, *(piece[-1] for piece in pieces)]
        for name in names:
            assert (row[name][predicts_nothing] == get_column(name).fill).all()
        for piece in pieces:
            if row["positions_bt"] is not None:
                assert row["positions_bt"][piece].tolist() == list(range(len(piece)))
            known = [[np.array(row[n][t]).tolist() for n in names] for t in piece[:-1]]
            found.append((row["tokens_bt"][piece].tolist(), known))
    expected = [
        (
            [token["tokens"] for token in dialogue],
            [[np.array(token[n]).tolist() for n in names] for token in dialogue[1:]],
        )
        for dialogue, _ in dialogues
    ]
    assert sorted(found) == sorted(expected)
    sampled = [any(token["sampled"] for token in dialogue) for dialogue, _ in dialogues]
    counts = {
        "sequences_b": len(dialogues),
        "sampled_b": sum(sampled),
        "truncated_b": sum(s and cut for s, (_, cut) in zip(sampled, dialogues, strict=True)),
    }
    for name, count in counts.items():
        assert sum(getattr(part, name).sum() for part in batch) == count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_on_the_students_turns_and_nothing_else(layout):
    """Prompt, response, two tokens of an environment, response; no prompt; nothing but one."""
    turns = [([1, 2], 0), ([PAD, 3], 1), ([4, 5], 0), ([6, PAD], 1)], [([7, 8], 1)], [([1], 0)]
    dialogues = [
        functools.reduce(Sequences.join, [Sequences.of_tokens([x], weight=w) for x, w in dialogue])
        for dialogue in turns
    ]
    batch = make_batch(concatenate(dialogues), layout=LAYOUTS[layout], pad_id=PAD)
    found = []
    for row in rows_of(batch):
        for piece in pieces_of(row):
            trained = [t for t in piece if row["weight"][t]]
            targets = row["tokens"][trained].tolist()
            found.append((row["tokens_bt"][piece].tolist(), (trained - piece[0]).tolist(), targets))
        inside = np.concatenate([[], *pieces_of(row)]).astype(int)
        assert not np.delete(row["weight"], inside).any()
    assert sorted(found) == [
        ([1], [], []),
        ([1, 2, PAD, 3, 4, 5, 6, PAD], [1, 2, 5, 6], [PAD, 3, 6, PAD]),
        ([7, 8], [0], [8]),  # nothing predicts a first token
    ]


@pytest.mark.parametrize("names", [["tokens"], ["tokens", "weight", "test_number"]])
def test_every_batch_has_the_declared_columns(names):
    """One program for all batches; vectors only where a batch brings them."""
    tokens = dict(tokens=1, weight=1.0, test_number=2.0, test_pair=(3, 4))
    layout = LAYOUTS["padded"]
    few = make_batch(sequences_of([([tokens] * 3, False)], names), layout=layout, pad_id=PAD)
    all_of_them = make_batch(sequences_of([([tokens] * 3, False)]), layout=layout, pad_id=PAD)
    assert {*all_of_them[0].columns} - {*few[0].columns} == {"test_pair"}
    assert (few[0].columns["advantage"] == 0).all()
    if "test_number" not in names:
        assert (few[0].columns["test_number"] == -7).all()


def test_a_row_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="8 tokens in rows of 7"):
        make_batch(Sequences.of_tokens([[1] * 8]), layout=Layout((Shape(4, 7),)), pad_id=PAD)


LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60).map(np.array)


@given(LENGTHS)
@settings(deadline=None)
def test_packed_rows_are_few_and_never_too_full(lengths_b):
    (placement,) = place(lengths_b, Layout((Shape(1, 64),), packed=True))
    assert placement.sequence_i.tolist() == list(range(len(lengths_b)))
    rows = placement.row_i.max() + 1
    filled = np.zeros((rows, 64), int)
    for row, start, length in zip(placement.row_i, placement.start_i, lengths_b, strict=True):
        filled[row, start : start + length] += 1
    assert filled.max() == 1  # nothing twice, and nothing beyond a row
    assert filled.sum() == lengths_b.sum()
    sequences = np.bincount(placement.row_i)
    assert sequences.max() <= MOST_SEGMENTS
    half_empty = (filled.sum(axis=1) <= 32) & (sequences < MOST_SEGMENTS)
    assert half_empty.sum() <= 1  # two of them would have been one


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), max_size=60))
@settings(deadline=None)
def test_packed_rows_are_those_of_first_fit_one_by_one(sizes):
    """Each sequence into the first row with room for it and its view; the longest first."""
    lengths = [(length, length + more) for length, more in sizes]
    layout = Layout((Shape(1, 64),), packed=True, view_excess=6)
    views = np.array([min(view, 70) for _, view in lengths], int)
    (placement,) = place(np.array([length for length, _ in lengths], int), layout, views)
    rows: list[list[int]] = []  # tokens of the sequences, of their views, and their number
    for i in sorted(range(len(sizes)), key=lambda i: -lengths[i][0]):
        size = lengths[i][0], views[i], 1
        fits = [
            all(
                h + s <= most for h, s, most in zip(row, size, (64, 70, MOST_SEGMENTS), strict=True)
            )
            for row in rows
        ]
        row = fits.index(True) if True in fits else len(rows)
        rows += [[0, 0, 0]] if row == len(rows) else []
        found = placement.row_i[i], placement.start_i[i], placement.view_start_i[i]
        assert found == (row, rows[row][0], rows[row][1])
        rows[row] = [held + each for held, each in zip(rows[row], size, strict=True)]


@given(LENGTHS, st.sampled_from([(4, 2, 1), (1, 1, 1), (16, 8, 4)]))
@settings(deadline=None)
def test_rows_of_three_lengths_hold_every_sequence_once(lengths_b, rows):
    shapes = tuple(Shape(n, length) for n, length in zip(rows, (16, 32, 64), strict=True))
    placements = place(lengths_b, Layout(shapes))
    held = np.concatenate([placement.sequence_i for placement in placements])
    assert sorted(held) == list(range(len(lengths_b)))
    for shape, placement in zip(shapes, placements, strict=True):
        assert (lengths_b[placement.sequence_i] <= shape.length).all()
        assert placement.row_i.tolist() == list(range(len(placement.sequence_i)))
        assert not placement.start_i.any()
    # Only rows of the shortest kind may stay empty, and longer ones where nothing else is left.
    for shape, placement in zip(shapes[1:], placements[1:], strict=True):
        longer = len(placement.sequence_i) % shape.rows
        assert longer == 0 or not len(placements[0].sequence_i)


VIEW_EXCESS = 3
# The student's prompt, the teacher's, and the response that stands behind both.
SEEN = st.tuples(
    *(st.lists(st.integers(0, PAD), min_size=1, max_size=most) for most in (3, 4, MOST_TOKENS - 3))
)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(st.lists(SEEN, min_size=1, max_size=12))
@settings(deadline=None)
def test_teacher_is_asked_for_every_token_of_a_response_behind_its_own_prompt(layout, examples):
    """Token by token: up to the asked position the view has its prompt and what came before."""
    ours, theirs, responses = (
        Sequences.of_tokens(tokens) for tokens in zip(*examples, strict=True)
    )
    sequences = ours.join(responses.with_columns(weight=1))
    batch = make_batch(
        sequences,
        layout=dataclasses.replace(LAYOUTS[layout], view_excess=VIEW_EXCESS),
        pad_id=PAD,
        view=theirs.join(responses),
    )
    found = []
    for part in batch:
        for index in np.ndindex(part.lengths_b.shape):
            row, seen = (jax.tree.map(lambda x, i=index: x[i], each) for each in (part, part.view))
            fields = vars(row) | row.columns
            tokens_t, ids_t = seen.tokens_bt, seen.segment_ids_bt
            for number, piece in enumerate(pieces_of(fields), start=1):
                trained = [t for t in piece if fields["weight"][t]]
                of_view = (
                    np.arange(len(tokens_t)) if ids_t is None else np.flatnonzero(ids_t == number)
                )
                if ids_t is not None:
                    assert seen.positions_bt[of_view].tolist() == list(range(len(of_view)))
                read = [
                    tokens_t[of_view[0] : seen.index_bt[t] + 1].tolist()
                    for t in trained
                    if seen.index_bt[t] in of_view
                ]
                found.append((row.tokens_bt[piece].tolist(), read))
    expected = [
        (mine + response, [other + response[:r] for r in range(len(response))])
        for mine, other, response in examples
    ]
    assert sorted(found) == sorted(expected)
