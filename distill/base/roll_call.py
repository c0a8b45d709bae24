"""Are all processes there? Asked before JAX connects them, which ends a process that waits in vain.

JAX gives up with a stack trace that names nobody. So process 0 listens first at the address where
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
_PAUSE = 0.2  # seconds between two attempts to reach process 0


def call_the_roll(address: str, num_processes: int, process: int, timeout: float) -> None:
    """Returns once all processes of the run have called this.

    Args:
      address: host and port of process 0.
      num_processes: of the run.
      process: number of this one.
      timeout: seconds to wait.

    Raises:
      UserError: somebody did not come, or came with other numbers.
    """
    host, _, port = address.rpartition(":")
    if process == 0:
        _call(address, int(port), num_processes, timeout)
    else:
        _answer(address, (host.strip("[]"), int(port)), num_processes, process, timeout)


def _call(address: str, port: int, num_processes: int, timeout: float) -> None:
    """Process 0: hears all others, and tells them the result."""
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as cleanup:
        try:
            listener = cleanup.enter_context(_listen(port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {address} ({error.strerror or error}): "
                "--coordinator_address takes a port of its host that is free"
            ) from None
        callers: list[socket.socket] = []
        present: dict[int, socket.socket] = {}
        problem = ""
        while len(present) < num_processes - 1 and not problem:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller = cleanup.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = sorted(set(range(1, num_processes)) - present.keys())
                problem = _missing(missing, num_processes, address, timeout)
                break
            callers.append(caller)
            number, problem = _hear(caller, present, num_processes)
            if number is not None:
                present[number] = caller
        for caller in callers:
            _tell(caller, problem or _COMPLETE)
        if problem:
            raise UserError(problem)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _hear(caller: socket.socket, present, num_processes: int) -> tuple[int | None, str]:
    """The number of a process that is one of the run's, and what is wrong with it."""
    numbers = _read_line(caller, 1.0).split()
    if len(numbers) != 3 or numbers[0] != "distill" or not "".join(numbers[1:]).isdecimal():
        return None, ""  # whoever that was
    number, count = int(numbers[1]), int(numbers[2])
    if count != num_processes:
        problem = f"process {number} was started for a run of {count}, process 0 for one of "
        return number, f"{problem}{num_processes}: --num_processes must be the same for all"
    if number in present and _is_open(present[number]):
        return None, f"two processes came as number {number}: each needs a --process_id of its own"
    return number, ""


def _is_open(caller: socket.socket) -> bool:
    """False for one that has died meanwhile, and may have been started again."""
    caller.setblocking(False)
    try:
        return caller.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _missing(missing: list[int], num_processes: int, address: str, timeout: float) -> str:
    shown = ", ".join(map(str, missing[:20])) + (", ..." if missing[20:] else "")
    noun = "process" if len(missing) == 1 else "processes"
    return (
        f"{noun} {shown} did not come to {address} within {timeout:g} s; "
        f"{num_processes - len(missing)} of {num_processes} are there: look for their errors, or "
        "raise --initialization_timeout"
    )


def _answer(
    address: str, target: tuple[str, int], num_processes: int, process: int, timeout: float
) -> None:
    """Another process: says that it is here, and waits for what process 0 makes of it."""
    deadline, reason = time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(target, timeout=left) as caller:
                caller.sendall(f"distill {process} {num_processes}\n".encode())
                # It waits for the others, longer than for this one.
                line = _read_line(caller, timeout + 10)
        except OSError as error:
            line, reason = "", error.strerror or str(error)
        if line == _COMPLETE:
            return
        if line:
            raise UserError(line)
        time.sleep(_PAUSE)
    raise UserError(
        f"process 0 is not to be reached at {address} within {timeout:g} s"
        f"{f' ({reason})' if reason else ''}, says process {process} of {num_processes}: look for "
        "its error, check the address, or raise --initialization_timeout"
    )


def _tell(caller: socket.socket, line: str) -> None:
    caller.settimeout(1.0)
    with contextlib.suppress(OSError):  # it has gone; JAX will notice
        caller.sendall(f"{line}\n".encode())


def _read_line(caller: socket.socket, timeout: float) -> str:
    """Up to the end of a line, '' if there is none."""
    caller.settimeout(timeout)
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < _LONGEST:
            part = caller.recv(_LONGEST)
            if not part:
                break
            received += part
    except OSError:
        return ""
    return received.decode(errors="replace").strip() if received.endswith(b"\n") else ""
