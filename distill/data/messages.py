"""The values of a row: texts, answers, and chat messages in the forms in which they are found."""

from __future__ import annotations

import decimal
import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

Prompt = str | list[dict[str, Any]]
# Names of who speaks, and of what is said.
_SPELLINGS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT


class Unusable(Exception):
    """A value that cannot be used: its kind and, perhaps, a detail, as in `BadRow`."""


def read_prompt(value: Any, name: str) -> tuple[Prompt, str | None]:
    """The prompt, and the response where the messages end with an assistant's."""
    messages = _read_messages(value, name)
    if messages is None:
        text = read_text(value, name)
        if not (text or "").strip():
            raise Unusable(f"{name} is empty")
        return text or "", None
    response = None
    if messages[-1]["role"] == "assistant":
        response = messages.pop()["content"]
        if all(message["role"] == "system" for message in messages):
            raise Unusable(f"{name} ends with an answer")
    # What is asked comes last; before it may stand an empty system message.
    if not messages[-1]["content"].strip():
        raise Unusable(f"{name} is empty")
    return messages, response


def read_response(value: Any, name: str) -> str | None:
    """A text, or that of one message."""
    messages = _read_messages(value, name)
    if messages is None:
        return read_text(value, name)
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise Unusable(f"{name} is not one assistant's message", roles)
    return messages[0]["content"]


def read_answer(value: Any, name: str) -> str | tuple[str, ...] | None:
    """A text or a number, None if it is empty; a list holds several answers that are right."""
    if not isinstance(value, list):
        return _read_answer(value, name)
    answers = (_read_answer(each, name) for each in value)
    return tuple(answer for answer in answers if answer is not None) or None


def _read_answer(value: Any, name: str) -> str | None:
    is_number = isinstance(value, numbers.Real | decimal.Decimal) and not isinstance(value, bool)
    text = str(value) if is_number and not _is_missing(value) else read_text(value, name)
    return text if text and text.strip() else None


def read_text(value: Any, name: str) -> str | None:
    """None where the value is missing, which NaN says in tables."""
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()  # JSON can spell lone surrogates, which no tokenizer reads
            return value
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise Unusable(f"{name} is not Unicode text", error.reason) from None
    if _is_missing(value):
        return None
    raise Unusable(f"{name} is not text", type(value).__name__)


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same: their text, whatever the white space."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return " ".join(text.split())


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value))


def _read_messages(value: Any, name: str) -> list[dict[str, Any]] | None:
    """Messages with role and content, or None where the value is something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        # Some tables hold messages as JSON, which would be nothing but text to a model.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not (isinstance(value, list) and value and all(map(_spelling, value))):
        return None
    return [_read_message(message, name) for message in value]


def _spelling(message: Any) -> tuple[str, str] | None:
    if not isinstance(message, Mapping):
        return None
    found = (names for names in _SPELLINGS if {*names} <= message.keys())
    return next((names for names in found if isinstance(message[names[0]], str)), None)


def _read_message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    role_name, content_name = _spelling(message) or _SPELLINGS[0]
    role = read_text(message[role_name], name) or ""
    # Tables fill with None what a message does not have.
    named = (role_name, content_name)
    rest = {k: value for k, value in message.items() if k not in named and value is not None}
    content = _read_content(message[content_name], name)
    if content is None and "tool_calls" not in rest:
        raise Unusable(f"{name} is not text", "a message without content")
    try:
        json.dumps(rest)
    except (TypeError, ValueError) as error:
        raise Unusable(f"{name} has a message with more than text", str(error)) from None
    return {"role": _ROLES.get(role, role), "content": content or "", **rest}


def _read_content(value: Any, name: str) -> str | None:
    """A text, or the texts of several parts."""
    if not isinstance(value, list):
        return read_text(value, name)
    others = [part for part in value if not (isinstance(part, dict) and part.get("type") == "text")]
    if others:
        kind = others[0].get("type") if isinstance(others[0], dict) else type(others[0]).__name__
        raise Unusable(f"{name} is not text", f"a part of type {kind}")
    return "".join(read_text(part.get("text"), name) or "" for part in value)
