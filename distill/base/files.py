"""Folders of this machine, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from distill.base.errors import UserError


def local_path(path: str | Path) -> Path:
    """Absolute, with ~ as the home; UserError for an address such as gs://bucket/run."""
    if scheme := re.match(r"\w+:/", str(path)):
        raise UserError(
            f"{path} is no folder of this machine, and {scheme[0]}/ is not written to: mount it "
            "(gcsfuse, s3fs) and pass the folder where it is mounted"
        )
    return Path(path).expanduser().absolute()


def check_output(path: Path) -> None:
    """Makes the folder of a file that a command will write, before anything is computed for it.

    UserError where the file cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: pass --output=FILE")
    make_folder_of(path)


def make_folder_of(path: Path) -> None:
    """Makes the folder that `path` will be in; UserError if it cannot be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): pass another place, which may be "
            "written to"
        ) from None


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a machine that goes down may leave the new name and no text
    os.replace(temporary, path)


def to_json(value: Any, **options: Any) -> str:
    """JSON of anything that it knows; numbers that it does not, NaN and infinite ones, are null."""
    return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
