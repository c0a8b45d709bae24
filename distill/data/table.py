"""What the sources that read tables share: columns, splits without leaks, examples in memory."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.data.base import DatasetInterface, Example
from distill.errors import UserError

Prompt = str | list[dict[str, str]]
# Each of the source's own splits, read when it is called.
Tables = Mapping[str, Callable[[], list[Example]]]


class InMemoryDataset(DatasetInterface):
    """A list of examples."""

    def __init__(self, examples: Sequence[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


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
        missing = [name for name in self.named if name not in {*available, *self.optional}]
        if missing:
            raise UserError(
                f"{where} has no column {', '.join(missing)}: wanted {', '.join(self.named)}; "
                f"it has {', '.join(available) or 'none'}; {self.advice}"
            )
        return [name for name in self.named if name in available]


def chosen_columns(prompt_column: str, response_column: str, answer_column: str) -> Columns:
    """Columns as the user named them; a response or answer left at its usual name may be absent."""
    return Columns(
        prompt_column,
        response_column,
        answer_column,
        optional=("response", "answer"),
        advice="set data.prompt_column, .response_column and .answer_column ('' reads none)",
    )


def make_example(row: Mapping[str, Any], columns: Columns, where: str, id: str) -> Example:
    """Builds the example of one row; raises UserError for a value that is not text."""

    def text(name: str) -> str | None:
        value = row.get(name)
        if isinstance(value, bytes):
            return value.decode()
        if value is None or isinstance(value, str):
            return value
        # Plain numbers are common as answers; anything nested has no one spelling.
        if isinstance(value, int | float):
            return str(value)
        raise UserError(f"{where}: column {name!r} must be text, not {type(value).__name__}")

    prompt = row[columns.prompt]
    if not _is_chat(prompt):
        prompt = text(columns.prompt)
    if prompt is None:
        raise UserError(f"{where}: column {columns.prompt!r} is empty")
    return Example(prompt, text(columns.response), text(columns.answer), id)


def examples_from_columns(
    values: Mapping[str, Sequence[Any]], columns: Columns, where: str, id_prefix: str
) -> list[Example]:
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
    tables: Tables, split: str, *, seed: int, holdout_fraction: float, where: str
) -> list[Example]:
    """Reads one split so that 'train' and 'validation' share no prompt.

    The source's own split is taken where there is one (rows of its 'validation' whose prompt also
    occurs in its 'train' are left out). Else 'train' and 'validation' are parts of its 'train',
    and 'all' is the whole of it.

    Raises:
        UserError: there is no such split, or nothing would be in it.
    """
    carved = {"train", "validation"} if "train" in tables and "validation" not in tables else set()
    known = {*tables, *carved, *(["all"] if "train" in tables else [])}
    if split not in known:
        raise UserError(f"{where} has no split {split!r}; it has: {', '.join(sorted(known))}")
    source = split if split in tables else "train"
    examples = tables[source]()
    if not examples:
        raise UserError(f"{where} has no rows: its split {source!r} is empty")
    if split in carved:
        texts = [prompt_key(example.prompt) for example in examples]
        return [examples[i] for i in holdout_split(texts, split, seed, holdout_fraction)]
    if split == "validation" and "train" in tables:
        trained = {prompt_key(example.prompt) for example in tables["train"]()}
        examples = [e for e in examples if prompt_key(e.prompt) not in trained]
    return examples


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
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )
