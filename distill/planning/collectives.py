"""Bytes that a compiled program sends between devices, read from its text.

The text is that of one device's program (SPMD). Loops are counted as often as they turn: the
compiler notes the trip count where it knows it.
"""

from __future__ import annotations

import functools
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_REGULAR_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")


def sent_bytes(text: str, num_devices: int, unknown_trips: int = 1) -> dict[str, float]:
    """Bytes that every device sends in one run of a program, by kind of collective.

    A ring's, which no way of doing it undercuts: (n - 1) / n of what is gathered or scattered in a
    group of n devices, twice that for an all-reduce.

    Args:
      text: `compiled.as_text()`.
      num_devices: size of groups that are not listed.
      unknown_trips: turns of loops whose number the compiler does not know.
    """
    computations, entry = _computations(text)

    @functools.cache
    def total(name: str) -> dict[str, float]:
        sums = dict.fromkeys(KINDS, 0.0)
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                sums[_kind(match[1], name)] += _bytes(line, match, name, num_devices)
            trips = 1
            if " while(" in line:
                known = _TRIPS.search(line)
                trips = int(known[1]) if known else unknown_trips
            for callee in _callees(line):
                for kind, size in total(callee).items():
                    sums[kind] += trips * size
        return sums

    return {kind: size for kind, size in total(entry).items() if size}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the first one that runs."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return computations, entry


def _callees(line: str) -> list[str]:
    names = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def _kind(operation: str, computation: str) -> str:
    """TPUs do a reduce-scatter as an all-reduce that is fused with the slicing of its result."""
    return "reduce-scatter" if _is_scatter(operation, computation) else operation


def _is_scatter(operation: str, computation: str) -> bool:
    return operation == "all-reduce" and computation.startswith("all-reduce-scatter")


def _bytes(line: str, match: re.Match, computation: str, num_devices: int) -> float:
    operation, is_start = match[1], match[2] is not None
    sizes = [_array_bytes(*array) for array in _ARRAY.findall(line[: match.start()])]
    group = _group_size(line, num_devices)
    result, others = sum(sizes), (group - 1) / group
    if operation == "collective-permute":
        return result / 2 if is_start else result  # a start's result repeats its operand
    if operation == "all-gather":
        return others * (result * group / (group + 1) if is_start else result)
    if operation == "reduce-scatter":
        return (group - 1) * (result / (group + 1) if is_start else result)
    if operation == "all-reduce" and not _is_scatter(operation, computation):
        return 2 * others * result
    return others * result


def _array_bytes(dtype: str, shape: str) -> float:
    elements = 1
    for size in shape.split(",") if shape else ():
        elements *= int(size)
    bits = int(re.search(r"\d+|$", dtype)[0] or 8)  # pred has a byte
    return elements * bits / 8


def _group_size(line: str, num_devices: int) -> int:
    if match := _LISTED_GROUP.search(line):
        return match[1].count(",") + 1
    if match := _REGULAR_GROUPS.search(line):
        return int(match[1])
    return num_devices
