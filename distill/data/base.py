"""What every source of prompts provides, and the registry that finds a source by its name."""

import abc
import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distill.base.errors import UserError, printable
from distill.base.registry import Registry

_BUILT_IN_MODULES = {
    "arithmetic": "distill.data.arithmetic",
    "csv": "distill.data.files",
    "gsm8k": "distill.data.gsm8k",
    "hf": "distill.data.hf",
    "json": "distill.data.files",
    "jsonl": "distill.data.files",
    "math_cl": "distill.data.math_cl",
    "parquet": "distill.data.files",
    "tfds": "distill.data.tfds",
}
PASSED = "split", "seed", "max_samples", "path"  # to every source
DATASETS = Registry("data.name", "distill.data.base.register_dataset", _BUILT_IN_MODULES)


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a dataset.

    Attributes:
        prompt: what the model is asked, a text or a list of chat messages ({'role', 'content'}).
        response: the full reference response, or None.
        answer: the short reference answer that a response is graded against, a tuple where any of
            several is right, or None.
        id: unique within the dataset and stable between runs.
        truncated: whether the response was cut off, so that no end belongs behind it.
        columns: further values by name, by which teachers are asked (teachers.NAME.prompts).
    """

    prompt: str | list[dict[str, Any]]
    response: str | None
    answer: str | tuple[str, ...] | None
    id: str
    truncated: bool = False
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def answers(self) -> tuple[str, ...]:
        """All that are right."""
        return (self.answer,) if isinstance(self.answer, str) else self.answer or ()


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
        """Says whether `response` answers `example`; None leaves it to its answer."""
        return None


def register_dataset(name: str):
    """Registers a factory `make(split, seed, max_samples, path, **options)` under `name`.

    The factory may be a DatasetInterface class. `options` are the factory's own keyword arguments,
    of a plugin's factory keys of the config: `plugin.NAME`.
    UserError when the name is taken.
    """
    return DATASETS.register(name)


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

    `path` is a local file or folder to read instead of (or as) the source's hub dataset, `seed`
    chooses what is held out for validation, or what is generated; `options` are the source's own.

    Raises:
        UserError: unknown name or option, or the source cannot give what was asked for.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"data.max_samples={max_samples} must be at least 1, or None for all")
    factory: Callable[..., DatasetInterface] = DATASETS.get(name)
    arguments = dict(split=split, seed=seed, max_samples=max_samples, path=path, **options)
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        parameters = ", ".join(inspect.signature(factory).parameters)
        raise UserError(f"dataset {name!r}: {error}; it takes: {parameters}") from None
    try:
        dataset = factory(**arguments)
        len(dataset)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"dataset {name!r} cannot be made: {described(error)}") from error
    if not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"dataset {name!r} is a {type(dataset).__name__}: its factory must return a "
            "distill.data.base.DatasetInterface"
        )
    return dataset


def examples_of(dataset: DatasetInterface) -> list[Example]:
    """All examples, each of the right kind; UserError names the first that is not."""
    return [_checked(dataset, i) for i in range(len(dataset))]


def _checked(dataset: DatasetInterface, i: int) -> Example:
    where = f"row {i} of the dataset ({type(dataset).__name__})"
    try:
        example = dataset[i]
    except Exception as error:
        raise UserError(f"{where} cannot be read: {described(error)}") from error
    if not isinstance(example, Example):
        raise UserError(
            f"{where} is {type(example).__name__}: it must be a distill.data.base.Example"
        )
    texts = {"response": example.response, "id": example.id or None}
    wrong = [name for name, text in texts.items() if not isinstance(text, str | None)]
    if not isinstance(example.answer, str | tuple | None):
        wrong.insert(0, "answer")
    if not isinstance(example.prompt, str) and not _is_chat(example.prompt):
        wrong.insert(0, "prompt")
    if wrong:
        value = getattr(example, wrong[0])
        raise UserError(
            f"{where} has {wrong[0]} of type {type(value).__name__}: it must be a text"
            + (", or a list of messages with role and content" if wrong[0] == "prompt" else "")
        )
    return example


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(turn, dict)
            and all(isinstance(turn.get(key), str) for key in ("role", "content"))
            for turn in prompt
        )
    )


def described(error: Exception) -> str:
    """An error of a user's own code, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {error}{where}")
