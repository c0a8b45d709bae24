"""Parts found by name: the built-in ones, and those that a module of the user's own registers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from distill.base.errors import UserError


class Registry:
    """Parts of one kind by name.

    Args:
      key: of the config, where such a part is named.
      decorator: what registers one, for the error that lists the known names.
      built_in: modules by the names that they register, imported on first use: a part's optional
        packages are needed only by its users.
    """

    def __init__(self, key: str, decorator: str, built_in: Mapping[str, str] | None = None):
        self._key, self._decorator, self._built_in = key, decorator, built_in or {}
        self._parts: dict[str, tuple[tuple[str, str], Any]] = {}

    def register(self, name: str, entry: Callable[[Any], Any] = lambda part: part) -> Callable:
        """Decorator: `get(name)` is then entry(what is decorated), by default that itself.

        UserError when the name is taken.
        """

        def decorate(part: Any) -> Any:
            origin = part.__module__, getattr(part, "__qualname__", repr(part))
            owner = self._parts[name][0] if name in self._parts else origin
            owner_module = self._built_in.get(name, origin[0])
            # A notebook cell run twice defines the same function again: that is no clash.
            if owner != origin or owner_module != origin[0]:
                taken_by = ".".join(owner) if owner != origin else owner_module
                raise UserError(
                    f"the name {name!r} for {self._key} is already taken by {taken_by}: choose one "
                    f"other than {self.names()}"
                )
            self._parts[name] = origin, entry(part)
            return part

        return decorate

    def names(self, allowed: Callable[[Any], bool] | None = None) -> str:
        """Known names, of the allowed entries if that is asked for, as a text."""
        names = {name for name, (_, found) in self._parts.items() if not allowed or allowed(found)}
        return ", ".join(sorted(names if allowed else names | self._built_in.keys()))

    def get(
        self, name: str, allowed: Callable[[Any], bool] | None = None, *, key: str | None = None
    ) -> Any:
        """The entry of that name; UserError when there is none, or it is not allowed.

        `key` is where this one was named, if elsewhere.
        """
        if name not in self._parts and name in self._built_in:
            importlib.import_module(self._built_in[name])
        if name in self._parts and (not allowed or allowed(self._parts[name][1])):
            return self._parts[name][1]
        known = self.names(allowed) or "none yet"
        raise UserError(
            f"{key or self._key} names {name!r}: known are {known} (add your own with "
            f"{self._decorator}, in a module that plugins names)"
        )
