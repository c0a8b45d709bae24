"""Where numbers go: JSONL and TensorBoard always, Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from distill.base.errors import UserError


class MetricsWriter:
    """Appends scalars of a step to `metrics.jsonl`, TensorBoard and, when asked, wandb.

    Args:
      workdir: where they are.
      resume_step: steps made before.
      resume_size: bytes of metrics.jsonl to keep, as `size` was when the run was saved: what a
        killed run has logged beyond will be logged again.
      wandb_project: None without wandb.
      config: shown there.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        resume_size: int,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        self._file = path.open("a")
        self._file.truncate(min(resume_size, path.stat().st_size))
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        self._wandb = None
        if wandb_project:
            self._wandb = import_wandb().init(
                project=wandb_project, dir=str(workdir), config=config, resume="allow"
            )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        # JSON has no NaN: a reader that is strict would refuse the file.
        self.note(step, {k: v if math.isfinite(v) else None for k, v in scalars.items()})
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def note(self, step: int, fields: dict[str, Any]) -> None:
        """A line of `metrics.jsonl` alone."""
        self._file.write(json.dumps({"step": step, **fields}) + "\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes of `metrics.jsonl`, which are on the disk on return."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


class NoWriter:
    """In the place of `MetricsWriter` in all processes but the first, which alone writes."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        pass

    def note(self, step: int, fields: dict[str, Any]) -> None:
        pass

    def size(self) -> int:
        return 0

    def close(self) -> None:
        pass


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logger.wandb_enabled=True needs the package wandb: pip install wandb"
        ) from None
    return wandb
