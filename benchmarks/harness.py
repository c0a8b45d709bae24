"""What the benchmarks share: fair timing, peak memory, compiler estimates, tables, JSON rows.

Each implementation lives in a worker process of its own, so that its peak memory is its own. The
workers stay alive and are asked in turn for one repeat each, which is timed after two seconds of
untimed ones: whatever slows the machine down for a while falls on all of them, and no two run at
once. Their medians are compared. Where two do not fit
into a GPU's memory, `measure_alone` has one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import flags

from distill.base.errors import UserError
from distill.kernels.linear_divergence import loop

SETTLE_SECONDS = 2.0  # before each timed run

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """An implementation to measure. All of it is pickled: `build` stands at the top of a module.

    `build(*arguments)` runs in the worker and returns the function to time, which takes no
    arguments and returns nothing, when the device is done. `peak_bytes` runs that function and
    returns how far memory rose above what was in use just before.
    """

    implementation: str
    build: Callable[..., Callable[[], None]]
    arguments: tuple
    peak_bytes: Callable[[Callable[[], None]], int] | None = None  # None: of JAX's device


@dataclasses.dataclass(frozen=True)
class Measurement:
    """`seconds` is the median of `all_seconds`; None, as is the peak, where `failure` says why."""

    seconds: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None
    all_seconds: tuple[float, ...] = ()


def measure_alone(jobs: Sequence[Job], repeats: int) -> dict[str, Measurement]:
    """Measurements by implementation, whose worker ends before the next one starts."""
    parts = [measure([job], repeats) for job in jobs]
    return {name: measured for part in parts for name, measured in part.items()}


def measure(jobs: Sequence[Job], repeats: int) -> dict[str, Measurement]:
    """Measurements by implementation, of interleaved repeats."""
    workers = {}
    try:
        for job in jobs:  # one after the other: they also compile and warm up undisturbed
            workers[job.implementation] = _Worker(job)
            workers[job.implementation].answer()
        for _ in range(repeats):
            for worker in workers.values():
                worker.repeat()
        return {name: worker.measurement() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()


class _Worker:
    """The parent's side of a worker process."""

    def __init__(self, job: Job):
        # Not forked: JAX and CUDA do not survive that.
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, job), daemon=True)
        self._process.start()
        remote.close()
        self._failure = None
        self._answers = []

    def answer(self, request: bool | None = None) -> None:
        """Waits for a number: the peak first, then, on request, seconds."""
        try:
            if request:
                self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            answer = f"the process died with exit code {self._process.exitcode}"
        if isinstance(answer, str):
            self._failure = answer
        else:
            self._answers.append(answer)

    def repeat(self) -> None:
        if self._failure is None:
            self.answer(request=True)

    def measurement(self) -> Measurement:
        if self._failure is not None:
            return Measurement(failure=self._failure)
        peak_bytes, *seconds = self._answers
        return Measurement(statistics.median(seconds), peak_bytes, all_seconds=tuple(seconds))

    def stop(self) -> None:
        self._connection.close()  # ends the worker, which waits for the next request
        self._process.join(timeout=10)
        self._process.kill()


def _serve(connection, job: Job) -> None:
    """The worker's side: the peak, then the seconds of one run per request; a text on failure."""
    try:
        run = job.build(*job.arguments)
        run()  # compiles, where `build` has not
        connection.send((job.peak_bytes or peak_bytes)(run))
        while connection.recv():
            _settle(run)
            start = time.perf_counter()
            run()
            connection.send(time.perf_counter() - start)
    except EOFError:  # the parent is done, or gone
        pass
    except Exception as error:
        traceback.print_exc()
        connection.send(one_line(error))


def _settle(run: Callable[[], None]) -> None:
    """At least one untimed run, and more until the machine has got over what the others did.

    Caches went cold, the kernel may have reclaimed pages, and the host of a virtual machine takes
    processor time (`steal` in /proc/stat) for memory that was given back, about a second after.
    """
    end = time.perf_counter() + SETTLE_SECONDS
    run()
    while time.perf_counter() < end:
        run()


