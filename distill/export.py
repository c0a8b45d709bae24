"""Exports the student of a checkpoint; a finished run has exported its last one already.

python -m distill.export --config=configs/math_cl.py --workdir=runs/math_cl --output=best \
    --config.checkpointing.best_metric=eval/student/accuracy
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from distill import build, cli, processes
from distill.checkpoint import Checkpoints, check_same_run, shapes_on_mesh
from distill.config import RESUMABLE_CHANGES, parse_config, to_flat_dict
from distill.errors import UserError
from distill.interrupts import Interrupts
from distill.manifest import find_damage
from distill.scratch import make_missing_models
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
    build.import_plugins(parsed)
    workdir, output = (Path(path).expanduser().absolute() for path in (workdir, output))
    checkpoints = build.build_checkpoints(parsed, workdir)

    def find() -> int:
        step = _find_step(checkpoints, checkpoint, parsed.checkpointing.best_metric)
        if damage := find_damage(checkpoints.path(step)):
            raise UserError(f"the checkpoint {checkpoints.path(step)} is damaged ({damage})")
        return step

    step = processes.from_first(find)
    saved = checkpoints.record(step)["config"]
    check_same_run(saved, to_flat_dict(parsed), RESUMABLE_CHANGES)
    mesh = build.build_mesh(parsed)
    with jax.set_mesh(mesh):
        supervise = functools.partial(run, interrupts=Interrupts())
        # Those that the run made are in its folder.
        student_folder, teacher_folder = build.find_models(
            make_missing_models(parsed, workdir, supervise)
        )
        vocabulary = build.build_vocabulary(student_folder, teacher_folder)
        optimizer, _ = build.build_optimizer(parsed)
        _, state = build.build_state(parsed, student_folder, optimizer, mesh)
        shapes, state = shapes_on_mesh(state), None
        state = checkpoints.restore(step, shapes)
        export_student(parsed, output, student_folder, state.params, vocabulary)
    return step


def _find_step(checkpoints: Checkpoints, checkpoint: str, best_metric: str) -> int:
    steps = checkpoints.steps()
    if checkpoint == "best":
        if not best_metric:
            raise UserError("pass --config.checkpointing.best_metric=... to say what is best")
        step = checkpoints.best()
        if step is None:
            raise UserError(f"no checkpoint was made at a step with {best_metric}")
        return step
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"--checkpoint={checkpoint} is not there: best, or one of {there}")
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
