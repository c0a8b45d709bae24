"""From a ConfigDict to the frozen dataclasses of schema.py, or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from distill.base.errors import UserError
from distill.config.checks import check_combinations
from distill.config.method import OneTeacher, Teachers
from distill.config.schema import Config, PluginKeys, schema_key, schema_keys

_INTEGER_LIMIT = 2**31  # devices count in 32 bits
# A password or a token in a URL: no value may have one, since values are logged and stored.
CREDENTIALS = re.compile(
    r"(?<=://)[^/\s]*(?=@)|(?<=[?&])[\w-]*(?:token|key|secret|password|signature)=[^&\s]*", re.I
)


def default_config() -> ConfigDict:
    """All keys with their defaults, as a ConfigDict to edit in a `get_config`."""
    return _to_config_dict(Config)


def default_teacher() -> ConfigDict:
    """All keys of a section `teachers.NAME`, which may also be left out there."""
    return _to_config_dict(OneTeacher)


def known_keys() -> list[str]:
    """Every dotted key, sections included."""
    parts = (key.name.split(".") for key in schema_keys())
    names = (".".join(each[:depth]) for each in parts for depth in range(1, len(each) + 1))
    return list(dict.fromkeys(names))


def parse_config(config: ConfigDict) -> Config:
    """Checks types, ranges and combinations.

    Raises:
      UserError: one line naming the key, the value and what is allowed.
    """
    parsed = _parse_section(Config, config, "")
    check_combinations(parsed)
    return parsed


def to_flat_dict(config: Config) -> dict[str, Any]:
    """Dotted keys to plain values: what is stored beside a checkpoint and compared on resume."""
    flat: dict[str, Any] = {}

    def visit(section: Any, prefix: str) -> None:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                visit(value, f"{prefix}{field.name}.")
            elif isinstance(value, PluginKeys):
                for name, own in value.items():
                    flat[f"{prefix}{field.name}.{name}"] = plain(own)
            elif isinstance(value, Teachers):
                for name, teacher in value.items():
                    visit(teacher, f"{prefix}{field.name}.{name}.")
            else:
                flat[prefix + field.name] = plain(value)

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value  # as it comes back from JSON

    visit(config, "")
    return flat


def digest(value: Any) -> str:
    """Twelve characters, the same for the same value, made of what JSON has."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _is_section(kind: object) -> typing.TypeGuard[type]:
    return dataclasses.is_dataclass(kind)


def _to_config_dict(cls: type) -> ConfigDict:
    section = ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if _is_section(kind):
            section[field.name] = _to_config_dict(kind)
        elif kind in (PluginKeys, Teachers):
            section[field.name] = ConfigDict()
        elif isinstance(kind, types.UnionType):
            section[field.name] = config_dict.placeholder(typing.get_args(kind)[0])
        else:
            section[field.name] = field.default
    return section


def _parse_section(cls: type, section: Any, prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(section, ConfigDict):
        raise UserError(f"config key '{prefix[:-1]}' is a section with keys {', '.join(fields)}")
    for name in section:
        if name not in fields:
            raise unknown_key(prefix + name)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name not in section:
            raise UserError(f"config key '{prefix}{name}' is missing: start from default_config()")
        kind = hints[name]
        if _is_section(kind):
            values[name] = _parse_section(kind, section[name], f"{prefix}{name}.")
        elif kind is PluginKeys:
            values[name] = _parse_plugin_keys(section[name], f"{prefix}{name}.")
        elif kind is Teachers:
            values[name] = _parse_teachers(section[name])
        else:
            values[name] = _parse_value(prefix + name, section[name], kind, field.metadata)
    return cls(**values)


def _parse_teachers(sections: Any) -> Teachers:
    """Sections of the user's own names, with defaults for what they leave out."""
    if not isinstance(sections, ConfigDict):
        raise UserError("config key 'teachers' is a section of sections: teachers.NAME.model=...")
    parsed = Teachers()
    for name, section in sections.items():
        if not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(
                f"config key 'teachers' names a teacher {_shown(name)}: names have letters, "
                "digits, _ and -"
            )
        if isinstance(section, ConfigDict):
            section = _with_defaults(default_teacher(), section)
        parsed[name] = _parse_section(OneTeacher, section, f"teachers.{name}.")
    return parsed


def _with_defaults(defaults: ConfigDict, given: ConfigDict) -> ConfigDict:
    whole = dict(defaults)
    for name, value in given.items():
        both = isinstance(value, ConfigDict) and isinstance(whole.get(name), ConfigDict)
        whole[name] = _with_defaults(whole[name], value) if both else value
    return ConfigDict(whole)


def _parse_plugin_keys(section: Any, prefix: str) -> PluginKeys:
    """Plain values; their types are checked by the parts that declare them."""
    values = PluginKeys()
    for name, value in dict(section).items():
        value = tuple(value) if isinstance(value, list) else value
        texts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(each, bool | int | float | str) for each in texts):
            raise UserError(
                f"config key '{prefix}{name}' is {_shown(value)}: it takes a number, a text, True "
                "or False, or several of them"
            )
        _check_no_credentials(prefix + name, *(each for each in texts if isinstance(each, str)))
        values[name] = value
    return values


def unknown_key(key: str) -> UserError:
    """The error for a key that is not in the schema, with the nearest one that is."""
    known, name = known_keys(), key.rpartition(".")[2]
    elsewhere = [each for each in known if each.rpartition(".")[2] == name]
    # The same name in another section is nearer than another name in the same one.
    cutoff = 0.0 if elsewhere else 0.6
    close = difflib.get_close_matches(schema_key(key), elsewhere or known, n=1, cutoff=cutoff)
    if close:
        return UserError(f"unknown config key '{key}': did you mean '{close[0]}'?")
    section = schema_key(key).rpartition(".")[0]
    while section and section not in known:
        section = section.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    return UserError(f"unknown config key '{key}': known here are {', '.join(siblings)}")


def _parse_value(key: str, value: Any, kind: Any, limits: typing.Mapping[str, Any]) -> Any:
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if not all(isinstance(item, str) for item in value):
            raise UserError(f"config key '{key}' is {_shown(value)}: it takes text values")
        _check_no_credentials(key, *value)
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"config key '{key}' is {_shown(value)}: it takes a value of type {kind.__name__}"
        )
    if kind is str:
        _check_no_credentials(key, value)
    low, high, choices = limits["low"], limits["high"], limits["choices"]
    if choices is not None and value not in choices:
        raise UserError(f"config key '{key}' is {_shown(value)}: allowed are {', '.join(choices)}")
    # Written so that NaN fails too.
    if not ((low is None or value >= low) and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"config key '{key}' is {_shown(value)}: it must be {bounds}")
    if value == math.inf or (kind is int and value >= _INTEGER_LIMIT):
        raise UserError(f"config key '{key}' is {_shown(value)}: that is too large, lower it")
    return value


def _shown(value: Any) -> str:
    """A wrong value on one line: sections have several, and a text can be of any length."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_no_credentials(key: str, *values: str) -> None:
    if any(CREDENTIALS.search(value) for value in values):
        # Not shown, for the same reason.
        raise UserError(
            f"config key '{key}' holds a URL with a password or token, which would be stored with "
            "every checkpoint: leave it out, and give it by an environment variable such as "
            "HF_TOKEN, or the one that an api_key_variable names"
        )
