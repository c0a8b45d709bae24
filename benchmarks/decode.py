"""The decode loop at one slot and at many, beside a plain read of the same weights.

    python -m benchmarks.decode [--slots=1,8,64] [--json=PATH] [--repeats=N]

How to read it. Every slot has a prompt and decodes 256 tokens, nothing ends earlier. `ms per step`
is what the engine spends in decode calls, host included, over the steps; the fewest of the repeats,
after runs that are not timed. `of read` is the share of a plain read's bandwidth: what a step must
read (all weights, and keys and values of every slot's tokens) over its time, beside one program
that adds up all weights, timed in the same process. The products count from some number of slots
on, so the share falls then.

On a CPU: a Qwen2 of 20M parameters in float32 (benchmarks/sampling.py's), the first two CPUs. On a
GPU: Qwen2.5-1.5B's shape in bfloat16, 1 to 256 slots.
"""

from __future__ import annotations

import os

from absl import flags

from benchmarks import harness
from benchmarks.decode_jobs import RESPONSE, measured
from benchmarks.sampling_jobs import CPU_WORKLOAD, CPUS, GPU_WORKLOAD
from distill.base.errors import UserError
from distill.config import cli

CPU_SLOTS = ["1", "8", "64"]
GPU_SLOTS = [str(1 << power) for power in range(9)]

_SLOTS = flags.DEFINE_list("slots", [], "Numbers of slots; none: 1, 8, 64, on a GPU 1 to 256.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each.", lower_bound=1)


def main() -> None:
    harness.check_json_path()
    if wrong := [slots for slots in _SLOTS.value if not slots.isdecimal() or not int(slots)]:
        raise UserError(f"--slots={wrong[0]}: numbers from 1 on, such as 1,8,64")
    if is_cpu := harness.select_platform() == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    workload = CPU_WORKLOAD if is_cpu else GPU_WORKLOAD
    slots = _SLOTS.value or (CPU_SLOTS if is_cpu else GPU_SLOTS)
    rows = measured(workload, list(map(int, slots)), RESPONSE, _REPEATS.value)
    harness.print_rows(rows)
    harness.write_json(rows)


if __name__ == "__main__":
    cli.run(main)
