"""Folders of this machine, and files that appear whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

from distill.base.errors import UserError


def local_path(path: str | Path) -> Path:
    """Absolute, with ~ as the home; UserError for an address such as gs://bucket/run."""
    if scheme := re.match(r"\w+:/", str(path)):
        raise UserError(
            f"{path} is no folder of this machine, and {scheme[0]}/ is not written to: mount it "
            "(gcsfuse, s3fs) and pass the folder where it is mounted"
        )
    return Path(path).expanduser().absolute()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
