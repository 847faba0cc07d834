# make demo: fit the digits and look at them.  make test: the whole suite.
# Both make .venv first if it is not there. DEVICE=cuda runs either on a GPU.

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= cpu
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py --device $(DEVICE)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --device $(DEVICE)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info
