#!/usr/bin/env bash
# Installs torch into the environment of the given python. Usage: install_torch.sh PYTHON REQUIREMENT
# On Linux without an NVIDIA GPU a CPU build is taken, so that no CUDA package is pulled; it is looked for first where
# pip looks anyway, then in PyTorch's own index. A requirement that names a local version (torch==2.13.0+cu130) or is
# no exact pin is installed as it stands.
set -euo pipefail
python=$1
requirement=$2

if [[ $(uname -s) != Linux || $requirement != torch==* || $requirement == *+* ]] || nvidia-smi -L >/dev/null 2>&1; then
    exec "$python" -m pip install "$requirement"
fi
if "$python" -m pip install "$requirement+cpu"; then
    exit 0
fi
echo "install_torch: no CPU build of $requirement where pip looks; trying download.pytorch.org" >&2
exec "$python" -m pip install --extra-index-url https://download.pytorch.org/whl/cpu "$requirement+cpu"
