"""Sizes that a session derives."""

from tiny_runs import tiny_config

from distill.build.session import Session
from distill.config.parse import parse_config


def test_few_prompts_are_a_small_batch_and_the_last_one_is_no_smaller_than_the_others():
    config = tiny_config()
    config.evaluation.batch_size = 64
    session = Session(parse_config(config))  # on eight devices
    sizes = {count: session._batch_size(count) for count in (1, 8, 9, 64, 65, 128)}
    assert sizes == {1: 8, 8: 8, 9: 16, 64: 64, 65: 40, 128: 64}
