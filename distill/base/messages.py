"""What processes tell each other through the key-value store of JAX's coordination service."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load, save

from distill.base.errors import RunStopped, UserError

T = TypeVar("T")

LONGEST_WAIT = 3600  # seconds by which one process may be ahead of another
_PIECE = 2**20  # bytes of an array that are told at once: a message has at most four times as many


def said(function: Callable[[], Any]) -> str:
    """What the function returns, or its error, as `value` takes it."""
    try:
        return json.dumps([function(), "", ""])
    except (UserError, RunStopped) as error:
        kind = UserError if isinstance(error, UserError) else RunStopped
        return json.dumps([None, kind.__name__, str(error)])


def value(said: str) -> Any:
    """What was returned; raises what was raised."""
    returned, name, message = json.loads(said)
    if name:
        raise (UserError if name == UserError.__name__ else RunStopped)(message)
    return returned


def tell_arrays(client: Any, folder: str, arrays: Mapping[str, np.ndarray]) -> int:
    """Tells them piece by piece, below a key that ends in '/'; returns the bytes of all."""
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    for start in range(0, len(content), _PIECE):
        client.key_value_set_bytes(f"{folder}{start}", content[start : start + _PIECE])
    return len(content)


def told_arrays(client: Any, folder: str, size: int) -> dict[str, np.ndarray]:
    """What `tell_arrays` told, of so many bytes."""
    get = client.blocking_key_value_get_bytes
    return load(b"".join(hear(get, f"{folder}{start}") for start in range(0, size, _PIECE)))


def hear(get: Callable[[str, int], T], key: str, patience: float = LONGEST_WAIT) -> T:
    """What stands, or will stand, under the key; between two looks, Python hears signals."""
    import jax

    deadline = time.monotonic() + patience
    while True:
        try:
            return get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > deadline:
                raise