def start_process(command: Sequence[str], log: Path) -> tuple[Callable[[], str], int]:
    """A process that answers every line with one, as `ask() -> answer`, and its number.

    RuntimeError, with the end of the log, where it has ended instead.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(log, "w"), text=True
    )

    def ask() -> str:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("go\n")
            process.stdin.flush()
        if not (answer := process.stdout.readline()):
            raise RuntimeError(f"it ended: {log.read_text().strip()[-150:]}")
        return answer

    return ask, process.pid


def one_line(error: Exception) -> str:
    """What failed, short enough for a line below the table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def peak_bytes(run: Callable[[], None]) -> int:
    """How far the memory of JAX's default device rises during `run`.

    On a GPU the allocator's peak is that of the whole process: hold nothing before the first run
    that is released again, i.e. compile (which tries out algorithms) before making the inputs.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return resident_peak_bytes(run)
    before = device.memory_stats()["bytes_in_use"]
    run()
    return device.memory_stats()["peak_bytes_in_use"] - before


def torch_peak_bytes(run: Callable[[], None]) -> int:
    """How far PyTorch's memory on a GPU rises during `run`."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def resident_peak_bytes(run: Callable[[], None], process: str = "self") -> int:
    """How far the resident memory of a process, a number or this one, rises during `run`."""
    gc.collect()
    with open(f"/proc/{process}/clear_refs", "w") as file:
        file.write("5")  # sets the high-water mark to what is resident now
    before = _status_bytes("VmRSS", process)
    run()
    return _status_bytes("VmHWM", process) - before


def _status_bytes(field: str, process: str) -> int:
    with open(f"/proc/{process}/status") as file:
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1])


def build_matrix_product(size: int, dtype: str) -> Callable[[], None]:
    """A square matrix product: the yardstick for what the device can do."""
    # Random numbers: a GPU multiplies constant ones faster than it ever will real ones.
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)

    def run():
        jax.block_until_ready(product(x, x))

    return run


def select_platform() -> str:
    """'cpu', 'gpu' or 'tpu': what JAX finds here, and what the workers will use.

    Asked in another process: this one must not hold the device.
    """
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    platform = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    if platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # the workers need not look for others again
    # Workers share a GPU, and a peak is only visible if memory is taken as it is needed.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return platform


@dataclasses.dataclass(frozen=True)
class Estimate(Measurement):
    """The compiler's estimate: `peak_bytes` are the program's temporaries. See `estimate`."""

    flops: float | None = None


