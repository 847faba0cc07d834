# make demo: fit the digits and look at them.  make test: the whole suite.
# make docs: the site, in docs/_build/html.
# All make .venv first if it is not there. DEVICE=cuda runs either on a GPU.

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= cpu
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types docs clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py --device $(DEVICE)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --device $(DEVICE)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) outputs build docs/_build *.egg-info
