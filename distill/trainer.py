"""The training run, from the config to the exported student, in the order in which it happens.

`train(config, workdir)` is everything that `python -m distill.main` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.errors import RunStopped, UserError, printable
from distill.base.files import local_path, to_json, write_atomically
from distill.base.status import busy, say
from distill.build.data import check_same_data
from distill.build.export import check_export, export_student
from distill.build.run import (
    build_batches,
    build_checkpoints,
    build_progress,
    build_save_schedule,
    check_loggers,
    describe_run,
    identify_run,
    open_loggers,
)
from distill.build.session import Session, open_session
from distill.checks.run import preflight
from distill.config.parse import digest, parse_config, to_flat_dict
from distill.config.schema import ema_decay
from distill.evaluation.table import format_table
from distill.losses.metrics import get_step_metric
from distill.reporting.facts import environment, write_facts
from distill.reporting.model_card import model_card
from distill.reporting.page import REPORT, write_report
from distill.run.interrupts import Interrupts
from distill.run.saver import (
    Evaluations,
    Saver,
    find_progress,
    how_to_go_on,
)
from distill.run.workdir import claim_workdir
from distill.step import TrainState, make_train_step

Results = dict[str, dict[str, Any]]  # evaluation fields by role
History = list[dict[str, Any]]  # what was changed, and at which step


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run produced: evaluations as in results.json, the folder of the exported student, and
    the updates made in all."""

    results: Results
    student: Path
    steps: int


def train(config: ConfigDict, workdir: str | Path, interrupts: Interrupts | None = None) -> Result:
    """Distils as `config` says, continuing the run in `workdir` if there is one.

    `config` is `distill.config.default_config()`, edited. Without `interrupts` nobody handles
    signals, and KeyboardInterrupt ends the run with what its last checkpoint has.

    Raises:
      UserError: whatever the user can fix, in one line.
      RunStopped: the run cannot go on soundly, in one line.
      RunInterrupted: `interrupts` was signalled, and everything is saved.
    """
    parsed = parse_config(config)
    processes.check_same("config", to_flat_dict(parsed))
    interrupts, folder = interrupts or Interrupts(), local_path(workdir).resolve()
    with open_session(parsed, folder, before_serving=interrupts.hold) as session:
        return _export(session, *_run(session, interrupts))


def _run(session: Session, interrupts: Interrupts) -> tuple[int, TrainState, Results, History]:
    """All updates and evaluations: (updates made, state, evaluations by role, history)."""
    config, workdir, flat_config = session.config, session.workdir, to_flat_dict(session.config)
    check_loggers(config.logger)
    _ = session.objective, session.sampler_mesh  # refused before anything is made

    # ------------------------------------------------------------------------- where the run stands
    session.cleanup.enter_context(claim_workdir(workdir))
    checkpoints = build_checkpoints(config, workdir)
    session.cleanup.callback(checkpoints.close)
    step, record, changes = find_progress(checkpoints, flat_config, config.checkpointing)
    updates_remain = step < config.distillation.max_steps

    # ----------------------------------------------------------------------------------------- data
    _, validation = session.dataset, session.validation  # before a model is looked for
    with busy("tokenizing the data"):
        prompts = session.prompts
    check_same_data(prompts)
    _ = session.reward, session.weighing
    identity, record, changes = identify_run(session, step, record, changes)
    evaluator = recorder = None
    if validation is not None:
        evaluator, recorder = session.evaluator, session.build_recorder()
    for line in describe_run(session, step):
        say(line)
    loggers = open_loggers(session, step, identity["run_id"])

    # --------------------------------------------------------------------------------------- models
    _ = session.student, session.state_shapes
    check_export(session)
    teachers = session.load_teachers(compares=not record, in_run=True)  # once per run
    if updates_remain:
        # Servers that will not do are told before anything takes time.
        for teacher in teachers.values():
            teacher.start()
        session.backend.start()
    state = session.restore_state(checkpoints, step) if step else session.load_state()
    checked = digest([flat_config, identity["contents"], environment()])
    if config.preflight and updates_remain and record.get("checked") != checked:
        preflight(session, state, print)
        identity["checked"] = checked
    train_step = build_step(session)

    # ------------------------------------------------------------------------- batches, log, saving
    batches = build_batches(session, record.get("iterator"))
    if step:
        batches.take_up(step, checkpoints.arrays(step), record["measured_ahead"])
    progress = build_progress(session, step, record, loggers)
    if processes.is_first():
        write_facts(workdir, flat_config)
    progress.say(f"data: {prompts.summary()}")
    for name, teacher in teachers.items():
        progress.teacher(step, name, teacher.measured())
    if evaluator is not None:
        progress.say(f"validation data: {evaluator.summary()}")
    if changes:
        progress.changed(step, changes)
    so_far = record.get("results", {}), record.get("evaluated", 0)
    evaluations = Evaluations(evaluator, recorder, progress, interrupts, *so_far)
    saves = build_save_schedule(config)
    saver = Saver(checkpoints, saves, batches, progress, evaluations, interrupts, identity)

    saver.save_beginning(step)
    if step == 0 and "base" not in evaluations.results:
        evaluations.evaluate("base", step, session.evaluated(state), session.teachers_at(state))
        saver.save_beginning(step)
    evaluations.evaluate_teachers(
        step, {name: each.lasting(state) for name, each in teachers.items()}
    )
    saver.save_beginning(step)
    step, state, stopping = _loop(session, saver, train_step, step, state)
    progress.close()
    checkpoints.close()
    interrupts.release()
    if stopping:
        raise interrupts.stop(how_to_go_on(step))
    session.backend.stop()
    if progress.all_skipped:
        raise RunStopped(progress.all_skipped)
    return step, state, evaluations.results, identity["history"]


