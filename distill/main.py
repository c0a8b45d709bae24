"""Distils a teacher into a student.

python -m distill.main --config=configs/math_cl.py --workdir=runs/math_cl
"""

from absl import flags

from distill import cli
from distill.interrupts import Interrupts

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an existing run is continued.")


def main() -> None:
    config = cli.required_config(_CONFIG)
    if not _WORKDIR.value:
        raise cli.UserError("pass --workdir=FOLDER, where checkpoints and results go")
    with Interrupts() as interrupts:
        cli.join_processes()
        # Imported late: a wrong flag should not wait for JAX.
        from distill.trainer import train

        train(config, _WORKDIR.value, interrupts)


if __name__ == "__main__":
    cli.run(main)
