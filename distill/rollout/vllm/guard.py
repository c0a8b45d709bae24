"""Runs a command that must not outlive the trainer; a script of its own: python guard.py COMMAND...

The trainer holds the other end of this process's standard input. When that closes, because the
trainer asks for it or because it died in whatever way, the command and its children are ended.
"""

import os
import signal
import subprocess
import sys
import threading

PATIENCE = 10.0  # seconds between asking and killing


def main() -> int:
    # A group of its own: vLLM's engine is a child of the server, and must end with it.
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        # Not sys.stdin: its lock would be held when this process ends.
        while os.read(0, 4096):
            pass
        end(command, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end(command, signal.SIGTERM))
    status = command.wait()
    end(command, signal.SIGKILL)  # children that the command left behind
    return status if status >= 0 else 128 - status


def end(command: subprocess.Popen, number: int) -> None:
    """Signals the whole group; kills it when patience is over."""
    try:
        os.killpg(command.pid, number)
    except ProcessLookupError:
        return
    if number != signal.SIGKILL:
        timer = threading.Timer(PATIENCE, end, (command, signal.SIGKILL))
        timer.daemon = True
        timer.start()


if __name__ == "__main__":
    sys.exit(main())
