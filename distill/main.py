"""Distils a teacher into a student.

python -m distill.main --config=configs/math_cl.py --workdir=runs/math_cl
"""

import sys

from absl import flags

from distill.config import cli
from distill.run.interrupts import Interrupts


def run() -> None:
    config_flag = cli.define_config_flag()
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run; an existing run is continued."
    )
    dry_run = flags.DEFINE_bool(
        "dry_run", False, "Print the resolved config and the plan for these devices, and end."
    )

    def main() -> None:
        config = cli.required_config(config_flag)
        if dry_run.value:
            _dry_run(config)
            return
        if not workdir.value:
            raise cli.UserError("pass --workdir=FOLDER, where checkpoints and results go")
        with Interrupts() as interrupts:
            cli.join_processes()
            # Imported late: a wrong flag should not wait for JAX.
            from distill.trainer import train

            train(config, workdir.value, interrupts)

    cli.run(main)


def _dry_run(config) -> None:
    """Exit status 3, as of `distill.plan`, if the run would not fit."""
    cli.join_processes()
    from distill.plan import DOES_NOT_FIT
    from distill.planning.run import dry_run

    if not dry_run(config).fits:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    run()
