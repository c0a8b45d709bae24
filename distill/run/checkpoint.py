"""Saving and restoring everything that a bit-exact resume needs.

A checkpoint is a folder named after its step:

    state/        the train state: sharded arrays, written by Orbax
    record.json   flat config, position in the data, results, what the log has counted
    arrays.npz    responses that were sampled ahead
    SHA256SUMS    of all of these; `sha256sum -c SHA256SUMS` checks them too

It is written as STEP.partial and renamed when it is whole, checksums included: whenever a run is
killed, a folder named after a step was finished. Older ones are removed only after that.

Several processes write into one folder, each its shards of the state; the first does the rest, and
tells the others what it sees there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from distill.base import processes
from distill.base.errors import RunStopped, UserError, first_line
from distill.base.manifest import find_damage, write_manifest
from distill.config.schema import BEST_METRICS

Arrays = dict[str, np.ndarray]

STATE, RECORD, ARRAYS = "state", "record.json", "arrays.npz"
PARTIAL, REMOVED, TORN = ".partial", ".removed", ".torn"
# Bytes of an array from which each of several devices that hold it writes a slice of it: a slice is
# a program for each shape.
_WORTH_SLICING = 2**20


class Checkpoints:
    """The checkpoints of a run; one save at a time goes on beside the loop.

    Of several processes, all call `save`, `restore` and `close`; `sweep`, `latest_intact`, `best`
    and `is_best` look into the folder and are for the first (`processes.from_first`).

    Args:
      folder: holds them; made by the first save.
      keep: newest checkpoints to keep.
      best_metric: keep the best by this number too; see `config.BEST_METRICS`. A checkpoint has it
        if its step was evaluated.
    """

    def __init__(self, folder: Path, *, keep: int, best_metric: str = ""):
        self.folder, self._keep, self._best_metric = folder.absolute(), keep, best_metric
        handler = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=_WORTH_SLICING
        )
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
        those = ocp.options.MultiprocessingOptions(
            active_processes=processes.side(), barrier_sync_key_prefix="distill"
        )
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(
                type_handler_registry=registry, multiprocessing_options=those
            ),
            multiprocessing_options=those,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future] | None = None

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def latest_intact(self, on_torn: str) -> int | None:
        """The newest step whose files are all as they were written; None without checkpoints.

        Args:
          on_torn: 'previous' sets damaged newer ones aside, as STEP.torn; 'stop' does not.

        Raises:
          UserError: the newest is damaged and `on_torn` is 'stop', or all are.
        """
        torn = []
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if not damage:
                break
            torn.append((step, damage))
            if on_torn == "stop":
                break
        else:
            step = None
        if torn and (step is None or on_torn == "stop"):
            newest, damage = torn[0]
            advice = (
                "; nothing was changed: put back a copy of it, or pass "
                "--config.checkpointing.on_torn=previous to go on from the one before"
                if on_torn == "stop"
                else ", and so are all others: pass another --workdir"
            )
            raise UserError(f"the checkpoint {self.path(newest)} is damaged ({damage}){advice}")
        for number, damage in torn:
            aside = _set_aside(self.path(number))
            print(f"WARNING: checkpoint {number} is damaged ({damage}) and set aside as {aside}")
        if torn:
            print(f"WARNING: going on from checkpoint {step}")
        return step

    def damage(self, step: int) -> str:
        """What is wrong with a checkpoint; '' if it is whole, and of this step."""
        if damage := find_damage(self.path(step)):
            return damage
        number = self.record(step).get("step", step)
        return "" if number == step else f"{RECORD} is of step {number}"

    def sweep(self) -> None:
        """Removes what a killed run was writing or removing."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.endswith((PARTIAL, REMOVED)):
                    shutil.rmtree(path)

    def save(
        self, step: int, state: Any, record: dict[str, Any], arrays: Arrays | None = None
    ) -> None:
        """Starts a save; returns when the state may be changed. Nothing if `step` is saved already.

        Raises:
          RunStopped: the save before has failed.
        """
        self._wait()
        if processes.from_first(self.path(step).exists):
            return
        partial = self.folder / f"{step}{PARTIAL}"
        try:
            if processes.is_first():
                partial.mkdir(parents=True)
                (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
                if arrays:
                    # By its types, an array may be called `allow_pickle`: none is.
                    np.savez(partial / ARRAYS, **arrays)  # type: ignore[arg-type]
            processes.sync(f"saving {partial}")
            self._orbax.save(partial / STATE, args=ocp.args.PyTreeSave(state))
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step, self._thread.submit(self._finish, partial)

    def check(self) -> None:
        """Raises RunStopped if a save has failed in the meantime."""
        if self._saving is not None and self._saving[1].done():
            self._wait()

    def record(self, step: int) -> dict[str, Any]:
        return json.loads((self.path(step) / RECORD).read_text())

    def arrays(self, step: int) -> Arrays:
        """As given to `save`; {} for none."""
        path = self.path(step) / ARRAYS
        if not path.exists():
            return {}
        with np.load(path) as arrays:
            return dict(arrays)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """State of `step` in the shapes and shardings of `abstract_state`."""
        places = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        args = ocp.args.PyTreeRestore(abstract_state, restore_args=places)
        return self._orbax.restore(self.path(step) / STATE, args=args)

    def best(self) -> int | None:
        """Step of the best checkpoint by the metric, the first of equals; None without any."""
        marks = self._marks()
        return max(marks, key=lambda step: (marks[step], -step), default=None)

    def is_best(self, scores: dict[str, float | None]) -> bool:
        """Whether a checkpoint with these scores would be better than all that are here."""
        mark = self._mark(scores)
        if mark is None:
            return False
        self._wait()
        return all(mark > other for other in self._marks().values())

    def _marks(self) -> dict[int, float]:
        marks = {step: self._mark(self.record(step)["scores"]) for step in self.steps()}
        return {step: mark for step, mark in marks.items() if mark is not None}

    def _mark(self, scores: dict[str, float | None]) -> float | None:
        """The metric, so that more is better; None where it was not measured, or is no number."""
        score = scores.get(self._best_metric)
        if score is None or not math.isfinite(score):
            return None
        return score if BEST_METRICS[self._best_metric] else -score

    def close(self) -> None:
        """Waits for the save under way; may be called more than once.

        Raises:
          RunStopped: it has failed.
        """
        try:
            self._wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _finish(self, partial: Path) -> None:
        """The part of a save that runs in the thread."""
        self._orbax.wait_until_finished()
        if processes.is_first():
            self._publish(partial)
        # Nobody takes for saved what the first has not finished.
        processes.sync(f"saved {partial}")

    def _publish(self, partial: Path) -> None:
        """Gives a whole checkpoint its name, and removes older ones."""
        write_manifest(partial)
        os.rename(partial, partial.with_suffix(""))
        _sync(self.folder)
        kept = set(self.steps()[-self._keep :])
        if self._best_metric and (best := self.best()) is not None:
            kept.add(best)
        for step in set(self.steps()) - kept:
            removed = self.path(step).with_suffix(REMOVED)
            os.rename(self.path(step), removed)
            shutil.rmtree(removed)

    def _wait(self) -> None:
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: Exception) -> RunStopped:
        # What is there of it may fill the disk that is full.
        if processes.is_first():
            shutil.rmtree(self.folder / f"{step}{PARTIAL}", ignore_errors=True)
        steps = self.steps()
        there = f"checkpoint {steps[-1]} is intact" if steps else "there is no earlier one"
        return RunStopped(
            f"step {step} could not be saved ({first_line(error)}); {there}: make room in "
            f"{self.folder}, and the same command goes on from there"
        )


class SaveSchedule:
    """Which steps are saved; saving alters nothing that is computed, so this may follow a clock.

    Of several processes, the first one's clock goes for all (`processes.from_first`).
    """

    def __init__(self, *, every_steps: int, every_minutes: float, max_steps: int):
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._max_steps, self._saved = max_steps, time.monotonic()
        self.has_clock = every_minutes > 0

    def counts(self, step: int) -> bool:
        """Whether `step` is due by its number."""
        return step >= self._max_steps or (self._every_steps > 0 and step % self._every_steps == 0)

    def has_come(self) -> bool:
        """Whether a save is due by the clock."""
        return self.has_clock and time.monotonic() - self._saved >= self._every_seconds

    def restart_clock(self) -> None:
        """After a save."""
        self._saved = time.monotonic()


def _set_aside(path: Path) -> Path:
    names = itertools.chain([TORN], (f"{TORN}-{number}" for number in itertools.count(2)))
    asides = (path.with_name(path.name + name) for name in names)
    return path.rename(next(aside for aside in asides if not aside.exists()))


def _sync(folder: Path) -> None:
    """Makes a rename in it outlast a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
