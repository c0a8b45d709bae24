"""Bytes that a compiled program sends between devices, read from its text.

The text is that of one device's program (SPMD). What is in a loop counts as often as the loop runs:
compilers note the trip count, or leave a condition that compares a counter with a constant.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) (\w[\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_REGULAR_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")


class _Instruction(NamedTuple):
    result: str  # its type
    operation: str
    rest: str  # operands, then attributes


_Computation = dict[str, _Instruction]  # by name, the root last
# Of each collective, by what tells it from others: what it is, and the bytes that it sends.
_Sent = dict[str, tuple[str, float]]


def sent_bytes(
    text: str, num_devices: int, unknown_trips: Sequence[float] = ()
) -> dict[str, float]:
    """Bytes that every device sends in one run of a program, by kind of collective.

    A ring's, which no way of doing it undercuts: (n - 1) / n of what is gathered or scattered in a
    group of n devices, twice that for an all-reduce.

    Args:
      text: `compiled.as_text()`.
      num_devices: size of groups that are not listed.
      unknown_trips: runs of the outermost loops whose number cannot be read, in the order in
        which they run. Any others of which it cannot be read count once.
    """
    computations, entry = _computations(text)
    given = iter(unknown_trips)

    @functools.cache
    def total(name: str, is_outermost: bool) -> _Sent:
        sent: _Sent = {}
        computation = computations.get(name, {})
        starts = any('"AsyncCollectiveStart"' in each.rest for each in computation.values())
        if name.startswith("async_collective_fusion") and not starts:
            return sent  # goes on, beside other work, with what another one has started
        # TPUs start and end a collective in two fusions, of one channel. Elsewhere a channel tells
        # nothing: all that shard_map sends is on the first.
        by_channel = any('"AsyncCollective' in each.rest for each in computation.values())
        for key, instruction in computation.items():
            operation, rest = instruction.operation, instruction.rest
            if operation.removesuffix("-start") in KINDS:
                channel = _CHANNEL.search(rest) if by_channel else None
                key = channel[1] if channel else f"{name}:{key}"
                sent[key] = _collective(instruction, name, num_devices)
            elif operation == "while":
                parts = _LOOP.findall(rest)[0]
                trips: float | None = _trips(rest, *(computations[part] for part in parts))
                if trips is None:
                    trips = next(given, 1) if is_outermost else 1
                for part in parts:
                    for inner, (kind, size) in total(part, False).items():
                        sent[f"{key}/{inner}"] = kind, trips * size
            else:
                branches = ", ".join(_BRANCHES.findall(rest)).replace("%", "")
                for callee in (*_CALLED.findall(rest), *filter(None, branches.split(", "))):
                    sent |= total(callee, is_outermost)
        return sent

    sums = dict.fromkeys(KINDS, 0.0)
    for kind, size in total(entry, True).values():
        sums[kind] += size
    return {kind: size for kind, size in sums.items() if size}


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """All of them by name, and the name of the one that the program enters."""
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[1], {})
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            current[match[2]] = _Instruction(*match.groups()[2:])
    return computations, entry


def _trips(loop: str, condition: _Computation, body: _Computation) -> int | None:
    """How often a loop runs; None if that is not known before."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    test = list(condition.values())[-1]
    if test.operation != "compare" or "direction=LT" not in test.rest:
        return None
    counter, limit = (condition.get(name) for name in _NAME.findall(test.rest)[:2])
    index = counter and re.search(r"index=(\d+)", counter.rest)
    if not index or limit is None or limit.operation != "constant":
        return None
    return -(-_constant(limit) // _step(body, int(index[1])))


def _step(body: _Computation, index: int) -> int:
    """What a loop's body adds to the counter at `index` of its state."""
    results = _NAME.findall(list(body.values())[-1].rest)
    added = body.get(results[index]) if index < len(results) else None
    if added is None or added.operation != "add":
        return 1
    operands = [body[name] for name in _NAME.findall(added.rest)[:2] if name in body]
    constants = [_constant(each) for each in operands if each.operation == "constant"]
    return constants[0] if len(constants) == 1 else 1


def _constant(instruction: _Instruction) -> int:
    return int(instruction.rest.partition(")")[0])


def _collective(instruction: _Instruction, computation: str, num_devices: int) -> tuple[str, float]:
    """Its kind, and the bytes that every device sends for it."""
    kind = instruction.operation.removesuffix("-start")
    group = _group_size(instruction.rest, num_devices)
    result = sum(_array_bytes(*array) for array in _ARRAY.findall(instruction.result))
    others = (group - 1) / group
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        # TPUs do a reduce-scatter as an all-reduce that is fused with the slicing of its result.
        return "reduce-scatter", others * result
    if kind != instruction.operation:  # a start's result repeats its operand
        operands = {"collective-permute": 1, "all-gather": 1 / group, "reduce-scatter": group}
        result /= 1 + operands.get(kind, 0)
    factors = {"all-reduce": 2 * others, "reduce-scatter": group - 1, "collective-permute": 1}
    return kind, factors.get(kind, others) * result


def _array_bytes(dtype: str, shape: str) -> float:
    elements = math.prod(int(size) for size in shape.split(",") if size)
    bits = int((re.findall(r"\d+", dtype) or ["8"])[0])  # pred has a byte
    return elements * bits / 8


def _group_size(attributes: str, num_devices: int) -> int:
    if match := _LISTED_GROUP.search(attributes):
        return match[1].count(",") + 1
    if match := _REGULAR_GROUPS.search(attributes):
        return int(match[1])
    if match := _MESH_GROUPS.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(
            int(part or sizes[axis])
            for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        )
    return num_devices
