# Everything that a fresh machine needs is done by these targets; each may be run again at any time.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format lock contracts clean

help: ## Show this
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done ## Make .venv with the freshline command, from the locked dependencies

$(VENV)/.done: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "the venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@# An interrupted set-up leaves no .done, and is done again from the start.
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup ## Start real servers, ingest real documents, ask, edit, delete; ARGS='--once --json'
	@$(BIN)/freshline demo $(ARGS)

test: setup ## Run all tests on real servers; ARGS='-k name' narrows
	@$(BIN)/pytest $(ARGS)

check: setup ## Run lint, types, import rules, and compare the generated contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m freshline.contracts --check

format: setup ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

contracts: setup ## Write docs/contracts and docs/configuration.md anew
	$(BIN)/python -m freshline.contracts

lock: setup ## Lock the dependencies of pyproject.toml anew
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
		--extra dev pyproject.toml --output-file requirements.lock

clean: ## Remove what was made here; the local stack's data and downloads stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
