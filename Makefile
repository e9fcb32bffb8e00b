# Each target does its own set-up: the environment is .venv, at the versions that constraints.txt locks.
#   make quickstart    from raw text to a model that answers, on the CPU
#   make test          the default tests; make test-slow the rest, make test-all both
#   make lint          ruff, formatting, types; make format applies the first two
#   make lock          writes constraints.txt anew
# PYTHON=... chooses the interpreter, PYTEST_FLAGS=... replaces pytest's flags.

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
PYTEST_FLAGS ?= -q -n logical --maxprocesses 8

.PHONY: quickstart test test-slow test-all lint format lock

quickstart: $(VENV)/.installed-run
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/quickstart.sh

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow and not gpu"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "slow and not gpu"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# On the oldest Python that is supported, so that one set of versions serves them all.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-tools
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --all-extras --strip-extras --no-annotate \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
	  --output-file constraints.txt pyproject.toml

$(VENV)/.installed-run: pyproject.toml constraints.txt launch/install.sh
	launch/install.sh data
	touch $@

# Has everything that a run and the tests of optional parts need, so a quickstart after it installs nothing.
$(VENV)/.installed-dev: pyproject.toml constraints.txt launch/install.sh
	launch/install.sh data,dev,hub,ray,tokenizers,warc
	touch $(VENV)/.installed-run $@
