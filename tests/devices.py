"""Marks of tests that need a device."""

import jax
import pytest

needs_hopper = pytest.mark.skipif(
    jax.default_backend() != "gpu"
    or float(getattr(jax.devices()[0], "compute_capability", 0)) < 9.0,
    reason="needs a GPU from Hopper on, and DISTILL_TEST_PLATFORM=cuda",
)
