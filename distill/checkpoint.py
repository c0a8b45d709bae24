"""Saving and restoring everything that a bit-exact resume needs, with Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from distill.errors import UserError


class Checkpoints:
    """Numbered checkpoints in one folder; each is written whole or not at all.

    A checkpoint is the train state (sharded arrays) and a JSON record: the flat config, the data
    iterator's position and the results so far.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_names=("state", "record")
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts an asynchronous save; does nothing if `step` is already saved."""
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        self._manager.save(step, args=items)

    def record(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["record"]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """State of `step` in the shapes and shardings of `abstract_state`."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=items)["state"]

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def check_same_run(saved: dict[str, Any], current: dict[str, Any], allowed: tuple[str, ...]):
    """Raises UserError, naming up to four keys, if a checkpoint belongs to another config."""
    differing = [
        key
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and not key.startswith(allowed)
    ]
    if differing:
        shown = ", ".join(
            f"{key} ({saved.get(key)!r} there, {current.get(key)!r} here)" for key in differing[:4]
        )
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"the workdir holds a checkpoint of another run: {shown}{more}; pass another "
            "--workdir, or the same config to go on"
        )
