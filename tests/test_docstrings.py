"""Examples in docstrings run, and give what they show."""

import doctest
import importlib
from pathlib import Path

import pyro
import pytest
import torch

import pyro_diffusion

PACKAGE = Path(pyro_diffusion.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("[a-z]*.py")
)


def names():
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
    from pyro.optim import Adam

    public = {name: getattr(pyro_diffusion, name) for name in pyro_diffusion.__all__}
    return public | {
        "torch": torch,
        "pyro": pyro,
        "dist": dist,
        "SVI": SVI,
        "Adam": Adam,
        "Trace_ELBO": Trace_ELBO,
        "TraceMeanField_ELBO": TraceMeanField_ELBO,
    }


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    module = importlib.import_module(f"pyro_diffusion.{module}")
    results = doctest.testmod(
        module, extraglobs=names(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(f"pyro_diffusion.{module}") for module in MODULES]
    tests = [test for module in modules for test in finder.find(module, globs={})]
    assert sum(bool(test.examples) for test in tests) >= 8
