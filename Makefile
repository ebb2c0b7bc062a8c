# make setup | bench | test | gpu | lint | compile-all | sanitize. Everything lives in .venv; GNU make 3.81, which macOS
# has, is enough. No compiler and no GPU are needed. What has been set up is not set up again.

# The interpreter, 3.10 to 3.13. A torch that it can import (2.11 or newer) is the one that is used.
PYTHON ?= python3
# Installed into .venv where there is no such torch, or where TORCH is given: make setup TORCH=torch==2.12.1
TORCH ?= torch==2.13.0
# Likewise, on Linux alone: Triton exists nowhere else.
TRITON ?= triton==3.6.0
# Arguments passed on: make bench ARGS='--op truncated -N 1k,4k', make test ARGS='-k window'
ARGS ?=
# Test processes; each computes with one thread.
JOBS ?= 2

# make gpu: cuda or cpu; seconds it may take, with the set-up; where its JSON goes; a folder of unpacked wheels of other
# libraries; RESUME=1 goes on where the last run of this commit stopped, RESUME=run.json where that one did.
DEVICE ?= cuda
BUDGET ?= 480
OUT ?= bench/results
PEERS ?=
RESUME ?=

# Modules, not the scripts in .venv/bin: what a torch's environment already has is used from there. And without the
# working folder on the path: transformers asks for a package `kernels`, and would get the folder of that name.
AS_MODULE := -c 'import runpy, sys; sys.path[:] = filter(None, sys.path); del sys.argv[0]; \
	runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)'
RUN := .venv/bin/python $(AS_MODULE)
CLANG_FORMAT := .venv/bin/python -c 'import clang_format; clang_format.clang_format()'
BEGAN := $(shell date +%s)
# A machine with a GPU may have no network: an environment of its own, of PYTHON's torch and what lies beside it.
GPU_VENV := $(if $(filter cpu,$(DEVICE)),.venv,.venv-offline)
GPU_RUN := $(GPU_VENV)/bin/python $(AS_MODULE) fastattn.bench.gpu.pipeline --device '$(DEVICE)' --budget '$(BUDGET)' \
	--began '$(BEGAN)' --out '$(OUT)' $(if $(PEERS),--peers '$(PEERS)') $(if $(RESUME),--resume '$(RESUME)')
OWN_TORCH := $(if $(filter file,$(origin TORCH)),,--own-torch)
TOO_OLD := fastattn needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12
CHECK := import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("$(TOO_OLD)" % v)

.DEFAULT_GOAL := help
GPU_STEPS := $(addprefix gpu-,build smoke check headline instructions tests sweep flex sanitizers tune)
.PHONY: help setup bench test gpu $(GPU_STEPS) gpu-setup lint compile-all sanitize clean

help:
	@echo 'make bench   set up what is missing, then measure on the best device here (ARGS=... as fastattn bench takes them)'
	@echo 'make test    set up what is missing, then run the tests (ARGS=... as pytest takes them, JOBS=$(JOBS))'
	@echo 'make gpu     on a machine with an NVIDIA GPU: test, check and time everything in BUDGET=$(BUDGET) seconds, with'
	@echo '             what PYTHON has (no network): OUT=$(OUT) PEERS=folder RESUME=1; DEVICE=cpu tries it without a GPU'
	@echo '             a step alone: make $(GPU_STEPS)'
	@echo 'make lint    set up what is missing, then ruff, mypy and clang-format'
	@echo 'make compile-all   set up what is missing, then compile every GPU kernel for every target (no GPU needed)'
	@echo 'make sanitize   set up what is missing, then the CPU backend and the simulator under the sanitizers of g++ or clang++'
	@echo 'make setup   the set-up alone, in .venv: PYTHON=$(PYTHON) TORCH=$(TORCH) TRITON=$(TRITON)'
	@echo 'make clean   remove .venv and what the builds left'

setup:
	@command -v '$(PYTHON)' >/dev/null || { echo '$(PYTHON) is not found; name a Python: make PYTHON=/path/to/python3'; exit 1; }
	@'$(PYTHON)' -c '$(CHECK)'
	@'$(PYTHON)' .ci/setup_venv.py --torch '$(TORCH)' --triton '$(TRITON)' $(OWN_TORCH)

bench: setup
	@.venv/bin/fastattn bench $(ARGS)

test: setup
	@$(RUN) pytest -n $(JOBS) $(ARGS)

gpu: gpu-setup
	@$(GPU_RUN) $(ARGS)

$(GPU_STEPS): gpu-setup
	@$(GPU_RUN) $(subst gpu-,,$@) $(ARGS)

ifeq ($(DEVICE),cpu)
gpu-setup: setup
else
gpu-setup:
	@command -v '$(PYTHON)' >/dev/null || { echo '$(PYTHON) is not found; name a Python: make gpu PYTHON=/path/to/python3'; exit 1; }
	@'$(PYTHON)' -c '$(CHECK)'
	@'$(PYTHON)' .ci/setup_venv.py --offline
endif

lint: setup
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@$(CLANG_FORMAT) --dry-run -Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

compile-all: setup
	@$(RUN) fastattn.cli inspect --all --jobs $(JOBS) $(ARGS)

sanitize: setup
	@.venv/bin/python .ci/sanitize.py $(ARGS)

clean:
	rm -rf .venv .venv-offline build dist fastattn.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
