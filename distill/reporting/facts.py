"""`run.json`: what a run is, for whoever reads its folder later."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from distill.base.files import write_atomically

FACTS = "run.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def write_facts(workdir: Path, flat_config: dict[str, Any]) -> None:
    """Writes the config and what the run runs on; a run that goes on writes them anew."""
    facts = dict(config=flat_config, environment=environment())
    write_atomically(workdir / FACTS, json.dumps(facts, indent=1) + "\n")


def environment() -> dict[str, str]:
    """Devices, system and versions."""
    device, count = jax.devices()[0], jax.device_count()
    return {
        "devices": f"{count} x {device.device_kind} ({device.platform})",
        "processes": str(jax.process_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }
