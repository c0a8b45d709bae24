"""Checks before the first step, in seconds: what must agree for the run to mean anything.

python -m distill.preflight --config=configs/math_cl.py
python -m distill.preflight --config=configs/math_cl.py --probe --workdir=runs/math_cl

Every check takes the parts that the run is about to use, and looks at a few prompts of its data.
One that fails stops the run with the likely cause and what to do about it;
`--config.preflight=False` skips them all.

With --probe, the teacher goes on from the student's half-way states instead, to say whether
on-policy distillation will help. With --workdir, the report of the run there shows it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from distill.config import cli
from distill.config.parse import parse_config


def preflight_alone(config: ConfigDict) -> dict[str, str]:
    """Builds what a new run of `config` would begin with; returns what each check found.

    Raises:
      UserError: the first problem, of the checks or of the config.
    """
    from distill.build.session import open_session  # late: flags come before JAX
    from distill.checks.run import preflight

    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(parse_config(config), Path(folder)) as session,
    ):
        session.load_teachers(in_run=True)
        state = session.load_state()
        session.backend.start()
        return preflight(session, state, print)


def run() -> None:
    config_flag = cli.define_config_flag()
    probe = flags.DEFINE_bool("probe", False, "Predict whether on-policy distillation will help.")
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run, which gets what --probe finds."
    )

    def main() -> None:
        config = cli.required_config(config_flag)
        if workdir.value and not probe.value:
            raise cli.UserError("--workdir is where --probe writes: pass --probe, or leave it out")
        cli.join_processes()
        if probe.value:
            from distill.checks.probe import probe_alone  # late: flags come before JAX

            probe_alone(config, workdir.value)
        else:
            preflight_alone(config)

    cli.run(main)


if __name__ == "__main__":
    run()
