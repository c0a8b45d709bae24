"""A sweep with XManager: a run for every combination of values, one after another.

    make .venv-launch/.installed
    .venv-launch/bin/python launch/xm_launch.py --config=configs/arithmetic.py \
        --workdir=runs/sweep --sweep=distillation.kl_type=forward,reverse \
        --sweep=distillation.lambda_=0.5,1

What follows after ` -- ` goes to every run as it is. A run's workdir is a folder of --workdir named
after its values. Runs share the devices of this machine, so there is one at a time, a process of
the project's own Python. One that fails ends the sweep; so does Ctrl-C, which saves the run under
way. The same command goes on from there.

On Vertex AI and on Kubernetes (never tried), runs are containers: the executable is then
`xm.container(xm_local.Vertex.Spec(), image_path=IMAGE)`, with an image of launch/Dockerfile, the
executor `xm_local.Vertex(xm.JobRequirements(h100=8))`, or `Kubernetes` for both, and --workdir a
folder that the container mounts. For TPU slices of several hosts, see launch/gke_jobset.yaml.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from xmanager import xm, xm_local

_CONFIG = flags.DEFINE_string("config", None, "As of distill.main.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Holds the workdirs of the runs.", required=True)
_SWEEP = flags.DEFINE_multi_string("sweep", [], "KEY=VALUE,VALUE,...; of several, all pairs.")
_PYTHON = flags.DEFINE_string("python", ".venv/bin/python", "The interpreter of the runs.")


def combinations(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """All choices of one KEY=VALUE from each KEY=VALUE,VALUE,..."""
    choices = []
    for key_and_values in sweep:
        key, equals, values = key_and_values.partition("=")
        if not equals or "" in (key, *values.split(",")):
            raise app.UsageError(f"--sweep={key_and_values}: write --sweep=KEY=VALUE,VALUE,...")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*choices))


def workdir_of(choice: Sequence[str]) -> Path:
    return Path(_WORKDIR.value) / (",".join(choice).replace("/", "_") or "run")


async def launch(choices: Sequence[Sequence[str]], flags_of_all: Sequence[str]) -> None:
    """Runs one choice after the other; raises ExperimentUnitFailedError if a run fails."""
    executor = xm_local.Local()
    command = ["-m", "distill.main", f"--config={_CONFIG.value}", *flags_of_all]
    async with xm_local.create_experiment(experiment_title="distill") as experiment:
        # XManager quotes arguments for a shell, but no shell runs these; it passes no environment.
        packageable = xm.binary(
            executor.Spec(),
            path=_PYTHON.value,
            args=[xm.ShellSafeArg(argument) for argument in command],
            env_vars=dict(os.environ),
        )
        [executable] = experiment.package([packageable])
        for choice in choices:
            arguments = [
                f"--workdir={workdir_of(choice)}",
                *(f"--config.{pair}" for pair in choice),
            ]
            job = xm.Job(executable, executor, args=[xm.ShellSafeArg(a) for a in arguments])
            unit = await experiment.add(job)
            await unit.wait_until_complete()


def main(argv: Sequence[str]) -> None:
    choices = combinations(_SWEEP.value)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # XManager ends the run at exit
    try:
        asyncio.run(launch(choices, argv[1:]))
    except xm.ExperimentUnitFailedError:
        print("error: a run failed, as it says above; the same command goes on", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
