#!/usr/bin/env bash
# A whole job in two processes; then its student is exported, evaluated and asked by two.
# Usage: bash tests/functional/two_processes.sh   (PYTHON=... to choose the interpreter)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
workdir=$(mktemp -d)
trap 'rm -rf "$workdir"' EXIT
export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=2"
export JAX_COMPILATION_CACHE_DIR="$workdir/programs" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1

# Starts a command of the package in two processes; fails if either does.
both() {
  local port first
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  "$python" -m "$@" --coordinator_address="127.0.0.1:$port" --num_processes=2 --process_id=0 &
  first=$!
  "$python" -m "$@" --coordinator_address="127.0.0.1:$port" --num_processes=2 --process_id=1
  wait "$first"
}
config=(--config=configs/arithmetic.py:short --config.distillation.max_steps=10
  --config.distillation.save_steps=5 --config.distillation.logging_steps=5
  --config.data.validation.max_samples=64 --config.evaluation.batch_size=64
  --config.mesh.data=2 --config.mesh.fsdp=2)

both distill.main "${config[@]}" --workdir="$workdir/run"
# The same command again finds the finished run and trains nothing.
cp "$workdir/run/metrics.jsonl" "$workdir/before.jsonl"
both distill.main "${config[@]}" --workdir="$workdir/run"
cmp "$workdir/before.jsonl" "$workdir/run/metrics.jsonl"

both distill.export "${config[@]}" --workdir="$workdir/run" --output="$workdir/again" --checkpoint=10
cmp "$workdir/again/model.safetensors" "$workdir/run/student/model.safetensors"
both distill.evaluate "${config[@]}" --model="$workdir/run/student" \
  --output="$workdir/evaluation.json"
both distill.generate "${config[@]}" --config.data.max_samples=64 --output="$workdir/two.jsonl"
XLA_FLAGS="--xla_force_host_platform_device_count=4" "$python" -m distill.generate "${config[@]}" \
  --config.data.max_samples=64 --output="$workdir/one.jsonl"
cmp "$workdir/one.jsonl" "$workdir/two.jsonl"

WORKDIR="$workdir" "$python" - <<'PY'
import json, os
from pathlib import Path

workdir = Path(os.environ["WORKDIR"])
results = json.loads((workdir / "run/results.json").read_text())
lines = [json.loads(line) for line in (workdir / "run/metrics.jsonl").read_text().splitlines()]
losses = [line["loss"] for line in lines if "loss" in line]
assert len(losses) == 2 and all(0.1 < loss < 1 for loss in losses), losses
assert results["teacher"]["accuracy"] > 0.9 and abs(results["teacher"]["forward_kl"]) < 1e-5
again, student = json.loads((workdir / "evaluation.json").read_text())["student"], results["student"]
assert 0 < student["accuracy"] < 1, student
assert abs(again["accuracy"] - student["accuracy"]) < 0.02, (again, student)
assert abs(again["reverse_kl"] - student["reverse_kl"]) < 0.01, (again, student)
PY
echo "two_processes.sh: ok"
