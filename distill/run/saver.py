"""What is kept of a run under way: its evaluations so far, and all that it needs to go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from distill.base import processes
from distill.base.errors import RunStopped, UserError
from distill.base.files import write_atomically
from distill.base.status import busy, say
from distill.batches.source import BatchSource
from distill.config.changes import Changes, check_changes, find_changes, is_same_run
from distill.config.schema import Checkpointing
from distill.evaluation.evaluator import Evaluation, Evaluator
from distill.evaluation.recorder import RolloutRecorder
from distill.models.model import Model
from distill.run.checkpoint import Checkpoints, SaveSchedule
from distill.run.interrupts import Interrupts
from distill.run.progress import Progress
from distill.step import TrainState

BEGINNING = "beginning.json"


@dataclasses.dataclass
class Evaluations:
    """Evaluates models on the held-out prompts, and remembers what came of it.

    Attributes:
      evaluator, recorder: None without held-out prompts; then nothing is evaluated.
      results: evaluations so far, by role.
      evaluated: the last step whose student was evaluated.
    """

    evaluator: Evaluator | None
    recorder: RolloutRecorder | None
    progress: Progress
    interrupts: Interrupts
    results: dict[str, dict[str, Any]]
    evaluated: int

    def evaluate(
        self, role: str, step: int, model: Model, teachers: Sequence[Model | None]
    ) -> None:
        """`teachers` are what the model is compared with; None where one is not on the mesh."""
        if self.evaluator is None or self.recorder is None:
            return
        with busy(f"evaluating the {role}"):
            evaluation, responses = self.evaluator(model, *teachers, reads_tokens=True)
        if self.interrupts.agree():  # of all processes, perhaps: graders that died make it wrong
            return
        self.recorder(role, step, responses)
        self._keep(role, step, evaluation)

    def evaluate_teachers(self, step: int, teachers: Mapping[str, Model | None]) -> None:
        """Those on the mesh that are not evaluated yet, on the prompts they are asked about."""
        for number, (name, model) in enumerate(teachers.items()):
            role = f"teacher/{name}" if name else "teacher"
            if self.evaluator is None or model is None or role in self.results:
                continue
            evaluator = self.evaluator.of_teacher(number)
            if not len(evaluator.prompts):
                continue
            with busy(f"evaluating the {role}"):
                evaluation, _ = evaluator(model, model)
            if not self.interrupts.agree():
                self._keep(role, step, evaluation)

    def _keep(self, role: str, step: int, evaluation: Evaluation) -> None:
        self.results[role], self.evaluated = evaluation.to_dict(), step
        self.progress.evaluation(step, role, self.results[role])

    def scores(self, step: int) -> dict[str, float | None]:
        """What the checkpoint of `step` may be the best by, if it was evaluated."""
        if self.evaluated != step:
            return {}
        return {f"eval/student/{k}": v for k, v in self.results.get("student", {}).items()}


@dataclasses.dataclass(frozen=True)
class Saver:
    """Saves a run with all that it needs to go on.

    Attributes:
      identity: what the run is: config, contents, history; kept with every checkpoint.
    """

    checkpoints: Checkpoints
    schedule: SaveSchedule
    batches: BatchSource
    progress: Progress
    evaluations: Evaluations
    interrupts: Interrupts
    identity: dict[str, Any]

    def is_due(self, step: int) -> bool:
        """Whether `step` is to be saved; the same in all processes."""
        scores = self.evaluations.scores(step)
        if self.schedule.counts(step):
            return True
        if not scores and not self.schedule.has_clock:  # every process knows that by itself
            return False
        return processes.from_first(
            lambda: self.schedule.has_come() or self.checkpoints.is_best(scores)
        )

    def save(self, step: int, state: TrainState, position: Any) -> None:
        """Starts saving; `position` is where the data go on."""
        arrays, measured = self.batches.sequences_ahead(step)
        record = self._record(step, position) | dict(measured_ahead=measured)
        self.checkpoints.save(step, state.saved, record, arrays)
        self.schedule.restart_clock()

    def save_beginning(self, step: int) -> None:
        """Before the first update, keeps the checks and evaluations made so far."""
        if step == 0 and processes.is_first():
            record = self._record(step, self.batches.position)
            write_atomically(self.checkpoints.folder.parent / BEGINNING, json.dumps(record) + "\n")

    def _record(self, step: int, position: Any) -> dict[str, Any]:
        return self.identity | dict(
            step=step,
            iterator=position,
            results=self.evaluations.results,
            evaluated=self.evaluations.evaluated,
            scores=self.evaluations.scores(step),
            log_size=self.progress.log_size(),
            progress=self.progress.state(),
        )

    def save_and_stop(
        self, step: int, state: TrainState, position: Any, reason: UserError | RunStopped
    ) -> NoReturn:
        """Ends the run for a reason, but loses nothing."""
        self.save(step, state, position)
        self.checkpoints.close()
        if self.interrupts.agree():  # the reason may be that servers were signalled too
            raise self.interrupts.stop(how_to_go_on(step)) from reason
        raise type(reason)(f"{reason} ({how_to_go_on(step)})") from reason

    @contextlib.contextmanager
    def saving_on(
        self, *reasons: type[UserError | RunStopped], step: int, state: TrainState
    ) -> Iterator[None]:
        """One of `reasons` that is raised inside ends the run, but loses nothing."""
        position = self.batches.position
        try:
            yield
        except reasons as reason:
            if not step:  # before the first update there is nothing to go on from
                raise
            # What was sampled but not trained on is sampled again.
            self.save_and_stop(step, state, position, reason)


def find_progress(
    checkpoints: Checkpoints, flat_config: dict[str, Any], section: Checkpointing
) -> tuple[int, dict[str, Any], Changes]:
    """Step and record of the checkpoint to go on from, and what the config has changed since.

    (0, {}, {}) for a new run.

    Raises:
      UserError: it is damaged, or belongs to a run with another config.
    """

    def find() -> int | None:
        checkpoints.sweep()
        return checkpoints.latest_intact(section.on_torn)

    step = processes.from_first(find)
    if step is None:
        return 0, {}, {}
    record = checkpoints.record(step)
    if isinstance(ahead := record.get("measured_ahead", {}), dict):  # of an earlier version: one
        record["measured_ahead"] = [ahead] if ahead else []
    changes = find_changes(record["config"], flat_config)
    check_changes(changes, section.allow_changes)
    return step, record, changes


def find_beginning(workdir: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The record of `Saver.save_beginning` if it is of the same run, else {}."""
    path = workdir / BEGINNING

    def find() -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return record if is_same_run(record, identity) else {}
        except (ValueError, LookupError, TypeError, AttributeError):
            say(f"{path} is damaged: what was checked and evaluated is done once more")
            return {}

    return processes.from_first(find)


def how_to_go_on(step: int) -> str:
    return f"step {step} is saved: the same command goes on from it"
