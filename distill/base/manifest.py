"""The SHA-256 of every file of a folder, in the format of `sha256sum`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

NAME = "SHA256SUMS"


def write_manifest(folder: Path) -> None:
    """Writes `folder`/SHA256SUMS; on return all files are on the disk."""
    lines = [f"{_digest(folder / name, sync=True)}  {name}\n" for name in _files(folder)]
    with (folder / NAME).open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str:
    """What is wrong with a folder, '' if every byte is as `write_manifest` found it."""
    try:
        lines = (folder / NAME).read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        return f"{NAME} is missing or unreadable"
    digests = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        if not separator or not name.endswith("\n"):
            return f"{NAME} is damaged"
        digests[name[:-1]] = digest
    there = set(_files(folder))
    if missing := sorted(digests.keys() - there):
        return f"{missing[0]}, which {NAME} lists, is missing"
    if surplus := sorted(there - digests.keys()):
        return f"{surplus[0]} is not in {NAME}"
    for name, digest in digests.items():
        if _digest(folder / name) != digest:
            return f"{name} does not match {NAME}"
    return ""


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths if path != folder / NAME)


def _digest(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return digest
