"""Dataset, tokenizer, tokenized prompts, and their order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill.base import processes
from distill.config.schema import Data
from distill.data.base import DatasetInterface, dataset_options, get_dataset
from distill.data.prompts import Prompts
from distill.data.tokenizer import check_same_vocabulary, end_ids, load_tokenizer, vocabulary_size

# Keys of the config's data section that a source may take.
_DATA_KEYS = {
    "holdout_fraction",
    "max_bad_rows",
    "subset",
    "prompt_column",
    "response_column",
    "answer_column",
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that student and teacher share.

    Attributes:
      tokenizer: the student's.
      size: ids in use; output heads may be padded beyond it.
      end_ids: ids that end an answer.
    """

    tokenizer: object
    size: int
    end_ids: tuple[int, ...]


def build_vocabulary(student_folder: Path, teacher_folder: Path | None) -> Vocabulary:
    """The student's tokenizer; the ids at which either model ends an answer.

    A base model and an instruction-tuned one of one family end their answers differently: what
    the student learns from the teacher must end its answers too.
    """
    tokenizer = load_tokenizer(student_folder)
    ends = set(end_ids(tokenizer, student_folder))
    if teacher_folder is not None:
        teacher_tokenizer = load_tokenizer(teacher_folder)
        check_same_vocabulary(tokenizer, teacher_tokenizer)
        ends.update(end_ids(teacher_tokenizer, teacher_folder))
    return Vocabulary(tokenizer, vocabulary_size(tokenizer), tuple(sorted(ends)))


def build_dataset(data: Data, seed: int) -> DatasetInterface:
    """The data to train on."""
    return get_dataset(
        data.name,
        data.split,
        seed=seed,
        max_samples=data.max_samples,
        path=data.path or None,
        **_source_options(data, data.name),
    )


def build_validation(data: Data, seed: int) -> DatasetInterface | None:
    """The held-out prompts; None when data.validation.max_samples is 0."""
    validation = data.validation
    if validation.max_samples == 0:
        return None
    name = validation.name or data.name
    path = validation.path or (data.path if name == data.name else "")
    return get_dataset(
        name,
        validation.split,
        seed=seed,
        max_samples=validation.max_samples,
        path=path or None,
        **_source_options(data, name),
    )


def _source_options(data: Data, name: str) -> dict[str, object]:
    """The keys of `data` that the source has a parameter for."""
    return {key: getattr(data, key) for key in dataset_options(name) & _DATA_KEYS}


def check_same_data(prompts: Prompts) -> None:
    """Raises UserError unless all processes have read the same prompts: each holds all of them."""
    if processes.several():
        processes.check_same("data", {"digest of the prompts": prompts.digest()})
