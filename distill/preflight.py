"""Checks before the first step, in seconds: what must agree for the run to mean anything.

python -m distill.preflight --config=configs/math_cl.py

Every check takes the parts that the run is about to use, and looks at a few prompts of its data.
One that fails stops the run with the likely cause and what to do about it;
`--config.preflight=False` skips them all."""

import tempfile
from pathlib import Path

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
        session.load_teachers()
        state = session.load_state()
        session.backend.start()
        return preflight(session, state, print)


def run() -> None:
    config_flag = cli.define_config_flag()

    def main() -> None:
        config = cli.required_config(config_flag)
        cli.join_processes()
        preflight_alone(config)

    cli.run(main)


if __name__ == "__main__":
    run()
