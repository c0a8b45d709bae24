"""The sources of examples: what is trained on, and the held-out prompts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from distill.base import processes
from distill.base.errors import UserError
from distill.base.registry import own_values
from distill.config.method import Teacher
from distill.config.schema import Config, Data, all_teachers, teacher_key
from distill.data.base import DATASETS, PASSED, DatasetInterface, get_dataset
from distill.data.prompts import Prompts
from distill.data.teacher_prompts import TeacherPrompt
from distill.teachers.alignment import Alignment

# Keys of the config's data section that a source may take.
_DATA_KEYS = "max_bad_rows", "subset", "prompt_column", "response_column", "answer_column"


def build_dataset(config: Config) -> DatasetInterface:
    """The data to train on; less what is held out, where nothing else is evaluated on."""
    data = config.data
    separate = data.validation.max_samples == 0 or _validates_elsewhere(data)
    fraction = 0.0 if separate else data.holdout_fraction
    return _build(config, data.name, data.split, data.max_samples, data.path, fraction)


def build_validation(config: Config) -> DatasetInterface | None:
    """The held-out prompts; None when data.validation.max_samples is 0."""
    data, validation = config.data, config.data.validation
    if validation.max_samples == 0:
        return None
    name = validation.name or data.name
    path = validation.path or (data.path if name == data.name else "")
    # What is given for validation is for nothing else.
    fraction = 1.0 if _validates_elsewhere(data) else data.holdout_fraction
    return _build(config, name, validation.split, validation.max_samples, path, fraction)


def _validates_elsewhere(data: Data) -> bool:
    """Whether the held-out prompts are no part of what `data.path` holds for training."""
    validation = data.validation
    source = validation.name or data.name, validation.path or data.path
    return source != (data.name, data.path) or validation.split != "validation"


def _build(
    config: Config,
    name: str,
    split: str,
    max_samples: int | None,
    path: str,
    holdout_fraction: float,
) -> DatasetInterface:
    """With the keys of `data` that the source has a parameter for, and those of a plugin's."""
    values = {key: getattr(config.data, key) for key in _DATA_KEYS}
    values |= dict(holdout_fraction=holdout_fraction, more_columns=columns_of_teachers(config))
    factory = DATASETS.get(name)
    options = own_values(factory, PASSED, config.plugin)
    taken = inspect.signature(factory).parameters.keys() & values.keys()
    options |= {key: values[key] for key in taken}
    return get_dataset(
        name, split, seed=config.seed, max_samples=max_samples, path=path or None, **options
    )


def teacher_prompts(
    config: Config, alignments: Mapping[str, Alignment] = MappingProxyType({})
) -> dict[str, TeacherPrompt]:
    """By teacher, what it is asked about, and how its prompts differ from the student's.

    `alignments`: of those with another tokenizer.
    """

    def own(name: str) -> dict[str, Any]:
        found = alignments.get(name)
        return {} if found is None else dict(vocabulary=found.teacher, recut=found.recut)

    return {
        name: TeacherPrompt(
            teacher.system_prompt,
            teacher.prompt_template,
            template_arguments(teacher, teacher_key(name, "template_arguments")),
            teacher.prompts,
            section=teacher_key(name, "prompt_template").rpartition(".")[0],
            **own(name),
        )
        for name, teacher in all_teachers(config).items()
    }


def columns_of_teachers(config: Config) -> tuple[str, ...]:
    """Those of the data by which teachers are asked."""
    teachers = all_teachers(config).values()
    return tuple(dict.fromkeys(column for each in teachers for column in each.columns))


def template_arguments(
    section: Data | Teacher, key: str = "data.template_arguments"
) -> dict[str, Any]:
    """The variables of the chat template by name; what is no JSON value is a text."""
    arguments = {}
    for argument in section.template_arguments:
        name, found, value = argument.partition("=")
        if not (found and name.isidentifier()):
            raise UserError(
                f"{key} has {argument!r}: write NAME=VALUE, such as enable_thinking=False"
            )
        try:
            arguments[name] = json.loads({"True": "true", "False": "false"}.get(value, value))
        except ValueError:
            arguments[name] = value
    return arguments


def check_asked(config: Config, dataset: DatasetInterface, prompts: Prompts) -> None:
    """Raises UserError unless each of several teachers has prompts, and each prompt a teacher."""
    if not prompts.parts:
        return
    teachers = all_teachers(config)

    def there_are() -> str:
        names = columns_of_teachers(config)
        examples = (dataset[int(row)] for row in prompts.rows)
        values = (tuple(str(each.columns.get(name)) for name in names) for each in examples)
        found = list(map("/".join, dict.fromkeys(values)))
        more = " and others" if len(found) > 10 else ""
        return f"rows have {'/'.join(names)} {', '.join(found[:10])}{more}"

    for (name, teacher), part in zip(teachers.items(), prompts.parts, strict=True):
        if not len(part):
            raise UserError(
                f"teachers.{name}.prompts={', '.join(teacher.prompts)} fits none of {len(prompts)} "
                f"prompts: {there_are()}"
            )
    asked = np.concatenate([part.rows for part in prompts.parts])
    missed = prompts.rows[~np.isin(prompts.rows, asked)]
    if len(missed):
        raise UserError(
            f"no teacher is asked about {len(missed)} of {len(prompts)} prompts, the first of them "
            f"{dataset[int(missed[0])].id}: {there_are()}, and teachers.*.prompts name "
            f"{', '.join(rule for each in teachers.values() for rule in each.prompts)}"
        )
    weights = [
        each.weight * np.isin(prompts.rows, part.rows)
        for each, part in zip(teachers.values(), prompts.parts, strict=True)
    ]
    if len(away := prompts.rows[np.sum(weights, axis=0) <= 0]):
        raise UserError(
            f"the weights of the teachers that are asked about {dataset[int(away[0])].id} are not "
            "above 0 in sum, so that it would be unlearned: a teacher of negative weight is a "
            "reference beside another; raise teachers.*.weight, or change teachers.*.prompts"
        )


def check_same_data(prompts: Prompts) -> None:
    """Raises UserError unless all processes have read the same prompts: each holds all of them."""
    if processes.several():
        processes.check_same("data", {"digest of the prompts": prompts.digest()})
