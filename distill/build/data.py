"""The sources of examples: what is trained on, and the held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.base import processes
from distill.base.registry import own_values
from distill.config.schema import Data
from distill.data.base import (
    PASSED,
    DatasetInterface,
    dataset_options,
    get_dataset,
    get_factory,
)
from distill.data.prompts import Prompts

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
    """The data to train on."""
    return get_dataset(
        data.name,
        data.split,
        seed=seed,
        max_samples=data.max_samples,
        path=data.path or None,
        **_source_options(data, data.name, plugin),
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
        **_source_options(data, name, plugin),
    )


def _source_options(data: Data, name: str, plugin: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of `data` that the source has a parameter for, and those of a plugin's source."""
    options = {key: getattr(data, key) for key in dataset_options(name) & _DATA_KEYS}
    return own_values(get_factory(name), PASSED, plugin or {}) | options


def check_same_data(prompts: Prompts) -> None:
    """Raises UserError unless all processes have read the same prompts: each holds all of them."""
    if processes.several():
        processes.check_same("data", {"digest of the prompts": prompts.digest()})
