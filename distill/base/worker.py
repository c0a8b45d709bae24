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
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from distill.base.errors import UserError

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_CONTEXT = multiprocessing.get_context("spawn")  # not fork: here are threads and an accelerator


class WorkerEnded(Exception):
    """What was to be computed has ended two processes."""


class Workers:
    """Processes that compute what they are given; one that ends is replaced.

    It may have been killed, at any moment: a fresh one computes the same once more. Each has a pipe
    of its own and shares no lock, so that one that is killed holds up no other.

    Args:
      count: how many compute at once. Each starts with the first task that it gets.
      prepare: what a process does first, which no time limit counts.
    """

    def __init__(self, count: int, prepare: Callable[[], None]):
        self._prepare = prepare
        # To the kernel, a process's parent is the thread that started it: these last as long.
        self._threads = ThreadPoolExecutor(count)
        self._workers: dict[int, _Worker] = {}  # by thread
        self._stopped = False

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Future[Any]:
        """What `function` gives or raises; both are found by name in the process.

        The future raises TimeoutError after so many seconds of computing, WorkerEnded, or UserError
        where no process can start.
        """
        return self._threads.submit(self._compute, function, arguments, timeout)

    def stop(self) -> None:
        """Ends all processes, whatever they are computing."""
        self._stopped = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers.values()):
            worker.process.kill()
        self._threads.shutdown()
        for thread in list(self._workers):
            self._end(thread)

    def _compute(self, function: Callable[..., Any], arguments: tuple, timeout: float) -> Any:
        thread, has_begun = threading.get_ident(), False
        for _ in range(2):
            try:
                pipe = (self._workers.get(thread) or self._start(thread)).pipe
                has_begun = True
                pipe.send((function, arguments))
                in_time = pipe.poll(timeout)
                succeeded, result = pipe.recv() if in_time else (False, TimeoutError())
            except (EOFError, OSError):
                self._end(thread)
                if self._stopped:
                    break
                continue
            if not in_time:
                self._end(thread)
            if not succeeded:
                raise result
            return result
        if has_begun or self._stopped:
            raise WorkerEnded
        raise UserError(
            "worker processes cannot start: a script that needs them must be a file whose work "
            "stands under `if __name__ == '__main__':`"
        )

    def _start(self, thread: int) -> _Worker:
        pipe, other_end = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_serve, args=(other_end, self._prepare), daemon=True)
        process.start()
        other_end.close()  # of which the process has its own: else its end would not be seen
        worker = self._workers[thread] = _Worker(process, pipe)
        pipe.recv()  # it is prepared
        return worker

    def _end(self, thread: int) -> None:
        worker = self._workers.pop(thread, None)
        if worker is not None:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


class _Worker(NamedTuple):
    process: SpawnProcess
    pipe: Connection


def _serve(pipe: Connection, prepare: Callable[[], None]) -> None:
    """What a worker process runs, until the other end of its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent's matter
    _end_with_parent()
    prepare()
    pipe.send(None)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            reply = True, function(*arguments)
        except Exception as error:
            reply = False, error
        pipe.send(reply)


def limit_memory(size: int) -> None:
    """A huge power must fail here, before the machine has to choose which process to end."""
    if sys.platform == "linux":  # macOS refuses to limit address space
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _end_with_parent() -> None:
    """Has the kernel end this process with its parent, even in the midst of a long computation.

    A thread that watches the parent would not do: the power of a huge number does not let it run.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the call above
        os._exit(1)
