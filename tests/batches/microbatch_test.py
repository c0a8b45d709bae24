"""Which tokens carry loss, and where sequences stand: padded, packed, rows of several lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batches.packing import Layout, Shape, place
from distill.batches.rows import make_batch
from distill.kernels.attention import MOST_SEGMENTS
from distill.losses.objective import TopKScores
from distill.sampling.request import Rollout

EOS = PAD = 9
PROMPTS = [[1, 2, 3], [1], [1, EOS], []]
RESPONSES = [[4, 5, EOS], [EOS], [6, EOS, 7, 8, 2, 3], [7, 8]]
ROW = 8
PADDED = Layout((Shape(2, ROW),))
PACKED = Layout((Shape(2, ROW),), packed=True)
THREE_LENGTHS = Layout((Shape(4, 2), Shape(2, 6), Shape(1, ROW)))


def padded(rows, width, value=PAD):
    array = np.full((len(rows), width), value, np.int32)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row
    return array, np.array([len(row) for row in rows], np.int32)


def batch_of(prompts, responses, layout, scores=None):
    tokens_br, lengths_b = padded(responses, 6)
    log_probs_br = -tokens_br - np.arange(6, dtype=np.float32) / 10
    stopped_b = np.arange(len(responses)) % 2 == 0
    rollout = Rollout(tokens_br, lengths_b, log_probs_br, log_probs_br, stopped_b)
    on_policy_b = np.arange(len(responses)) < 2
    arrays = *padded(prompts, 4), rollout, on_policy_b, scores
    return make_batch(*arrays, layout=layout, pad_id=PAD)


def rows_of(batch):
    """All rows of all microbatches, by field."""
    for part in batch:
        for index in np.ndindex(part.lengths_b.shape):
            fields = vars(part) | {"scores": None}
            yield {name: x if x is None else x[index] for name, x in fields.items()}


def sequences_of(batch):
    """(tokens, predicting positions, their targets) of every sequence, positions from 0."""
    found = []
    for row in rows_of(batch):
        ids_t = row["segment_ids_bt"]
        if ids_t is None:
            ids_t = (np.arange(len(row["tokens_bt"])) < row["lengths_b"]).astype(int)
        assert ids_t.max(initial=0) == row["sequences_b"]
        assert (row["targets_bt"][ids_t == 0] == -1).all()
        assert (row["tokens_bt"][ids_t == 0] == PAD).all()
        for number in range(1, row["sequences_b"] + 1):
            here = ids_t == number
            if row["positions_bt"] is not None:
                assert row["positions_bt"][here].tolist() == list(range(here.sum()))
            targets = row["targets_bt"][here]
            predicting = np.flatnonzero(targets != -1)
            tokens = row["tokens_bt"][here].tolist()
            found.append((tokens, predicting.tolist(), targets[predicting].tolist()))
    return sorted(found)


@pytest.mark.parametrize("layout", [PADDED, PACKED, THREE_LENGTHS], ids=lambda x: str(x)[:40])
def test_loss_on_the_response_and_nothing_else(layout):
    """Pad is EOS; a hidden state predicts the next token; nothing predicts a first token."""
    assert sequences_of(batch_of(PROMPTS, RESPONSES, layout)) == sorted(
        [
            ([1, 2, 3, 4, 5, EOS], [2, 3, 4], [4, 5, EOS]),
            ([1, EOS], [0], [EOS]),
            ([1, EOS, 6, EOS, 7, 8, 2, 3], [1, 2, 3, 4, 5, 6], [6, EOS, 7, 8, 2, 3]),
            ([7, 8], [0], [8]),
        ]
    )


@pytest.mark.parametrize("layout", [PADDED, PACKED, THREE_LENGTHS], ids=lambda x: str(x)[:40])
def test_what_belongs_to_a_token_stays_with_it(layout):
    ids_brk = padded(RESPONSES, 6)[0][..., None]
    scores = TopKScores(ids_brk, -ids_brk.astype(np.float32))
    batch = batch_of(PROMPTS, RESPONSES, layout, scores)
    for part in batch:
        known = part.targets_bt != -1
        np.testing.assert_array_equal(np.ceil(part.log_probs_bt), -part.targets_bt * known)
        np.testing.assert_array_equal(
            part.scores.ids_brk[..., 0], np.where(known, part.targets_bt, -1)
        )
        np.testing.assert_array_equal(part.scores.log_probs_brk[..., 0], -part.targets_bt * known)
    assert sum(part.on_policy_bt.sum() for part in batch) == len(RESPONSES[0] + RESPONSES[1])
    assert sum(part.sequences_b.sum() for part in batch) == 4
    assert sum(part.sampled_b.sum() for part in batch) == 2
    assert sum(part.truncated_b.sum() for part in batch) == 1  # the second, of the two sampled


def test_a_row_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="8 tokens in rows of 7"):
        batch_of(PROMPTS, RESPONSES, Layout((Shape(4, 7),)))


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
