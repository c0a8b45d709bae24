"""Spreads rows over servers: each is answered once, in order, whatever fails on the way.

A row is tried whole until it has an answer. A server that fails gets no further rows until it has
recovered; other servers take its rows. What stays failing for longer than the retry time ends it
all with one line.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from distill.base.errors import RunStopped, UserError
from distill.rollout.vllm.client import RequestRefused, ServerFailed, VllmClient

Row = TypeVar("Row")
Answer = TypeVar("Answer")

CONNECTIONS = 256  # requests at once to one server: what vLLM decodes together by default
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds


def answer_all(
    clients: Sequence[VllmClient],
    rows: Sequence[Row],
    answer: Callable[[VllmClient, Row], Answer],
    recover: Callable[[VllmClient], None],
    retry_timeout: float,
) -> tuple[list[Answer], list[VllmClient], int]:
    """Answers of all rows, the client that gave each, and how many tries failed.

    Args:
      clients: one per server.
      rows: what to ask.
      answer: asks one server for one row; ServerFailed is tried again, here or elsewhere.
      recover: readies a server after a failure (new weights after a restart); may raise
        ServerFailed, and is tried again then.
      retry_timeout: seconds that a row or a server may go on failing.

    Raises:
      RunStopped: a row or a server went on failing; names the server and its last error.
      Exception: what `answer` or `recover` raised otherwise.
    """
    if not rows:
        return [], [], 0
    shared = _Shared(rows, answer, recover, retry_timeout)
    servers = [_Server(client) for client in clients]
    for server in servers:
        for _ in range(min(CONNECTIONS, len(rows))):
            # Daemons: a hanging request must not keep a run alive that has stopped.
            threading.Thread(target=shared.work, args=(server,), daemon=True).start()
    with shared.changed:
        shared.changed.wait_for(lambda: shared.over)
    if shared.error is not None:
        for client in clients:
            client.close_connections()
        raise shared.error
    for server in servers:
        with server.recovering:
            pass  # nobody may still be refitting it
    answers, answered_by = zip(*shared.results, strict=True)
    return list(answers), list(answered_by), shared.failed_tries


def keep_trying(action: Callable[[], Any], retry_timeout: float) -> Any:
    """Result of `action`, tried again with growing pauses while it raises ServerFailed.

    Raises:
      RunStopped: it went on failing for retry_timeout seconds.
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
                raise stopped(error, retry_timeout) from None
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def stopped(error: ServerFailed, retry_timeout: float) -> RunStopped:
    return RunStopped(
        f"a vLLM server stayed away for {retry_timeout:g} s (retry_timeout); its last error was: "
        f"{error}"
    )


@dataclasses.dataclass
class _Server:
    """A server as its threads see it; `recoveries` counts how often it was readied again."""

    client: VllmClient
    recovering: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    recoveries: int = 0


class _Shared:
    """What the threads of one call share; `changed` guards all of it."""

    def __init__(self, rows, answer, recover, retry_timeout: float):
        self._rows, self._answer, self._recover = rows, answer, recover
        self._retry_timeout = retry_timeout
        self._waiting = deque(range(len(rows)))
        self._failing_since: dict[int, float] = {}
        self._left = len(rows)
        self.results: list[Any] = [None] * len(rows)
        self.failed_tries = 0
        self.error: Exception | None = None
        self.changed = threading.Condition()

    @property
    def over(self) -> bool:
        return self._left == 0 or self.error is not None

    def work(self, server: _Server) -> None:
        """A thread: takes rows until all are answered."""
        try:
            while (row := self._take()) is not None:
                with server.recovering:
                    recoveries, started = server.recoveries, time.monotonic()
                try:
                    self._finish(row, self._answer(server.client, self._rows[row]), server)
                except ServerFailed as error:
                    self._put_back(row, started, error)
                    self._await_recovery(server, recoveries)
        except RequestRefused as error:
            self._end(RunStopped(f"a request was refused: {error}"))
        except Exception as error:
            self._end(error)

    def _take(self) -> int | None:
        with self.changed:
            # Rows under way elsewhere may yet come back.
            self.changed.wait_for(lambda: self.over or self._waiting)
            return None if self.over else self._waiting.popleft()

    def _finish(self, row: int, result: Any, server: _Server) -> None:
        with self.changed:
            self.results[row] = result, server.client
            self._left -= 1
            self.changed.notify_all()

    def _put_back(self, row: int, started: float, error: ServerFailed) -> None:
        with self.changed:
            self.failed_tries += 1
            since = self._failing_since.get(row)
            self._failing_since.setdefault(row, started)
            if since is not None and time.monotonic() - since >= self._retry_timeout:
                raise stopped(error, self._retry_timeout)
            self._waiting.appendleft(row)
            self.changed.notify_all()

    def _await_recovery(self, server: _Server, recoveries: int) -> None:
        """One thread readies the server; the others that saw it fail wait for that."""
        with server.recovering:
            if server.recoveries > recoveries:
                return
            started, pause = time.monotonic(), _FIRST_PAUSE
            while not self._pause(pause):
                try:
                    self._recover(server.client)
                    break
                except ServerFailed as error:
                    if time.monotonic() - started >= self._retry_timeout:
                        raise stopped(error, self._retry_timeout) from None
                pause = min(2 * pause, _LONGEST_PAUSE)
            server.recoveries += 1

    def _pause(self, seconds: float) -> bool:
        """Waits, or less if there is nothing left to do; then True."""
        with self.changed:
            return self.changed.wait_for(lambda: self.over, seconds)

    def _end(self, error: Exception) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()
