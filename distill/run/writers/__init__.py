"""Where numbers go: JSONL and TensorBoard always, Weights & Biases when asked; a module for each.

A writer has `write(step, scalars)` and `close()`.
"""

from __future__ import annotations

from typing import Any

from distill.run.writers.json_lines import JsonLines


class MetricsWriter:
    """Gives the scalars of a step to all writers.

    Args:
      log: metrics.jsonl; None, with no others, in all processes but the first, which alone writes.
      others: further writers.
    """

    def __init__(self, log: JsonLines | None = None, *others: Any):
        self._log, self._writers = log, (log, *others) if log else ()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, scalars)

    def note(self, step: int, fields: dict[str, Any]) -> None:
        """A line of `metrics.jsonl` alone."""
        if self._log:
            self._log.note(step, fields)

    def size(self) -> int:
        """Bytes of `metrics.jsonl`, which are on the disk on return."""
        return self._log.size() if self._log else 0

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
