"""Are all processes there? Asked before JAX connects them, which ends a process that waits in vain.

JAX gives up with stack traces that name nobody. So process 0 listens first at the address where
its coordination service will, everybody else says there which one it is, and process 0 tells all of
them either that the run is complete or what is wrong.
"""

from __future__ import annotations

import contextlib
import socket
import time

from distill.base.errors import UserError

_COMPLETE = "complete"
_LONGEST = 1000  # bytes of a line


def call_the_roll(address: str, num_processes: int, process: int, timeout: float) -> None:
    """Returns once all processes of the run have called this, within `timeout` seconds.

    Raises:
      UserError: somebody did not come, or came with other numbers.
    """
    if process == 0:
        line = _hear_all(address, num_processes, timeout)
    else:
        line = _report(address, num_processes, process, timeout)
    if line != _COMPLETE:
        raise UserError(line)


def _hear_all(address: str, count: int, timeout: float) -> str:
    """Process 0: hears all others, and tells them the result."""
    port, deadline = int(address.rpartition(":")[2]), time.monotonic() + timeout
    with contextlib.ExitStack() as cleanup:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            return (
                f"process 0 cannot listen at {address} ({error.strerror or error}): "
                "--coordinator_address takes a port of its host that is free"
            )
        cleanup.enter_context(listener)
        callers, line = [], _COMPLETE
        present: dict[int, socket.socket] = {}
        while len(present) < count - 1 and line == _COMPLETE:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller = cleanup.enter_context(listener.accept()[0])
            except TimeoutError:
                line = _missing(sorted({*range(1, count)} - {*present}), count, address, timeout)
                break
            name, *numbers = _read_line(caller, 1.0).split() or [""]
            if name != "distill" or len(numbers) != 2 or not "".join(numbers).isdecimal():
                continue  # whoever that was
            number, its_count = map(int, numbers)
            if its_count != count:
                line = (
                    f"process {number} was started for a run of {its_count}, process 0 for one of "
                    f"{count}: --num_processes must be the same for all"
                )
            elif number in present and _is_open(present[number]):
                line = f"two processes came as number {number}: each needs its own --process_id"
            callers.append(caller)
            present[number] = caller
        for caller in callers:
            with contextlib.suppress(OSError):  # it has gone; JAX will notice
                caller.settimeout(1.0)
                caller.sendall(f"{line}\n".encode())
    return line


def _missing(missing: list[int], count: int, address: str, timeout: float) -> str:
    shown = ", ".join(map(str, missing[:20])) + (", ..." if missing[20:] else "")
    return (
        f"{'process' if len(missing) == 1 else 'processes'} {shown} did not come to {address} "
        f"within {timeout:g} s; {count - len(missing)} of {count} are there: look for their "
        "errors, raise --initialization_timeout, or pass --num_processes=1 if there is only this "
        "one, as in an interactive shell"
    )


def _report(address: str, count: int, process: int, timeout: float) -> str:
    """Another process: says that it is here, and waits for what process 0 makes of it."""
    host, _, port = address.rpartition(":")
    deadline, reason = time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as caller:
                caller.sendall(f"distill {process} {count}\n".encode())
                # It waits for the others, longer than for this one.
                if line := _read_line(caller, timeout + 10):
                    return line
        except OSError as error:
            reason = f" ({error.strerror or error})"
        time.sleep(0.2)
    return (
        f"process {process} of {count} could not reach process 0 at {address} within {timeout:g} "
        f"s{reason}: look for the error of process 0, check the address, or raise "
        "--initialization_timeout"
    )


def _read_line(caller: socket.socket, timeout: float) -> str:
    """Up to the end of a line, '' if there is none."""
    caller.settimeout(timeout)
    try:
        with caller.makefile("rb") as received:
            line = received.readline(_LONGEST)
    except OSError:
        return ""
    return line.decode(errors="replace").strip() if line.endswith(b"\n") else ""


def _is_open(caller: socket.socket) -> bool:
    """False for one that has died meanwhile, and may have been started again."""
    caller.setblocking(False)
    try:
        return caller.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
