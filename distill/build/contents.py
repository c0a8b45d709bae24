"""What a run is made of, in few characters: kept in its checkpoints, and compared on resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.base import processes
from distill.base.errors import UserError
from distill.build.data import columns_of_teachers
from distill.build.session import Session
from distill.config.schema import all_teachers
from distill.data.base import DatasetInterface, Example
from distill.data.table import InMemoryDataset
from distill.models.checkpoints.fingerprint import fingerprint

_NONE = "none here"
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
            teacher=_teachers(session),
            data=_rows(session.dataset, columns_of_teachers(session.config)),
            template=_template(session),
        )

    return processes.from_first(find)


def _held_out(session: Session) -> str:
    config = session.config
    if session.validation is None:
        return "none"
    max_length = config.evaluation.max_length or config.distillation.generate_strategy.max_length
    rows = _rows(session.validation, columns_of_teachers(config))
    return f"{rows}, responses of at most {max_length} tokens"


def _model(folder: Path | None) -> str:
    return _NONE if folder is None else fingerprint(folder)


def _teachers(session: Session) -> str:
    """Of one teacher, and of several by name."""
    found = {
        name: teacher.model if teacher.in_state else _model(session.teacher_folders.get(name))
        for name, teacher in all_teachers(session.config).items()
    }
    return ", ".join(f"{name}: {each}" if name else each for name, each in found.items()) or _NONE


def _rows(dataset: DatasetInterface, columns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        *values, more = vars(dataset[i]).values()
        row = json.dumps([*values, *(more.get(name) for name in columns)])
        digest.update(row.encode())
    return f"{len(dataset)} rows, {digest.hexdigest()[:12]}"


def _template(session: Session) -> str:
    """Of one prompt's tokens: a template may hold the date, which nothing else would show."""
    rules = (rule for each in all_teachers(session.config).values() for rule in each.prompts)
    columns = [dict([rule.split("=", 1)]) for rule in rules] or [{}]  # every teacher is asked
    probe = _Probe([Example(_PROBE, _PROBE, _PROBE, "probe", columns=each) for each in columns])
    probe.template = session.dataset.get_prompt_template()
    try:
        return session.tokenize(probe, max_prompt_length=2**31).digest()[:12]
    except UserError as error:  # a prompt like this may have no tokens: the same on each start
        return str(error)


class _Probe(InMemoryDataset):
    template: str

    def get_prompt_template(self) -> str:
        return self.template
