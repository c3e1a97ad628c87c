# All it takes from a fresh machine: `make demo` shows Freshline, `make test` checks it. `make` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: help setup demo test check format schemas lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## Make .venv with the freshline command, from the locked requirements

demo: setup ## Show everything on real servers (ARGS='--docs DIR --once' and the like are passed on)
	@$(BIN)/freshline demo $(ARGS)

test: setup ## Run all tests on real servers, in two processes (ARGS='-k splitting' and the like are passed on)
	@$(BIN)/pytest --numprocesses 2 $(ARGS)

check: setup ## Check format, style, types, import rules and generated files; a part of `make test`
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m freshline.contracts --check

format: setup ## Format the code, and mend what lint can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

schemas: setup ## Generate docs/contracts, docs/configuration.md and docs/cli.md
	@$(BIN)/python -m freshline.contracts

lock: $(VENV)/locked ## Resolve requirements.lock anew from pyproject.toml; versions that still fit stay
	@$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	    --python-version 3.11 --extra dev pyproject.toml --output-file requirements.lock

clean: ## Remove .venv and whatever tools have left behind
	rm -rf $(VENV) build dist ./*.egg-info .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written last, so an interrupted set-up is begun again. Another lock makes another environment, not one
# with leftovers of the old; the project itself is installed anew where its own table says otherwise.
$(VENV)/locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Freshline needs Python 3.11 or newer, and '$(PYTHON)' is not ($$($(PYTHON) --version 2>&1))."; \
	    echo "Install one (Debian: apt-get install python3 python3-venv; macOS: brew install python),"; \
	    echo "or name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@echo "Installing the locked requirements into $(VENV); the first time takes a few minutes."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
	    --only-binary=:all: -r requirements.lock
	@touch $@

$(VENV)/ready: $(VENV)/locked pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --quiet
	@touch $@
