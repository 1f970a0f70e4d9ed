# make setup | demo PROMPT="…" | test | browser | lint | docs | world | clean
# Everything is installed into .venv; PYTHON chooses the interpreter (3.10 or newer) that makes it.

PYTHON ?= python3
PROMPT ?= a neon elephant on a blue background
SEED ?= 0
OUTPUTS ?= outputs

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.autolora-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test browser lint docs world clean

help:
	@echo 'make setup               install everything into $(VENV)'
	@echo 'make demo PROMPT="..."   draw a picture with the embedded model, into $(OUTPUTS)/'
	@echo 'make test                lint, type check and test'
	@echo 'make browser             test the web console with Chromium'
	@echo 'make lint                only lint and type check'
	@echo 'make docs                build the documentation into build/site'
	@echo 'make world               build the embedded model and its pool anew: hours; goes on where it was'
	@echo 'make clean               remove caches, builds and the search index; pictures stay'

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "AutoLoRA needs Python 3.10 or newer; choose one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): several GB the first time, a few minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[text,console,dev]"
	touch $@

demo: setup
	@$(BIN)/autolora generate "$$PROMPT" --model tiny --seed $(SEED) --out $(OUTPUTS)/

# Handed over through the environment, so that quotes and dollars in a prompt need no escaping.
override PROMPT := $(value PROMPT)
export PROMPT

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not browser"

browser: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy autolora
	$(BIN)/lint-imports --no-logo

docs: setup
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

ICONS := build/icons/node_modules/@iconify-json

world: setup $(ICONS)
	@$(BIN)/python -c 'import resvg_py, efficientnet_lite_pytorch' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[world]"
	$(BIN)/python scripts/build_tiny_world.py

$(ICONS):
	npm install --silent --prefix build/icons @iconify-json/noto @iconify-json/noto-v1 \
		@iconify-json/fluent-emoji @iconify-json/fluent-emoji-flat @iconify-json/twemoji

# What took long to make stays: pictures, and a tiny world under build/.
clean:
	rm -rf build/site build/lib build/bdist.* dist index *.egg-info .hypothesis
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
