"""`metrics.jsonl`: a line for each logged step."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends to `metrics.jsonl`.

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
