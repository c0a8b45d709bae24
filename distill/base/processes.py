"""Several processes as one run: how they find each other, agree, and end together.

Every process runs the same program on the same host data, and arrays span the devices of all. What
one process alone knows (its clock, its files, a signal) is agreed on here, through the key-value
store that JAX runs in process 0. That needs no device: nobody waits for a step under way. A run of
one process joins nothing, and all of this is free.

JAX's own preemption sync hears SIGTERM only, and its heartbeat ends the other processes with stack
traces. So signals and deaths are told here, and JAX's heartbeat is left for the death of process 0.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np

from distill.base import messages
from distill.base.errors import UserError
from distill.base.roll_call import call_the_roll
from distill.base.starting import find_others

T = TypeVar("T")

_PARTING = 10  # seconds for all to hear that the run ends
_HEARING = 0.5  # seconds between two looks for that
_ROUNDS = 1000  # exchanges after which the older ones are removed
_LEFT, _ALIVE, _STOP = "distill/left/", "distill/alive/", "distill/stop/"


@dataclasses.dataclass(frozen=True)
class _Run:
    """This process in a run of several."""

    client: Any  # of the coordination service; JAX has no public name for it, Orbax takes the same
    process: int  # this one's number there
    num_processes: int
    silence: int  # seconds without a sign of life after which a process counts as dead
    side: range  # the processes that agree with this one: all, until `divide`
    # Of exchanges, by the name of the thread: in one, they have an order.
    rounds: defaultdict[str, Iterator[int]] = dataclasses.field(
        default_factory=lambda: defaultdict(itertools.count)
    )
    leaving: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # by this process
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)  # well

    @property
    def its_side(self) -> str:
        """In names of what is only for that side."""
        return f"{self.side[0]}-{self.side[-1]}"


_run: _Run | None = None


# ------------------------------------------------------------------------------------- joining


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
    silence: int = 100,
) -> None:
    """Joins the other processes of the run; a plain single process does nothing here.

    What is not given is found by JAX where Slurm, Open MPI or a TPU pod says it. To be called
    before JAX is used for anything. Then, only the first process prints. `timeout` is in seconds
    for the others to come, `silence` in seconds without a sign of life after which the run ends.

    Raises:
      UserError: the arguments contradict each other, or somebody did not come in time.
    """
    others = find_others(coordinator_address, num_processes, process_id, timeout)
    if others is not None:
        _connect(*others, timeout, silence)


def _connect(address: str, count: int, number: int, devices, timeout: int, silence: int) -> None:
    """Connects this process, which has these local devices or all, to the others."""
    import jax
    from jax._src import distributed

    global _run
    if number == 0:
        print(
            f"waiting for all {count} processes (--num_processes=1 runs this one alone)", flush=True
        )
    call_the_roll(address, count, number, timeout)
    # JAX would take SIGTERM from `Interrupts`.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX ends a process with stack traces: only where `_watch` has not.
    jax.distributed.initialize(
        address,
        count,
        number,
        devices,
        "deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=2 * silence + _PARTING,
    )
    _run = _Run(distributed.global_state.client, number, count, silence, range(count))
    watcher = threading.Thread(target=_watch, args=(_run,), daemon=True)
    watcher.start()
    atexit.register(_hang_up, _run, watcher)
    if not is_first():
        sys.stdout = open(os.devnull, "w")


# ------------------------------------------------------------------------------------ agreeing


def several() -> bool:
    """Whether this process has joined others."""
    return _run is not None


def divide(trainers: int) -> bool:
    """Makes two sides, of the first so many processes and of the others; whether here is the other.

    From here on, all below but `send` and `receive` is among the processes of a side, each of which
    has a first one. They still end together.
    """
    global _run
    assert _run is not None  # so there are others
    second = _run.process >= trainers
    side = range(trainers, _run.num_processes) if second else range(trainers)
    _run = dataclasses.replace(_run, side=side)
    return second


def side() -> set[int] | None:
    """The processes that agree with this one; None for one that is alone."""
    return None if _run is None else set(_run.side)


def is_first() -> bool:
    """Whether this process is the one that writes and decides."""
    return _run is None or _run.process == _run.side[0]


def share(count: int) -> slice:
    """This process's share of `count` things."""
    if _run is None:
        return slice(None)
    return slice(_run.process - _run.side[0], count, len(_run.side))


