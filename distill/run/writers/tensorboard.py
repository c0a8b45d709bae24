"""TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path


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
