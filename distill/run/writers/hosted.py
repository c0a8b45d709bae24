"""Weights & Biases and trackio, whose interfaces are one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from distill.base.errors import UserError, printable


def import_logger(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"logger.writers names {name}, which needs the package {name}: pip install {name}"
        ) from None


def open_run(
    name: str, workdir: Path, project: str, run_id: str, config: dict[str, Any]
) -> HostedRun:
    """The run of this id at the service `name`, which goes on if it is there.

    Raises:
      UserError: the package is missing, no key is set, or the service cannot be reached.
    """
    module = import_logger(name)
    # trackio knows a run by its name; W&B by an id, and writes into a folder meanwhile.
    options = dict(id=run_id, dir=str(workdir)) if name == "wandb" else dict(name=run_id)
    try:
        run = module.init(project=project, config=config, resume="allow", **options)
    except Exception as error:
        raise UserError(
            f"logger.writers names {name}, which does not start ({printable(str(error))}): log in "
            "to it, or leave it out"
        ) from None
    return HostedRun(run)


class HostedRun:
    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()
