#!/usr/bin/env bash
# Prints the pins to install under: constraints.txt as it is, or, where another torch than the pinned one is installed,
# constraints.txt without torch and triton (each torch build names its own triton) but with that torch held fast.
set -euo pipefail
python=$1
pinned=$(sed -n 's/^torch==//p' constraints.txt)
installed=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')
if [[ ${installed%%+*} == "$pinned" ]]; then
    cat constraints.txt
else
    grep -vE '^(torch|triton)==' constraints.txt
    echo "torch==$installed"
fi
