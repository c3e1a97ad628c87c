# `make demo` runs Freshline on a fresh machine, `make test` runs its tests. `make` lists all targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: help setup demo test check format schemas lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## Create .venv with the freshline command from the locked requirements

demo: setup ## Run the demo on real servers (for example ARGS='--docs DIR --once')
	@$(BIN)/freshline demo $(ARGS)

test: setup ## Run all tests on real servers in two processes (for example ARGS='-k splitting')
	@$(BIN)/pytest --numprocesses 2 $(ARGS)

check: setup ## Check format, style, types, import rules and generated files; part of `make test`
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m freshline.contracts --check

format: setup ## Format the code and apply automatic lint fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

schemas: setup ## Generate docs/contracts, docs/configuration.md, docs/cli.md and docs/metrics.md
	@$(BIN)/python -m freshline.contracts

lock: $(VENV)/locked ## Update requirements.lock from pyproject.toml; versions that still match are kept
	@$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	    --python-version 3.11 --extra dev pyproject.toml --output-file requirements.lock

clean: ## Remove .venv and the caches of all tools
	rm -rf $(VENV) build dist ./*.egg-info .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp file is written last, so an interrupted set-up starts over. A changed lock file creates a new environment;
# a changed pyproject.toml installs the project again.
$(VENV)/locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Freshline requires Python 3.11 or newer; '$(PYTHON)' is not ($$($(PYTHON) --version 2>&1))."; \
	    echo "Install one (Debian: apt-get install python3 python3-venv; macOS: brew install python),"; \
	    echo "or select one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@echo "Installing the locked requirements into $(VENV); the first time takes a few minutes."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
	    --only-binary=:all: -r requirements.lock
	@touch $@

$(VENV)/ready: $(VENV)/locked pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --quiet
	@touch $@
