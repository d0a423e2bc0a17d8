# make quickstart   set up everything, train a planner on canvas, compare it with hand-made orders
# make test         set up everything, then ruff, mypy and all tests
# make test-slow    what takes minutes: every long command killed twenty times, a Slurm sweep's launcher
# make reproduce    the full table for digits: all rows, 3 seeds
# make gpu          everything on a GPU, and its speed: tests, benchmarks, one table and gpu.json, in under 8 minutes
# make lint         ruff and mypy only
# make docs         the documentation's site in site/; a warning is an error
# make dist         wheel and sdist in dist/, checked by twine

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?= -q --durations=15
# one process a core and one thread each: small tensors gain nothing from more threads
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.DEFAULT_GOAL := quickstart
.PHONY: quickstart test test-slow reproduce gpu lint docs dist

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/python -m orderrl.train agent=bc
	$(BIN)/python -m orderrl.train agent=ppo
	$(BIN)/python -m orderrl.evaluate

reproduce: $(INSTALLED)
	$(BIN)/python -m orderrl.reproduce

gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --json gpu.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site: site/index.html"

dist: $(INSTALLED)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

test: lint
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m very_slow
