"""Signs that a run is going wrong, found in the numbers of every step."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from distill.config.schema import Warn

_WINDOW, _FEWEST = 50, 10  # steps behind a median, and without how many there is none

# kind: (metric, what to look at)
_SPIKES = {
    "loss_spike": ("loss", "the learning rate may be too high, or this batch unlike the others"),
    "length_spike": (
        "generation/mean_length",
        "the student may be forgetting to end its responses: look at truncated and repetition",
    ),
}
_ABOVE = {
    "truncated": (
        "generation/truncated",
        "raise generate_strategy.max_length, or check that the template lets responses end",
    ),
    "repetition": ("generation/repetition", "the student may be looping: read its responses"),
}
_RISES = {
    "truncated_rise": (
        "generation/truncated",
        "the student unlearns to end its responses: set lambda_=0.5, which mixes in fixed data, or "
        "export a checkpoint from before",
    ),
}
_BELOW = {
    "low_entropy": (
        "generation/entropy_estimate",
        "the student may have collapsed: read responses",
    ),
}


class Health:
    """Compares every step with the thresholds of `config.Warn`.

    So many `quiet_steps` lie between two warnings of one kind. `count` is of the thresholds passed
    since `take_count`, those that gave no warning included.
    """

    def __init__(self, limits: Warn, quiet_steps: int):
        self._limits, self._quiet_steps = limits, quiet_steps
        self._recent: dict[str, deque[float]] = {
            name: deque(maxlen=_WINDOW) for name, _ in _SPIKES.values()
        }
        self._first: dict[str, list[float]] = {name: [] for name, _ in _RISES.values()}
        self._warned: dict[str, int] = {}
        self.count = 0

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Lines to show about a step with these metrics, of which any may be missing."""
        found = []
        for kind, (name, advice) in _SPIKES.items():
            recent, factor = self._recent[name], getattr(self._limits, kind)
            if name not in values:
                continue
            if factor and len(recent) >= _FEWEST:
                # A loss with advantages may be negative, or about 0: its size is what is usual.
                usual = statistics.median(map(abs, recent))
                if values[name] > factor * usual:
                    seen = f"{name} is {values[name]:.4g}, usually {usual:.4g}"
                    found.append((kind, f"{seen}: {advice}"))
            recent.append(values[name])
        for kind, (name, advice) in _RISES.items():
            first, limit = self._first[name], getattr(self._limits, kind)
            if name not in values:
                continue
            if len(first) < _FEWEST:
                first.append(values[name])
            elif limit and values[name] - statistics.mean(first) > limit:
                seen = f"{name} is {values[name]:.4g}, at first {statistics.mean(first):.4g}"
                found.append((kind, f"{seen}: {advice}"))
        for table, sign, word in ((_ABOVE, 1, "above"), (_BELOW, -1, "below")):
            for kind, (name, advice) in table.items():
                limit = getattr(self._limits, kind)
                if limit and name in values and sign * values[name] > sign * limit:
                    seen = f"{name} is {values[name]:.4g}, {word} {limit:g}"
                    found.append((kind, f"{seen}: {advice}"))
        self.count += len(found)
        due = [
            (kind, line)
            for kind, line in found
            if kind not in self._warned or step - self._warned[kind] >= self._quiet_steps
        ]
        self._warned |= {kind: step for kind, _ in due}
        return [f"WARNING: step {step}: {line} (logger.warn.{kind})" for kind, line in due]

    def take_count(self) -> int:
        count, self.count = self.count, 0
        return count

    def state(self) -> dict[str, Any]:
        """As JSON, for `restore`."""
        recent = {name: list(values) for name, values in self._recent.items()}
        first = {name: list(values) for name, values in self._first.items()}
        return {"recent": recent, "first": first, "warned": self._warned, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in state["recent"].items():
            self._recent[name].extend(values)
        self._first |= state.get("first", {})  # earlier checkpoints have none
        self._warned, self.count = dict(state["warned"]), state["count"]
