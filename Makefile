# On a fresh machine each of `make demo` and `make test` sets everything up first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint stubs clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[hf,test,dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

stubs: $(VENV)/.installed
	$(BIN)/python proto/generate.py

clean:
	rm -rf $(VENV) build dist
