"""Examples in docstrings and in README run, and give what they show."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pyro
import pytest
import torch

import pyro_diffusion

ROOT = Path(__file__).parent.parent
PACKAGE = Path(pyro_diffusion.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("[a-z]*.py")
)


def names():
    from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
    from pyro.optim import Adam

    public = {name: getattr(pyro_diffusion, name) for name in pyro_diffusion.__all__}
    return public | {
        "torch": torch,
        "pyro": pyro,
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


def test_readme_example_runs(tmp_path, monkeypatch):
    """The Python blocks of README, in order and in one namespace."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_readme_names_what_exists():
    """Links to modules and to their names in README's tables."""
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([a-z_]+/[\w./]+)\)", readme):
        assert (ROOT / target).exists(), target
    links = re.findall(r"\[`(\w+)\.([\w.]+)`\]\((pyro_diffusion/[\w/.]+)\)", readme)
    assert links
    for module, name, file in links:
        found = importlib.import_module(f"pyro_diffusion.{module}")
        for part in name.split("."):
            found = getattr(found, part)
        assert ROOT / file == Path(inspect.getsourcefile(found)), (module, name)  # in one hop
