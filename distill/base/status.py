"""What takes a while says so: what is being done, how far it is, and for how long.

On a terminal, a line counts the seconds meanwhile. Elsewhere, a line says what has begun, and one
every half minute how far it is. Afterwards a line says how long it took. What takes less than a
second is not worth a line.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from distill.base import processes

_WORTH_SAYING = 1.0  # seconds
_EVERY = 30.0  # seconds between two lines
_TICK = 0.5

_under_way: list[object] = []  # the innermost, last, is what is spoken of
_far = ""
_last_said = 0.0


def shows_bars() -> bool:
    """Whether bars may be drawn: by the first process, on a terminal."""
    return processes.is_first() and sys.stderr.isatty()


def say(line: str) -> None:
    """Prints a line, beside bars."""
    global _last_said
    _last_said = time.monotonic()
    tqdm.write(line)
    sys.stdout.flush()


def how_far(words: str) -> None:
    """Notes how far that is which is being done, for the next line about it."""
    global _far
    _far = words


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Says that `what` is being done."""
    started = time.monotonic()
    how_far("")

    def describe() -> str:
        seconds = time.monotonic() - started
        return f"{what} ..." if seconds < _EVERY else so_far(what, seconds)

    with _counting(what) if shows_bars() else reminding(describe, first=_WORTH_SAYING):
        yield
    how_far("")
    seconds = time.monotonic() - started
    if seconds >= _WORTH_SAYING:
        say(f"{what}: {seconds:.1f} s")


def so_far(what: str, seconds: float) -> str:
    return f"{time.strftime('%H:%M:%S')} {what}: {seconds:.0f} s so far{_far and f', {_far}'}"


@contextlib.contextmanager
def reminding(describe: Callable[[], str], *, first: float | None = None) -> Iterator[None]:
    """Says `describe()` after `first` seconds if given, and whenever nothing was said for long."""
    task, due = object(), time.monotonic() + (_EVERY if first is None else first)

    def remind() -> None:
        nonlocal due
        now = time.monotonic()
        if first is None:
            due = max(due, _last_said + _EVERY)
        if now >= due and _under_way[-1] is task:
            say(describe())
            due = now + _EVERY

    _under_way.append(task)
    try:
        with _ticking(remind):
            yield
    finally:
        _under_way.remove(task)


@contextlib.contextmanager
def _counting(what: str) -> Iterator[None]:
    with (
        tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar,
        _ticking(bar.refresh),
    ):
        yield


@contextlib.contextmanager
def _ticking(tick: Callable[[], object]) -> Iterator[None]:
    """Calls `tick` twice a second."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(_TICK):
            tick()

    ticker = threading.Thread(target=run, name="status", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
