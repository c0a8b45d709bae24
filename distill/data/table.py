"""What the sources that read tables share: columns, splits without leaks, examples in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.base.errors import UserError
from distill.data.base import DatasetInterface, Dropped, Example, count_drops, register_dataset
from distill.data.messages import Unusable, prompt_key, read_answer, read_prompt, read_response

if TYPE_CHECKING:
    import pyarrow

# What other trainers name the columns that are named as ours by default.
_OTHER_NAMES = {"prompt": ("messages", "conversations"), "response": ("completion",)}
_NAMED_BAD_ROWS = 5  # in an error
_DETAIL_LENGTH = 300
_ADVICE = "set data.prompt_column, .response_column and .answer_column ('' reads none)"


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, in the place of its example.

    Attributes:
        where: file and line, or the like.
        kind: what is wrong, in words that other rows share.
        detail: what is wrong with this one; may be ''.
    """

    where: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail[:_DETAIL_LENGTH]})" if self.detail else ""
        return f"{self.where}: {self.kind}{detail}"


# Each of the source's own splits, read when it is called.
Tables = Mapping[str, Callable[[], list[Example | BadRow]]]


class InMemoryDataset(DatasetInterface):
    """A list of examples, and what was wrong with the rows that are not among them."""

    def __init__(self, examples: Sequence[Example], bad_rows: Mapping[str, Dropped] | None = None):
        self._examples, self._bad_rows = examples, bad_rows or {}

    @property
    def bad_rows(self) -> Mapping[str, Dropped]:
        return self._bad_rows

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


# Column, where there is one, that says which responses were cut off.
TRUNCATED = "truncated"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns that make an example; NAME.FIELD is a field of what a column holds.

    `response` and `answer` are not read when '' and may be absent when they are in `optional`;
    `more` are kept as they are.
    """

    prompt: str
    response: str = ""
    answer: str = ""
    optional: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    advice: str = "pass the dataset this source is made for, or use data.name=hf, jsonl or parquet"

    @property
    def named(self) -> list[str]:
        return [name for name in (self.prompt, self.response, self.answer, *self.more) if name]

    def among(self, available: Collection[str]) -> Columns:
        """The columns that a table has: other trainers' names where it lacks the usual ones."""

        def found(name: str) -> str:
            others = _OTHER_NAMES.get(name, ()) if self.optional else ()
            return next((n for n in (name, *others) if _column(n, available)), name)

        if all(_column(name, available) for name in self.named):
            return self
        return dataclasses.replace(self, prompt=found(self.prompt), response=found(self.response))

    def present(self, available: Collection[str], where: str) -> list[str]:
        """Returns the columns to read; a UserError shows those wanted and those there are."""
        missing = self.missing(available)
        if missing:
            raise UserError(
                f"{where} has no column {', '.join(missing)}: {self.describe(available)}"
            )
        named = (*self.among(available).named, TRUNCATED)
        columns = [_column(name, available) for name in named]
        return list(dict.fromkeys(column for column in columns if column))

    def missing(self, available: Collection[str]) -> list[str]:
        named = self.among(available).named
        return [n for n in named if not _column(n, available) and n not in self.optional]

    def describe(self, available: Iterable[str]) -> str:
        return (
            f"wanted {', '.join(self.named)}; it has {', '.join(available) or 'none'}; "
            f"{self.advice}"
        )


def _column(name: str, available: Collection[str]) -> str | None:
    """The column that holds what is named."""
    head = name.partition(".")[0]
    return next((column for column in (name, head) if column in available), None)


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return _value(inner, rest) if rest and isinstance(inner, Mapping) else None


def make_example(row: Mapping[str, Any], columns: Columns, where: str, id: str) -> Example | BadRow:
    """Builds the example of one row, which need not have all columns."""
    missing = columns.missing(row)
    if missing:
        return BadRow(where, f"no column {', '.join(missing)}", columns.describe(row))
    found = columns.among(row)
    try:
        prompt, ending = read_prompt(_value(row, found.prompt), found.prompt)
        response = read_response(_value(row, found.response), found.response)
        if ending is not None and response is not None:
            raise Unusable(f"{found.prompt} ends with an answer", f"beside {found.response}")
        answer = read_answer(_value(row, found.answer), found.answer)
    except Unusable as error:
        return BadRow(where, *error.args)
    truncated = row.get(TRUNCATED) is True
    more = {name: str(_value(row, name)) for name in columns.more}
    return Example(prompt, ending if response is None else response, answer, id, truncated, more)


def examples_from_arrow(
    table: pyarrow.Table, columns: Columns, where: str, id_prefix: str
) -> list[Example | BadRow]:
    """Examples of a table's rows, in its order; classes by their names."""
    names = columns.present(table.column_names, where)
    classes = _class_names(table.schema)
    values = [_values(table.column(name), classes.get(name)) for name in names]
    return [
        make_example(
            dict(zip(names, row, strict=True)), columns, f"{where} row {i}", f"{id_prefix}/{i}"
        )
        for i, row in enumerate(zip(*values, strict=True))
    ]


def _class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Of the columns that hold numbers of classes."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    labels = {k: label for k, label in features.items() if isinstance(label, datasets.ClassLabel)}
    return {name: label.names for name, label in labels.items() if label.names}


