PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
FAST := "not slow and not distributed"

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-litdata test-ray test-versions lint format bench notebooks docs clean

help:  ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Creates .venv with the pinned dependencies; PYTHON=… selects the interpreter.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "PYTHON must be Python 3.10 or newer, got $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## Trains the example with and without the callbacks and compares them (about 4 minutes on two cores).
	$(BIN)/bigopt demo

# The tests of a file share what they start. Distributed tests start two processes: they run alone.
test: $(STAMP)  ## Runs all tests (25 minutes at most on two cores).
	$(PYTEST) --numprocesses 2 -m $(FAST) --cov --cov-report=
	$(PYTEST) --numprocesses 2 --dist loadfile -m "slow and not distributed" --cov --cov-append --cov-report=
	$(PYTEST) -m distributed --cov --cov-append

test-fast: $(STAMP)  ## Runs the tests that are neither slow nor distributed (4 minutes at most).
	$(PYTEST) --numprocesses 2 -m $(FAST)

test-litdata: $(STAMP)  ## Installs litdata into build/litdata; resumes runs with its loader (5 minutes).
	test -d build/litdata || $(BIN)/python -m pip install --no-deps --target build/litdata \
		--requirement benchmarks/with_litdata/constraints.txt
	PYTHONPATH=$(CURDIR):$(CURDIR)/build/litdata $(BIN)/python benchmarks/with_litdata/resume.py

test-ray: $(STAMP)  ## Installs Ray into build/ray; compares runs with and without it (10 to 25 minutes).
	test -d build/ray || $(BIN)/python -m pip install --no-deps --target build/ray \
		--constraint benchmarks/with_ray/constraints.txt ray msgpack tensorboardX
	PYTHONPATH=$(CURDIR)/build/ray $(BIN)/python benchmarks/with_ray/compare_runs.py

test-versions: $(STAMP)  ## Tests other versions of Lightning and checks each Python (10 minutes on two cores).
	$(BIN)/python -m tests.versions

lint: $(STAMP)  ## Checks style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Formats the code and applies automatic fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Runs the benchmarks, one after the other.
	test -d $(VENV)/optimizers/bitsandbytes || $(BIN)/python -m pip install --no-deps --constraint constraints.txt \
		--target $(VENV)/optimizers prodigyopt pytorch_optimizer bitsandbytes
	@set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

notebooks: $(STAMP)  ## Executes the notebooks and stores their outputs; NAMES="02 04" selects some.
	$(BIN)/python notebooks/run.py $(NAMES)

docs: $(STAMP)  ## Builds the site into docs/_build/html, warnings as errors.
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

clean:  ## Removes builds, logs, caches and .venv.
	rm -rf $(VENV) build dist docs/_build docs/notebooks/*.ipynb htmlcov runs lightning_logs checkpoints
	rm -rf .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
