"""Answers that are right by chance, and, where FAULT is set, faults: see fault_plugin.py."""

import os
import zlib

from distill.data.arithmetic import ArithmeticDataset
from distill.data.base import register_dataset

if os.environ.get("FAULT"):
    import fault_plugin  # noqa: F401


@register_dataset("chance")
class Chance(ArithmeticDataset):
    """Random models answer half of it rightly."""

    def __init__(self, split="train", seed=0, max_samples=None, path=None, **options):
        super().__init__(split, seed, max_samples)

    def is_correct(self, example, response):
        return zlib.crc32((example.prompt + response).encode()) % 2 == 0
