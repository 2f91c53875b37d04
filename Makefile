# make demo | test | bench | bench-gpu | bench-memory | bench-sharing | lint. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench bench-gpu bench-memory bench-sharing lint protos clean

# torch comes first and by its exact version, because a range may bring a CUDA build of gigabytes.
# Where this version is a CUDA build too, set TORCH to what names a CPU build there.
TORCH ?= torch==2.13.0

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[data-plane,local,dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/quire demo $(if $(KEEP),--keep)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.run $(BENCH)

# On a GPU, with the python that has torch for it: it makes no environment of its own.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(BENCH)

# Counts and ratios, no times. BENCH="--traces DIR" adds the traces of real services.
bench-memory: $(VENV)/ready
	$(BIN)/python -m benchmarks.memory $(BENCH)
	$(BIN)/python -m benchmarks.prefix_cache $(BENCH)

bench-sharing: $(VENV)/ready
	$(BIN)/python -m benchmarks.sharing $(BENCH)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

protos: $(VENV)/ready
	$(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) build dist *.egg-info
