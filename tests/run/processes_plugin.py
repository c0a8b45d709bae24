"""Answers that are right by chance, replies, and, where FAULT is set, faults: fault_plugin.py."""

import os
import zlib

from distill.base import processes
from distill.data.arithmetic import ArithmeticDataset
from distill.data.base import register_dataset
from distill.rollout.environment import Environment, Reply, register_environment, says

if os.environ.get("FAULT"):
    import fault_plugin  # noqa: F401


@register_dataset("chance")
class Chance(ArithmeticDataset):
    """Random models answer half of it rightly."""

    def __init__(self, split="train", seed=0, max_samples=None, path=None, **options):
        super().__init__(split, seed, max_samples)

    def is_correct(self, example, response):
        return zlib.crc32((example.prompt + response).encode()) % 2 == 0


@register_environment("says_more")
class SaysMore(Environment):
    """A message after the first turn, made from an example that only the first process asks."""

    def __init__(self, example):
        assert processes.is_first()
        self.what = "1+1"

    def step(self, response):
        what, self.what = self.what, ""
        return Reply(says("user", what), reward=1.0) if what else Reply()
