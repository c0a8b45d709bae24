"""How time and memory grow: with vocabulary, row length, depth, teachers, LoRA's rank, responses.

    python -m benchmarks.growth [--json=PATH] [--repeats=N] [--only=TEXT,...]

How to read it. One thing grows at a time, the rest stays. `work` is what cannot be avoided: for
updates and decoding the operations of the products and of attention's causal half, for packing the
sequences. `seconds` are the processor's, the fewest of a few runs on one CPU in one thread, so that
others on the machine hardly matter. `temporary` are the bytes that the compiled update takes beside
its arguments; of decoding, its cache. `compiling` is processor time, too. Sizes marked with `-` are
compiled and not run.

Below, the exponent of each: the slope of log against log over the upper half of the sizes. What
grows faster than its work, or faster than in proportion where it is memory or compilation, by more
than the tolerance, is marked as a fault, and the command exits with 1.

The models are small (two layers of width 128), so that all takes a few minutes: exponents are what
is looked for, not rates.
"""

from __future__ import annotations

import os
import sys

from absl import flags

from benchmarks import harness
from benchmarks.growth_jobs import GROWTH, Point, exponents, faults, measured
from distill.base.errors import UserError
from distill.config import cli

_ONLY = flags.DEFINE_list("only", [""], "Only what grows with something that has one of these.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each size.", lower_bound=1)


def main() -> None:
    harness.check_json_path()
    names = [name for name in GROWTH if any(text in name for text in _ONLY.value)]
    if not names:
        raise UserError(f"--only={','.join(_ONLY.value)}: there are {', '.join(GROWTH)}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the workers inherit both
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    rows: list[harness.Row] = []
    fitted, wrong = [], []
    for name in names:
        points = dict(measured(name, _REPEATS.value))
        rows += [_row(name, size, point) for size, point in points.items()]
        harness.print_rows(rows[-len(points) :])
        print(flush=True)
        found = exponents(points)
        fitted.append({"exponents": name} | found)
        wrong += faults(name, found)
    harness.print_rows(fitted)
    print(*wrong, sep="\n")
    harness.write_json(rows + fitted)
    sys.exit(1 if wrong else 0)


def _row(name: str, size: int, point: Point) -> harness.Row:
    return {
        "what grows": name,
        "size": size,
        "work": f"{point.work:.3g}",
        "seconds": point.seconds,
        "temporary bytes": point.temporary,
        "compiling": point.compiling,
    }


if __name__ == "__main__":
    cli.run(main)
