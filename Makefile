# What people and CI run. `make help` lists it.
SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/noria-setup.stamp
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help setup check lint types imports rules proto-fresh docs-fresh test fuzz soak-clients demo bench docs proto clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make .venv and install everything, then prove it (noria doctor)
	@deploy/scripts/setup.sh

$(STAMP): pyproject.toml deploy/scripts/setup.sh
	@deploy/scripts/setup.sh

check: lint types imports rules proto-fresh docs-fresh ## ruff, mypy, import rule, size and documentation rules, freshness

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

rules: $(STAMP)
	$(BIN)/python -m tests.checks.sizes
	$(BIN)/python -m tests.checks.documented

proto-fresh: $(STAMP)
	$(BIN)/python proto/generate.py --check

docs-fresh: $(STAMP)
	$(BIN)/python -m tests.checks.papers --check

test: $(STAMP) ## unit, contract, fuzz and flow tests
	$(PYTEST) tests/unit tests/contract tests/fuzz tests/flow

fuzz: $(STAMP) ## ten thousand malformed requests over both wires of a server on the tiny model
	$(BIN)/python -m tests.fuzz

soak-clients: $(STAMP) ## 200 streaming clients for three minutes, then clients that dawdle
	$(BIN)/python -m tests.soak

demo: $(STAMP) ## the whole loop on this machine, with a table at the end
	$(BIN)/noria demo

bench: $(STAMP) ## what there is to measure, measured
	@for file in benchmarks/[a-z]*.py; do name=$${file##*/}; \
		echo "== $$file"; $(BIN)/python -m "benchmarks.$${name%.py}" || exit 1; done

docs: $(STAMP) ## write docs/cli.md and docs/settings.md from the code
	$(BIN)/python -m tests.checks.papers

proto: $(STAMP) ## write noria/v1 from proto/noria/v1
	$(BIN)/python proto/generate.py

clean: ## remove caches and the demo's output, not .venv
	rm -rf build dist demo-out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
