"""Files of rows; the same reader serves local copies of the other sources."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from distill.base.errors import UserError, first_line
from distill.data.base import Example
from distill.data.table import (
    BadRow,
    Columns,
    Tables,
    examples_from_arrow,
    make_example,
    register_tables,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# Splits by the words in names of files and folders that stand for them.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    "math500": "math500",
}


@register_tables(
    "csv",
    "json",
    "jsonl",
    "parquet",
    without_path="no path is set: pass the file or folder to read, data.path=LOCAL (for held-out "
    "data, data.validation.path=LOCAL)",
)
def _tables(path: str, columns: Columns, subset: str) -> Tables:
    """Of a file, those that a pattern such as data/*.jsonl.gz names, or a folder.

    Each may have an address that fsspec knows, such as gs://bucket/data.
    """
    return file_tables(path, columns)


def file_tables(path: str, columns: Columns) -> Tables:
    """The splits found at a path or address: a file is one 'train', a folder is sorted by name.

    A folder none of whose files is named after a split is one 'train' too.

    Raises:
        UserError: nothing is there, or no file of a kind that is read.
    """
    system, root, files = _find(path)
    base = root if system.isdir(root) else os.path.commonpath(map(os.path.dirname, files))
    by_name = {file: _split_of(_within(base, file)) for file in files if file != root}
    by_split: dict[str, list[str]] = {}
    for file in files:
        # Files of no split are trained on where no others are.
        split = by_name.get(file) or ("train" if "train" not in by_name.values() else None)
        if split:
            by_split.setdefault(split, []).append(file)
    return {
        name: functools.partial(_read_files, system, found, base, columns)
        for name, found in by_split.items()
    }


def _find(path: str) -> tuple[AbstractFileSystem, str, list[str]]:
    """The file system of a path or address, the place there, and the files that are read."""
    import fsspec

    try:
        system, root = fsspec.url_to_fs(os.path.expanduser(path))
        exists = system.exists(root)
        if exists and system.isdir(root):
            files = _files_in(system, root)
        elif exists:
            files = _readable([system.info(root)])
        else:
            files = _readable(system.glob(root, detail=True).values())
    # Without the package for the scheme, the credentials or a network: each has its own class.
    except Exception as error:
        raise UserError(f"data.path={path} cannot be read ({first_line(error)})") from None
    if not files:
        if not exists:
            raise UserError(f"data.path={path} does not exist; pass data.path=LOCAL, {_ALLOWED}")
        raise UserError(f"data.path={path} has nothing to read; it must be {_ALLOWED}")
    return system, root, files


def _files_in(system: AbstractFileSystem, folder: str) -> list[str]:
    # A copy of a hub repository often keeps its tables in data/.
    for each in (folder, f"{folder}/data"):
        if system.isdir(each) and (files := _readable(system.ls(each, detail=True))):
            return files
    files = _readable(system.find(folder, detail=True).values())
    return [file for file in files if not re.search(r"(^|/)\.", _within(folder, file))]


def _readable(found: Iterable[Mapping[str, Any]]) -> list[str]:
    files = [info["name"] for info in found if info["type"] == "file"]
    return sorted(file for file in files if _kind(file) in _READERS)


def _kind(file: str) -> str:
    """The suffix that says how a file's text is to be read."""
    name = PurePosixPath(file)
    return PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix


def _within(folder: str, file: str) -> str:
    return str(PurePosixPath(file).relative_to(folder))


def _split_of(file: str) -> str | None:
    """The split that the last word of the path that names one stands for."""
    words = re.split(r"[^a-z0-9]+", file.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


def _read_files(
    system: AbstractFileSystem, files: list[str], base: str, columns: Columns
) -> list[Example | BadRow]:
    return [row for file in files for row in _read_file(system, file, _within(base, file), columns)]


def _read_file(
    system: AbstractFileSystem, file: str, id: str, columns: Columns
) -> list[Example | BadRow]:
    import pyarrow
    from fsspec.implementations.local import LocalFileSystem

    where = file if isinstance(system, LocalFileSystem) else system.unstrip_protocol(file)
    compression = _COMPRESSED.get(PurePosixPath(file).suffix)
    try:
        with system.open(file) as raw, pyarrow.input_stream(raw, compression) as stream:
            return _READERS[_kind(file)](io.BufferedReader(stream), where, id, columns)
    except (pyarrow.ArrowException, OSError, csv.Error) as error:
        kind = "Parquet" if _kind(file) == ".parquet" else "readable"
        raise UserError(
            f"{where} is not a whole {kind} file ({first_line(error)}): copy or download it again"
        ) from None


def _read_lines(stream: BinaryIO, where: str, id: str, columns: Columns) -> list[Example | BadRow]:
    return [  # decoded one by one, so that a bad line spoils no other
        _read_line(line, columns, f"{where}:{number}", id=f"{id}/{number}")
        for number, line in enumerate(stream, start=1)
        if line.strip()
    ]


def _read_line(line: bytes, columns: Columns, where: str, id: str) -> Example | BadRow:
    row = _parse(line, where)
    return row if isinstance(row, BadRow) else _read_row(row, columns, where, id)


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        return BadRow(where, "not UTF-8 text", error.reason)
    # Besides wrong syntax: numbers of more digits than Python reads, and nesting beyond its stack.
    except (ValueError, RecursionError) as error:
        return BadRow(where, "not valid JSON", getattr(error, "msg", str(error)))


def _read_row(row: Any, columns: Columns, where: str, id: str) -> Example | BadRow:
    if not isinstance(row, dict):
        return BadRow(where, "not a JSON object", type(row).__name__)
    return make_example(row, columns, where, id)


def _read_json(stream: BinaryIO, where: str, id: str, columns: Columns) -> list[Example | BadRow]:
    """One list of rows; or lines, which some name .json too."""
    text = stream.read()
    if not text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _read_lines(io.BytesIO(text), where, id, columns)
    rows = _parse(text, where)
    if isinstance(rows, BadRow):
        return [rows]
    return [
        _read_row(row, columns, f"{where} row {i}", id=f"{id}/{i}") for i, row in enumerate(rows)
    ]


def _read_csv(stream: BinaryIO, where: str, id: str, columns: Columns) -> list[Example | BadRow]:
    """Values as they are written, an empty one is missing."""
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no text become what no text holds, and spoil their own row only.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text)
    columns.present(rows.fieldnames or [], where)
    return [
        _read_record(row, columns, f"{where}:{rows.line_num}", f"{id}/{number}")
        for number, row in enumerate(rows, start=1)
    ]


def _read_record(
    row: dict[str | None, Any], columns: Columns, where: str, id: str
) -> Example | BadRow:
    # A comma in a text that is not quoted would leave its rest to the next column.
    if any(row.get(None, ())):
        return BadRow(where, "more values than columns", "quote texts that have a comma")
    found = {name: value or None for name, value in row.items() if name}
    return make_example(found, columns, where, id)


def _read_parquet(
    stream: BinaryIO, where: str, id: str, columns: Columns
) -> list[Example | BadRow]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    available = file.schema_arrow.names
    names = columns.present(available, where)
    if twice := [name for name in names if available.count(name) > 1]:
        raise UserError(f"{where} has several columns {twice[0]}: rename all but one")
    return examples_from_arrow(file.read(columns=names), columns, where, id)


_READERS = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_ALLOWED = (
    f"a file ({', '.join(_READERS)}, all but the last also {' or '.join(_COMPRESSED)}), "
    "a pattern that names such files, or a folder of them"
)
