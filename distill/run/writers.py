"""Where numbers go: `metrics.jsonl` always, and to what `logger.writers` names.

A writer has `write(step, scalars)` and `close()`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

from distill.base.errors import UserError, printable
from distill.base.status import say


class MetricsWriter:
    """Gives the scalars of a step to all writers. One that fails is left out from then on.

    Args:
      log: metrics.jsonl; None, with no others, in all processes but the first, which alone writes.
      others: further writers.
    """

    def __init__(self, log: JsonLines | None = None, *others: Any):
        self._log, self._others = log, list(others) if log else []

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._log:
            self._log.write(step, scalars)
        self._tell("write", step, scalars)

    def note(self, step: int, fields: dict[str, Any]) -> None:
        """A line of `metrics.jsonl` alone."""
        if self._log:
            self._log.note(step, fields)

    def size(self) -> int:
        """Bytes of `metrics.jsonl`, which are on the disk on return."""
        return self._log.size() if self._log else 0

    def close(self) -> None:
        if self._log:
            self._log.close()
        self._tell("close")

    def _tell(self, method: str, *arguments: Any) -> None:
        for writer in list(self._others):
            try:
                getattr(writer, method)(*arguments)
            except Exception as error:
                self._others.remove(writer)
                name, reason = type(writer).__name__, printable(f"{type(error).__name__}: {error}")
                say(f"WARNING: {name} failed and is left out from here on ({reason})")


class JsonLines:
    """Appends to `metrics.jsonl` a line for each logged step.

    Args:
      workdir: where it is.
      size: bytes of it to keep, as `size` was when the run was saved: what a killed run has logged
        beyond will be logged again.
    """

    def __init__(self, workdir: Path, size: int):
        path = workdir / "metrics.jsonl"
        self._file = path.open("a")
        self._file.truncate(min(size, path.stat().st_size))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        # JSON has no NaN: a reader that is strict would refuse the file.
        self.note(step, {k: v if math.isfinite(v) else None for k, v in scalars.items()})

    def note(self, step: int, fields: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **fields}) + "\n")
        self._file.flush()

    def size(self) -> int:
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes into `workdir`/tensorboard; there, steps after `resume_step` are taken back."""

    def __init__(self, workdir: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class HostedRun:
    """Weights & Biases and trackio, whose interfaces are one."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


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
