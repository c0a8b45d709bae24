"""What a run is made of, in few characters: kept in its checkpoints, and compared on resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.base import processes
from distill.base.errors import UserError
from distill.build.session import Session
from distill.data.base import DatasetInterface, Example
from distill.data.prompts import tokenize_prompts
from distill.data.table import InMemoryDataset
from distill.models.checkpoints.fingerprint import fingerprint

# Digits, signs, other scripts: what tokenizers and their normalisers treat each in their own way.
_PROBE = "What is 12345 + 3.14? \u00c9 \u65e5\u672c x\u00b2\n\tif a != b:"


def find_contents(session: Session) -> dict[str, str]:
    """By the names of `config.changes.CONTENTS`; the same in all processes."""
    return processes.from_first(lambda: _find(session))


def _find(session: Session) -> dict[str, str]:
    config, strategy = session.config, session.config.distillation.generate_strategy
    validation = "none"
    if session.validation is not None:
        max_length = config.evaluation.max_length or strategy.max_length
        validation = f"{_rows(session.validation)}, responses of at most {max_length} tokens"
    return dict(
        student=_model(session.student_folder),
        teacher=_model(session.teacher_folder),
        data=_rows(session.dataset),
        template=_template(session),
        validation=validation,
    )


def _model(folder: Path | None) -> str:
    return "none here" if folder is None else fingerprint(folder)


def _rows(dataset: DatasetInterface) -> str:
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        example = dataset[i]
        row = json.dumps([example.prompt, example.response, example.answer])
        digest.update(row.encode())
    return f"{len(dataset)} rows, {digest.hexdigest()[:12]}"


def _template(session: Session) -> str:
    """Of one prompt's tokens: a template may hold the date, which nothing else would show."""
    template = session.config.data.prompt_template or session.dataset.get_prompt_template()
    probe = InMemoryDataset([Example(prompt=_PROBE, response=None, answer=None, id="probe")])
    try:
        prompts = tokenize_prompts(
            probe,
            session.vocabulary.tokenizer,
            max_prompt_length=2**31,
            system_prompt=session.config.data.system_prompt,
            prompt_template=template,
        )
    except UserError as error:  # a prompt like this may have no tokens: the same on each start
        return str(error)
    return prompts.digest()[:12]
