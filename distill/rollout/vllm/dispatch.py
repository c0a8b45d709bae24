"""Spreads rows over servers: each gets one reply, in order, whatever fails on the way.

A row is tried whole until it has a reply. A server that fails gets no further rows until it has
recovered; other servers take its rows. What stays failing for longer than the retry time ends it
all with one line.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distill.base.errors import RunStopped, UserError
from distill.rollout.vllm.client import RequestRefused, ServerFailed, VllmClient

CONNECTIONS = 256  # requests at once to one server: what vLLM decodes together by default
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds
_MOST_RESTARTS = 5  # of a server within one batch


def at_each(
    clients: Sequence[VllmClient], action: Callable[[VllmClient], Any], retry_timeout: float
) -> list[Any]:
    """Results of `action` for all servers at once, each tried again as by `keep_trying`."""
    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(lambda c: keep_trying(lambda: action(c), retry_timeout), clients))


def keep_trying(action: Callable[[], Any], retry_timeout: float) -> Any:
    """Result of `action`, tried again with growing pauses while it raises ServerFailed.

    Raises:
      RunStopped: it went on failing for so many seconds.
      UserError: a server refused the request.
    """
    started, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return action()
        except RequestRefused as error:
            raise UserError(f"a request was refused: {error}") from None
        except ServerFailed as error:
            if time.monotonic() - started >= retry_timeout:
                raise _stopped(error, retry_timeout) from None
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def ask_all(
    clients: Sequence[VllmClient],
    rows: Sequence[Any],
    ask: Callable[[VllmClient, Any], Any],
    recover: Callable[[VllmClient], bool],
    retry_timeout: float,
) -> tuple[list[Any], int]:
    """Replies to all rows, and how many tries came to nothing.

    Args:
      ask: asks one server for one row; ServerFailed is tried again, here or elsewhere.
      recover: readies a server after a failure, and at the end, and says whether it had restarted:
        then its earlier replies do not count. ServerFailed is tried again.
      retry_timeout: seconds that a row or a server may go on failing.

    Raises:
      RunStopped: a row or a server went on failing; names the server and its last error.
    """
    servers = [_Server(client) for client in clients]
    batch = _Batch(rows, ask, recover, retry_timeout)
    while batch.left:
        for server in servers:
            for _ in range(min(CONNECTIONS, batch.left)):
                # Daemons: a hanging request must not keep a run alive that has stopped.
                threading.Thread(target=batch.work, args=(server,), daemon=True).start()
        batch.await_end()
        for server in servers:  # one that restarted between two requests failed none
            batch.ready(server, server.recoveries)
        batch.drop_stale()
    return [batch.results[row][0] for row in range(len(rows))], batch.lost_tries


@dataclasses.dataclass
class _Server:
    """A server as its threads see it: how often it was readied again, and had restarted."""

    client: VllmClient
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    recoveries: int = 0
    restarts: int = 0


class _Batch:
    """What the threads of one call share; `_changed` guards all of it.

    A result is the reply, the server that gave it, and how often that had restarted before.
    """

    def __init__(self, rows, ask, recover, retry_timeout: float):
        self._rows, self._ask, self._recover = rows, ask, recover
        self._retry_timeout = retry_timeout
        self._waiting = deque(range(len(rows)))
        self._failing_since: dict[int, float] = {}
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.results: dict[int, tuple[Any, _Server, int]] = {}
        self.lost_tries = 0

    @property
    def left(self) -> int:
        return len(self._rows) - len(self.results)

    def work(self, server: _Server) -> None:
        """A thread: takes rows until all have replies."""
        try:
            while (row := self._take()) is not None:
                with server.lock:  # nobody is readying it
                    recoveries, restarts = server.recoveries, server.restarts
                started = time.monotonic()
                try:
                    reply = self._ask(server.client, self._rows[row])
                except ServerFailed as error:
                    self._put_back(row, started, error)
                    self.ready(server, recoveries)
                else:
                    with self._changed:
                        self.results[row] = reply, server, restarts
                        self._changed.notify_all()
        except RequestRefused as error:
            self._end(RunStopped(f"a request was refused: {error}"))
        except Exception as error:
            self._end(error)

    def await_end(self) -> None:
        with self._changed:
            self._changed.wait_for(self._is_over)
        if self._error is not None:
            raise self._error

    def ready(self, server: _Server, recoveries: int) -> None:
        """Recovers a server, unless that was done since its `recoveries` were read."""
        with server.lock:
            if server.recoveries > recoveries:
                return
            server.restarts += keep_trying(lambda: self._try(server), self._retry_timeout)
            server.recoveries += 1
        if server.restarts > _MOST_RESTARTS:
            raise RunStopped(
                f"{server.client.url} restarted {server.restarts} times in one batch: see its log"
            )

    def _try(self, server: _Server) -> bool:
        # After an error, nobody may touch what is another run's by now.
        return self._error is None and self._recover(server.client)

    def drop_stale(self) -> None:
        """Puts back the rows of servers that have restarted since: their weights are unknown."""
        stale = [row for row, (_, server, n) in self.results.items() if n != server.restarts]
        for row in stale:
            del self.results[row]
        self._waiting.extend(stale)
        self.lost_tries += len(stale)

    def _is_over(self) -> bool:
        return self.left == 0 or self._error is not None

    def _take(self) -> int | None:
        with self._changed:
            # Rows under way elsewhere may yet come back.
            self._changed.wait_for(lambda: self._is_over() or self._waiting)
            return None if self._is_over() else self._waiting.popleft()

    def _put_back(self, row: int, started: float, error: ServerFailed) -> None:
        with self._changed:
            self.lost_tries += 1
            since = self._failing_since.setdefault(row, started)
            if since != started and time.monotonic() - since >= self._retry_timeout:
                raise _stopped(error, self._retry_timeout)
            self._waiting.appendleft(row)
            self._changed.notify_all()

    def _end(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _stopped(error: ServerFailed, retry_timeout: float) -> RunStopped:
    return RunStopped(
        f"a vLLM server stayed away for {retry_timeout:g} s (retry_timeout); its last error was: "
        f"{error}"
    )
