# `make demo` and `make test` install what they need into .venv first; `make install` does only that.
# PYTHON=... names the Python that makes .venv. If that has Megatron-Core and pytest itself, as in the
# image that the Dockerfile builds, it is used as it is, and nothing is installed.

SHELL := /bin/bash
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python

HAS_ALL := import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ("torch", "megatron", "pytest"))))
ifeq ($(origin PYTHON),command line)
ifeq ($(shell $(PYTHON) -c '$(HAS_ALL)' 2>/dev/null && echo yes),yes)
RUN := $(PYTHON)
INSTALLED :=
endif
endif
PYTHON ?= $(shell command -v python3.12 || command -v python3)

# Python compiles what a run imports of PyTorch and Megatron; else the first command would take 10 s more.
COMPILED := from megatron_scmoe.platform import cpu_backend; cpu_backend.enable_if_no_gpu(); import megatron_scmoe.training.pretrain

.PHONY: help install demo test test-fast test-gpu test-slurm test-image test-faults golden coverage lint format docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv, with the package and all that the others need

demo: $(INSTALLED)  ## train a small ScMoE GPT on the source of Python's standard library
	@$(RUN) tools/demo.py $(ARGS)

test: $(INSTALLED)  ## all tests that need no GPU
	@$(RUN) -m pytest tests/distributed tests/golden tests/unit --numprocesses 2 --dist loadfile \
	  --no-loadscope-reorder $(ARGS)

test-fast: $(INSTALLED)  ## the tests of tenths of a second, for while you work
	@$(RUN) -m pytest tests/unit -m "not slow" --numprocesses 2 --dist loadfile $(ARGS)

test-gpu: $(INSTALLED)  ## the tests that need GPUs and Transformer Engine
	@$(RUN) -m pytest tests/gpu --numprocesses 2 --dist loadfile $(ARGS)

test-slurm: $(INSTALLED)  ## jobs on a real Slurm, started on this machine (as root; docs/slurm.md)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1 tests/slurm/cluster.sh build/slurm \
	  $(RUN) -m pytest tests/slurm $(ARGS)

test-image: $(INSTALLED)  ## build the Dockerfile's image and run it (as root; docs/slurm.md)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tests/image/build.sh build/image \
	  $(RUN) -m pytest tests/image $(ARGS)

test-faults: $(INSTALLED)  ## jobs to which something happens: kills, full disks, cut links (docs/reliability.md)
	@$(RUN) -m pytest tests/faults $(ARGS)

golden: $(INSTALLED)  ## renew the golden losses (CONTRIBUTING.md says when)
	@$(RUN) -m tests.golden.renew

coverage: $(INSTALLED)  ## which lines no unit test runs
	@$(RUN) -m coverage run -m pytest tests/unit $(ARGS)
	@$(RUN) -m coverage combine --quiet && $(RUN) -m coverage report

lint: $(INSTALLED)  ## check style, formatting and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: $(INSTALLED)  ## mend style and formatting
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

docs: $(INSTALLED)  ## build/api: a page a module, from the docstrings
	@$(RUN) -m pdoc --docformat google --output-directory build/api ./megatron_scmoe \
	  '!megatron_scmoe.checkpoints.hf'

clean:  ## remove the environment and what was made in it
	@rm -rf $(VENV) demo build

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.12 is needed: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time: PyTorch is large)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@SCMOE_CPU=1 $(RUN) -W ignore -c '$(COMPILED)'
	@touch $@
