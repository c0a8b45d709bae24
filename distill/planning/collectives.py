"""Bytes that a compiled program sends between devices, read from its text.

The text is that of one device's program (SPMD). What is in a loop counts as often as the loop
turns: compilers note the trip count, or leave a condition that compares a counter with a constant.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_REGULAR_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? (\w[\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")

# Of each collective, by what tells it from others: what it is, and the bytes that it sends.
Sent = dict[str, tuple[str, float]]


def sent_bytes(
    text: str, num_devices: int, unknown_trips: Sequence[float] = ()
) -> dict[str, float]:
    """Bytes that every device sends in one run of a program, by kind of collective.

    A ring's, which no way of doing it undercuts: (n - 1) / n of what is gathered or scattered in a
    group of n devices, twice that for an all-reduce.

    Args:
      text: `compiled.as_text()`.
      num_devices: size of groups that are not listed.
      unknown_trips: turns of the outermost loops whose number cannot be read, in the order in
        which they run. Any others of which it cannot be read count once.
    """
    computations, entry = _computations(text)
    given = iter(unknown_trips)

    @functools.cache
    def total(name: str, is_outermost: bool) -> Sent:
        sent: Sent = {}
        lines = computations.get(name, ())
        if _is_progress(name, lines):
            return sent
        # TPUs start and end a collective in two fusions, of one channel. Elsewhere a channel tells
        # nothing: all that shard_map sends is on the first.
        by_channel = any('"AsyncCollective' in line for line in lines)
        for number, line in enumerate(lines):
            if match := _COLLECTIVE.search(line):
                channel = _CHANNEL.search(line) if by_channel else None
                key = channel[1] if channel else f"{name}:{number}"
                sent[key] = _kind(match[1], name), _bytes(line, match, name, num_devices)
            elif loop := _LOOP.search(line):
                trips = _trips(line, *(computations[each] for each in loop.groups()))
                if trips is None:
                    trips = next(given, 1) if is_outermost else 1
                for callee in loop.groups():
                    for key, (kind, size) in total(callee, False).items():
                        sent[f"{number}/{key}"] = kind, trips * size
            else:
                for callee in _callees(line):
                    sent |= total(callee, is_outermost)
        return sent

    sums = dict.fromkeys(KINDS, 0.0)
    for kind, size in total(entry, True).values():
        sums[kind] += size
    return {kind: size for kind, size in sums.items() if size}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the one that the program enters."""
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


def _is_progress(name: str, lines: Sequence[str]) -> bool:
    """Whether it goes on with a collective, beside other work, that another one has started."""
    in_between = name.startswith("async_collective_fusion")
    return in_between and not any('"AsyncCollectiveStart"' in line for line in lines)


# ------------------------------------------------------------------------------ turns of a loop


def _trips(line: str, condition: list[str], body: list[str]) -> int | None:
    """Turns of a loop; None if they are not known before it runs."""
    if known := _TRIPS.search(line):
        return int(known[1])
    tests, root = _definitions(condition)
    if root is None or tests[root][0] != "compare" or "direction=LT" not in tests[root][1]:
        return None
    counter, limit = (tests.get(name) for name in _NAME.findall(tests[root][1])[:2])
    if counter is None or limit is None or limit[0] != "constant":
        return None
    index = re.search(r"index=(\d+)", counter[1])
    return index and -(-_constant(limit) // _step(body, int(index[1])))


def _step(body: list[str], index: int) -> int:
    """What a loop's body adds to the counter at `index` of its state."""
    steps, root = _definitions(body)
    results = _NAME.findall(steps[root][1]) if root else []
    operation, operands = steps.get(results[index], ("", "")) if index < len(results) else ("", "")
    added = [steps[name] for name in _NAME.findall(operands)[:2] if name in steps]
    constants = [_constant(each) for each in added if each[0] == "constant"]
    return constants[0] if operation == "add" and len(constants) == 1 else 1


def _definitions(lines: list[str]) -> tuple[dict[str, tuple[str, str]], str | None]:
    """Operation and the rest of the line by name, and the name of the result."""
    definitions, root = {}, None
    for line in lines:
        if match := _DEFINED.match(line):
            definitions[match[1]] = match[2], match[3]
            root = match[1] if line.lstrip().startswith("ROOT") else root
    return definitions, root


def _constant(definition: tuple[str, str]) -> int:
    return int(definition[1].partition(")")[0])


# ------------------------------------------------------------------------------ one collective


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
    elements = math.prod(int(size) for size in shape.split(",") if size)
    bits = int(re.search(r"\d+|$", dtype)[0] or 8)  # pred has a byte
    return elements * bits / 8


def _group_size(line: str, num_devices: int) -> int:
    if match := _LISTED_GROUP.search(line):
        return match[1].count(",") + 1
    if match := _REGULAR_GROUPS.search(line):
        return int(match[1])
    if match := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(
            int(part or sizes[axis])
            for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        )
    return num_devices
