# `make demo` and `make test` install what they need into .venv first; `make install` does only that.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-gpu lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv, with the package and all that the others need

demo: $(INSTALLED)  ## train a small ScMoE GPT on the source of Python's standard library
	@$(BIN)/python tools/demo.py $(ARGS)

test: $(INSTALLED)  ## all tests that need no GPU
	@$(BIN)/python -m pytest tests/unit --numprocesses 2 --dist loadfile $(ARGS)
	@$(BIN)/python -m pytest tests/distributed $(ARGS)

test-gpu: $(INSTALLED)  ## the tests that need GPUs and Transformer Engine
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: $(INSTALLED)  ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED)  ## mend style and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment and the demo's files
	@rm -rf $(VENV) demo

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.12 is needed: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time: PyTorch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
