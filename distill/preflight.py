"""Checks before the first step, in seconds: what must agree for the run to mean anything.

python -m distill.preflight --config=configs/math_cl.py

Every check of preflight_checks.py takes the parts that the run is about to use, and looks at a few
prompts of its data. One that fails stops the run with the likely cause and what to do about it;
`--config.preflight=False` skips them all."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import jax
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.errors import UserError
from distill.build.data import build_dataset, build_prompts, build_vocabulary
from distill.build.devices import build_mesh, build_sampler_mesh
from distill.build.models import build_optimizer, build_state, find_models
from distill.build.objective import build_objective
from distill.build.plugins import import_plugins
from distill.build.sampler import build_backend
from distill.build.scratch import make_missing_models, missing_models, without_pretraining
from distill.build.teachers import build_teacher
from distill.checks.checks import Subject
from distill.checks.run import Finding, preflight
from distill.config import cli
from distill.config.parse import parse_config
from distill.models.model import Model


def preflight_alone(config: ConfigDict) -> list[Finding]:
    """Builds what a new run of `config` would begin with, and checks it.

    Models made from scratch are checked with random weights: nothing is trained.

    Raises:
      UserError: the first problem, of the checks or of the config.
    """
    parsed = without_pretraining(parse_config(config))
    if processes.several() and (missing := missing_models(parsed)):
        raise UserError(
            f"the {missing[0]} would be made from scratch in a temporary folder, which several "
            "processes do not share: name a folder of the model, or check with one process"
        )
    import_plugins(parsed)
    objective, mesh = build_objective(parsed), build_mesh(parsed)
    sampler_mesh = build_sampler_mesh(parsed, mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as cleanup:
        workdir = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        parsed = make_missing_models(parsed, workdir, supervise=None)
        student_folder, teacher_folder = find_models(parsed)
        dataset = build_dataset(parsed)
        vocabulary = build_vocabulary(student_folder, teacher_folder)
        prompts = build_prompts(
            parsed,
            dataset,
            vocabulary.tokenizer,
            needs_responses=parsed.distillation.lambda_ < 1,
        )
        optimizer, _ = build_optimizer(parsed)
        teacher = build_teacher(parsed, teacher_folder, mesh)
        graph, state = build_state(parsed, student_folder, optimizer, mesh)
        folders = dict(student_folder=student_folder, workdir=workdir)
        student = Model(graph, state.params)
        backend = build_backend(parsed, student, vocabulary, mesh, sampler_mesh, **folders)
        cleanup.callback(backend.stop)
        backend.start()
        subject = Subject(
            config=parsed,
            mesh=mesh,
            dataset=dataset,
            prompts=prompts,
            vocabulary=vocabulary,
            teacher_folder=teacher_folder,
            graph=graph,
            state=state,
            teacher=teacher,
            objective=objective,
            backend=backend,
        )
        return preflight(subject, print)


def main() -> None:
    config = cli.required_config(config_flag)
    cli.join_processes()
    preflight_alone(config)


if __name__ == "__main__":
    config_flag = cli.define_config_flag()
    cli.run(main)
