"""Checks before the first step, in seconds: what must agree for the run to mean anything.

python -m distill.preflight --config=configs/math_cl.py

Every check of preflight_checks.py takes the parts that the run is about to use, and looks at a few
prompts of its data. One that fails stops the run with the likely cause and what to do about it;
`--config.preflight=False` skips them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from distill import build, cli, processes
from distill.build_teacher import build_teacher
from distill.config import parse_config
from distill.errors import UserError
from distill.evaluate import Model
from distill.preflight_checks import CHECKS, Problem, Subject
from distill.scratch import make_missing_models, missing_models, without_pretraining


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check; `problem` is None if it passed."""

    check: str
    detail: str
    problem: str | None
    seconds: float


def preflight(subject: Subject, say: Callable[[str], None]) -> list[Finding]:
    """Runs all checks and says what they found.

    Raises:
      UserError: the first problem.
    """
    findings = []
    for name, check in CHECKS.items():
        start = time.perf_counter()
        detail, problem = "", None
        try:
            detail = check(subject)
        except Problem as error:
            problem = str(error)
        findings.append(Finding(name, detail, problem, time.perf_counter() - start))
    seconds = sum(finding.seconds for finding in findings)
    for finding in findings:
        say(f"preflight: {finding.check}: {finding.problem or finding.detail}")
    failed = [finding for finding in findings if finding.problem]
    if failed:
        raise UserError(
            f"preflight: {failed[0].check}: {failed[0].problem} "
            "(--config.preflight=False skips the checks)"
        )
    say(f"preflight: {len(findings)} checks passed in {seconds:.1f} s")
    return findings


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
    build.import_plugins(parsed)
    objective, mesh = build.build_objective(parsed), build.build_mesh(parsed)
    sampler_mesh = build.build_sampler_mesh(parsed, mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as cleanup:
        workdir = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        parsed = make_missing_models(parsed, workdir, supervise=None)
        student_folder, teacher_folder = build.find_models(parsed)
        dataset = build.build_dataset(parsed)
        vocabulary = build.build_vocabulary(student_folder, teacher_folder)
        prompts = build.build_prompts(
            parsed,
            dataset,
            vocabulary.tokenizer,
            needs_responses=parsed.distillation.lambda_ < 1,
        )
        optimizer, _ = build.build_optimizer(parsed)
        teacher = build_teacher(parsed, teacher_folder, mesh)
        graph, state = build.build_state(parsed, student_folder, optimizer, mesh)
        folders = dict(student_folder=student_folder, workdir=workdir)
        student = Model(graph, state.params)
        backend = build.build_backend(parsed, student, vocabulary, mesh, sampler_mesh, **folders)
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
