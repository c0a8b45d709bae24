"""Where compiled programs are kept."""

import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from distill.base.compilation import compiled, count_compiled_programs, keep_compiled_programs
from distill.base.errors import UserError


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A user's home without anything said about compiled programs."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_something() -> None:
    jax.jit(lambda x: x * 3 + 1).lower(jax.numpy.ones(7)).compile()


def test_the_users_folder_is_the_default_even_after_something_was_compiled(fresh):
    compilation_cache.reset_cache()
    compile_something()
    keep_compiled_programs("default")
    (folder,) = (fresh / "distill" / "jax").iterdir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    jax.clear_caches()
    compile_something()
    assert list(folder.iterdir())


def test_a_folder_of_the_environment_and_its_thresholds_are_respected(fresh, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(fresh / "theirs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7)
    keep_compiled_programs("default")
    assert jax.config.jax_compilation_cache_dir == str(fresh / "theirs")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
    keep_compiled_programs(str(fresh / "ours"))
    assert jax.config.jax_compilation_cache_dir == str(fresh / "ours")


def test_off_keeps_nothing_and_may_be_taken_back(fresh):
    keep_compiled_programs("off")
    assert jax.config.jax_compilation_cache_dir is None and not os.listdir(fresh)
    keep_compiled_programs("default")
    keep_compiled_programs("off")
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_are_counted_once_and_their_seconds_added_up():
    count_compiled_programs()
    count_compiled_programs()
    before = compiled()
    function = jax.jit(lambda x: x * 5 + 2)
    for _ in range(2):
        function(np.ones(3))
    change = {name: count - before[name] for name, count in compiled().items()}
    assert change["compilation/programs"] == 1 and 0 < change["compilation/seconds"] < 60


def test_folder_that_cannot_be_made_is_refused_only_if_it_was_asked_for(fresh, capsys, monkeypatch):
    (fresh / "file").write_text("")
    with pytest.raises(UserError, match="file/cache .Not a directory.*set compilation_cache"):
        keep_compiled_programs(str(fresh / "file" / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    keep_compiled_programs("default")
    assert "Not a directory): each run compiles again" in capsys.readouterr().out
    assert jax.config.jax_compilation_cache_dir is None
