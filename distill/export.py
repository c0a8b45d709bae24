"""Exports the student of a checkpoint; a finished run has exported its last one already.

python -m distill.export --config=configs/math_cl.py --workdir=runs/math_cl --output=best \
    --config.checkpointing.best_metric=eval/student/accuracy
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.errors import UserError
from distill.build.data import build_vocabulary
from distill.build.devices import build_mesh
from distill.build.models import build_optimizer, build_state, find_models
from distill.build.plugins import import_plugins
from distill.build.run import build_checkpoints
from distill.build.scratch import make_missing_models
from distill.config import cli
from distill.config.parse import check_same_run, parse_config, to_flat_dict
from distill.config.schema import BEST_METRICS, RESUMABLE_CHANGES
from distill.models.checkpoints.export import check_replaceable
from distill.reporting.model_card import model_card
from distill.run.checkpoint import Checkpoints, shapes_on_mesh
from distill.run.interrupts import Interrupts
from distill.run.manifest import find_damage
from distill.trainer import export_student, run


def export_checkpoint(
    config: ConfigDict, workdir: str | Path, output: str | Path, checkpoint: str = "best"
) -> int:
    """Writes the student of one checkpoint as a Hugging Face folder; returns its step.

    Args:
      config: of the run.
      workdir: of the run, which may go on meanwhile.
      output: folder to write, replaced if it holds an earlier export.
      checkpoint: 'best' by checkpointing.best_metric, or a step.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or the config is of another run.
    """
    parsed = parse_config(config)
    import_plugins(parsed)
    workdir, output = (Path(path).expanduser().absolute() for path in (workdir, output))
    check_replaceable(output)
    checkpoints = build_checkpoints(parsed, workdir)

    def find() -> int:
        step = _find_step(checkpoints, checkpoint, parsed.checkpointing.best_metric)
        if damage := find_damage(checkpoints.path(step)):
            raise UserError(
                f"the checkpoint {checkpoints.path(step)} is damaged ({damage}): put back a copy "
                "of it, or pass another --checkpoint"
            )
        return step

    step = processes.from_first(find)
    record = checkpoints.record(step)
    check_same_run(record["config"], to_flat_dict(parsed), RESUMABLE_CHANGES)
    mesh = build_mesh(parsed)
    with jax.set_mesh(mesh):
        supervise = functools.partial(run, interrupts=Interrupts())
        # Those that the run made are in its folder.
        student_folder, teacher_folder = find_models(
            make_missing_models(parsed, workdir, supervise)
        )
        vocabulary = build_vocabulary(student_folder, teacher_folder)
        optimizer, _ = build_optimizer(parsed)
        _, state = build_state(parsed, student_folder, optimizer, mesh)
        shapes, state = shapes_on_mesh(state), None
        state = checkpoints.restore(step, shapes)
        card = model_card(record["config"], _results_at(step, record), step)
        export_student(parsed, output, student_folder, state.params, vocabulary, card)
    return step


def _results_at(step: int, record: dict[str, Any]) -> dict[str, Any]:
    """Evaluations that a checkpoint holds, but not that of an earlier student."""
    results = record["results"]
    if record["evaluated"] == step:
        return results
    return {role: result for role, result in results.items() if role != "student"}


def _find_step(checkpoints: Checkpoints, checkpoint: str, best_metric: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(
            f"there is no checkpoint in {checkpoints.folder}: pass the --workdir of a run that has "
            "saved one (distillation.save_steps)"
        )
    if checkpoint == "best":
        if not best_metric:
            raise UserError(
                f"--checkpoint=best needs to know by what: pass --config.checkpointing.best_metric="
                f"{'|'.join(BEST_METRICS)}, or --checkpoint={steps[-1]}"
            )
        step = checkpoints.best()
        if step is None:
            raise UserError(
                f"no checkpoint was made at a step with {best_metric}: pass --checkpoint=STEP, one "
                f"of {', '.join(map(str, steps))}"
            )
        return step
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"--checkpoint={checkpoint} is not there: pass best, or one of {there}")
    return int(checkpoint)


def main() -> None:
    config = cli.required_config(config_flag)
    if not workdir_flag.value or not output_flag.value:
        raise UserError("pass --workdir=FOLDER of the run and --output=FOLDER to write")
    cli.join_processes()
    step = export_checkpoint(config, workdir_flag.value, output_flag.value, checkpoint_flag.value)
    print(f"student of step {step}: {output_flag.value}")


if __name__ == "__main__":
    config_flag = cli.define_config_flag()
    workdir_flag = flags.DEFINE_string("workdir", None, "Folder of the run.")
    output_flag = flags.DEFINE_string("output", None, "Folder to write.")
    checkpoint_flag = flags.DEFINE_string("checkpoint", "best", "'best' or a step.")
    cli.run(main)
