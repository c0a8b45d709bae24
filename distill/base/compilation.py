"""JAX's store of compiled programs: what one run has compiled, the next one only loads."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from distill.base.errors import UserError
from distill.base.files import local_path

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Programs that compile faster are not worth a file: there are hundreds of them in any run.
_WORTH_KEEPING = 0.1  # seconds


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
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX looks once, perhaps before this


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
