# `make demo` and `make test` install what they need into .venv first; `make install` does only that.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-fast test-gpu test-slurm test-faults golden coverage lint format docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv, with the package and all that the others need

demo: $(INSTALLED)  ## train a small ScMoE GPT on the source of Python's standard library
	@$(BIN)/python tools/demo.py $(ARGS)

test: $(INSTALLED)  ## all tests that need no GPU
	@$(BIN)/python -m pytest tests/distributed tests/golden tests/unit --numprocesses 2 --dist loadfile \
	  --no-loadscope-reorder $(ARGS)

test-fast: $(INSTALLED)  ## the tests of tenths of a second, for while you work
	@$(BIN)/python -m pytest tests/unit -m "not slow" --numprocesses 2 --dist loadfile $(ARGS)

test-gpu: $(INSTALLED)  ## the tests that need GPUs and Transformer Engine
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

test-slurm: $(INSTALLED)  ## jobs on a real Slurm, started on this machine (as root; docs/slurm.md)
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 tests/slurm/cluster.sh build/slurm \
	  $(BIN)/python -m pytest tests/slurm $(ARGS)

test-faults: $(INSTALLED)  ## jobs to which something happens: kills, full disks, cut links (docs/reliability.md)
	@$(BIN)/python -m pytest tests/faults $(ARGS)

golden: $(INSTALLED)  ## renew the golden losses (CONTRIBUTING.md says when)
	@$(BIN)/python -m tests.golden.renew

coverage: $(INSTALLED)  ## which lines no unit test runs
	@$(BIN)/coverage run -m pytest tests/unit $(ARGS)
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report

lint: $(INSTALLED)  ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## mend style and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(INSTALLED)  ## build/api: a page a module, from the docstrings
	@$(BIN)/pdoc --docformat google --output-directory build/api ./megatron_scmoe \
	  '!megatron_scmoe.checkpoints.hf'

clean:  ## remove the environment and what was made in it
	@rm -rf $(VENV) demo build

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.12 is needed: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time: PyTorch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
