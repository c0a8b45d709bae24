"""Marks of tests that need a device."""

import pytest

from distill.kernels.platform import cuda_capability

needs_hopper = pytest.mark.skipif(
    cuda_capability() < 9,
    reason="needs a GPU from Hopper on, and DISTILL_TEST_PLATFORM=cuda",
)
