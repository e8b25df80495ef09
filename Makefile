# Needs only python3 (3.11 or newer), make and a PyPI index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile

# With DB=sqlite the tests that need a server are skipped, even if it listens.
export TORTOISE_AUTH_TEST_DB := $(DB)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types check cov fmt bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tortoise-auth needs Python 3.11 or newer; choose one with: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[bcrypt,postgres,psycopg,mysql,cli,fastapi,faststream,limits]" --group dev
	@touch $@

install: $(STAMP) ## Make .venv with the package and the development tools

demo: $(STAMP) ## Run the quickstart: every step of a session, each handler printing
	$(BIN)/python examples/quickstart.py

test: $(STAMP) ## The quick tests: SQLite alone, no server (make test ARGS="-k login")
	$(PYTEST) -m "not service and not slow" $(ARGS)

lint: $(STAMP) ## Style and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP) ## mypy, strict, on package, examples and tests
	$(BIN)/mypy

check: $(STAMP) ## All that CI runs: style, layers, types, every test (without servers: make check DB=sqlite)
	@echo "Style, layers, types and every test: about 12 minutes on two idle cores with every server. The quick tests alone: make test"
	@$(MAKE) --no-print-directory lint types
	$(PYTEST) $(ARGS)

# What decides who gets in is covered to the last branch.
DOORS := passwords/* keys config sessions/* service throttling/* flows/* users/* web/*

cov: $(STAMP) ## Branch coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n auto --dist loadfile $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	set -f; for door in $(DOORS); do $(BIN)/coverage report --fail-under=100 --include=tortoise_auth/$$door.py || exit; done

fmt: $(STAMP) ## Rewrite to style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure logins under load, the emitter and the outbox
	$(BIN)/python tests/benchmarks/hashing.py
	$(BIN)/python tests/benchmarks/emitters.py
	$(BIN)/python tests/benchmarks/outbox.py

clean: ## Remove the environment and build products
	rm -rf $(VENV) dist .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
