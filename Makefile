# Owns the commands of a checkout: set up, run the quickstart, test, check.

PYTHON ?= python3
VENV ?= .venv
# What is installed beside the package for `make test`; EXTRAS=dev,cuda on a GPU machine.
EXTRAS ?= dev
# Passed on: make quickstart ARGS='--train.steps=5', make test ARGS='-k config'.
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# The reference of the numeric tests; saro_jax itself never runs torch. It goes in by a pip call of
# its own, before the rest, and pinned exactly: where a CPU build (2.13.0+cpu) is offered, pip takes
# that one, while a range could resolve to a newer build that brings gigabytes of CUDA libraries.
TORCH := torch==2.13.0

.PHONY: help quickstart test test-slow bench lint format types check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/.installed  ## both stages on a small model and packaged rows
# Transparent huge pages for malloc: XLA on a CPU allocates and frees large buffers in every step,
# and with 4 KiB pages much of the time goes into page faults. Without glibc it has no effect.
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PY) -m saro_jax.pipeline $(ARGS)

test: $(VENV)/.installed-$(EXTRAS)  ## the fast tests
# A process for each core; most of a test's time is tracing and compiling, which use one.
	$(PY) -m pytest -m "not slow" -n auto --dist worksteal --durations=15 $(ARGS)

test-slow: $(VENV)/.installed-$(EXTRAS)  ## the slow tests only
	$(PY) -m pytest -m slow --durations=15 $(ARGS)

bench: $(VENV)/.installed  ## speed and memory on this CPU; ARGS='--trl-python=...' for peers
	$(PY) benchmarks/train_cpu.py $(ARGS)
	$(PY) benchmarks/scaling_cpu.py

lint: $(VENV)/.installed-$(EXTRAS)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-$(EXTRAS)  ## ruff: mend what can be mended
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.installed-$(EXTRAS)  ## pyright
	$(PY) -m pyright --pythonpath $(PY)

check: lint types test  ## lint, types and fast tests

clean:  ## remove the virtual environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find saro_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "saro_jax needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps: what is installed is renewed when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | $(PY)
	$(PIP) install -e .
	@touch $@

$(VENV)/.installed-$(EXTRAS): pyproject.toml | $(PY)
	$(PIP) install "$(TORCH)" || \
	  echo "warning: $(TORCH) could not be installed; the tests that compare with it skip" >&2
	$(PIP) install -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.installed
