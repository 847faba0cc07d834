# make demo: fit the digits and look at them.  make test: the whole suite.
# make wheel: sdist and wheel in dist/, and the wheel's smoke test in an empty environment (PYTHON's).
# make docs: the site, in docs/_build/html.  make docs-shots: pictures of it, by headless Chromium.
# make gallery: run every example and keep its picture, output and time in docs/gallery.
# make arviz1: the tests of arviz_bridge against ArviZ 1.x, without torch; PYTHON is 3.12 or later.
# All but those two make .venv first if it is not there. DEVICE=cuda runs either on a GPU.

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= cpu
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types docs docs-shots gallery wheel arviz1 clean

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

wheel:
	rm -rf dist build/wheel
	$(PYTHON) -m venv build/wheel/tools
	build/wheel/tools/bin/python -m pip install --quiet build
	build/wheel/tools/bin/python -m build --outdir dist
	$(PYTHON) -m venv build/wheel/empty
	build/wheel/empty/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/wheel/empty/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/wheel && empty/bin/python -I ../../tests/smoke.py ../../dist

docs-shots: $(INSTALLED)
	$(BIN)/python docs/shots.py

gallery: $(INSTALLED)
	$(BIN)/python docs/make_gallery.py

arviz1:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "make arviz1 PYTHON=…: ArviZ 1.x needs 3.12")'
	$(PYTHON) -m venv .venv-arviz1
	.venv-arviz1/bin/python -m pip install --quiet 'arviz>=1.2,<2' xarray h5netcdf h5py matplotlib pytest
	.venv-arviz1/bin/python -m pytest --noconftest tests/test_arviz_bridge.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-arviz1 outputs build dist docs/_build *.egg-info
