"""Parts found by name: the built-in ones, and those that a module of the user's own registers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.base.errors import UserError, first_line


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

    def register(
        self,
        name: str,
        entry: Callable[[Any], Any] = lambda part: part,
        takes: Sequence[str] = (),
    ) -> Callable:
        """Decorator: `get(name)` is then entry(what is decorated), by default that itself.

        UserError when the name is taken, or the part cannot be called with what it `takes`.
        """

        def decorate(part: Any) -> Any:
            if takes:
                check_call(f"{self._key}={name}", part, takes)
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

    def knows(self, name: str) -> bool:
        return name in self._parts or name in self._built_in

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
        known = self.names(allowed)
        raise UserError(
            f"{key or self._key} names {name!r}, but "
            + (f"the known names are {known}" if known else "no name is registered")
            + f"; a module that plugins names can register one with {self._decorator}"
        )


def name_of(part: Any) -> str:
    """Where a part of the user's own is defined, for errors about it."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def check_call(what: str, part: Any, takes: Sequence[str]) -> None:
    """UserError unless `part` can be called with as many arguments."""
    try:
        inspect.signature(part).bind(*takes)
    except ValueError:  # nothing is known of it
        return
    except TypeError as error:
        raise UserError(
            f"{what}: {name_of(part)} must take ({', '.join(takes)}), and have defaults for "
            f"anything else ({error})"
        ) from None


def describe(error: BaseException) -> str:
    """What kind of error it is and how its message begins: JAX's own have many lines."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def own_keys(factory: Callable, passed: Sequence[str]) -> dict[str, type]:
    """Keys of `plugin.*` that a part declares, by their types.

    They are its parameters with a default, but for those that are `passed` anyway.
    """
    parameters = inspect.signature(factory).parameters.values()
    return {
        parameter.name: type(parameter.default)
        for parameter in parameters
        if parameter.name not in passed and parameter.default is not inspect.Parameter.empty
    }


def own_values(factory: Callable, passed: Sequence[str], values: Mapping[str, Any]) -> dict:
    """Those of `values` that the part declares; UserError for one of another type."""
    found = {}
    for name, kind in own_keys(factory, passed).items():
        if name not in values:
            continue
        value = values[name]
        if kind is float and type(value) is int:
            value = float(value)
        if kind is not type(None) and type(value) is not kind:
            raise UserError(
                f"config key 'plugin.{name}' is {value!r}: {name_of(factory)} takes a value of "
                f"type {kind.__name__}"
            )
        found[name] = value
    return found
