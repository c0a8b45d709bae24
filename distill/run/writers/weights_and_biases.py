"""Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.base.errors import UserError


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logger.wandb_enabled=True needs the package wandb: pip install wandb"
        ) from None
    return wandb


class WeightsAndBiases:
    """A run of `project`, which shows the config."""

    def __init__(self, workdir: Path, project: str, config: dict[str, Any]):
        self._run = import_wandb().init(
            project=project, dir=str(workdir), config=config, resume="allow"
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()
