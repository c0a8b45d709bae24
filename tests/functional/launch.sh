#!/usr/bin/env bash
# A sweep of two runs by XManager; then the command of the JobSet, interrupted twice and continued.
# Usage: bash tests/functional/launch.sh   (PYTHON, LAUNCH_PYTHON: the project's and XManager's)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
launch_python=${LAUNCH_PYTHON:-.venv-launch/bin/python}
workdir=$(mktemp -d)
trap 'rm -rf "$workdir"' EXIT
# XManager keeps a list of experiments in the home folder.
export HOME="$workdir/home" JAX_COMPILATION_CACHE_DIR="$workdir/programs"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
mkdir "$HOME"
config=configs/arithmetic.py:short
small=(--config.preflight=False --config.policy.train_global_batch_size=16
  --config.policy.train_micro_batch_size=16 --config.distillation.logging_steps=1
  --config.data.validation.max_samples=16 --config.evaluation.batch_size=16)

fail() {
  echo "launch.sh: $1" >&2
  exit 1
}

# ---------------------------------------------------------------------------------------- XManager
sweep() {
  "$launch_python" launch/xm_launch.py --python="$python" --config="$config" \
    --workdir="$workdir/sweep" --sweep=distillation.kl_type=forward,reverse "$@" -- "${small[@]}" \
    --config.distillation.max_steps=3 --config.distillation.save_steps=3
}
sweep
cd "$workdir/sweep"
runs=(distillation.kl_type=forward distillation.kl_type=reverse)
[ "$(ls)" = "$(printf '%s\n' "${runs[@]}")" ] || fail "other workdirs: $(ls)"
for run in "${runs[@]}"; do
  [ "$(grep -c '"loss"' "$run/metrics.jsonl")" = 3 ] || fail "not three steps in $run"
  [ -s "$run/results.json" ] || fail "no results in $run"
done
! cmp -s -- */student/model.safetensors || fail "the sweep changed nothing"
cat -- */metrics.jsonl > "$workdir/before.jsonl"
cd - > /dev/null
# The same command finds both runs finished.
sweep
cat "$workdir"/sweep/*/metrics.jsonl | cmp - "$workdir/before.jsonl"
# A run that fails ends the sweep, with its own error and status 1.
status=0
sweep --sweep=policy.optimizer.learning_rate=-1 > "$workdir/log" 2>&1 || status=$?
[ "$status" = 1 ] || fail "status $status after a run that failed"
grep -q "learning_rate" "$workdir/log" || fail "no error of the run"
grep -q "^error: a run failed" "$workdir/log" || fail "no error of the sweep"
[ "$(ls "$workdir/sweep")" = "$(printf '%s\n' "${runs[@]}")" ] || fail "the sweep went on"

# ------------------------------------------------------------------------------------------ JobSet
script=$("$python" -c '
import yaml
jobset = yaml.safe_load(open("launch/gke_jobset.yaml"))
job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
print(job["template"]["spec"]["containers"][0]["args"][0])')
run="$workdir/run"

start() {  # in the background, as the container does it
  PATH="$(dirname "$python"):$PATH" WORKDIR="$run" bash -c "$script" distill.main \
    --config="$config" "${small[@]}" --config.distillation.max_steps=60 \
    --config.distillation.save_steps=60 &
  shell=$!
}
losses() { cat "$run/metrics.jsonl" 2> /dev/null | grep -c '"loss"' || true; }
until_trained() {  # until there are more losses than $1
  for _ in $(seq 3000); do
    [ "$(losses)" -le "$1" ] || return 0
    kill -0 "$shell" 2> /dev/null || fail "the run has ended before its first step"
    sleep 0.1
  done
  fail "no step within five minutes"
}
expect() {  # status $1 of what was started
  status=0
  wait "$shell" || status=$?
  [ "$status" = "$1" ] || fail "status $status instead of $1"
}
start
until_trained 0
kill -TERM "$shell"  # as Kubernetes does it
expect 75
first=$(losses)
start
until_trained "$first"
# As if another host had been signalled: the run ends here as well, with status 0, but not finished.
kill -TERM "$(cat "/proc/$shell/task/$shell/children")"
expect 75
second=$(losses)
[ "$first" -lt "$second" ] && [ "$second" -lt 60 ] || fail "stopped at $first and $second of 60"
start
expect 0
[ "$(losses)" = 60 ] || fail "$(losses) steps instead of 60"
[ -s "$run/results.json" ] || fail "no results"
echo "launch.sh: ok"
