# The commands of the project. `make` targets create .venv with PYTHON and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Large arrays in large pages: a training step takes 0.82 to 0.86 of its time so, see README.md.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: compare test test-fast lint clean

compare: $(INSTALLED)
	$(BIN)/python -m experiments.compare --config=configs/compare.py --workdir=runs/compare

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
