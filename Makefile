# Everything a newcomer needs, each target doing its own set-up: `make quickstart`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
PARITY_ARGS ?=

.PHONY: help quickstart test check parity clean
help:
	@echo "make quickstart   train a small model on this Python's own source text, about 5 minutes on 2 cores"
	@echo "make test         run the whole test suite (no GPU needed)"
	@echo "make check        ruff, mypy, import-linter"
	@echo "make parity       every layout of the grid against one process, 20 steps each (about 1.5 hours on 2 cores)"
	@echo "make clean        remove the virtual environment and caches"

# The venv is rebuilt when dependencies change; .installed and .installed-dev mark what it holds.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bigtrain needs Python >= 3.11; " + sys.executable + " is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing bigtrain into $(VENV) (PyTorch and DeepSpeed are large: a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing bigtrain and its test tools into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.installed

quickstart: $(VENV)/.installed
	@$(BIN)/bigtrain quickstart

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

parity: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.runs.parity_grid $(PARITY_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
