"""What the sources that read tables share: columns, splits without leaks, examples in memory."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from distill.base.errors import UserError
from distill.data.base import DatasetInterface, Dropped, Example, count_drops

Prompt = str | list[dict[str, str]]
_NAMED_BAD_ROWS = 5  # in an error
_DETAIL_LENGTH = 300


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
    """Names of the columns that make an example.

    `response` and `answer` are not read when '' and may be absent when they are in `optional`.
    """

    prompt: str
    response: str = ""
    answer: str = ""
    optional: tuple[str, ...] = ()
    advice: str = "pass the dataset this source is made for, or use data.name=hf, jsonl or parquet"

    @property
    def named(self) -> list[str]:
        return [name for name in (self.prompt, self.response, self.answer) if name]

    def present(self, available: Sequence[str], where: str) -> list[str]:
        """Returns the columns to read; a UserError shows those wanted and those there are."""
        missing = self.missing(available)
        if missing:
            raise UserError(
                f"{where} has no column {', '.join(missing)}: {self.describe(available)}"
            )
        return [name for name in (*self.named, TRUNCATED) if name in available]

    def missing(self, available: Collection[str]) -> list[str]:
        return [name for name in self.named if name not in {*available, *self.optional}]

    def describe(self, available: Iterable[str]) -> str:
        return (
            f"wanted {', '.join(self.named)}; it has {', '.join(available) or 'none'}; "
            f"{self.advice}"
        )


def chosen_columns(prompt_column: str, response_column: str, answer_column: str) -> Columns:
    """Columns as the user named them; a response or answer left at its usual name may be absent."""
    return Columns(
        prompt_column,
        response_column,
        answer_column,
        optional=("response", "answer"),
        advice="set data.prompt_column, .response_column and .answer_column ('' reads none)",
    )


def make_example(row: Mapping[str, Any], columns: Columns, where: str, id: str) -> Example | BadRow:
    """Builds the example of one row, which need not have all columns."""
    missing = columns.missing(row)
    if missing:
        return BadRow(where, f"no column {', '.join(missing)}", columns.describe(row))
    try:
        prompt = _read_prompt(row[columns.prompt], columns.prompt)
        response = _read_text(row.get(columns.response), columns.response)
        answer = _read_answer(row.get(columns.answer), columns.answer)
    except _Unusable as error:
        return BadRow(where, *error.args)
    return Example(prompt, response, answer, id, row.get(TRUNCATED) is True)


class _Unusable(Exception):
    """A value that is no text: its kind and, perhaps, a detail, as in `BadRow`."""


def _read_prompt(value: Any, name: str) -> Prompt:
    is_chat = _is_chat(value)
    texts = [turn["content"] for turn in value] if is_chat else [value]
    texts = [_read_text(text, name) for text in texts]
    # What is asked comes last; before it may stand an empty system message.
    if not (texts[-1] or "").strip():
        raise _Unusable(f"{name} is empty")
    if is_chat and value[-1]["role"] == "assistant":
        raise _Unusable(f"{name} ends with an answer")
    return value if is_chat else texts[0]


def _read_answer(value: Any, name: str) -> str | tuple[str, ...] | None:
    """A list holds several answers that are right."""
    if not isinstance(value, list):
        return _read_text(value, name)
    texts = (_read_text(each, name) for each in value)
    return tuple(text for text in texts if text is not None) or None


def _read_text(value: Any, name: str) -> str | None:
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeError as error:
        # JSON can spell lone surrogates, which no tokenizer reads.
        raise _Unusable(f"{name} is not Unicode text", error.reason) from None
    # Plain numbers are common as answers; anything nested has no one spelling.
    if value is None or isinstance(value, int | float):
        return value if value is None else str(value)
    raise _Unusable(f"{name} is not text", type(value).__name__)


def examples_from_columns(
    values: Mapping[str, Sequence[Any]], columns: Columns, where: str, id_prefix: str
) -> list[Example | BadRow]:
    """Examples of a table given as equally long columns, in its order."""
    names = columns.present(list(values), where)
    rows = zip(*(values[name] for name in names), strict=True)
    return [
        make_example(
            dict(zip(names, row, strict=True)), columns, f"{where} row {i}", f"{id_prefix}/{i}"
        )
        for i, row in enumerate(rows)
    ]


def choose_split(
    tables: Tables,
    split: str,
    *,
    seed: int,
    holdout_fraction: float,
    max_bad_rows: float,
    where: str,
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
        examples = [e for e in examples if prompt_key(e.prompt) not in trained]
    return examples, bad_rows


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


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same: their text, whatever the white space."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return " ".join(text.split())


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in value
        )
    )
