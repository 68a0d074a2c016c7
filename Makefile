# `make mini` and `make test` install what they need into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install mini lab notebooks test test-slurm attack lint clean
mini: $(INSTALLED)
	$(BIN)/sparseinst run table5 --profile mini --jobs 2 --results runs/mini --pictures runs/pictures
	$(BIN)/sparseinst report table5 --profile mini --results runs/mini --show

# The notebooks, in a browser.
lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks

# Run all notebooks and keep their outputs; a test compares them with a run.
notebooks: $(INSTALLED)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

install: $(INSTALLED)

test: $(INSTALLED)
	$(BIN)/python -m pytest

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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@
