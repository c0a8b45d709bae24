"""Dataset, tokenizer, tokenized prompts, and their order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill.base import processes
from distill.config.schema import Config
from distill.data.base import DatasetInterface, dataset_options, get_dataset
from distill.data.pipeline import make_train_iterator
from distill.data.prompts import Prompts, tokenize_prompts
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


def build_dataset(config: Config) -> DatasetInterface:
    """The data to train on."""
    data = config.data
    return get_dataset(
        data.name,
        data.split,
        seed=config.seed,
        max_samples=data.max_samples,
        path=data.path or None,
        **_source_options(config, data.name),
    )


def build_validation(config: Config) -> DatasetInterface | None:
    """The held-out prompts; None when data.validation.max_samples is 0."""
    data, validation = config.data, config.data.validation
    if validation.max_samples == 0:
        return None
    name = validation.name or data.name
    path = validation.path or (data.path if name == data.name else "")
    return get_dataset(
        name,
        validation.split,
        seed=config.seed,
        max_samples=validation.max_samples,
        path=path or None,
        **_source_options(config, name),
    )


def _source_options(config: Config, name: str) -> dict[str, object]:
    """The keys of `data` that the source has a parameter for."""
    return {key: getattr(config.data, key) for key in dataset_options(name) & _DATA_KEYS}


def build_prompts(
    config: Config, dataset: DatasetInterface, tokenizer, *, needs_responses: bool = False
) -> Prompts:
    """Tokenized prompts that leave room for a response of full length."""
    max_length = config.distillation.generate_strategy.max_length
    return tokenize_prompts(
        dataset,
        tokenizer,
        max_prompt_length=config.policy.max_total_sequence_length - max_length,
        max_response_length=max_length,
        needs_responses=needs_responses,
        system_prompt=config.data.system_prompt,
        prompt_template=config.data.prompt_template,
    )


def check_same_data(prompts: Prompts) -> None:
    """Raises UserError unless all processes have read the same prompts: each holds all of them."""
    if processes.several():
        processes.check_same("data", {"digest of the prompts": prompts.digest()})


def build_iterator(config: Config, prompts: Prompts):
    """Endless iterator over the prompts of every step, the same in all processes."""
    policy, strategy = config.policy, config.distillation.generate_strategy
    return make_train_iterator(
        prompts,
        batch_size=policy.train_global_batch_size // strategy.num_generations,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
