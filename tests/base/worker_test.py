"""Worker processes: which are killed at any moment, and answer all the same."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from distill.base.worker import WorkerEnded, Workers


def nothing() -> None:
    pass


def double(x: int) -> int:
    return 2 * x


def echo(text: str) -> tuple[int, str]:
    return os.getpid(), text


def die(times: int, marks: str) -> int:
    """Killed so many times; then the process that answers."""
    if len(list(Path(marks).iterdir())) < times:
        Path(marks, str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def fail() -> None:
    raise OSError("a disk")


@pytest.fixture
def workers():
    made = Workers(1, nothing)
    yield made
    made.stop()
    assert not multiprocessing.active_children()


def test_process_that_is_killed_in_the_midst_is_replaced_once(workers, tmp_path):
    first = workers.submit(die, 0, str(tmp_path), timeout=9).result()
    second = workers.submit(die, 1, str(tmp_path), timeout=9).result()
    assert first != second and [path.name for path in tmp_path.iterdir()] == [str(first)]
    with pytest.raises(WorkerEnded):
        workers.submit(die, 3, str(tmp_path), timeout=9).result()
    assert workers.submit(double, 4, timeout=9).result() == 8


def test_process_that_is_killed_at_any_moment(workers):
    """Even as it takes its task or answers: one that holds a lock then would hold up all others."""
    killed, answered = [0], [0]

    def kill() -> None:
        for number in range(10):
            while answered[0] in killed:  # no call loses two processes
                time.sleep(0.001)
            time.sleep(0.007 * number)
            killed.append(answered[0])
            os.kill(answered[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    text = "x" * 10**6  # for which a pipe has no room: it is sent in parts
    while killer.is_alive():
        answered[0], said = workers.submit(echo, text, timeout=30).result()
        assert said == text
    assert len(set(killed)) == 11


def test_time_limit_and_errors(workers):
    with pytest.raises(OSError, match="a disk"):
        workers.submit(fail, timeout=9).result()
    with pytest.raises(TimeoutError):
        workers.submit(time.sleep, 60, timeout=0.1).result()
    assert workers.submit(double, 4, timeout=9).result() == 8


def test_process_outlives_the_thread_that_asked_first(workers, tmp_path):
    found = []
    for _ in range(2):
        ask = lambda: found.append(workers.submit(die, 0, str(tmp_path), timeout=9).result())  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        time.sleep(0.3)  # for a signal that would end the process
    assert found[0] == found[1]


def test_stopping_waits_for_nothing():
    workers = Workers(2, nothing)
    futures = [workers.submit(time.sleep, 60, timeout=90) for _ in range(3)]
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    start = time.monotonic()
    workers.stop()
    assert time.monotonic() - start < 20 and not multiprocessing.active_children()
    assert futures[2].cancelled()
