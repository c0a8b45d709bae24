"""The batch of a step, with a sampler that is none: what is drawn when, and what is handed out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.base.errors import UserError
from distill.batches.packing import Layout, Shape
from distill.batches.source import Asked, BatchSource
from distill.batches.weighing import weigh
from distill.build.objective import build_weighing
from distill.config.method import Objective
from distill.data.sequences import Column, Sequences, declare_column
from distill.losses.weights import token_weights
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
    """Answers with the version of its weights; fails where told to."""

    def __init__(self, **columns):
        self.refits, self.errors, self.columns = [], {}, columns

    def refit(self, student_params, version):
        self.refits.append(version)

    def generate(self, request):
        if error := self.errors.get(request.step):
            raise error
        assert request.version in self.refits
        tokens_br = np.full((request.num_rows, WIDTH), request.version, np.int32)
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


@pytest.fixture
def ahead(sampler):
    """Samples one batch ahead, in a run of four updates."""
    source = make_source(sampler, async_steps=1, max_steps=4)
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

    source = make_source(sampler, reward=reward, async_steps=1, max_steps=2)
    batch, measured = source.next(0, {})
    arrays, _ = source.sequences_ahead(1)
    assert arrays["reward"].tolist() == [1, 2, 3, 4], "a checkpoint has them"
    assert measured["reward/mean"] == 2.5 and measured["generation/max_length"] == 3
    assert seen[0]["sampled"].sum() == 8 and seen[0]["row"].tolist() == [0, 1, 2, 3]
    advantage_bt = batch[0].columns["advantage"][0]
    assert [set(row[row != 0]) for row in advantage_bt] == [{1}, {2}, {3}, {4}]
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


def test_a_steep_discount_leaves_no_token_of_a_long_response_out():
    """Neither of those counted nor, divided by their number, of those that the loss computes."""
    long = Sequences.of_tokens([np.arange(4000) % 7], weight=1)
    weight = jnp.asarray(weigh(long, discount=0.5)["weight"])
    assert (weight != 0).all() and (token_weights(weight, 10_000_000) != 0).all()


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


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_batches_have_the_weights_of_so_many_updates_before(sampler, steps):
    source = make_source(sampler, async_steps=steps, max_steps=7)
    for step in range(7):
        batch, measured = source.next(step, None)
        stale = min(step, steps)
        assert (first_prompt(batch), sampled_with(batch)) == (ROWS * step, step - stale)
        assert measured["generation/staleness"] == stale
        assert source.position == {"next": step + 1}
    # Once for each version, and none for batches that no update would see.
    assert sampler.refits == list(range(7 - steps))
    source.close()


def test_position_is_behind_the_batches_handed_out(ahead, sampler):
    """Not behind those drawn: a batch under way, or one whose sampling failed, comes again."""
    assert ahead.position == {"next": 0}
    sampler.errors[2] = ValueError("lost")
    ahead.next(0, None)
    assert ahead.position == {"next": 1}
    ahead.next(1, None)
    assert ahead.position == {"next": 2}
    with pytest.raises(ValueError, match="lost"):
        ahead.next(2, None)
    assert ahead.position == {"next": 2}


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
    assert not sampler.refits and not batch[0].columns["sampled"].any()
    np.testing.assert_array_equal(batch[0].tokens_bt[0, :, 1], np.arange(ROWS) + 200)
    source.close()


def test_sequences_sampled_ahead_are_taken_up_by_another_source(sampler):
    """What a checkpoint does; the other sampler is never asked. Two teachers have columns each."""
    options = dict(async_steps=3, max_steps=4, teachers=[Asked(LAYOUT), Asked(LAYOUT, weight=0.5)])
    source = make_source(sampler, **options)
    source.next(0, None)
    arrays, measured = source.sequences_ahead(1)
    assert [each["generation/staleness"] for each in measured] == [1, 2, 3]
    others = [make_source(None, iterator=Counter(1), **options) for _ in range(2)]
    others[0].take_up(1, arrays, measured)
    for step in (1, 2, 3):
        (ours, ours_measured), (theirs, theirs_measured) = (
            each.next(step, None) for each in (source, others[0])
        )
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert ours_measured == theirs_measured and first_prompt(theirs) == ROWS * step
        assert source.position == others[0].position == {"next": step + 1}
        np.testing.assert_array_equal(others[0].rows, source.rows)
        saved = source.sequences_ahead(step + 1)[0]
        assert saved.keys() == others[0].sequences_ahead(step + 1)[0].keys()
    assert not saved
    for each in (source, *others):
        each.close()


def test_what_is_staler_than_allowed_is_not_taken_up(sampler):
    """Where a run goes on with a lower `async_steps`: such a batch and those behind come again."""
    source = make_source(sampler, async_steps=3, max_steps=4)
    source.next(0, None)
    arrays, measured = source.sequences_ahead(1)
    other = make_source(sampler, iterator=Counter(1), async_steps=1, max_steps=4)
    other.take_up(1, arrays, measured)
    for step, version in ((1, 0), (2, 1), (3, 2)):
        batch, measured = other.next(step, None)
        assert (first_prompt(batch), sampled_with(batch)) == (ROWS * step, version)
        assert measured["generation/staleness"] == 1
    source.close()
    other.close()


def test_sequences_ahead_end_before_a_batch_that_failed(sampler):
    source = make_source(sampler, async_steps=3, max_steps=5)
    sampler.errors[2] = ValueError("lost")
    source.next(0, None)
    assert len(source.sequences_ahead(1)[1]) == 1
    source.next(1, None)
    with pytest.raises(ValueError, match="lost"):
        source.next(2, None)
    assert source.sequences_ahead(2) == ({}, []), "those behind it are none of its step"
    source.close()


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
    options = dict(lambda_=0.5, mix="sample", async_steps=1, max_steps=2)
    source = make_source(make_plugin(), **options)
    source.next(0, None)
    arrays, measured = source.sequences_ahead(1)
    np.savez(tmp_path / "arrays.npz", **arrays)
    other = make_source(None, iterator=Counter(1), **options)
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