def estimate(function: Callable, *arguments: jax.ShapeDtypeStruct) -> Estimate:
    """The compiler's estimate for one call; `arguments` carry the device in their sharding.

    The sum over operations of max(operations / peak, bytes / bandwidth), where the compiler counts
    a loop's body once, whatever the trips: seconds = outside + body. What is outside are passes
    over arrays, so its share is bytes / bandwidth, and the loop over the fused loss's chunks, all
    of whose tokens have weight, takes outside + trips * body. (Two loops in a row in place of one
    do not tell: they are laid out and fused differently.) Pallas
    kernels with a `cost_estimate` are in the sum like any operation, so nothing is added for them;
    one without would be missing and is an error.
    """
    trips = set()
    walk_chunks = loop._walk_chunks

    def recorded_walk(step, carry, tokens, size):
        trips.add(-(-tokens.targets_t.shape[0] // size))
        return walk_chunks(step, carry, tokens, size)

    jax.clear_caches()  # a function traced before is not traced again
    try:
        with mock.patch.object(loop, "_walk_chunks", recorded_walk):
            compiled = jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:  # it does not fit into the chip's memory
        return Estimate(failure=one_line(error))
    text = compiled.as_text()
    _check_kernels_are_counted(text)
    seconds, flops = _counted(compiled, text)
    if trips:
        (num_trips,) = trips  # loops of different lengths would have to be told apart
        outside = _entry_bytes(text) / _bandwidth(arguments[0].sharding)
        seconds = outside + num_trips * (seconds - outside)
        flops = num_trips * flops
    return Estimate(seconds, compiled.memory_analysis().temp_size_in_bytes, flops=flops)


def _counted(compiled, text: str) -> tuple[float, float]:
    """(seconds, operations) as the compiler counts them."""
    analysis = compiled.cost_analysis()
    # An operation of unknown cost counts as -1: there is one kind of it, and it moves nothing.
    unknown = text.count('custom_call_target="ConcatBitcast"')
    return analysis["optimal_seconds"] + unknown, analysis["flops"] + unknown


def _check_kernels_are_counted(text: str) -> None:
    for line in text.splitlines():
        if '"tpu_custom_call"' in line and '"cost_estimate"' not in line:
            raise ValueError(f"a kernel without cost_estimate: {line.split(' = ')[0].strip()}")


def _bandwidth(sharding) -> float:
    """Bytes per second that the compiler reckons with: Google's for v6e, 0.9 of it for v5e."""
    x = jax.ShapeDtypeStruct((1 << 13, 1 << 13), "float32", sharding=sharding)
    analysis = jax.jit(lambda x: x + 1).lower(x).compile().cost_analysis()
    return analysis["bytes accessed"] / analysis["optimal_seconds"]


_OPERATION = re.compile(r"%(\S+) = (\S+?)\[([\d,]*)\]\S* ([\w-]+)\((.*?)\)[,\s]")
_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "custom-call"}


def _entry_bytes(text: str) -> float:
    """Bytes read and written by the operations of a program that are in none of its loops."""
    sizes, total = {}, 0
    for line in text[text.index("\nENTRY ") :].splitlines():
        # Only single arrays: loops and tuples have a parenthesis for a type.
        if match := _OPERATION.search(line):
            name, dtype, shape, operation, operands = match.groups()
            elements = math.prod(int(size) for size in shape.split(",") if size)
            sizes[name] = elements * int(re.search(r"\d+|$", dtype)[0] or 8) / 8
            if operation not in _FREE:
                read = sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
                total += sizes[name] + read
    return total


def compare(name: str, measurements: dict[str, Measurement], baseline: str) -> list[Row]:
    """A row for each implementation; `ratio` and `peak_ratio` are its parts of the baseline's."""
    base = measurements[baseline]
    return [
        {
            "name": name,
            "implementation": implementation,
            "seconds": measured.seconds,
            "ratio": _ratio(measured.seconds, base.seconds),
            "peak_bytes": measured.peak_bytes,
            "peak_ratio": _ratio(measured.peak_bytes, base.peak_bytes),
        }
        for implementation, measured in measurements.items()
    ]


def _ratio(value, base):
    return None if value is None or base is None else value / base


def print_rows(rows: Sequence[Row]) -> None:
    """Rows of the same keys as aligned text, a column for each key."""
    table = [[key.replace("_", " ") for key in rows[0]]]
    table += [[_cell(key, value) for key, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _cell(key: str, value) -> str:
    if value is None:
        return "-"
    if key in ("seconds", "fastest", "slowest"):
        return f"{value:.4f}"
    if key.endswith("bytes"):
        return f"{value / 1e9:.3f}e9"
    if key.endswith("error"):
        return f"{value:.1e}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def failures(name: str, measurements: dict[str, Measurement]) -> list[str]:
    """A line for each implementation that has no numbers."""
    failed = {key: value.failure for key, value in measurements.items() if value.failure}
    return [f"{name}, {implementation}: {why}" for implementation, why in failed.items()]


_JSON = flags.DEFINE_string("json", None, "File to write the rows to.")


def check_json_path() -> None:
    """UserError, before anything is measured, if `write_json` will fail."""
    if path := _JSON.value:
        try:
            open(path, "a").close()
        except OSError as error:
            raise UserError(f"--json={path}: {error.strerror}") from None


def write_json(rows: Sequence[Row]) -> None:
    """The rows as one JSON list, if --json asks for it."""
    if path := _JSON.value:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)
            file.write("\n")
