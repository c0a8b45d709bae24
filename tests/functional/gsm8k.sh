#!/usr/bin/env bash
# GSM8K from scratch on a CPU: tokenizer, teacher, student, on-policy distillation; the figures are
# checked. Usage: bash tests/functional/gsm8k.sh   (DATA=FOLDER with train.jsonl and test.jsonl)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
data=${DATA:-../shared/data/gsm8k}
if [ ! -f "$data/train.jsonl" ]; then
  echo "gsm8k.sh: skipped, no train.jsonl in $data (pass DATA=FOLDER)"
  exit 0
fi
workdir=$(mktemp -d)
trap 'rm -rf "$workdir"' EXIT

"$python" -m distill.main --config=configs/gsm8k.py:scratch --workdir="$workdir/run" \
  --config.data.path="$data"

WORKDIR="$workdir" "$python" - <<'PY'
import json, math, os
from pathlib import Path

run = Path(os.environ["WORKDIR"]) / "run"
results = json.loads((run / "results.json").read_text())
base, student = results["base"], results["student"]
for name in ("forward_kl", "reverse_kl"):
    assert math.isfinite(student[name]) and student[name] < 0.6 * base[name], (name, results)

def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]

teacher = losses(run / "scratch/teacher/pretrain")
pupil = losses(run / "scratch/student/pretrain")
assert teacher[-1] < 0.6 * teacher[0], teacher
assert teacher[-1] < pupil[-1], "the teacher should know the text better than the student"
print("gsm8k.sh: ok")
PY
