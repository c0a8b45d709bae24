"""What every source of prompts provides, and the registry that finds a source by its name."""

import abc
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distill.base.errors import UserError
from distill.base.registry import Registry

_BUILT_IN_MODULES = {
    "arithmetic": "distill.data.arithmetic",
    "gsm8k": "distill.data.gsm8k",
    "hf": "distill.data.hf",
    "jsonl": "distill.data.files",
    "math_cl": "distill.data.math_cl",
    "parquet": "distill.data.files",
    "tfds": "distill.data.tfds",
}
_DATASETS = Registry("data.name", "distill.data.base.register_dataset", _BUILT_IN_MODULES)


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a dataset.

    Attributes:
        prompt: what the model is asked, a text or a list of chat messages ({'role', 'content'}).
        response: the full reference response, or None.
        answer: the short reference answer that a response is graded against, or None.
        id: unique within the dataset and stable between runs.
        truncated: whether the response was cut off, so that no end belongs behind it.
    """

    prompt: str | list[dict[str, str]]
    response: str | None
    answer: str | None
    id: str
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Rows left out for one reason: how many, and where the first of them is."""

    count: int
    first: str


def count_drops(drops: Iterable[tuple[str, str]]) -> dict[str, Dropped]:
    """Groups pairs of a reason and a place, in the order in which reasons first occur."""
    counted: dict[str, Dropped] = {}
    for reason, place in drops:
        known = counted.get(reason, Dropped(0, place))
        counted[reason] = Dropped(known.count + 1, known.first)
    return counted


class DatasetInterface(abc.ABC):
    """A finite, ordered, random-access collection of examples."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def get_prompt_template(self) -> str:
        """Returns the text that wraps a prompt, with one '{problem}' where the prompt goes."""
        return "{problem}"

    @property
    def bad_rows(self) -> Mapping[str, Dropped]:
        """Rows of the source that could not be made examples, by what is wrong with them."""
        return {}

    def is_correct(self, example: Example, response: str) -> bool | None:
        """Says whether `response` answers `example`; None leaves it to math-verify."""
        return None


def register_dataset(name: str):
    """Registers a factory `make(split, seed, max_samples, path, **options)` under `name`.

    The factory may be a DatasetInterface class. `options` are the factory's own keyword arguments.
    UserError when the name is taken.
    """
    return _DATASETS.register(name)


def get_dataset(
    name: str,
    split: str,
    *,
    seed: int = 0,
    max_samples: int | None = None,
    path: str | None = None,
    **options: Any,
) -> DatasetInterface:
    """Builds the dataset registered under `name`.

    Args:
        name: a built-in source or a name given to `register_dataset`.
        split: name of the split, usually 'train' or 'validation'; each source lists its own.
        seed: chooses what is held out for validation, or what is generated.
        max_samples: keep only this many first examples of the split; None keeps all.
        path: local file or folder to read instead of (or as) the source's hub dataset.
        **options: further keyword arguments of the source.

    Raises:
        UserError: unknown name or option, or the source cannot give what was asked for.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"data.max_samples={max_samples} must be at least 1, or None for all")
    factory: Callable[..., DatasetInterface] = _DATASETS.get(name)
    arguments = dict(split=split, seed=seed, max_samples=max_samples, path=path, **options)
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        parameters = ", ".join(inspect.signature(factory).parameters)
        raise UserError(f"dataset {name!r}: {error}; it takes: {parameters}") from None
    return factory(**arguments)


def dataset_options(name: str) -> set[str]:
    """Names of the keyword arguments that the source takes beside those that every source takes."""
    parameters = inspect.signature(_DATASETS.get(name)).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named - {"split", "seed", "max_samples", "path"}
