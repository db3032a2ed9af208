# One command each, on a machine with Python 3.11+ and git only:
#   make demo        set up .venv, run the main job on a planted world, write runs/demo
#   make test        set up .venv, run the tests
#   make lint        ruff, mypy, clang-format, typos and text rules (the pre-commit hooks)
#   make bench       the benchmark suite on this machine
#   make wheels      manylinux wheels of the CPU half into dist/, each tried in a fresh venv
#   make sanitize    the CPU kernels of assign_codes under ASan, UBSan and TSan (GCC)
#   make gpu-check   on a GPU machine, offline: what it gives, headlines first, within ten minutes
#   make gpu-test    the same machine: build in place, all gpu tests, sanitizers
#   make clean       remove build products (`make distclean`: and .venv)
# PYTHON=python3.12 chooses the interpreter; pip's own settings (PIP_*, pip.conf) pass through.

SHELL := /bin/sh
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
# Without an NVIDIA driver torch is held at the version of constraints.txt, whose CPU wheel pip
# prefers where one is provided; with one, torch is whatever pip finds.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints.txt)
NATIVE := CMakeLists.txt setup.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: help demo test ray lint bench wheels sanitize gpu-check gpu-test clean distclean
help:
	@sed -n '2,11s/^# //p' Makefile

demo: .venv/.installed
	$(BIN)/userip demo

# A process per processor, each of one thread and with whole files; eight take memory enough.
test: .venv/.installed
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

# For `make test` to test Ray too, where it can be had; CI asks for it.
ray: .venv/.installed
	$(PIP) install $(CONSTRAINTS) $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["ray"])') \
	  || echo "Ray cannot be installed here: what needs it is skipped"

bench: .venv/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

wheels:
	packaging/wheels.sh dist

lint: .venv/.linters
	PATH="$(CURDIR)/$(BIN):$$PATH" PRE_COMMIT_HOME=.venv/.pre-commit pre-commit run --all-files

sanitize: .venv/.installed
	$(PIP) install 'pybind11>=2.13' 'cmake>=3.24' ninja
	$(BIN)/python tests/sanitize_assign_codes.py

# No .venv and no download for these two: torch, triton, transformers are already there (gpu-test:
# pybind11, cmake, ninja, pytest too). torch's caching allocator would hide reads past a tensor's end.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

GPU_TEST := USERIP_FAST_GPU_TESTS=1 HF_HUB_OFFLINE=1 PYTHONPATH=.
gpu-test:
	$(PYTHON) setup.py build_ext --inplace
	$(GPU_TEST) $(PYTHON) -m pytest -q -m gpu -p no:cacheprovider \
	  $$($(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null)
	for tool in memcheck racecheck; do \
	  $(GPU_TEST) PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	    --error-exitcode 86 $(PYTHON) -m pytest -q -x -m 'gpu and sanitizer' -p no:cacheprovider \
	    || exit 1; done

clean:
	rm -rf build dist *.egg-info userip_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +

distclean: clean
	rm -rf .venv

# Stamps: each runs again only when what it was made from has changed.
.venv/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "userip_fast needs Python 3.11 or newer, got: $$($(PYTHON) --version 2>&1);" \
	       "name one by make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install $(CONSTRAINTS) 'torch>=2.11'
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml $(NATIVE)
	$(PIP) install $(CONSTRAINTS) -e '.[test,nf4,triton,ctr]'
	@$(BIN)/python -c 'from userip_fast.core import _extension as e; \
	  print("compiled extension:", e.why_not() or "usable")'
	@touch $@

.venv/.linters: .venv/.installed
	$(PIP) install $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"])')
	@touch $@
