"""The batch of a step, with a sampler that is none: what is drawn when, and what is handed out."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from distill.base.errors import UserError
from distill.batches.packing import Layout, Shape
from distill.batches.source import Asked, BatchSource
from distill.batches.weighing import weigh
from distill.build.objective import build_weighing
from distill.config.method import Objective
from distill.data.sequences import Column, Sequences, declare_column
from distill.rollout.metrics import repetition
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout

ROWS, WIDTH = 4, 3
LAYOUT = Layout((Shape(ROWS, 1 + WIDTH),))
declare_column("test_of_token", Column(np.float32, fill=-1))
declare_column("test_of_sequence", Column(np.int32, per_token=False))


class Counter:
    """Batches that say which they are; its state is the number of the next."""

    def __init__(self, number: int = 0):
        self.number = number

    def get_state(self):
        return {"next": self.number}

    def __next__(self) -> Sequences:
        self.number += 1
        first = (self.number - 1) * ROWS
        index_b = np.arange(first, first + ROWS)
        prompts = Sequences.of_tokens(index_b[:, None] + 100, index=index_b, row=index_b)
        return prompts.join(Sequences.of_tokens(index_b[:, None] + 200, weight=1))


class Sampler:
    """Answers with the version of its weights; fails when told to."""

    def __init__(self, **columns):
        self.version, self.error, self.columns = None, None, columns

    def refit(self, student_params, version):
        self.version = version

    def generate(self, request):
        if self.error:
            raise self.error
        tokens_br = np.full((request.num_rows, WIDTH), self.version, np.int32)
        lengths_b = np.array([1, 2, 3, 2], np.int32)
        zeros_br = np.zeros(tokens_br.shape, np.float32)
        stopped_b = np.array([True, True, False, True])
        rollout = Rollout(tokens_br, lengths_b, zeros_br, zeros_br, stopped_b, self.columns)
        return rollout, {"generation/slot_occupancy": 0.5}


@pytest.fixture
def sampler() -> Sampler:
    return Sampler()


@pytest.fixture
def source(sampler):
    source = make_source(sampler)
    yield source
    source.close()


def make_source(sampler, **options) -> BatchSource:
    defaults = dict(
        params=SamplingParams(max_length=WIDTH), num_generations=1, seed=0, lambda_=1.0,
        teachers=[Asked(LAYOUT)], pad_id=0,
    )  # fmt: skip
    iterator = options.pop("iterator", Counter())
    return BatchSource(iterator, sampler, lambda batch: batch, **(defaults | options))


def test_rewards_become_columns_of_what_was_sampled(sampler):
    seen = []

    def reward(sequences):
        seen.append(sequences)
        columns = dict(reward=[1, 2, 3, 4], advantage=np.repeat([1, 2, 3, 4], sequences.lengths_b))
        return sequences.with_columns(**columns), {"reward/mean": 2.5}

    source = make_source(sampler, reward=reward)
    batch, measured = source.next(0, {})
    assert measured["reward/mean"] == 2.5 and measured["generation/max_length"] == 3
    assert seen[0]["sampled"].sum() == 8 and seen[0]["row"].tolist() == [0, 1, 2, 3]
    advantage_bt = batch[0].columns["advantage"][0]
    assert [set(row[row != 0]) for row in advantage_bt] == [{1}, {2}, {3}, {4}]
    source.sample_ahead(1, {})
    arrays, _ = source.sequences_ahead()
    assert arrays["reward"].tolist() == [1, 2, 3, 4], "a checkpoint has them"
    source.close()
    # Fixed data are not rewarded.
    source = make_source(sampler, reward=reward, lambda_=0.0)
    batch, measured = source.next(0, {})
    assert len(seen) == 2 and "reward/mean" not in measured
    assert not batch[0].columns["advantage"].any()
    source.close()


def test_both_responses_to_every_prompt(sampler):
    layout = Layout((Shape(2 * ROWS, 1 + WIDTH),))
    source = make_source(sampler, mix="both", lambda_=0.5, teachers=[Asked(layout)])
    batch, measured = source.next(0, {})
    (rows,) = batch
    assert rows.sampled_b[0].tolist() == [0] * ROWS + [1] * ROWS
    prompts = rows.tokens_bt[0, :, 0].tolist()
    assert prompts[:ROWS] == prompts[ROWS:] == [100, 101, 102, 103]
    assert rows.targets_bt[0, :ROWS, 0].tolist() == [200, 201, 202, 203]
    assert measured["generation/max_length"] == 3
    source.close()


WEIGHED = Sequences.of_tokens(
    [[1, 2, 3, 4], [5, 3, 6], [7]],
    weight=[0, 1, 1, 1, 0, 1, 1, 0],  # the last has a prompt only
)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0, 1, 1, 1, 0, 1, 1, 0]),
        (dict(horizon=2), [0, 1, 1, 0, 0, 1, 1, 0]),
        (dict(discount=0.5), [0, 1, 0.5, 0.25, 0, 1, 0.5, 0]),
        (dict(skipped=[3]), [0, 1, 0, 1, 0, 0, 1, 0]),
        (dict(horizon=2, discount=0.1, skipped=[2]), [0, 0, 0.1, 0, 0, 1, 0.1, 0]),
    ],
    ids=str,
)
def test_tokens_count_by_place_and_kind(options, expected):
    np.testing.assert_allclose(weigh(WEIGHED, **options)["weight"], expected, rtol=1e-6)


def test_turns_of_others_are_not_counted():
    dialogue = Sequences.of_tokens([[1, 2, 3, 4, 5]], weight=[0, 1, 0, 0, 1])
    assert weigh(dialogue, discount=0.5)["weight"].tolist() == [0, 1, 0, 0, 0.5]


def test_weights_reach_the_batch(sampler):
    source = make_source(sampler, weigh=functools.partial(weigh, horizon=2, discount=0.5))
    batch, _ = source.next(0, {})
    assert batch[0].columns["weight"][0].max(0).tolist() == [1, 0.5, 0, 0]
    source.close()


def test_a_token_that_is_none():
    with pytest.raises(UserError, match="skip_tokens names '<thinking>', which is no token"):
        build_weighing(Objective(skip_tokens=("<think>", "<thinking>")), {"<think>": 3})


def first_prompt(batch) -> int:
    return int(batch[0].tokens_bt[0, 0, 0]) - 100


def sampled_with(batch) -> int:
    return int(batch[0].tokens_bt[0, 0, 1])


def test_batch_sampled_ahead_is_handed_out_with_its_staleness(source):
    batch, measured = source.next(5, None)
    assert (first_prompt(batch), sampled_with(batch), measured["generation/staleness"]) == (0, 5, 0)
    source.sample_ahead(6, None)
    batch, measured = source.next(6, None)
    assert (first_prompt(batch), sampled_with(batch), measured["generation/staleness"]) == (4, 5, 1)
    batch, measured = source.next(7, None)
    assert (first_prompt(batch), sampled_with(batch), measured["generation/staleness"]) == (8, 7, 0)


def test_only_one_batch_is_under_way_and_only_its_step_may_ask(source):
    source.sample_ahead(1, None)
    with pytest.raises(RuntimeError, match="stale by more than 1"):
        source.sample_ahead(2, None)
    with pytest.raises(RuntimeError, match="update 1 is under way, not of 3"):
        source.next(3, None)


def test_position_is_behind_the_batches_handed_out(source, sampler):
    """Not behind those drawn: a batch under way, or one whose sampling failed, comes again."""
    assert source.position == {"next": 0}
    source.next(0, None)
    source.sample_ahead(1, None)
    assert source.position == {"next": 1}
    source.next(1, None)
    assert source.position == {"next": 2}
    sampler.error = ValueError("lost")
    source.sample_ahead(2, None)
    with pytest.raises(ValueError, match="lost"):
        source.next(2, None)
    assert source.position == {"next": 2}


def test_measures_what_any_rollout_tells_and_passes_on_the_rest(source):
    _, measured = source.next(0, None)
    seconds = measured["generation/seconds"]
    assert measured["generation/tokens_per_second"] == pytest.approx(8 / seconds)
    assert measured["generation/refit_seconds"] > 0
    exact = {"mean_length": 2, "max_length": 3, "truncated": 0.25, "slot_occupancy": 0.5}
    assert {name: measured[f"generation/{name}"] for name in exact} == exact


def test_fixed_data_measures_nothing_but_its_staleness(sampler):
    source = make_source(sampler, lambda_=0.0)
    batch, measured = source.next(0, None)
    assert measured == {"generation/staleness": 0.0}
    assert sampler.version is None and not batch[0].columns["sampled"].any()
    np.testing.assert_array_equal(batch[0].tokens_bt[0, :, 1], np.arange(ROWS) + 200)
    source.close()


def test_sequences_sampled_ahead_are_taken_up_by_another_source(source, sampler):
    """What a checkpoint does; the other sampler is never asked."""
    source.next(0, None)
    assert source.sequences_ahead() == ({}, {})
    source.sample_ahead(1, None)
    arrays, measured = source.sequences_ahead()
    other = make_source(None, iterator=Counter(source.position["next"]))
    other.take_up(1, arrays, measured)
    (ours, ours_measured), (theirs, theirs_measured) = source.next(1, None), other.next(1, None)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert ours_measured == theirs_measured and ours_measured["generation/staleness"] == 1
    assert first_prompt(theirs) == 4 and source.position == other.position
    np.testing.assert_array_equal(other.rows, np.arange(4, 8))
    sampler.error = ValueError("lost")
    source.sample_ahead(2, None)
    assert source.sequences_ahead() == ({}, {}), "next says it"
    other.close()


def test_scores_of_what_the_teacher_reads_stand_at_the_students_tokens(sampler):
    """Here a teacher by scores says what it reads, behind a prompt of three tokens."""

    def view(sequences):
        prompts = Sequences.of_tokens(np.full((len(sequences), 3), 7))
        return prompts.join(sequences.behind(np.ones(len(sequences), int)))

    def score(sequences):
        assert (sequences.lengths_b > 3).all()
        tokens_n1 = sequences["tokens"][:, None]
        return {"teacher_ids": tokens_n1, "teacher_log_probs": np.zeros_like(tokens_n1)}

    layout = dataclasses.replace(LAYOUT, view_excess=2)
    source = make_source(sampler, teachers=[Asked(layout, score=score, view=view)])
    (rows,), _ = source.next(5, None)
    assert rows.view is None, "what was scored need not be laid out"
    ids_bt, trained_bt = rows.columns["teacher_ids"][..., 0], rows.mask_bt
    assert trained_bt.any()
    np.testing.assert_array_equal(ids_bt[trained_bt], rows.targets_bt[trained_bt])
    source.close()


def make_plugin() -> Sampler:
    """Knows a number of every token of its responses, and one of every response."""
    return Sampler(test_of_token=np.arange(12.0).reshape(4, 3), test_of_sequence=np.arange(4))


def test_column_of_a_plugin_reaches_the_rows(tmp_path):
    """Through a checkpoint of a batch sampled ahead, too, and beside fixed data that lack it."""
    options = dict(lambda_=0.5, mix="sample")
    source = make_source(make_plugin(), **options)
    source.sample_ahead(1, None)
    arrays, measured = source.sequences_ahead()
    np.savez(tmp_path / "arrays.npz", **arrays)
    other = make_source(None, **options)
    other.take_up(1, dict(np.load(tmp_path / "arrays.npz")), measured)
    (ours, _), (theirs, _) = source.next(1, None), other.next(1, None)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    numbers_bt = theirs[0].columns["test_of_token"][0]
    sampled_b = theirs[0].sampled_b[0].astype(bool)
    assert sampled_b.any() and not sampled_b.all()
    lengths = [1, 2, 3, 2]
    for row in range(ROWS):
        known = [3 * row + r for r in range(lengths[row])] if sampled_b[row] else []
        assert numbers_bt[row].tolist() == known + [-1] * (1 + WIDTH - len(known))
    of_sequences = np.where(sampled_b, np.arange(ROWS), 0)
    np.testing.assert_array_equal(arrays["test_of_sequence"], of_sequences)
    source.close()
    other.close()


def test_a_teachers_scores_are_columns(source):
    def score(sequences: Sequences) -> dict[str, np.ndarray]:
        return {"teacher_ids": sequences["tokens"][:, None] + [[0, 1]], "advantage": 2.0}

    source = make_source(Sampler(), teachers=[Asked(LAYOUT, score=score)])
    batch, measured = source.next(3, None)
    assert "teacher/seconds" in measured
    ids_btk = batch[0].columns["teacher_ids"][0]
    assert ids_btk[3].tolist() == [[3, 4], [3, 4], [-1, -1], [-1, -1]]
    assert batch[0].columns["advantage"][0, 3].tolist() == [2, 2, 0, 0]
    source.close()


def test_repetition_counts_what_came_earlier_in_the_same_answer():
    looping = [1, 2, 1, 2, 1, 2, 1, 2, 9, 9, 9, 9]
    varied = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    # 8 tokens have 5 4-grams, of which 1212 and 2121 are new; what lies behind the end is not seen.
    assert repetition(np.array([looping]), np.array([8])) == pytest.approx(3 / 5)
    assert repetition(np.array([looping, varied]), np.array([8, 12])) == pytest.approx(3 / 14)
    assert repetition(np.array([varied, varied]), np.array([12, 12])) == 0
    assert repetition(np.array([looping]), np.array([3])) == 0
    assert repetition(np.zeros((2, 3), np.int32), np.array([3, 3])) == 0
