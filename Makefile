# make demo | test | bench | lint. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench lint protos clean

# The CPU build of torch is asked for by its exact version: a range would bring CUDA's gigabytes.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[data-plane,local,dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/quire demo $(if $(KEEP),--keep)

test: $(VENV)/ready
	$(BIN)/python -m pytest

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.run $(BENCH)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

protos: $(VENV)/ready
	$(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) build dist *.egg-info
