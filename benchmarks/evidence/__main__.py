"""When does on-policy distillation pay, by how much, and at what cost?

    python -m benchmarks.evidence --output=runs/evidence [--only=TEXT]
    python -m benchmarks.evidence --report [--output=runs/evidence]

The first command makes the runs of runs.py that are missing, in one process, and writes a row for
each to OUTPUT/rows. A run that was interrupted goes on. `--only` takes the runs whose names have
TEXT. The second makes docs/results/evidence.json of the rows, the tables in docs/results.md and the
pictures in docs/images; without --output, from the JSON as it is.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from distill.base.errors import UserError
from distill.config import cli


def main() -> None:
    from benchmarks.evidence.runs import all_runs

    output = Path(output_flag.value).absolute() if output_flag.value else None
    if report_flag.value:
        from benchmarks.evidence.report import make_report

        make_report(output)
        return
    if not output:
        raise UserError("pass --output=FOLDER, where the runs go")
    runs = [run for run in all_runs() if only_flag.value in run.name]
    if not runs:
        raise UserError(f"--only={only_flag.value} names no run; such as: {all_runs()[0].name}")
    from benchmarks.evidence.runner import perform_all

    perform_all(runs, output)


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.")
    only_flag = flags.DEFINE_string("only", "", "Only runs whose names have this text.")
    report_flag = flags.DEFINE_bool("report", False, "Make tables and pictures of what is there.")
    cli.run(main)
