#!/usr/bin/env bash
# All that this project wants to know of a GPU from Hopper on, in one go of at most half an hour.
#
#     bash benchmarks/gpu_day.sh FOLDER
#
# PYTHON (default .venv/bin/python) has this project with "jax[cuda13]" and pytest; torch,
# transformers, triton and liger-kernel are compared with where it has them. Every part runs in a
# process of its own with a limit of its own, and a part that fails leaves the others alone. Writes
# FOLDER/gpu_day.json, the rows of all parts; FOLDER/PART.log has what a part printed. See
# docs/benchmarks.md. Exits with 1 where a part failed, and with 2 where JAX finds no such GPU.
set -uo pipefail
[ $# = 1 ] || { echo "usage: bash benchmarks/gpu_day.sh FOLDER" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
failed=0

# FAMILY and the rest as JAX names the device.
"$python" - > "$out/device.json" << 'EOF' || exit 2
import json, sys
import jax
device = jax.devices()[0]
if device.platform != "gpu" or float(device.compute_capability) < 9:
    sys.exit(f"error: JAX finds {device.device_kind}: this needs a GPU from Hopper on")
json.dump({"device": device.device_kind, "jax": jax.__version__}, sys.stdout)
EOF

# part NAME SECONDS COMMAND...: runs it, with all that it prints in a file, too.
part() {
  local name=$1 limit=$2 code
  shift 2
  echo "== $name, at most $limit s"
  timeout --kill-after=20 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  echo "$code" > "$out/$name.code"
  [ "$code" = 0 ] || { failed=1; echo "$name failed: exit code $code"; }
}

part kernels 240 env DISTILL_TEST_PLATFORM=cuda "$python" -m pytest -q \
  tests/kernels/pallas_gpu_test.py tests/kernels/attention_test.py -k "compiled or cudnn or nan"
for tokens in 8192 16384; do
  part "loss-$tokens" 210 "$python" -m benchmarks.linear_divergence --repeats=3 \
    --only="T=$tokens" --json="$out/loss-$tokens.json"
done
part update 300 "$python" -m benchmarks.train_step --repeats=3 --notorch --json="$out/update.json"
part decode 180 "$python" -m benchmarks.decode --json="$out/decode.json"
# Ten timed steps, and at least one before each that is not.
part step 240 "$python" -m benchmarks.distill_step --repeats=10 --json="$out/step.json"
part torch 360 "$python" -m benchmarks.train_step --repeats=3 --only=torch \
  --json="$out/torch.json"

"$python" - "$out" << 'EOF'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = {}
for code in sorted(out.glob("*.code"), key=lambda path: path.stat().st_mtime):
    rows = code.with_suffix(".json")
    text = rows.read_text() if rows.exists() else ""
    last = code.with_suffix(".log").read_text().strip().splitlines()[-1:]
    parts[code.stem] = {"exit_code": int(code.read_text()), "rows": json.loads(text or "[]")}
    parts[code.stem]["last_line"] = last[0] if last else ""
result = json.loads((out / "device.json").read_text()) | {"parts": parts}
(out / "gpu_day.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"{out}/gpu_day.json")
EOF
exit "$failed"
