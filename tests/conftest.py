"""Eight CPU devices for every test; set before jax is first imported."""

import os
from pathlib import Path

import pytest
from quick_xla import QUICK_XLA_FLAGS

# Another platform only on request, for the tests that need a device: DISTILL_TEST_PLATFORM=cuda.
os.environ["JAX_PLATFORMS"] = os.environ.get("DISTILL_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_XLA_FLAGS}"
# Tests run side by side, and torch's threads would wait for each other: nine times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# And each of them once, also from one session of tests to the next.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache/jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: no process ends long after the others have."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def models() -> dict[str, str]:
    """Folders of a tiny student and teacher with one tokenizer."""
    # Imported here: the lines above must run before jax is.
    from tiny_runs import tiny_config

    config = tiny_config()
    return dict(student=config.policy.model_name, teacher=config.distillation.teacher_model_path)


@pytest.fixture
def nothing_compiled_before():
    """Without the tests' common store of compiled programs."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def losses_as_before():
    """What a test registers is unknown to those behind it."""
    from distill.data import base as data
    from distill.evaluation import grading
    from distill.evaluation import metrics as evaluated
    from distill.losses import divergences, metrics, weights
    from distill.rollout import base as rollout
    from distill.rollout import rewards

    losses = divergences._LOSSES, weights._WEIGHTS, metrics._METRICS
    others = data.DATASETS, grading._GRADERS, evaluated.METRICS, rollout.BACKENDS
    others = *others, rewards._REWARDS
    before = [(registry, dict(registry._parts)) for registry in (*losses, *others)]
    yield
    for registry, parts in before:
        # A built-in module is imported once, so what it registered must stay.
        added = {k: part for k, part in registry._parts.items() if k in registry._built_in}
        registry._parts = added | parts
