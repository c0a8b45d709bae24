"""Sizes that an evaluation derives."""

from distill.build.evaluator import rows_at_once


def test_few_prompts_are_a_small_batch_and_the_last_one_is_no_smaller_than_the_others():
    sizes = {count: rows_at_once(count, 64, 8) for count in (1, 8, 9, 64, 65, 128)}
    assert sizes == {1: 8, 8: 8, 9: 16, 64: 64, 65: 40, 128: 64}