def _values(column: pyarrow.ChunkedArray, classes: list[str] | None) -> list[Any]:
    if classes:
        return [None if i is None or i < 0 else classes[i] for i in column.to_pylist()]
    try:
        return column.to_pylist()
    except (ValueError, ArithmeticError, ImportError):  # one value that Python cannot hold
        return [_python_value(value) for value in column]


def _python_value(value: pyarrow.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return "\ud800"  # what is no Unicode text
    except (ValueError, ArithmeticError, ImportError):
        return value  # which is no text


def choose_split(
    tables: Tables,
    where: str,
    split: str,
    seed: int,
    max_samples: int | None,
    holdout_fraction: float,
    max_bad_rows: float,
) -> tuple[list[Example], dict[str, Dropped]]:
    """Reads one split so that 'train' and 'validation' share no prompt.

    The source's own split is taken where there is one (rows of its 'validation' whose prompt also
    occurs in its 'train' are left out). Else 'train' and 'validation' are parts of its 'train',
    and 'all' is the whole of it.

    Returns:
        The examples; and the bad rows of the table they are from, which are skipped as long as
        they are no larger a share of it than `max_bad_rows`.

    Raises:
        UserError: there is no such split, nothing would be in it, or too many rows are bad.
    """
    carved = {"train", "validation"} if "train" in tables and "validation" not in tables else set()
    known = {*tables, *carved, *(["all"] if "train" in tables else [])}
    if split not in known:
        raise UserError(f"{where} has no split {split!r}; it has: {', '.join(sorted(known))}")
    source = split if split in tables else "train"
    examples, bad_rows = _usable_rows(tables[source](), max_bad_rows, where)
    if not examples:
        raise UserError(
            f"{where} has no rows: its split {source!r} is empty; pass another data.path or split"
        )
    if split in carved:
        texts = [prompt_key(example.prompt) for example in examples]
        examples = [examples[i] for i in holdout_split(texts, split, seed, holdout_fraction)]
    elif split == "validation" and "train" in tables:
        trained = {prompt_key(e.prompt) for e in tables["train"]() if isinstance(e, Example)}
        count = len(examples)
        examples = [e for e in examples if prompt_key(e.prompt) not in trained]
        if not examples:
            raise UserError(
                f"{where} has a split 'validation' of {count} rows, whose prompts are all in its "
                "'train' too: hold out other ones, or set data.validation.max_samples=0"
            )
    return examples[:max_samples], bad_rows


def _usable_rows(
    rows: Sequence[Example | BadRow], max_bad_rows: float, where: str
) -> tuple[list[Example], dict[str, Dropped]]:
    examples = [row for row in rows if isinstance(row, Example)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    if len(bad) > max_bad_rows * len(rows):
        more = len(bad) - _NAMED_BAD_ROWS
        named = [*map(str, bad[:_NAMED_BAD_ROWS]), *([f"and {more} more"] if more > 0 else [])]
        raise UserError(
            f"{len(bad)} of {len(rows)} rows of {where} are bad, a larger share than "
            f"data.max_bad_rows={max_bad_rows} lets pass: {'; '.join(named)}"
        )
    return examples, count_drops((row.kind, row.where) for row in bad)


def register_tables(*names: str, without_path: str):
    """Decorator: f(path, columns, subset) -> Tables is the data source of each of the names.

    Columns are as the user named them; a response or answer left at its usual name may be absent.
    `without_path` is the error where no path is set.
    """

    def decorate(tables: Callable[[str, Columns, str], Tables]):
        def make(
            split: str,
            seed: int = 0,
            max_samples: int | None = None,
            path: str | None = None,
            *,
            subset: str = "",
            prompt_column: str = "prompt",
            response_column: str = "response",
            answer_column: str = "answer",
            more_columns: tuple[str, ...] = (),
            holdout_fraction: float = 0.02,
            max_bad_rows: float = 0.01,
        ) -> InMemoryDataset:
            if not path:
                raise UserError(without_path)
            columns = Columns(
                prompt_column,
                response_column,
                answer_column,
                optional=("response", "answer"),
                more=more_columns,
                advice=_ADVICE,
            )
            limits = seed, max_samples, holdout_fraction, max_bad_rows
            found = tables(path, columns, subset)
            return InMemoryDataset(*choose_split(found, path, split, *limits))

        make.__module__ = tables.__module__  # whose the names are
        for name in names:
            register_dataset(name)(make)
        return tables

    return decorate


def holdout_split(texts: Sequence[str], split: str, seed: int, fraction: float) -> list[int]:
    """Indices of 'train' or of 'validation', in order; equal texts are on the same side.

    The `fraction` of the unique texts with the smallest hash of (seed, text) is held out: at least
    one, unless `fraction` is 0. The same texts and seed give the same split on every machine.
    """

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{seed}:{text}".encode()).digest()

    unique = sorted(set(texts), key=rank)
    count = max(1, round(fraction * len(unique))) if fraction > 0 else 0
    held_out = set(unique[:count])
    indices = [i for i, text in enumerate(texts) if (text in held_out) == (split == "validation")]
    if not indices:
        raise UserError(
            f"split {split!r} is empty: {count} of {len(unique)} unique prompts are held out for "
            f"validation with data.holdout_fraction={fraction}; change it or give more data"
        )
    return indices
