"""What a key of the config is: default, help, range, and what a change of it does to a run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

MOST_ROWS, LONGEST, MOST_GB = 10**6, 10**7, 10**6  # beyond what anybody has
# What a key changes that differs from the checkpoint's, and so what becomes of the run.
FREE = "free"  # nothing in the result, up to rounding: it goes on
CONTENT = "content"  # where to find what is compared by its content: see `run.contents`
NAMED = "named"  # the rest of the run: it goes on if `checkpointing.allow_changes` names the key
FIXED = "fixed"  # what the run is: it is refused


def key(default: Any, help: str, *, choices=None, low=None, high=None, changes=NAMED) -> Any:
    """A field of a section, with what is allowed and what a change of it does to a run."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "changes": changes}
    return dataclasses.field(default=default, metadata=metadata)


free, content, fixed = (functools.partial(key, changes=each) for each in (FREE, CONTENT, FIXED))


def section(cls: type) -> Any:
    """A section within a section."""
    return dataclasses.field(default_factory=cls)
