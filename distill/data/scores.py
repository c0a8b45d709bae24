"""A teacher's scores of fixed data: a folder of safetensors files, read by slices where they lie.

Every file has the scores of the next so many rows, token behind token. `scores.json` says what they
are of. The digests of all files come last, and without them nothing is believed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from distill.base import processes
from distill.base.errors import UserError
from distill.base.files import make_folder_of, write_atomically
from distill.base.manifest import find_damage, write_manifest

_ABOUT = "scores.json"
_REMEDY = "write them with python -m distill.generate --scores"


class Scores:
    """The scores in a folder that `ScoreWriter` has written.

    `identity` is what they must be of, `lengths_r` the scored tokens of every row; `key`, of the
    config, names the folder.

    Raises:
      UserError: they are not there, not whole, or of something else.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        lengths_r: Sequence[int],
        key: str = "teacher.scores",
    ):
        if problem := processes.from_first(lambda: _problem(folder, identity)):
            raise UserError(f"{key}={folder}: {problem}")
        self._folder = folder
        self._rows_per_file = _about(folder)["rows_per_file"]
        self._starts_r = np.concatenate([[0], np.cumsum(lengths_r)])

    def row(self, row: int) -> dict[str, np.ndarray]:
        """The columns of a row, one value or vector for each of its scored tokens."""
        number = row // self._rows_per_file
        before = self._starts_r[number * self._rows_per_file]
        start, stop = (int(self._starts_r[i] - before) for i in (row, row + 1))
        # Opened anew: until a file is closed, all of it that was read counts as our memory.
        with safe_open(_file(self._folder, number), framework="numpy") as file:
            return {name: file.get_slice(name)[start:stop] for name in file.keys()}


def check_replaceable(*folders: Path) -> None:
    """Raises UserError unless scores can be written there that replace nothing but earlier ones."""
    for folder in folders:
        if folder.is_dir():
            if not (folder / _ABOUT).is_file() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} is not empty and holds no {_ABOUT}: pass --output=FOLDER, another "
                    "one"
                )
        elif folder.exists():
            raise UserError(f"{folder} is a file: pass --output=FOLDER")
        make_folder_of(folder)


class ScoreWriter:
    """Writes scores file by file; one that was stopped goes on behind its last whole file.

    Attributes:
      rows: of the data that are written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rows_per_file: int):
        self._folder, self._partial = folder, folder.with_name(folder.name + ".partial")
        self._about = {"identity": dict(identity), "rows_per_file": rows_per_file}
        self._rows_per_file = rows_per_file
        self._number = processes.from_first(self._begin)

    @property
    def rows(self) -> int:
        return self._number * self._rows_per_file

    def _begin(self) -> int:
        if not (self._partial / _ABOUT).exists() or _about(self._partial) != self._about:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            write_atomically(self._partial / _ABOUT, json.dumps(self._about))
        return len(list(self._partial.glob("*.safetensors")))

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        """The scores of the next rows, of which only the last file has fewer than the others."""
        if processes.is_first():
            whole = _file(self._partial, self._number)
            temporary = whole.with_suffix(".tmp")
            with temporary.open("wb") as file:
                file.write(save(dict(columns)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, whole)
        self._number += 1

    def finish(self) -> None:
        """Gives the folder its name, in the place of an older one."""
        if processes.is_first():
            write_manifest(self._partial)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._partial.rename(self._folder)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _ABOUT).read_text())


def _problem(folder: Path, identity: Mapping[str, Any]) -> str:
    """What is wrong with the scores; '' if nothing is."""
    if not (folder / _ABOUT).is_file():
        return f"no finished scores are there: {_REMEDY}, or start that again if it was stopped"
    if damage := find_damage(folder):
        return f"they are damaged, {damage}: {_REMEDY}"
    found = _about(folder)["identity"]
    if other := [key for key in identity.keys() | found if identity.get(key) != found.get(key)]:
        key = min(other)
        return (
            f"they are of another {key} ({found.get(key)} there, {identity.get(key)} here): "
            f"{_REMEDY} for this config, or choose their folder"
        )
    return ""
