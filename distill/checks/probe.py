"""Will on-policy distillation help? Asked before a run, of a few held-out prompts.

The student responds as in training, and its responses are cut in half. The teacher goes on from
there. Where it ends up right more often than the student did, it knows a way on from the student's
states, and on-policy data can teach that. How often it is right from its own half-way states is how
often it is right at all: the halves are of its own responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.errors import UserError
from distill.base.files import local_path, make_folder_of, to_json, write_atomically
from distill.base.status import busy
from distill.build.sampler import build_engine, build_sampling_params
from distill.build.session import Session, open_session
from distill.config.parse import parse_config
from distill.config.schema import Config, all_teachers, teacher_key
from distill.evaluation.diagnosis import diagnose
from distill.evaluation.evaluator import Evaluator
from distill.evaluation.grading import wilson_interval
from distill.models.model import Model
from distill.reporting.read import PROBE
from distill.sampling.request import Rollout, RolloutRequest
from distill.sampling.schedule import SHORT_RESPONSE
from distill.step import TrainState

PROMPTS = 64


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
      prompts: those whose answer is known.
      student, teacher: accuracy of their responses, sampled as in training.
      teacher_from_student: the teacher's, when it goes on from half of the student's responses.
      more_low, more_high: 95% interval of teacher_from_student - student, of the same prompts.
      overlap, entropy_p, entropy_q, left, back: of the student's responses; see
        `evaluation.diagnosis`.
    """

    prompts: int
    student: float
    teacher: float
    teacher_from_student: float
    more_low: float
    more_high: float
    overlap: float | None
    entropy_p: float | None
    entropy_q: float | None
    left: float | None
    back: float | None

    @property
    def recovers(self) -> bool:
        """Whether the teacher is right from the student's states where the student is not."""
        return self.more_low > 0

    @property
    def verdict(self) -> str:
        """One sentence."""
        more = self.teacher_from_student - self.student
        found = (
            f"from the student's half-way states the teacher solves {self.teacher_from_student:.0%}"
            f", the student {self.student:.0%} ({100 * more:+.0f} points, 95% interval "
            f"{100 * self.more_low:+.0f} to {100 * self.more_high:+.0f})"
        )
        if self.recovers:
            return f"On-policy distillation should help: {found}."
        if self.teacher <= self.student:
            return f"On-policy distillation should not help: the teacher solves {self.teacher:.0%}."
        return (
            f"On-policy distillation should not help: {found}, and {self.teacher:.0%} from its "
            "own. It does not recover from what the student writes."
        )

    def to_dict(self) -> dict[str, Any]:
        """For probe.json."""
        return dataclasses.asdict(self) | dict(recovers=self.recovers, verdict=self.verdict)

    def table(self) -> str:
        """Accuracies with Wilson intervals, and the numbers per token."""
        rows = {
            "student": self.student,
            "teacher from the student's half-way states": self.teacher_from_student,
            "teacher from its own": self.teacher,
        }
        lines = [f"{f'{self.prompts} held-out prompts':44}accuracy  95% interval"]
        for name, share in rows.items():
            low, high = wilson_interval(round(share * self.prompts), self.prompts)
            lines.append(f"{name:44}{share:<8.1%}  {low:.1%} - {high:.1%}")
        shares = {
            "overlap of the likeliest tokens": self.overlap,
            "tokens that leave the teacher's path": self.left,
            "comes back from there": self.back,
        }
        nats = {"entropy of the teacher": self.entropy_p, "entropy of the student": self.entropy_q}
        lines += [f"{name:44}{x:.1%}" for name, x in shares.items() if x is not None]
        lines += [f"{name:44}{x:.3f} nats" for name, x in nats.items() if x is not None]
        return "\n".join(lines)


def probe_alone(config: ConfigDict, workdir: str | Path | None = None) -> dict[str, Probe]:
    """What the teachers make of the student's half-way states.

    Args:
      workdir: the folder of the run, where its report looks for what was found.

    Raises:
      UserError: a teacher cannot be probed, or the config is wrong.
    """
    config = config.copy_and_resolve_references()
    held_out = config.data.validation.max_samples
    config.data.validation.max_samples = PROMPTS if held_out is None else min(PROMPTS, held_out)
    parsed = parse_config(config)
    check_probe(parsed)
    folder = local_path(workdir) if workdir else None
    if folder:
        processes.from_first(lambda: make_folder_of(folder / PROBE))
    with open_session(parsed, trains=False) as session:
        session.load_teachers()
        found = probe(session, session.load_state(), print)
    if folder and processes.is_first():
        write_probe(found, folder)
    return found


def probe(session: Session, state: TrainState, say: Callable[[str], None]) -> dict[str, Probe]:
    """By teacher, each asked about its prompts, and said; the session's teachers are loaded.

    Raises:
      UserError: a teacher cannot go on from a response, or no answer is known.
    """
    check_probe(session.config)
    student, found = session.evaluated(state), {}
    for number, (name, model) in enumerate(
        zip(session.teachers, session.teachers_at(state), strict=True)
    ):
        assert model is not None  # or `check_probe` has refused it
        evaluator = session.evaluator.of_teacher(number)
        if evaluator.num_graded:
            found[name] = _probe(session, evaluator, student, model)
            heading = f"teacher {name}\n" if name else ""
            say(f"{heading}{found[name].table()}\n{found[name].verdict}")
    if not found:
        raise UserError(
            "the probe compares accuracies, and no held-out prompt has an answer: set "
            "data.answer_column, or data.validation to data that have them"
        )
    return found