def gather(value: Any) -> list[Any]:
    """The values of all processes, the first one's first; made of what JSON has.

    All processes call this, in threads of the same name, in the same order there.
    """
    if _run is None:
        return [value]
    folder = _next_round(_run) + "/"
    _run.client.key_value_set(f"{folder}{_run.process}", json.dumps(value))
    _meet(_run, f"gather/{threading.current_thread().name}")
    said = dict(_run.client.key_value_dir_get(folder))
    return [json.loads(said[f"{folder}{process}"]) for process in _run.side]


def from_first(function: Callable[[], T]) -> T:
    """What the first process's call of `function` returns; the others do not call it.

    All processes call this as they do `gather`, but the first one waits for nobody. A UserError or
    RunStopped of the first one is raised in all.
    """
    if _run is None:
        return function()
    key = _next_round(_run)
    if is_first():
        said = messages.said(function)
        _run.client.key_value_set(key, said)
    else:
        said = messages.hear(_run.client.blocking_key_value_get, key)
    return messages.value(said)


def arrays_from_first(
    function: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """As `from_first`, of arrays by name; all wait until all have them."""
    if _run is None:
        return dict(function())
    run = _run
    made: dict[str, np.ndarray] = {}
    folder = f"distill/arrays/{run.its_side}/{threading.current_thread().name}/"

    def tell() -> int:
        made.update(function())
        return messages.tell_arrays(run.client, folder, made)

    size = from_first(tell)
    if not is_first():
        made = messages.told_arrays(run.client, folder, size)
    _meet(run, folder)
    if is_first():
        run.client.key_value_delete(folder)
    return made


def send(name: str, function: Callable[[], Mapping[str, np.ndarray]]) -> None:
    """Lets one process `receive` what the function makes, or its UserError or RunStopped.

    A name is used once.
    """
    run, folder = _run, f"distill/sent/{name}/"
    assert run is not None
    said = messages.said(lambda: messages.tell_arrays(run.client, folder, function()))
    run.client.key_value_set(f"{folder}size", said)


def receive(name: str) -> dict[str, np.ndarray]:
    """What was sent under this name, or will be, for which it waits as long as it takes."""
    run, folder = _run, f"distill/sent/{name}/"
    assert run is not None
    get = run.client.blocking_key_value_get
    size = messages.value(messages.hear(get, f"{folder}size", math.inf))
    made = messages.told_arrays(run.client, folder, size)
    run.client.key_value_delete(folder)
    return made


def was_sent(name: str) -> bool:
    """Whether `receive` would not wait."""
    import jax

    assert _run is not None
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return bool(_run.client.key_value_try_get(f"distill/sent/{name}/size"))
    return False


def _next_round(run: _Run) -> str:
    """The key of this exchange, the same in all processes of a side."""
    thread = threading.current_thread().name
    generation, place = divmod(next(run.rounds[thread]), _ROUNDS)
    folder = f"distill/round/{run.its_side}/{thread}"
    if generation and not place:
        _meet(run, f"generation/{thread}")  # all are here, so all have read what came before
        if is_first():
            run.client.key_value_delete(f"{folder}/{generation - 1}/")
    return f"{folder}/{generation}/{place}"


def ask_to_stop(reason: str) -> None:
    """Lets `stop_asked` say so in the first process, whatever this one is doing."""
    if _run is not None:
        with contextlib.suppress(Exception):  # process 0 is gone: this one will be ended
            _run.client.key_value_set(f"{_STOP}reason", reason, allow_overwrite=True)


def stop_asked() -> str:
    """What some process has given to `ask_to_stop`, '' before; for the first."""
    asked = [] if _run is None else _run.client.key_value_dir_get(_STOP)
    return asked[0][1] if asked else ""


def check_same(what: str, values: dict[str, Any]) -> None:
    """Raises UserError unless all processes call this with the same values."""
    first, *others = gather(values)
    for process, theirs in enumerate(others, start=1):
        differing = [key for key in first | theirs if first.get(key) != theirs.get(key)]
        if differing:
            key = differing[0]
            raise UserError(
                f"process {process} has another {what} than process 0: {key} is "
                f"{theirs.get(key)!r} there, {first.get(key)!r} here; start all processes by the "
                "same command, on the same files"
            )


def sync(name: str) -> None:
    """Waits until all processes have come here; in any thread, with a name used once at a time."""
    if _run is not None:
        _meet(_run, name)


def _meet(run: _Run, name: str) -> None:
    barrier = f"distill/{run.its_side}/{name}"
    run.client.wait_at_barrier(barrier, messages.LONGEST_WAIT * 1000, list(run.side))


# -------------------------------------------------------------------------------------- ending


def leave(line: str, status: int) -> NoReturn:
    """Ends this process at once, and all others of the run; all of them show `line`."""
    run = _run
    if run is None:
        _exit(line, status)
    said = json.dumps([run.process, line, status])
    _part(run, line, status, lambda: run.client.key_value_set(f"{_LEFT}{run.process}", said))


def wait_for_the_cause(error: BaseException) -> None:
    """Ends this process if `error` comes of the end of another one, which is noticed later."""
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        assert _run is not None  # another one is there
        time.sleep(1.5 * _run.silence + _PARTING + 2)


def _watch(run: _Run) -> None:
    """Tells that this process is there; ends it when another one has left or, in process 0, died.

    The main thread may be waiting for that one.
    """
    mine, last = f"{_ALIVE}{run.process}", -math.inf
    heard: dict[tuple[str, str], float] = {}
    while not run.ended.wait(_HEARING):
        # A look that fails is followed by others; where process 0 is gone, JAX ends this one.
        with contextlib.suppress(Exception):
            if said := run.client.key_value_dir_get(_LEFT):
                number, line, status = json.loads(said[0][1])
                _part(run, f"process {number}: {line}", status)
            now = time.monotonic()
            if now - last < run.silence / 10:
                continue
            last = now
            run.client.key_value_set(mine, str(now), allow_overwrite=True)
            if run.process == 0:
                # When each process's last sign came, of those that have not ended.
                signs = run.client.key_value_dir_get(_ALIVE)
                heard = {sign: heard.get(sign, now) for sign in signs}
                (process, _), since = min(heard.items(), key=lambda item: item[1])
                if now - since > run.silence:
                    leave(_death(process.removeprefix(_ALIVE), run.silence), 1)
    with contextlib.suppress(Exception):
        run.client.key_value_delete(mine)


def _death(process: str, silence: int) -> str:
    return (
        f"error: process {process} has shown no sign of life for {silence} s: it was killed, or "
        "its host is gone. Start all processes again: the run goes on from its last checkpoint"
    )


def _part(run: _Run, line: str, status: int, tell: Callable[[], None] = lambda: None) -> NoReturn:
    """Ends this process, but waits a little for all to know that the run has ended."""
    run.leaving.acquire()  # a thread that comes second waits here for the end
    with contextlib.suppress(Exception):  # whatever has become of the others
        tell()
        run.client.wait_at_barrier("distill/parting", _PARTING * 1000)
        if run.process == 0:  # the others are still being told, by this one
            time.sleep(2 * _HEARING)
    _exit(line, status)


def _exit(line: str, status: int) -> NoReturn:
    """In one write, on a line of its own and the last, whatever other threads are writing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the disk may be full
            stream.flush()
    os.write(2, f"\n{line}\n".encode())
    os._exit(status)


def _hang_up(run: _Run, watcher: threading.Thread) -> None:
    """Before JAX closes the line on which the thread speaks."""
    run.ended.set()
    watcher.join()
