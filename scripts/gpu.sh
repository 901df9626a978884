#!/usr/bin/env bash
# The checks that need a GPU, on a machine with torch preinstalled: no virtual environment, no network.
# UNMEASURED: this script has not run on a GPU yet; it exists so that the first machine with one can run it as it stands.
# Builds in place, runs the tests that need no GPU-less reference beside those under tests/gpu, trains the quickstart
# for a few steps on CUDA, measures the ops, and leaves everything under bench/results/<device>/.
# PYTHON=python3.12 bash scripts/gpu.sh     ZS_GPU_STEPS=20 bash scripts/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels

"$python" - <<'PY'
import sys
try:
    import torch
except ImportError:
    sys.exit("gpu.sh: torch is not installed for this python; set PYTHON to one that has it")
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} finds no CUDA device here; this script is for machines with a GPU")
PY

"$python" setup.py -q build_ext --inplace
"$python" -m zs_fast.cli doctor

device=$("$python" -c 'import torch; from bench.harness import device_slug; from zs_fast.system.environment import environment; print(device_slug(environment("cuda:0")))')
results=bench/results/$device
mkdir -p "$results"

"$python" -m pytest -q tests/ops tests/rollout tests/learn $([[ -d tests/gpu ]] && echo tests/gpu) | tee "$results/tests.txt"
"$python" -m zs_fast.cli train quickstart --model.device cuda --train.steps "${ZS_GPU_STEPS:-10}" \
    --output "runs/gpu_$(date +%s)" --json | tail -n 1 >"$results/quickstart.json"
"$python" -m zs_fast.cli bench ops
echo "gpu.sh: results are in $results"
