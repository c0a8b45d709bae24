"""JSON-lines and Parquet files; the same reader serves local copies of the other sources."""

import functools
import json
from pathlib import Path

from distill.base.errors import UserError
from distill.data.base import Example, register_dataset
from distill.data.table import (
    BadRow,
    Columns,
    InMemoryDataset,
    Tables,
    choose_split,
    chosen_columns,
    examples_from_columns,
    make_example,
)

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
    max_bad_rows: float = 0.01,
) -> InMemoryDataset:
    """Reads a file, or a folder with files such as train.jsonl or train-00000-of-00002.parquet.

    A prompt is a text or a list of chat messages. See `choose_split` for the splits and bad rows,
    and `chosen_columns` for the columns.
    """
    if not path:
        raise UserError("data.path is not set: pass the file or folder to read, data.path=LOCAL")
    tables = file_tables(path, chosen_columns(prompt_column, response_column, answer_column))
    examples, bad_rows = choose_split(
        tables,
        split,
        seed=seed,
        holdout_fraction=holdout_fraction,
        max_bad_rows=max_bad_rows,
        where=path,
    )
    return InMemoryDataset(examples[:max_samples], bad_rows)


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


def _read_files(files: list[Path], columns: Columns) -> list[Example | BadRow]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return [row for file in files for row in readers[file.suffix](file, columns)]


def _read_jsonl(file: Path, columns: Columns) -> list[Example | BadRow]:
    with file.open("rb") as lines:  # decoded one by one, so that a bad line spoils no other
        return [
            _read_line(line, columns, f"{file}:{number}", id=f"{file.name}/{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]


def _read_line(line: bytes, columns: Columns, where: str, id: str) -> Example | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        return BadRow(where, "not UTF-8 text", error.reason)
    # Besides wrong syntax: numbers of more digits than Python reads, and nesting beyond its stack.
    except (ValueError, RecursionError) as error:
        return BadRow(where, "not valid JSON", getattr(error, "msg", str(error)))
    if not isinstance(row, dict):
        return BadRow(where, "not a JSON object", type(row).__name__)
    return make_example(row, columns, where, id)


def _read_parquet(file: Path, columns: Columns) -> list[Example | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = columns.present(pyarrow.parquet.read_schema(file).names, str(file))
        table = pyarrow.parquet.read_table(file, columns=names)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file} is not a whole Parquet file ({reason}): copy or download it again"
        ) from None
    # As bytes, which are decoded one by one like the lines of a text file.
    as_bytes = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    values = {
        name: column.cast(as_bytes.get(column.type, column.type)).to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return examples_from_columns(values, columns, str(file), file.name)
