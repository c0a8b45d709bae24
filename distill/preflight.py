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
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.files import local_path
from distill.config import cli
from distill.config.parse import parse_config

if TYPE_CHECKING:
    from distill.checks.probe import Probe


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


def probe_alone(config: ConfigDict, workdir: str | Path | None = None) -> dict[str, Probe]:
    """What the teachers make of the student's half-way states; see checks/probe.py.

    Args:
      workdir: the folder of the run, where its report looks for what was found.

    Raises:
      UserError: a teacher cannot be probed, or the config is wrong.
    """
    from distill.build.session import open_session  # late: flags come before JAX
    from distill.checks.probe import PROMPTS, check_probe, probe, write_probe

    config = config.copy_and_resolve_references()
    held_out = config.data.validation.max_samples
    config.data.validation.max_samples = PROMPTS if held_out is None else min(PROMPTS, held_out)
    parsed = parse_config(config)
    check_probe(parsed)
    with open_session(parsed) as session:
        session.load_teachers()
        found = probe(session, session.load_state(), print)
    if workdir and processes.is_first():
        write_probe(found, local_path(workdir))
    return found


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
            probe_alone(config, workdir.value)
        else:
            preflight_alone(config)

    cli.run(main)


if __name__ == "__main__":
    run()
