#!/usr/bin/env bash
# The quickstart at reduced length: loss, accuracy, checkpoint, resume and export are checked.
# Usage: bash tests/functional/distillation.sh   (PYTHON=... to choose the interpreter)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
workdir=$(mktemp -d)
trap 'rm -rf "$workdir"' EXIT

run() {
  "$python" -m distill.main --config=configs/arithmetic.py:short --workdir="$workdir/run"
}
run
# The same command again finds the finished run and trains nothing.
cp "$workdir/run/metrics.jsonl" "$workdir/before.jsonl"
run
cmp "$workdir/before.jsonl" "$workdir/run/metrics.jsonl"

"$python" -m distill.evaluate --config=configs/arithmetic.py:short \
  --model="$workdir/run/student" --output="$workdir/evaluation.json"

WORKDIR="$workdir" "$python" - <<'PY'
import json, os
from pathlib import Path

workdir = Path(os.environ["WORKDIR"])
results = json.loads((workdir / "run/results.json").read_text())
lines = [json.loads(line) for line in (workdir / "run/metrics.jsonl").read_text().splitlines()]
losses = [line["loss"] for line in lines if "loss" in line]
base, student, teacher = results["base"], results["student"], results["teacher"]
assert losses[-1] < 0.7 * losses[0], f"loss went from {losses[0]} to {losses[-1]}"
assert student["accuracy"] > base["accuracy"], results
assert student["reverse_kl"] < base["reverse_kl"], results
assert abs(teacher["forward_kl"]) < 1e-5, results
steps = sorted(int(path.name) for path in (workdir / "run/checkpoints").iterdir())
assert steps == [175, 350], steps
again = json.loads((workdir / "evaluation.json").read_text())["student"]
assert abs(again["accuracy"] - student["accuracy"]) < 0.01, (again, student)
print("distillation.sh: ok")
PY