def check_probe(config: Config) -> None:
    """UserError where the teacher cannot be probed, before anything is loaded."""
    if not config.distillation.has_teacher:
        raise UserError("the probe asks a teacher, and this config has none")
    if name := config.environment.name:
        raise UserError(
            f"environment.name={name} makes dialogues, and the probe cuts single responses in half"
        )
    if not config.data.validation.max_samples:
        raise UserError("data.validation.max_samples=0 leaves no prompt to probe: raise it")
    for name, teacher in all_teachers(config).items():
        if teacher.scores or teacher.backend != "local":
            section = f"teachers.{name}" if name else "teacher"
            raise UserError(
                f"of the teacher only scores are known ({section}.backend={teacher.backend}, "
                f"{section}.scores={teacher.scores!r}), and the probe lets it go on from the "
                "student's responses: it needs backend=local and scores=''"
            )
        if teacher.alignment != "none":
            raise UserError(
                f"the probe lets the teacher go on from the student's tokens, and "
                f"{teacher_key(name, 'alignment')}={teacher.alignment} has others"
            )


def write_probe(found: dict[str, Probe], workdir: Path) -> None:
    """For the report of the run in `workdir`, which may be still to come."""
    workdir.mkdir(parents=True, exist_ok=True)
    probes = {name: each.to_dict() for name, each in found.items()}
    write_atomically(workdir / PROBE, to_json(probes, indent=1) + "\n")


def _probe(session: Session, evaluator: Evaluator, student: Model, teacher: Model) -> Probe:
    prompts, tokenizer = evaluator.prompts, session.vocabulary.tokenizer
    theirs = prompts.view_tokens or prompts.prompt_tokens
    longest = session.config.distillation.generate_strategy.max_length

    def texts(rollout: Rollout, begun: Sequence[np.ndarray] | None = None) -> list[str]:
        rows = zip(rollout.tokens_br, rollout.lengths_b, strict=True)
        ends = [tokens_r[:length] for tokens_r, length in rows]
        whole = [np.concatenate(pair) for pair in zip(begun, ends, strict=True)] if begun else ends
        return tokenizer.batch_decode([x.tolist() for x in whole], skip_special_tokens=True)

    with busy("responding as the student"):
        rollout = _respond(session, student, prompts.prompt_tokens, longest)
    halves = [
        tokens_r[: length // 2]
        for tokens_r, length in zip(rollout.tokens_br, rollout.lengths_b, strict=True)
    ]
    with busy("responding as the teacher, from the start and half-way"):
        of_teacher = _respond(session, teacher, theirs, longest)
        begun = [np.concatenate(pair) for pair in zip(theirs, halves, strict=True)]
        rest = _respond(session, teacher, begun, longest, [longest - len(half) for half in halves])
    graded = [evaluator.grade(x) for x in (texts(rollout), texts(of_teacher), texts(rest, halves))]
    rights = [np.array([c for c in each if c is not None], float) for each in graded]
    more = rights[2] - rights[0]
    margin = 1.96 * more.std() / np.sqrt(len(more))
    _, values = evaluator.read(student, {"": teacher}, prompts, rollout, reads_tokens=True)
    diagnosis = diagnose(values, rollout, graded[0], session.vocabulary)
    means, departures = diagnosis["means"], diagnosis["departures"]
    student_right, teacher_right, from_student = (float(right.mean()) for right in rights)
    return Probe(
        prompts=len(more),
        student=student_right,
        teacher=teacher_right,
        teacher_from_student=from_student,
        more_low=float(more.mean() - margin),
        more_high=float(more.mean() + margin),
        overlap=means["overlap"],
        entropy_p=means["entropy_p"],
        entropy_q=means["entropy_q"],
        left=departures["tokens"],
        back=departures["back"],
    )


def _respond(
    session: Session,
    model: Model,
    prompts: Sequence[np.ndarray],
    longest: int,
    limits: Sequence[int] | None = None,
) -> Rollout:
    """A response to each prompt, sampled as in training; `limits` are their tokens at most."""
    config = session.config
    # A half of a response stands in its prompt, and the teacher's prompts may be longer.
    width = max(map(len, prompts)) + longest
    policy = dataclasses.replace(config.policy, max_total_sequence_length=width)
    few = longest <= SHORT_RESPONSE
    engine = build_engine(policy, model.graph, session.vocabulary, few_programs=few)
    request = RolloutRequest(
        tuple(prompts),
        np.arange(len(prompts)),
        build_sampling_params(config.distillation.generate_strategy),
        seed=config.seed,
        step=0 if limits is None else 1,
        max_lengths=None if limits is None else np.array(limits, np.int32),
    )
    return engine.generate(model.fetch(), request)[0]
