# `make mini` and `make test` install what they need into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install mini lab notebooks test test-quick test-slurm attack lint clean
# The rows train side by side on up to four cores. `make mini JOBS=1` trains one after the other.
JOBS ?= $(shell $(BIN)/python -c "from sparseinst.machine import usable_cores; print(min(4, usable_cores()))")
mini: $(INSTALLED)
	$(BIN)/sparseinst run table5 --profile mini --jobs $(JOBS) --results runs/mini --pictures runs/pictures
	$(BIN)/sparseinst report table5 --profile mini --results runs/mini --show

# The notebooks, in a browser.
lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks

# Run all notebooks and keep their outputs; a test compares them with a run.
notebooks: $(INSTALLED)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

install: $(INSTALLED)

# Each process tests with one thread; a process needs up to 2 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4
test: $(INSTALLED)
	@echo "The tests take eight to seventeen minutes on two cores; make test-quick takes two."
	$(PYTEST)

# All tests but those over three seconds.
test-quick: $(INSTALLED)
	$(PYTEST) -m "not slow and not slurm"

# Debian: apt-get install slurm-wlm munge
test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest tests/slurm -m slurm

# Hundreds of attacks on runs, about half an hour; prints the table of docs/reliability.md.
attack: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Runs stay: they are the user's.
clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), 'Python 3.11, 3.12 or 3.13 is needed; set PYTHON='"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): 6.6 GB, most of it torch with its libraries for NVIDIA GPUs."
	$(BIN)/python -m pip install --constraint constraints.txt --editable .[dev]
	touch $@
