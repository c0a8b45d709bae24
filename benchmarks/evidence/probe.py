"""How well does `distill.preflight --probe` predict what on-policy data gains?

    python -m benchmarks.evidence.probe --output=runs/evidence
    python -m benchmarks.evidence.probe

The first command probes every off-policy student of OUTPUT that has an on-policy sibling with its
prompts and seed, and writes docs/results/probe.json. The second prints the table of
docs/results.md from that, and writes it there. The prediction is how much more the teacher solves
from the student's half-way states than the student; the gain is the sibling's held-out accuracy
above the student's. Probed are other problems than those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.evidence.report import DOCS, RESAMPLES, align, publish, write_rows
from benchmarks.evidence.runs import OFF, ON, all_runs, common_config
from distill.config import cli

PROBES = DOCS / "results/probe.json"


def probe_all(output: Path) -> None:
    """Writes the JSON after every student."""
    from distill.checks.probe import probe_alone

    found = []
    for run in all_runs():
        names = run.name, run.name.replace(OFF, ON)
        paths = [output / "rows" / f"{name}.json" for name in names]
        if run.method != OFF or not all(path.exists() for path in paths):
            continue
        off, on = (json.loads(path.read_text())["right"] for path in paths)
        config = common_config(run.seed)
        config.policy.model_name = str(output / "runs" / run.name / "phase0" / "student")
        probed = probe_alone(config)[""].to_dict()
        gain = (on.count("1") - off.count("1")) / len(off)
        found.append(dict(run=run.name, prompts=run.prompts, gain=gain, probe=probed))
        write_rows(PROBES, found)


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Pearson's, with its 95% interval by bootstrap over the runs."""
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    values = [np.corrcoef(x[d], y[d])[0, 1] for d in draws if len(set(d.tolist())) > 2]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(np.corrcoef(x, y)[0, 1]), float(low), float(high)


def make_table(rows: list[dict[str, Any]]) -> str:
    table = [("off-policy student", "student", "teacher from its states", "predicted", "gained")]
    for row in rows:
        student, teacher = row["probe"]["student"], row["probe"]["teacher_from_student"]
        shares = (f"{100 * x:.1f}" for x in (student, teacher, teacher - student, row["gain"]))
        table.append((row["run"], *shares))
    lines = [align(table), ""]
    gain = np.array([row["gain"] for row in rows])
    student = np.array([row["probe"]["student"] for row in rows])
    predicted = np.array([row["probe"]["teacher_from_student"] for row in rows]) - student
    several = np.array([row["prompts"] > 64 for row in rows])
    for name, x, kept in (
        ("the prediction", predicted, np.ones(len(rows), bool)),
        ("the prediction, without 64 prompts", predicted, several),
        ("one minus the student's accuracy", 1 - student, np.ones(len(rows), bool)),
        ("the same, without 64 prompts", 1 - student, several),
    ):
        value, low, high = correlation(x[kept], gain[kept])
        interval = f"(95% interval {low:+.2f} to {high:+.2f}), {kept.sum()} runs"
        lines.append(f"    correlation of the gain with {name}: {value:+.2f} {interval}")
    return "\n".join(lines)


def main() -> None:
    if output_flag.value:
        probe_all(Path(output_flag.value).absolute())
    publish({"probe": make_table(json.loads(PROBES.read_text()))})


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the evidence's runs.")
    cli.run(main)
