"""What differs between a run and its continuation, and whether it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.base.errors import UserError
from distill.config.keys import CONTENT, FIXED, FREE, NAMED
from distill.config.schema import schema_key, schema_keys

# What is compared by content rather than by key, and may be named as keys may.
CONTENTS = ("student", "teacher", "data", "template", "validation")
Changes = dict[str, list[Any]]  # by key or content: the checkpoint's value, and the one here


def classes() -> dict[str, str]:
    """Every key and content: what a change of it changes, as the schema says beside the key."""
    by_key = {key.name: key.field.metadata["changes"] for key in schema_keys()}
    return by_key | dict.fromkeys(CONTENTS, NAMED)


def find_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Changes:
    """What differs and is not free, of two flat configs or of two runs' contents.

    A key that is newer than what was saved had its default there.
    """
    ignored = {key for key, changed in classes().items() if changed in (FREE, CONTENT)}
    schedule = "policy.optimizer.schedule"
    if saved.get(schedule) == current.get(schedule) == "constant":
        ignored.add("distillation.max_steps")  # no update depends on how many will follow
    defaults = {key.name: key.field.default for key in schema_keys()}
    changes = {}
    for key in sorted(saved.keys() | current.keys()):
        if schema_key(key) in ignored:
            continue
        before, now = saved.get(key, defaults.get(schema_key(key))), current.get(key)
        if (list(before) if isinstance(before, tuple) else before) != now:
            changes[key] = [before, now]
    return changes


def is_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether `config` and `contents` are the same in both, but for what is free."""
    return not any(find_changes(saved[kind], current[kind]) for kind in ("config", "contents"))


def check_changes(changes: Changes, allowed: Sequence[str]) -> None:
    """Raises UserError unless all of `changes` may be, and are allowed by name."""
    refused = [key for key in changes if classes().get(schema_key(key), FIXED) == FIXED]
    unnamed = [key for key in changes if key not in allowed]
    if refused:
        raise UserError(
            f"the workdir holds a checkpoint of another run: {_shown(changes, refused)}; pass "
            "another --workdir, or the same config to go on"
        )
    if unnamed:
        names = [*allowed, *unnamed]
        value = names[0] if len(names) == 1 else '"' + str(tuple(names)).replace(" ", "") + '"'
        raise UserError(
            f"the workdir holds a checkpoint of another run: {_shown(changes, unnamed)}; pass "
            "another --workdir, or the same as there; or go on with what is here: "
            f"--config.checkpointing.allow_changes={value}"
        )


def _shown(changes: Changes, keys: Sequence[str]) -> str:
    four = ", ".join(
        f"{key} ({changes[key][0]!r} there, {changes[key][1]!r} here)" for key in keys[:4]
    )
    return f"{four} and {len(keys) - 4} more" if len(keys) > 4 else four
