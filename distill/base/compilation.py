"""Compiled programs: how many there are, and JAX's store from which the next run loads them."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from distill.base.errors import UserError
from distill.base.files import local_path

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# What becomes of a program: traced, lowered, and compiled or loaded.
_STAGES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_PROGRAMS, _SECONDS = "compilation/programs", "compilation/seconds"
_counts: dict[str, float] = {}  # JAX's listeners cannot be removed: of the process


def keep_compiled_programs(where: str) -> None:
    """Lets JAX load what it has compiled before; to be called before it compiles.

    Args:
      where: a folder; 'default' is JAX_COMPILATION_CACHE_DIR or, where that is not set, one in the
        user's cache folder; 'off' keeps nothing.

    Raises:
      UserError: the folder cannot be written to, and is not the default.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = None if where == "off" else os.environ.get(_VARIABLE) or str(_users_folder())
    if where not in ("default", "off"):
        folder = str(local_path(where))
    # JAX adds its options to the class as it defines them.
    if folder == jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    if folder is not None and "://" not in folder:  # which JAX's own variable may have
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"compiled programs cannot be kept in {folder} ({error.strerror})"
            if where != "default":
                raise UserError(f"{problem}: set compilation_cache to another folder") from None
            print(f"{problem}: each run compiles again; see compilation_cache")
            return
    if _VARIABLE not in os.environ:  # whose owner has thresholds of its own, too
        # A small program is loaded in a tenth of the time that it takes to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX looks once, perhaps before this


def count_compiled_programs() -> None:
    """Counts the programs of this process from now on, for `compiled`."""
    import jax

    if _SECONDS not in _counts:
        _counts.update({_PROGRAMS: 0, _SECONDS: 0.0})
        jax.monitoring.register_event_duration_secs_listener(_count)


def compiled() -> dict[str, float]:
    """Programs that this process has compiled or loaded, and the seconds of preparing them."""
    return dict(_counts)


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _STAGES:
        _counts[_SECONDS] += duration_secs
        _counts[_PROGRAMS] += event == _STAGES[-1]


def _users_folder() -> Path:
    """One for each kind of processor: a home is shared by machines, and programs for CPUs are not.

    JAX's key names the accelerator, its driver and JAX's version.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "distill" / "jax" / _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