def build_step(session: Session) -> Callable:
    """The update of a run, of its state, its teachers' weights and a batch."""
    config = session.config
    return make_train_step(
        session.student.graph,
        session.teachers_in_step(),
        session.objective,
        session.optimizer,
        vocab_size=session.vocabulary.size,
        metrics={name: get_step_metric(name) for name in config.logger.step_metrics},
        state_shardings=jax.tree.map(lambda x: x.sharding, session.state_shapes),
        ema_decay=ema_decay(config),
        router_aux_loss=config.policy.router_aux_loss,
    )


def _loop(
    session: Session, saver: Saver, train_step: Callable, step: int, state: TrainState
) -> tuple[int, TrainState, bool]:
    """Updates, evaluations and saves from `step` on; and whether a signal ended them."""
    distillation = session.config.distillation
    max_steps, eval_steps = distillation.max_steps, distillation.eval_steps
    batches, progress, interrupts = saver.batches, saver.progress, saver.interrupts
    while True:
        evaluating = step >= max_steps or (eval_steps > 0 and step % eval_steps == 0)
        # One that a signal prevented or spoilt is made up for when the run goes on.
        if evaluating and saver.evaluations.evaluated < step and not interrupts.agree():
            with saver.saving_on(RunStopped, step=step, state=state):
                student, teachers = session.evaluated(state), session.teachers_at(state)
                saver.evaluations.evaluate("student", step, student, teachers)
        stopping = bool(interrupts.agree_by_first())
        if stopping or (step and saver.is_due(step)):
            saver.save(step, state, batches.position)
        if stopping or step >= max_steps:
            return step, state, stopping
        progress.begin_step(step, state)
        with saver.saving_on(RunStopped, UserError, step=step, state=state):
            with progress.phase("generate") as finish:
                batch, measured = finish(batches.next(step, state.params))
        with progress.phase("train") as finish:
            state, metrics = train_step(state, session.weights_in_step(), batch)
            finish(metrics)
        step += 1
        interrupts.hold()
        progress.end_step(step, metrics, measured, batches.rows)
        saver.checkpoints.check()
        if reason := progress.too_many_skipped:
            saver.save_and_stop(step, state, batches.position, RunStopped(reason))


def _export(
    session: Session, step: int, state: TrainState, results: Results, history: History
) -> Result:
    """The student as a Hugging Face folder, the results and the report."""
    folder = session.workdir / "student"
    card = model_card(to_flat_dict(session.config), results, step, history)
    with busy("exporting the student"):
        export_student(session, folder, state, card)
    if results:
        print(format_table(results))
    print(f"student: {folder}", flush=True)
    if processes.is_first():
        _write_results(session.workdir, results)
    return Result(results, folder, step)


def _write_results(workdir: Path, results: Results) -> None:
    """`results.json` and the report, without which a run is finished all the same."""
    if results:
        write_atomically(workdir / "results.json", to_json(results, indent=2) + "\n")
    try:
        write_report([workdir], workdir / REPORT)
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        print(f"no report ({reason}): python -m distill.report {workdir}", flush=True)
    else:
        print(f"report: {workdir / REPORT}", flush=True)
