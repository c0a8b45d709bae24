"""Follows a run: metrics one step late, phases of a logged step, what is said meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from distill.base.compilation import compiled
from distill.base.errors import RunStopped
from distill.base.status import busy, how_far, reminding, say, shows_bars, so_far
from distill.run.health import Health
from distill.run.writers import MetricsWriter


class _Step(NamedTuple):
    """An update that was dispatched and not yet reported; see `Progress.end_step`."""

    number: int
    metrics: dict[str, jax.Array]
    measured: dict[str, float]
    rows: np.ndarray


class Progress:
    """Follows the run: one step late on the console bar, every `logging_steps` in the writer.

    Metrics of a step are fetched when the next step has been dispatched, so the device never waits
    for the host, except at logged steps: those are measured phase by phase.

    Args:
      writer: where logged steps go; closed with the progress.
      schedule: learning rate of an update count.
      first_step: updates made before.
      max_log_prob_gap: mean |nats| by which sampler and trainer may disagree.
      names: of the examples in a batch, from their rows in the dataset.
      show_bar: whether to draw the bar; where there is no terminal, a line per logged step.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        schedule: Callable[[int], Any],
        *,
        first_step: int,
        max_steps: int,
        logging_steps: int,
        max_log_prob_gap: float,
        max_skipped_steps: int,
        health: Health,
        names: Callable[[np.ndarray], list[str]],
        show_bar: bool,
    ):
        self._writer, self._schedule = writer, schedule
        self._logging_steps, self._max_gap = logging_steps, max_log_prob_gap
        self._max_skipped, self._health, self._names = max_skipped_steps, health, names
        self._skipped, self._skipped_in_a_row = 0, 0
        draws = show_bar and shows_bars()
        self._prints_steps = show_bar and not draws
        self._bar = tqdm(
            total=max_steps, initial=first_step, unit="step", disable=not draws, mininterval=1
        )
        self._first_step, self._max_steps = first_step, max_steps
        self._compiling, self._reminding = ExitStack(), ExitStack()
        self._step, self._doing, self._doing_since, self._loop_began = first_step, "", 0.0, 0.0
        self._pending: _Step | None = None
        self._measuring, self._begun = False, 0.0
        self._seconds: dict[str, float] = {}
        self._tokens, self._since = 0.0, time.perf_counter()

    def begin_step(self, step: int, state: Any) -> None:
        """Before update `step` (from 0) is dispatched on `state`."""
        self._step = step + 1
        if step == self._first_step:
            self._loop_began = time.monotonic()
            if self._prints_steps:
                self._reminding.enter_context(reminding(self._describe))
            self._compiling.enter_context(busy("compiling, with the first step"))
        self._measuring = (step + 1) % self._logging_steps == 0
        if self._measuring:
            self._seconds = {}
            jax.block_until_ready(state)
            self._begun = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[Any], Any]]:
        """Times a phase of a logged step; yields a function that waits for the phase's arrays."""
        start = time.perf_counter()
        self._doing, self._doing_since = name, time.monotonic()
        how_far("")
        yield jax.block_until_ready if self._measuring else lambda arrays: arrays
        if self._measuring:
            self._seconds[f"seconds/{name}"] = time.perf_counter() - start

    def end_step(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        measured: dict[str, float],
        rows: np.ndarray,
    ) -> None:
        """After update `step` (from 1) was dispatched; reports the update before, or itself.

        Args:
          step: updates made.
          metrics: of the update, on the device.
          measured: of its batch, as from `BatchSource.next`.
          rows: of the dataset, in its batch.
        """
        self._compiling.close()
        if step == self._first_step + 1 and (counts := compiled()):
            programs, seconds = counts.values()
            self.say(f"compiled so far: {programs} programs, {seconds:.1f} s")
        self.flush()
        self._pending = _Step(step, metrics, measured, rows)
        if self._measuring:
            self._seconds["seconds/step"] = time.perf_counter() - self._begun
            self.flush()

    def flush(self) -> None:
        """Reports the pending update.

        Raises:
          RunStopped: sampler and trainer disagree; the gap of a batch of staleness above 0 needs
            only be finite, since the weights differ rightly.
        """
        if self._pending is None:
            return
        (step, metrics, measured, rows), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["skipped"]:
            self._skip(step, values, rows)
        else:
            self._skipped_in_a_row = 0
            fresh = measured["generation/staleness"] == 0
            self._check(step, values["log_prob_gap"], is_fresh=fresh)
            for line in self._health.check(step, {**values, **measured}):
                self.say(line)
        self._tokens += values["tokens"]
        self._bar.set_postfix(
            {"loss": f"{values['loss']:.4f}", "tokens/s": f"{self._rate():.0f}"}, refresh=False
        )
        self._bar.update(step - self._bar.n)
        if step % self._logging_steps == 0:
            self._write(step, values, measured)

    @property
    def too_many_skipped(self) -> str:
        """Why the run should stop, '' if it may go on."""
        count = self._skipped_in_a_row
        return "" if count <= self._max_skipped else self._not_finite(f"{count} steps in a row")

    @property
    def all_skipped(self) -> str:
        """Why a run that has come to its end has not succeeded, '' if it has."""
        if self._skipped < self._step:
            return ""
        return f"{self._not_finite('all steps')}; the student is as it was"

    def _not_finite(self, which: str) -> str:
        return (
            f"{which} had a loss or gradient that is not finite and were skipped "
            f"(distillation.max_skipped_steps={self._max_skipped}): their examples stand in "
            "metrics.jsonl; try a new workdir with a lower policy.optimizer.learning_rate or "
            "policy.precision=float32"
        )

    def state(self) -> dict[str, Any]:
        """What has been counted so far, as JSON, for `restore`."""
        return {
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "health": self._health.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._health.restore(state["health"])

    def log_size(self) -> int:
        """Bytes of metrics.jsonl with everything reported."""
        self.flush()
        return self._writer.size()

    def evaluation(self, step: int, role: str, result: dict[str, Any]) -> None:
        self.flush()
        numbers = {name: value for name, value in result.items() if value is not None}
        self._writer.write(step, {f"eval/{role}/{name}": value for name, value in numbers.items()})
        shown = ", ".join(
            f"{name} {value:.4f}"
            for name, value in numbers.items()
            if name in ("accuracy", "forward_kl", "reverse_kl") or "/" in name
        )
        self.say(f"step {step} {role}: {shown}")
        # Time spent evaluating is not training time.
        self._tokens, self._since = 0.0, time.perf_counter()

    def teacher(self, step: int, name: str, measured: dict[str, float]) -> None:
        """What was measured of a teacher, once; nothing, if it was not."""
        for key, value in measured.items():
            self._writer.write(step, {f"teacher/{name}/{key}" if name else f"teacher/{key}": value})
        if kl := measured.get("quantization_kl"):
            which = f"teacher {name}".strip()
            self.say(f"{which}: in 8 bits, KL to itself in bfloat16 is {kl:.2e} nats per token")

    def changed(self, step: int, changes: dict[str, list[Any]]) -> None:
        """Says what is not as it was in the run's checkpoint, of `step`."""
        self._writer.note(step, {"changes": changes})
        for key, (before, now) in changes.items():
            self.say(f"changed at step {step}: {key} from {before!r} to {now!r}")

    def say(self, line: str) -> None:
        say(line)

    def _describe(self) -> str:
        step = f"step {self._step} of {self._max_steps}"
        return so_far(f"{step}: {self._doing}", time.monotonic() - self._doing_since)

    def close(self) -> None:
        self._reminding.close()
        self.flush()
        self._bar.close()
        self._writer.close()

    def abandon(self) -> None:
        """Closes the log of a run that fails, or has ended: what is pending is not reported."""
        self._compiling.close()
        self._reminding.close()
        self._bar.close()
        with suppress(Exception):  # the disk may be full; the run's own error is the one to show
            self._writer.close()

    def _time_left(self, step: int) -> str:
        """At the pace so far, evaluations and saves included."""
        elapsed, made = time.monotonic() - self._loop_began, step - self._first_step
        return tqdm.format_interval(elapsed / made * (self._max_steps - step))

    def _rate(self) -> float:
        return self._tokens / (time.perf_counter() - self._since)

    def _write(self, step: int, values: dict[str, float], measured: dict[str, float]) -> None:
        seconds = self._seconds
        rates = {
            "tokens_per_second/total": self._rate(),
            "tokens_per_second/train": values["tokens"] / seconds["seconds/train"],
        }
        if "generation/seconds" in measured:
            share = measured["generation/seconds"] / seconds["seconds/step"]
            rates["generation/share_of_step"] = share
        skipped_before = self._skipped - int(values["skipped"])
        counts = {
            # The optimizer has not seen what was skipped.
            "learning_rate": float(self._schedule(step - 1 - skipped_before)),
            "skipped": self._skipped,
            "warnings": self._health.take_count(),
        }
        self._writer.write(step, {**values, **measured, **seconds, **rates, **counts, **compiled()})
        if self._prints_steps:
            self.say(
                f"{time.strftime('%H:%M:%S')} step {step} of {self._max_steps}: loss "
                f"{values['loss']:.4f}, learning rate {counts['learning_rate']:.2e}, "
                f"{self._rate():.0f} tokens/s, {self._time_left(step)} left"
            )
        self._tokens, self._since = 0.0, time.perf_counter()

    def _skip(self, step: int, values: dict[str, float], rows: np.ndarray) -> None:
        self._skipped += 1
        self._skipped_in_a_row += 1
        names = self._names(rows)
        self._writer.note(step, {"skipped_examples": names})
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
        self.say(
            f"WARNING: step {step} is skipped: loss {values['loss']:.4g}, gradient norm "
            f"{values['grad_norm']:.4g}; examples {shown}"
        )

    def _check(self, step: int, gap: float, *, is_fresh: bool) -> None:
        if not math.isfinite(gap) or (is_fresh and gap > self._max_gap):
            raise RunStopped(
                f"step {step}: sampler and trainer disagree by {gap:.3f} nats per token on the "
                f"same tokens (policy.generation.max_log_prob_gap={self._max_gap}): the sampler's "
                "weights are stale, or its precision or template differs from the trainer's"
            )
