"""Where numbers go: `metrics.jsonl` always, and to what `logger.writers` names.

A writer has `write(step, scalars)` and `close()`.
"""

from __future__ import annotations

from typing import Any

from distill.base.errors import printable
from distill.base.status import say
from distill.run.writers.json_lines import JsonLines


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
