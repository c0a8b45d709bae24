"""What takes a while says so: what is being done, and for how long.

On a terminal, a line counts the seconds meanwhile. Afterwards, and elsewhere only then, a line says
how long it took, if that was a second or more.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from distill.base import processes

_WORTH_SAYING = 1.0  # seconds
_TICK = 0.5


def shows_bars() -> bool:
    """Whether bars may be drawn: by the first process, on a terminal."""
    return processes.is_first() and sys.stderr.isatty()


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Says that `what` is being done."""
    started = time.monotonic()
    with _counting(what):
        yield
    seconds = time.monotonic() - started
    if seconds >= _WORTH_SAYING:
        tqdm.write(f"{what}: {seconds:.1f} s")


@contextlib.contextmanager
def _counting(what: str) -> Iterator[None]:
    if not shows_bars():
        yield
        return
    done = threading.Event()
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar:

        def tick() -> None:
            while not done.wait(_TICK):
                bar.refresh()

        ticker = threading.Thread(target=tick, name="status", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
