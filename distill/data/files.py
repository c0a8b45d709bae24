"""JSON-lines and Parquet files; the same reader serves local copies of the other sources."""

import functools
import json
from pathlib import Path

from distill.data.base import Example, register_dataset
from distill.data.table import (
    Columns,
    InMemoryDataset,
    Tables,
    choose_split,
    chosen_columns,
    examples_from_columns,
    make_example,
)
from distill.errors import UserError

SUFFIXES = (".jsonl", ".parquet")
_SPLIT_NAMES = ("train", "validation", "test", "math500")


@register_dataset("jsonl")
@register_dataset("parquet")
def make(
    split: str,
    seed: int = 0,
    max_samples: int | None = None,
    path: str | None = None,
    *,
    prompt_column: str = "prompt",
    response_column: str = "response",
    answer_column: str = "answer",
    holdout_fraction: float = 0.02,
) -> InMemoryDataset:
    """Reads a file, or a folder with files such as train.jsonl or train-00000-of-00002.parquet.

    A prompt is a text or a list of chat messages. See `choose_split` for the splits and
    `chosen_columns` for the columns.
    """
    if not path:
        raise UserError("data.path is not set: pass the file or folder to read, data.path=LOCAL")
    tables = file_tables(path, chosen_columns(prompt_column, response_column, answer_column))
    examples = choose_split(tables, split, seed=seed, holdout_fraction=holdout_fraction, where=path)
    return InMemoryDataset(examples[:max_samples])


def file_tables(path: str, columns: Columns) -> Tables:
    """The splits found at a local path: a file is one 'train', a folder is sorted by file name.

    A folder none of whose files is named after a split is one 'train' too.

    Raises:
        UserError: nothing is there, or no file ends in .jsonl or .parquet.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"data.path={path} does not exist; pass data.path=LOCAL, {_ALLOWED}")
    # A copy of a hub repository often keeps its tables in data/.
    files = [root] if root.is_file() else _tables_in(root) or _tables_in(root / "data")
    if not files or files[0].suffix not in SUFFIXES:
        raise UserError(f"data.path={path} has nothing to read; it must be {_ALLOWED}")
    by_split = {"train": files}
    if root.is_dir():
        named = {name: [f for f in files if _split_of(f) == name] for name in _SPLIT_NAMES}
        by_split = {name: found for name, found in named.items() if found} or by_split
    return {
        name: functools.partial(_read_files, found, columns) for name, found in by_split.items()
    }


_ALLOWED = f"a file ({' or '.join(SUFFIXES)}) or a folder of such files"


def _tables_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.*") if file.suffix in SUFFIXES)


def _split_of(file: Path) -> str | None:
    names = (name for name in _SPLIT_NAMES if file.name.startswith((f"{name}.", f"{name}-")))
    return next(names, None)


def _read_files(files: list[Path], columns: Columns) -> list[Example]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return [example for file in files for example in readers[file.suffix](file, columns)]


def _read_jsonl(file: Path, columns: Columns) -> list[Example]:
    examples = []
    with file.open("rb") as lines:  # decoded one by one, so that an error knows its line
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 text: {error.reason}") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not valid JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} must be a JSON object, not {type(row).__name__}")
            columns.present(list(row), where)
            examples.append(make_example(row, columns, where, id=f"{file.name}/{number}"))
    return examples


def _read_parquet(file: Path, columns: Columns) -> list[Example]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = columns.present(pyarrow.parquet.read_schema(file).names, str(file))
        table = pyarrow.parquet.read_table(file, columns=names)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a Parquet file: {str(error).splitlines()[0]}") from None
    return examples_from_columns(table.to_pydict(), columns, str(file), file.name)
