"""The sources of examples: what is trained on, and the held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distill.base import processes
from distill.base.errors import UserError
from distill.base.registry import own_values
from distill.config.schema import Config, Data, Teacher
from distill.data.base import (
    PASSED,
    DatasetInterface,
    dataset_options,
    get_dataset,
    get_factory,
)
from distill.data.prompts import Prompts, TeacherPrompt

# Keys of the config's data section that a source may take.
_DATA_KEYS = {
    "holdout_fraction",
    "max_bad_rows",
    "subset",
    "prompt_column",
    "response_column",
    "answer_column",
}


def build_dataset(
    data: Data, seed: int, plugin: Mapping[str, Any] | None = None
) -> DatasetInterface:
    """The data to train on; less what is held out, where nothing else is evaluated on."""
    separate = data.validation.max_samples == 0 or _validates_elsewhere(data)
    holdout_fraction = 0.0 if separate else data.holdout_fraction
    return get_dataset(
        data.name,
        data.split,
        seed=seed,
        max_samples=data.max_samples,
        path=data.path or None,
        **_source_options(data, data.name, plugin, holdout_fraction),
    )


def build_validation(
    data: Data, seed: int, plugin: Mapping[str, Any] | None = None
) -> DatasetInterface | None:
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
        # What is given for validation is for nothing else.
        **_source_options(
            data, name, plugin, 1.0 if _validates_elsewhere(data) else data.holdout_fraction
        ),
    )


def _validates_elsewhere(data: Data) -> bool:
    """Whether the held-out prompts are no part of what `data.path` holds for training."""
    validation = data.validation
    return (validation.name or data.name, validation.path or data.path) != (
        data.name,
        data.path,
    ) or validation.split != "validation"


def _source_options(
    data: Data, name: str, plugin: Mapping[str, Any] | None, holdout_fraction: float
) -> dict[str, Any]:
    """The keys of `data` that the source has a parameter for, and those of a plugin's source."""
    values = {key: getattr(data, key) for key in _DATA_KEYS}
    values["holdout_fraction"] = holdout_fraction
    options = {key: values[key] for key in dataset_options(name) & _DATA_KEYS}
    return own_values(get_factory(name), PASSED, plugin or {}) | options


def teacher_prompt(config: Config) -> TeacherPrompt | None:
    """How the teacher's prompts differ from the student's; None: in nothing, or no teacher."""
    teacher = config.teacher
    arguments = template_arguments(teacher, "teacher")
    differs = TeacherPrompt(teacher.system_prompt, teacher.prompt_template, arguments)
    if not config.distillation.has_teacher or differs == TeacherPrompt():
        return None
    return differs


def template_arguments(section: Data | Teacher, key: str = "data") -> dict[str, Any]:
    """The variables of the chat template by name; what is no JSON value is a text."""
    arguments = {}
    for argument in section.template_arguments:
        name, found, value = argument.partition("=")
        if not (found and name.isidentifier()):
            raise UserError(
                f"{key}.template_arguments has {argument!r}: write NAME=VALUE, such as "
                "enable_thinking=False"
            )
        try:
            arguments[name] = json.loads({"True": "true", "False": "false"}.get(value, value))
        except ValueError:
            arguments[name] = value
    return arguments


def check_same_data(prompts: Prompts) -> None:
    """Raises UserError unless all processes have read the same prompts: each holds all of them."""
    if processes.several():
        processes.check_same("data", {"digest of the prompts": prompts.digest()})
