PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast lint format bench notebooks docs clean

help:  ## Shows this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Makes .venv with the pinned dependencies; PYTHON=… chooses the interpreter.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "PYTHON must be Python 3.10 or newer, got $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## Trains the example with and without us, and prints the difference (3 to 4 minutes).
	$(BIN)/bigopt demo

test: $(STAMP)  ## Runs everything that must hold (25 minutes at most on two cores).
	$(PYTEST) --cov

test-fast: $(STAMP)  ## Leaves out what is slow or starts processes (4 minutes at most).
	$(PYTEST) -m "not slow and not distributed"

lint: $(STAMP)  ## Checks style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrites the code as lint wants it.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Runs the benchmarks, one after the other.
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

notebooks: $(STAMP)  ## Executes the notebooks and stores their outputs; NAMES="02 04" chooses.
	$(BIN)/python notebooks/run.py $(NAMES)

docs: $(STAMP)  ## Builds the site into docs/_build/html, warnings as errors.
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

clean:  ## Removes what was built, logged and cached, .venv included.
	rm -rf $(VENV) build dist docs/_build docs/notebooks/*.ipynb htmlcov runs lightning_logs checkpoints
	rm -rf .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
