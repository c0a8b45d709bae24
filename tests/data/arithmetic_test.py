"""The built-in curriculum."""

import pytest

from distill.base.errors import UserError
from distill.data.arithmetic import (
    CHARACTERS,
    LEVELS,
    SIZES,
    ArithmeticDataset,
    DistinctArithmetic,
)
from distill.data.base import get_dataset
from distill.data.tokenizer import END_OF_TEXT


def test_worked_steps_lead_to_the_answer():
    dataset = get_dataset("arithmetic", "train")
    for i in range(0, len(dataset), 5003):
        example = dataset[i]
        steps = example.response.split("\n")
        assert len(steps) == dataset.level(i)
        for step, following in zip(steps, steps[1:] + [None], strict=True):
            left, _, result = step.partition("=")
            assert eval(left) == int(result)
            assert following is None or following.startswith(result)
        assert steps[-1].endswith(f"={example.answer}")
        assert set(example.prompt + example.response) <= set(CHARACTERS)


def test_same_index_gives_the_same_problem_and_seeds_differ():
    assert ArithmeticDataset("train", seed=3)[11] == ArithmeticDataset("train", seed=3)[11]
    ours = [ArithmeticDataset("train", seed=0)[i].prompt for i in range(40_000, 40_020)]
    theirs = [ArithmeticDataset("train", seed=1)[i].prompt for i in range(40_000, 40_020)]
    assert ours != theirs


def test_splits_share_no_problem():
    train = ArithmeticDataset("train")
    # Short problems are the ones that could meet by chance.
    problems = {train[i].prompt for i in range(0, 10_000, 2)}
    for split in ("validation", "test"):
        held_out = ArithmeticDataset(split)
        assert not problems & {held_out[i].prompt for i in range(0, SIZES[split], LEVELS)}


def test_training_climbs_and_held_out_covers_all_levels():
    train, validation = ArithmeticDataset("train"), ArithmeticDataset("validation")
    levels = [train.level(i) for i in range(len(train))]
    assert levels == sorted(levels) and set(levels) == set(range(1, LEVELS + 1))
    assert {validation.level(i) for i in range(LEVELS)} == set(range(1, LEVELS + 1))


@pytest.mark.parametrize(
    ("response", "right"),
    [("1+2=3\n3*4=12", True), ("1+2=3\n3*4=13", False), ("1+2=4\n4*3=12", True), ("", False),
     ("3*4=12=", False), ("1+2=3\n3*4=12\n", True), ("3*4=012", False)],
)  # fmt: skip
def test_checker_reads_the_last_result_exactly(response, right):
    dataset = ArithmeticDataset("validation")
    example = dataset[0]
    example = type(example)(prompt="1+2*4", response=None, answer="12", id="x")
    assert dataset.is_correct(example, response) is right


def test_unknown_split_lists_the_known():
    with pytest.raises(UserError, match="'math500'; it has: test, train, validation"):
        get_dataset("arithmetic", "math500")


def test_variants():
    plain, hinted, tools = (ArithmeticDataset("test", variant=v) for v in ("", "hinted", "tools"))
    assert hinted[0] == plain[0] and hinted[1].prompt == f"{plain[1].response}\n{plain[1].prompt}"
    called = [line.split(END_OF_TEXT) for line in tools[3].response.splitlines()]
    assert ["".join(line) for line in called] == [*plain[3].response.splitlines(), plain[3].answer]
    assert len(called) > 2 and all(line[0].endswith("=") for line in called[:-1])


def test_problems_are_distinct_random_and_apart():
    train, other = (DistinctArithmetic("train", seed, 64) for seed in (0, 1))
    prompts = [{data[i].prompt for i in range(64)} for data in (train, other)]
    assert len(prompts[0]) == len(prompts[1]) == 64 and len(prompts[0] & prompts[1]) < 32
    more = DistinctArithmetic("train", 0, 128)
    assert [more[i].id for i in range(64)] == [train[i].id for i in range(64)]
    held_out, again = (DistinctArithmetic("test", seed, 64) for seed in (0, 1))
    texts = [held_out[i].prompt for i in range(64)]
    assert texts == [again[i].prompt for i in range(64)] and not set(texts) & prompts[0]
    assert {(len(text) - 1) // 2 for text in texts} == {2, 3, 4, 5, 6}
    assert train.is_correct(train[0], train[0].response)
