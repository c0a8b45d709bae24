"""SIGTERM, SIGINT and SIGHUP: what is under way is finished and saved; a second one ends it."""

from __future__ import annotations

import os
import signal
import threading

from distill.base import processes
from distill.base.errors import RunInterrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupts:
    """Whether the run was asked to stop.

    Used as a context manager, in the main thread, it handles the signals; otherwise nothing is
    installed and nothing is ever requested, as in a notebook.

    The first signal sets `requested` between `hold` and `release`; elsewhere nothing would be lost,
    so it ends the process at once with status 0. A second one always ends it at once, with status
    128 + its number. That is done by a thread which the C handler wakes: the main one may be inside
    a compilation for minutes. Of several processes, all end as the one that is signalled does.

    Attributes:
      requested: name of the signal, '' before; of one sent to another process, once that is agreed
        on.
    """

    def __init__(self):
        self.requested = ""
        self._held = self._received = False

    def hold(self) -> None:
        """From here on there is something to save."""
        self._held = True

    def release(self) -> None:
        """Everything is saved."""
        self._held = False

    def agree(self) -> str:
        """`requested` of any process, all of which wait for each other here."""
        self.requested = next(filter(None, processes.gather(self.requested)), "")
        return self.requested

    def agree_by_first(self) -> str:
        """What the first process knows of `requested`, '' perhaps for one sent to another just now.

        Every step can afford this: the first process waits for nobody, the others for one word.
        """
        agreed = processes.from_first(lambda: self.requested or processes.stop_asked())
        self.requested = self.requested or agreed
        return agreed

    def stop(self, what_is_saved: str) -> RunInterrupted:
        """The exception that ends the run."""
        return RunInterrupted(f"stopped by {self.requested}: {what_is_saved}")

    def __enter__(self) -> Interrupts:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The handler itself has nothing to do; the default one would end the process. What the
        # parent ignores, such as SIGHUP under nohup, stays ignored.
        heard = [x for x in _SIGNALS if signal.getsignal(x) != signal.SIG_IGN]
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_writer)
        os.close(self._writer)  # the thread reads the end

    def _watch(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] in _SIGNALS:
                    self._receive(signal.Signals(number[0]))

    def _receive(self, number: signal.Signals) -> None:
        # A scheduler signals all processes: that another's came first makes this no second one.
        if self._received:
            line = f"stopped at once by {number.name}: the last save is intact"
            processes.leave(line, 128 + number)
        if not self._held:
            processes.leave(
                f"stopped by {number.name}: nothing was lost, the same command goes on", 0
            )
        self._received, self.requested = True, number.name
        processes.ask_to_stop(number.name)
        line = f"{number.name}: finishing the step and saving; a second signal ends the run at once"
        os.write(2, f"\n{line}\n".encode())
