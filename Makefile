# Everything a clone needs: Python 3.11 or newer, make and a package index. All set-up stays in .venv.
# Another interpreter: make PYTHON=/path/to/python3.12 ...
# More processes for the tests, each of which takes a core and up to 1.5 GB: make test WORKERS=8

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart reproduce demo bench gpu test fuzz interop slow mistakes faults docs check format clean

PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
BIN := .venv/bin
WORKERS ?= 3

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: .venv/package ## create .venv from requirements.lock (the other targets do it by themselves)
	@echo "next: source .venv/bin/activate"

quickstart: .venv/package ## SmolLM2's architecture at a size for minutes: 5000 steps, resume at 5001, 5050, audit, report
	$(BIN)/resmol quickstart

reproduce: .venv/package ## the same with the real SmolLM2-135M, on a GPU or a CPU; interrupted, it goes on
	$(BIN)/resmol reproduce runs/smollm2-135m

demo: .venv/package ## a page to try the model of `make quickstart` in, at http://127.0.0.1:7860
	@if [ ! -d runs/quickstart ]; then \
	  echo "error: there is no runs/quickstart" >&2; echo "  fix: make quickstart" >&2; exit 3; fi
	$(BIN)/resmol demo runs/quickstart

bench: .venv/package ## speed and memory of training side by side with transformers, at the size of SmolLM2-135M
	$(BIN)/resmol bench train --peer transformers

# The one target without .venv: such a machine often has its own PyTorch and no network. WHEELS is a folder with what it lacks.
gpu: ## what only a GPU can show, in 8 minutes: docs/performance-gpu.md; make gpu PYTHON=python3 WHEELS=folder
	$(if $(WHEELS),$(or $(PYTHON),python3) -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl)
	PYTHONPATH=src $(or $(PYTHON),python3) benchmarks/gpu.py

test: .venv/package ## the test suite
	$(BIN)/python -m pytest -m "not slow and not interop" -n $(WORKERS) --dist worksteal

fuzz: .venv/package ## the property tests with new random examples, ten times as many
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=fuzz -n $(WORKERS) --dist worksteal

interop: .venv/interop ## what llama.cpp, lm-eval and other transformers make of our exports; builds llama.cpp the first time (minutes)
	$(BIN)/python -m pytest -m interop

slow: .venv/package ## the tests that take over a minute or download real weights
	$(BIN)/python -m pytest -m slow

mistakes: .venv/package ## the mistakes of other reproductions, each put into ours, and what catches it
	$(BIN)/python tests/mistakes/table.py

faults: .venv/package ## the fault campaign at its full counts; writes docs/reliability.md
	RESMOL_FAULTS_WORKERS=$(WORKERS) $(BIN)/python tests/faults/campaign.py

docs: .venv/package ## the documentation as a site, build/site/index.html; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: .venv/package docs ## format, lint, strict types for three systems, import layers, links of the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	for platform in linux darwin win32; do $(BIN)/mypy --platform $$platform --cache-dir .mypy_cache/$$platform || exit; done
	$(BIN)/lint-imports

format: .venv/package ## format the code and sort the imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps: a changed lock makes a new environment, a changed pyproject.toml only installs the package again.
.venv/package: .venv/locked pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# llama.cpp comes as source. pip keeps the wheel that it builds, so a new .venv costs seconds. Built for any processor with
# AVX2 instead of this one alone, so that a kept wheel runs elsewhere; without what only its web client and images need;
# and with -O1 for its C++: what is tested is numbers, not speed.
.venv/interop: .venv/package requirements-interop.lock
	@echo "adding llama.cpp and lm-eval to .venv"; \
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG'" \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock -r requirements-interop.lock
	@touch $@

.venv/locked: requirements.lock
	@for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python 3.11 or newer with venv was found (looked for: $(CANDIDATES))" >&2; \
	  echo "  fix: install one (Debian and Ubuntu: python3 python3-venv), or run make PYTHON=/path/to/python3" >&2; \
	  exit 3; \
	fi; \
	echo "setting up .venv with $$("$$python" --version) (the first time takes a minute or more, by the network)"; \
	"$$python" -m venv --clear .venv && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@
