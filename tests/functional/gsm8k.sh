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

# As in the config's docstring, but in a folder of its own.
root=$PWD data=$(realpath "$data")
config() {
  echo "--config=$root/configs/gsm8k.py:$1" "--config.data.path=$data"
}
export PYTHONPATH=$root
python=$(realpath -s "$python")
cd "$workdir"
# shellcheck disable=SC2046
{
  "$python" -m distill.scratch $(config teacher) --tokenizer=bpe:2048 --layers=3 --width=128 --seed=1
  "$python" -m distill.main $(config teacher) --workdir=runs/gsm8k_toy/teacher
  "$python" -m distill.scratch $(config student) --tokenizer=bpe:2048 --layers=2 --width=64
  "$python" -m distill.main $(config student) --workdir=runs/gsm8k_toy/student
  "$python" -m distill.main $(config scratch) --workdir=runs/gsm8k_toy/run
}

WORKDIR="$workdir" "$python" - <<'PY'
import json, math, os
from pathlib import Path

runs = Path(os.environ["WORKDIR"]) / "runs/gsm8k_toy"
run = runs / "run"
results = json.loads((run / "results.json").read_text())
base, student = results["base"], results["student"]
for name in ("forward_kl", "reverse_kl"):
    assert math.isfinite(student[name]) and student[name] < 0.6 * base[name], (name, results)

def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]

teacher = losses(runs / "teacher")
pupil = losses(runs / "student")
assert teacher[-1] < 0.6 * teacher[0], teacher
assert teacher[-1] < pupil[-1], "the teacher should know the text better than the student"
print("gsm8k.sh: ok")
PY
