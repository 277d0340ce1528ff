# On a fresh machine with Python >= 3.11 and nothing else: `make quickstart`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Data of one's own: make fusion-table POSTERS=<movie_posters>
POSTERS ?= ../shared/data/movie_posters

.PHONY: install quickstart test test-all check bench fusion-table study clean
.DEFAULT_GOAL := quickstart

$(STAMP): pyproject.toml constraints.txt
	@command -v uv >/dev/null 2>&1 || $(PYTHON) -m uv --version >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv $(VENV)-uv && $(VENV)-uv/bin/python -m pip install --quiet uv; }
	@UV="uv"; command -v uv >/dev/null 2>&1 || UV="$(PYTHON) -m uv"; \
		if [ -x $(VENV)-uv/bin/uv ]; then UV="$(VENV)-uv/bin/uv"; fi; \
		test -x $(BIN)/python || $$UV venv --quiet --python $(PYTHON) $(VENV); \
		$$UV pip install --quiet --python $(BIN)/python -c constraints.txt -e . \
			--group encoders --group dev
	@touch $@

install: $(STAMP)

quickstart: install
	$(BIN)/python run.py

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: install
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.bench_cells
	$(BIN)/python -m benchmarks.bench_micro

fusion-table: install
	$(BIN)/python scripts/fusion_table.py dataset.path=$(POSTERS)
	$(BIN)/python scripts/report.py results

study: install
	$(BIN)/python run.py -m sweep=ssl_nas_posters dataset.path=$(POSTERS)
	$(BIN)/python scripts/report.py results --collect outputs

clean:
	rm -rf outputs/stages outputs/multirun .pytest_cache .mypy_cache .ruff_cache
