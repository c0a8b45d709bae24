"""Worker processes for what may take too long or too much: they end with the process that has them.

It must stay quick to import: workers do.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pebble import ProcessFuture, ProcessPool

_PR_SET_PDEATHSIG = 1  # of prctl(2)
# To the kernel, a process's parent is the thread that started it: this one ends with the program.
_STARTER = ThreadPoolExecutor(1)


def make_pool(workers: int, initializer: Callable[[], None]) -> ProcessPool:
    """A pool whose processes start with the first task, whichever thread schedules it."""
    # Not fork: the parent has threads and an accelerator.
    context = multiprocessing.get_context("spawn")
    return _Pool(max_workers=workers, initializer=initializer, context=context)


class _Pool(ProcessPool):
    def schedule(self, function, args=(), kwargs=None, timeout=None) -> ProcessFuture:
        schedule = super().schedule
        return _STARTER.submit(schedule, function, args, kwargs or {}, timeout).result()


def limit_memory(size: int) -> None:
    """A huge power must fail here, before the machine has to choose which process to end."""
    if sys.platform == "linux":  # macOS refuses to limit address space
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def end_with_parent() -> None:
    """Has the kernel end this process with its parent, even in the midst of a long computation.

    A thread that watches the parent would not do: the power of a huge number does not let it run.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the call above
        os._exit(1)
