# Two commands for everybody: `make demo` and `make test`. All versions are pinned in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# For the packages, and for what builds them.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint check format gpu clean

demo: $(VENV)/.asgo
	$(BIN)/asgo demo

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint
	ASGO_TESTS=all $(BIN)/pytest -n 2 --dist worksteal --durations=25

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# On a machine with a GPU: its tests and measurements, as one table in docs/results/costs.
gpu: $(VENV)/.dev
	@$(BIN)/python docs/measure_gpu.py

$(VENV)/.asgo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "asgo needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.asgo
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# `make results`: what docs/results shows; hours on a CPU.
include docs/results/results.mk

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
