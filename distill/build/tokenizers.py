"""The vocabulary of a run, and what those of teachers have in common with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.config.schema import Config, all_teachers
from distill.data.tokenizer import Vocabulary, shared_vocabulary
from distill.models.checkpoints.hub import tokenizer_folder
from distill.models.checkpoints.source import load_model_config
from distill.teachers.alignment import Alignment


def build_vocabulary(
    config: Config, student_folder: Path, teacher_folders: Mapping[str, Path]
) -> Vocabulary:
    """The student's, which teachers share that are not aligned by bytes.

    Raises:
      UserError: a teacher has another tokenizer.
    """
    teachers = all_teachers(config)
    found = teacher_folders.items()
    alike = [folder for name, folder in found if teachers[name].alignment == "none"]
    folders = list(dict.fromkeys([student_folder, *alike]))
    # Before any complaint about tokenizers: a model that is not supported is refused as that.
    local = {teacher_folders.get(n) for n, t in teachers.items() if t.backend == "local"}
    rows = {
        folder: load_model_config(folder)[0].vocab_size
        for folder in folders
        if folder in (student_folder, *local)
    }
    template = config.data.chat_template
    vocabulary = shared_vocabulary(*map(tokenizer_folder, folders), chat_template=template)
    for folder, number in rows.items():
        vocabulary = vocabulary.within(number, folder)
    return vocabulary


def build_alignments(
    config: Config,
    vocabulary: Vocabulary,
    student_folder: Path,
    teacher_folders: Mapping[str, Path],
) -> dict[str, Alignment]:
    """Of the teachers with another tokenizer, by name."""
    made = {}
    for name, teacher in all_teachers(config).items():
        if teacher.alignment == "none":
            continue
        folder = teacher_folders[name]
        rows = load_model_config(folder)[0].vocab_size
        own = shared_vocabulary(tokenizer_folder(folder)).within(rows, folder)
        folders = student_folder, folder
        made[name] = Alignment(vocabulary, own, folders, teacher.alignment == "spans")
    return made
