"""What a run is made of, in few characters: kept in its checkpoints, and compared on resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.base import processes
from distill.base.errors import UserError
from distill.build.session import Session
from distill.config.schema import own_teacher
from distill.data.base import DatasetInterface, Example
from distill.data.table import InMemoryDataset
from distill.models.checkpoints.fingerprint import fingerprint

# Digits, signs, other scripts: what tokenizers and their normalisers treat each in their own way.
_PROBE = "What is 12345 + 3.14? \u00c9 \u65e5\u672c x\u00b2\n\tif a != b:"


def find_contents(session: Session) -> dict[str, str]:
    """By the names of `config.changes.CONTENTS`; the same in all processes."""
    return find_inputs(session) | processes.from_first(lambda: dict(validation=_held_out(session)))


def find_inputs(session: Session) -> dict[str, str]:
    """All but the held-out prompts."""

    def find() -> dict[str, str]:
        return dict(
            student=_model(session.student_folder),
            teacher=own_teacher(session.config) or _model(session.teacher_folder),
            data=_rows(session.dataset),
            template=_template(session),
        )

    return processes.from_first(find)


def _held_out(session: Session) -> str:
    config = session.config
    if session.validation is None:
        return "none"
    max_length = config.evaluation.max_length or config.distillation.generate_strategy.max_length
    return f"{_rows(session.validation)}, responses of at most {max_length} tokens"


def _model(folder: Path | None) -> str:
    return "none here" if folder is None else fingerprint(folder)


def _rows(dataset: DatasetInterface) -> str:
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        example = dataset[i]
        row = json.dumps(list(vars(example).values()))
        digest.update(row.encode())
    return f"{len(dataset)} rows, {digest.hexdigest()[:12]}"


def _template(session: Session) -> str:
    """Of one prompt's tokens: a template may hold the date, which nothing else would show."""
    probe = _Probe([Example(prompt=_PROBE, response=_PROBE, answer=_PROBE, id="probe")])
    probe.template = session.dataset.get_prompt_template()
    try:
        return session.tokenize(probe, max_prompt_length=2**31).digest()[:12]
    except UserError as error:  # a prompt like this may have no tokens: the same on each start
        return str(error)


class _Probe(InMemoryDataset):
    template: str

    def get_prompt_template(self) -> str:
        return self.template
