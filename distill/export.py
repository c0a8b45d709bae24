"""Exports the student of a checkpoint; a finished run has exported its last one already.

python -m distill.export --config=configs/math_cl.py --workdir=runs/math_cl --output=best \
    --config.checkpointing.best_metric=eval/student/accuracy
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.files import local_path, make_folder_of
from distill.config import cli
from distill.config.parse import parse_config


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
    from distill.build.export import export_saved  # late: flags come before JAX
    from distill.build.session import open_session
    from distill.models.checkpoints.export import check_replaceable

    workdir, output = (local_path(path) for path in (workdir, output))
    check_replaceable(output)
    processes.from_first(lambda: make_folder_of(output))
    with open_session(parse_config(config), workdir, trains=False) as session:
        return export_saved(session, output, checkpoint)


def run() -> None:
    config_flag = cli.define_config_flag()
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.")
    output = flags.DEFINE_string("output", None, "Folder to write.")
    checkpoint = flags.DEFINE_string("checkpoint", "best", "'best' or a step.")

    def main() -> None:
        config = cli.required_config(config_flag)
        if not workdir.value or not output.value:
            raise cli.UserError("pass --workdir=FOLDER of the run and --output=FOLDER to write")
        cli.join_processes()
        step = export_checkpoint(config, workdir.value, output.value, checkpoint.value)
        print(f"student of step {step}: {output.value}")

    cli.run(main)


if __name__ == "__main__":
    run()
