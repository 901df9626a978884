#!/usr/bin/env bash
# Installs the packages that zs_kernels is compared with (TRL, verl, OpenRLHF, Liger, Cut Cross-Entropy, torchrl), and
# bitsandbytes, for the tests of what needs it.
# Usage: peers.sh PYTHON        into the environment of PYTHON, at the versions of constraints.txt; about 15 s, 120 MB
# All but TRL come without their own dependencies, and what their op modules really import is named here: asked for all,
# pip would bring Ray (240 MB) and another transformers with verl, deepspeed and flash-attn with OpenRLHF, a second
# triton with Liger. `pip check` complains about those; no test needs them. torch and triton are not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
scripts/constraints.sh "$python" >"$constraints"
versions() {
    "$python" -c 'import importlib.metadata as m; print("torch", m.version("torch"), "triton", m.version("triton"))'
}
before=$(versions)

"$python" -m pip install -q -c "$constraints" trl accelerate
"$python" -m pip install -q -c "$constraints" --no-deps \
    verl codetiming omegaconf antlr4-python3-runtime orjson \
    torchrl tensordict pyvers cloudpickle \
    liger-kernel cut-cross-entropy bitsandbytes
"$python" -m pip install -q -c "$constraints" --no-deps openrlhf ||
    echo "peers.sh: OpenRLHF has no wheel for this Python; the tests against it are skipped" >&2

# verl, torchrl, tensordict and OpenRLHF bring top-level packages named `tests`, `scripts` and `benchmarks`, which would
# hide folders of those names from every project's imports. Nothing of theirs imports them.
"$python" - <<'PY'
import importlib.metadata as metadata

for name in ("verl", "torchrl", "tensordict", "openrlhf"):
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        continue
    for file in files:
        if file.parts[0] in ("tests", "scripts", "benchmarks"):
            file.locate().unlink(missing_ok=True)
PY

after=$(versions)
[[ $before == "$after" ]] || { echo "peers.sh: $before became $after; run \`make setup\` again" >&2; exit 1; }
