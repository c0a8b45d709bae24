"""A run's folder belongs to one run at a time, and is seen by all of its processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from distill.base import processes
from distill.base.errors import UserError

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def claim_workdir(workdir: Path) -> Iterator[None]:
    """Holds the folder for this run; the kernel lets go when the process dies, in whatever way.

    The folder is made if need be, and removed again if nothing came into it. Of several processes,
    the first does all that, and the others make sure that they see it.

    Raises:
      UserError: another run has it, it cannot be written to, or not all processes see it.
    """
    with contextlib.ExitStack() as held:
        if processes.is_first():
            held.enter_context(_claim(workdir))
        processes.sync(f"claimed {workdir}")
        if not (workdir / LOCK).exists():
            raise UserError(
                f"this process does not see the workdir {workdir} of process 0: all processes need "
                "one folder, on a file system that they share"
            )
        yield


@contextlib.contextmanager
def _claim(workdir: Path) -> Iterator[None]:
    lock, made = workdir / LOCK, not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _open_lock(lock)
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir} ({error.strerror}): pass another --workdir"
        ) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)
        if made:
            with contextlib.suppress(OSError):  # not empty: the rule
                workdir.rmdir()


def _open_lock(lock: Path) -> int:
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 100).decode(errors="replace")
            os.close(file)
            raise UserError(
                f"another run ({owner}) is using the workdir {lock.parent}: wait for its end, or "
                "pass another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            print(f"{lock.parent} is on a file system without locks: start no second run in it")
        if _is_same_file(file, lock):
            break
        os.close(file)  # the run before removed it between our opening and locking
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {os.uname().nodename}".encode())
    return file


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
