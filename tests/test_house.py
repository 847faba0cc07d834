"""How the house is built: what imports what, where sample sites live, what importing costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_diffusion

PACKAGE = Path(pyro_diffusion.__file__).parent
#: Bottom-up: a module, or a folder of modules, imports only from those before it and from itself.
ORDER = [
    "moved",
    "typed",
    "checks",
    "display",
    "style",
    "distributions",
    "scoring",
    "params",
    "given",
    "schedules",
    "processes",
    "transforms",
    "networks",
    "reading",
    "likelihoods",
    "denoisers",
    "chains",
    "family",
    "encoders",
    "diffusion",
    "hvae",
    "walk",
    "arviz_bridge",
    "bounds",
    "evidence",
    "samplers",
    "training",
    "diagnostics",
    "inference",
    "plots",
    "__init__",
    "__main__",
]

#: Methods that are documented where they are declared first.
INHERITED = {
    "expanded",
    "has_basis",
    "part",
    "local",
    "basis",
    "coordinates",
    "of_rows",
    "drawn",
    "completed",
    "known",
    "expected",
    "look",
    "start",
    "log_snr",
    "entrance",
    "check_states",
    "batch_shape",
    "state_mask",
    "x",
    "reverse_increment",
    "increment",
    "noised",
    "prior",
    "reverse",
    "marginal",
    "posterior",
    "last",
    "whole",
    "edges",
    "law",
    "continuous",
    "chain",
    "process",
    "backward",
    "configure_optimizers",
    "decode",
    "denoise",
    "device",
    "dtype",
    "embed",
    "encode",
    "enumerate_support",
    "event_shape",
    "expand",
    "extra_repr",
    "forward",
    "guide",
    "has_rsample",
    "in_order",
    "initial",
    "load_state_dict",
    "log_prob",
    "log_snr_at",
    "logits",
    "slope_at",
    "tail",
    "mean",
    "output",
    "points",
    "quantile",
    "reverse_kernel",
    "rsample",
    "run",
    "sample",
    "scales",
    "standard_error",
    "support",
    "test_step",
    "training_step",
    "transition",
    "update",
    "validation_step",
    "variance",
    "with_num_timesteps",
    "x_0_hat",
}


#: Every file by its path below the package, without its ending: ``bounds``, ``training/batches``.
FILES = [str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")]


def row(module):
    return module.split("/")[0]


def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def test_every_module_has_its_place():
    assert {row(module) for module in FILES} == set(ORDER)


@pytest.mark.parametrize("module", FILES)
def test_imports_run_bottom_up(module):
    below = ORDER[: ORDER.index(row(module))]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_diffusion"):
            names = [node.module.removeprefix("pyro_diffusion.").split(".")[0]]
            if node.module == "pyro_diffusion":  # from pyro_diffusion import a_module
                names = [alias.name for alias in node.names]
            assert set(names) <= {*below, row(module)}


@pytest.mark.parametrize("module", [name for name in FILES if row(name) != "chains"])
def test_sample_sites_are_in_chains_only(module):
    calls = [node.func for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    sites = [f for f in calls if isinstance(f, ast.Attribute) and f.attr == "sample"]
    assert not [f for f in sites if isinstance(f.value, ast.Name) and f.value.id == "pyro"]


@pytest.mark.parametrize("module", FILES)
def test_docstrings_and_annotations(module):
    """Every module, public class and function is documented; every function says what it returns."""
    assert ast.get_docstring(tree(module))
    for node in ast.walk(tree(module)):
        if any(
            isinstance(d, ast.Name) and d.id == "overload"
            for d in getattr(node, "decorator_list", ())
        ):
            continue  # the implementation is documented
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(
            ("_", "on_")
        ):
            assert node.name in INHERITED or ast.get_docstring(node), (module, node.name)
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, (module, node.name)


def test_files_and_functions_are_short():
    """No file has more than 400 lines, no function more than 40 beside its docstring."""
    assert not [m for m in FILES if len((PACKAGE / f"{m}.py").read_text().splitlines()) > 400]
    assert not [(m, f.name) for m in FILES for f in functions(m) if length(f) > 40]


def functions(module):
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]


def length(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    documentation = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - documentation


def test_the_programs_fit_on_a_slide():
    """At most 200 lines, and each forward at most 12 statements."""
    assert len((PACKAGE / "chains/programs.py").read_text().splitlines()) <= 200
    for module in ("chains/programs", "chains/subsampled"):
        for function in functions(module):
            if function.name == "forward":
                statements = [n for n in ast.walk(function) if isinstance(n, ast.stmt)]
                documented = ast.get_docstring(function) is not None
                assert len(statements) - 1 - documented <= 12


def test_nobody_asks_what_kind_of_states_a_chain_has():
    """No isinstance of a kind of process or of its denoisers; the check of an argument is another thing."""
    kinds = ("Gaussian", "Bernoulli", "Categorical")
    for module in FILES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                assert not any(kind in ast.unparse(node.args[1]) for kind in kinds), module
            assert not (isinstance(node, ast.Attribute) and node.attr == "__new__"), module


def test_all_names_exist_and_are_exported_once():
    assert len(set(pyro_diffusion.__all__)) == len(pyro_diffusion.__all__)
    for name in pyro_diffusion.__all__:
        assert getattr(pyro_diffusion, name).__doc__


def run(code):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return result.stdout.strip().splitlines()


def test_import_is_fast():
    """Under 0.3 CPU seconds beyond torch and pyro; the best of three, because the machine is shared."""
    code = (
        "import time, torch, pyro\n"
        "start = time.process_time()\n"
        "import pyro_diffusion\n"
        "print(time.process_time() - start)"
    )
    assert min(float(run(code)[-1]) for _ in range(3)) < 0.3


def test_import_changes_nothing_global():
    code = (
        "import logging, random, sys, warnings\n"
        "import numpy, torch, pyro, pyro.distributions as dist\n"
        "def state():\n"
        "    return (\n"
        "        pyro.settings.get(), torch.get_default_dtype(), torch.get_num_threads(),\n"
        "        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),\n"
        "        torch.is_grad_enabled(), torch.distributions.Distribution._validate_args,\n"
        "        list(warnings.filters), list(logging.root.handlers), logging.root.level,\n"
        "        {n: (l.level, list(l.handlers)) for n, l in logging.root.manager.loggerDict.items()\n"
        "         if isinstance(l, logging.Logger)},\n"
        "        list(pyro.get_param_store().keys()), list(pyro.poutine.runtime._PYRO_STACK),\n"
        "        torch.are_deterministic_algorithms_enabled(), sys.getrecursionlimit(),\n"
        "    )\n"
        "before = state()\n"
        "import pyro_diffusion\n"
        "assert state() == before\n"
        "late = {'arviz', 'diffusers', 'matplotlib', 'lightning', 'xarray'}\n"
        "print('same', sorted(late & set(sys.modules)))"
    )
    assert run(code)[-1] == "same []"
