"""A user's script is checked by ``mypy --strict``, it runs, and mistakes in it are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_diffusion

PACKAGE = Path(pyro_diffusion.__file__).parent
SCRIPT = Path(__file__).parent / "data/user_script.py"

#: A user's settings: strict, but for Pyro, which has few hints, and for torch's functions that have none.
#: The package is read from where it is under test, and its own errors are another test (``make types``).
#: Modules that no type of the script comes from are skipped, which halves the time.
SETTINGS = """
[mypy]
strict = true
untyped_calls_exclude = torch

[mypy-pyro.*]
follow_imports = skip

[mypy-arviz.*]
ignore_missing_imports = true

[mypy-pyro_diffusion.*]
follow_imports = silent

[mypy-torch._inductor.*,torch._dynamo.*,torch._export.*,torch._functorch.*,torch.export.*]
follow_imports = skip

[mypy-torch.ao.*,torch.distributed.*,torch.fx.*,torch.onnx.*,torch.testing.*,sympy.*]
follow_imports = skip

[mypy-torchmetrics.*,IPython.*,pandas.*,scipy.*,sklearn.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Run mypy on a file; what it printed, and whether it found nothing."""
    pytest.importorskip("mypy")
    pytest.importorskip("lightning")
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "mypy.ini").write_text(SETTINGS)

    def check(path):
        command = [sys.executable, "-m", "mypy", "--config-file", folder / "mypy.ini"]
        result = subprocess.run(
            [*command, "--cache-dir", folder / "cache", path],
            env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not result.stderr
        return result.stdout, result.returncode == 0

    return check


def test_the_package_says_that_it_has_hints():
    assert (PACKAGE / "py.typed").exists()


def test_a_users_script_is_strictly_typed(mypy):
    """Every ``assert_type`` in it holds, and no name of this package is untyped."""
    printed, clean = mypy(SCRIPT)
    assert clean, printed


#: Mistakes in a script, and what mypy must say of them.
MISTAKES = {
    "from pyro_diffusion import DifusionModel": "has no attribute",
    "import pyro_diffusion.bounds; pyro_diffusion.bounds.elbo_term": "has no attribute",
    "from pyro_diffusion.training import SVIModul": "has no attribute",
    "from pyro_diffusion import Denoiser": "has no attribute",  # has moved
    "diffusion.smaple()": "[operator]",  # a Tensor or Module, as of every torch module
    "diffusion.sample('three')": "incompatible type",
    "diffusion.denoiser(x_0)": "Missing positional argument",
    "elbo_terms(diffusion)": "No overload variant",
    "elbo_terms(diffusion, x_0, num_particle='eight', num_particles='eight')": "No overload variant",
    "evaluate_bound(diffusion, x_0)": "No overload variant",
    "smc_evidence(vae, x_0, num_particles=8)": "No overload variant",
    "elbo_terms(diffusion, x_0).reconstructions": "has no attribute",
    "ODESampler(diffusion)(2).shapes": "has no attribute",
    "diffusion.decode(x_0).log_probs(x_0)": "has no attribute",
    "LogSNRSchedule('many')": "incompatible type",
    "DiffusionModel(diffusion.denoiser, likelihood=3)": "incompatible type",
    "DiffusionModel(diffusion.denoiser, likelihood=GaussianLikelihood)": "incompatible type",
    "HierarchicalVAE((2,), (4,), likelihood=x_0)": "incompatible type",
    "MLP((2,))(x_0)": "Missing positional argument",
}


def test_mistakes_are_found(mypy, tmp_path):
    script = tmp_path / "mistakes.py"
    before = [
        "import torch",
        "from pyro_diffusion import *",
        "diffusion = DiffusionModel(NeuralDenoiser(MLP((2,)), LogSNRSchedule(5), (2,)))",
        "vae = HierarchicalVAE((2,), latent_sizes=(4,))",
        "x_0 = torch.zeros(3, 2)",
    ]
    script.write_text("\n".join([*before, *MISTAKES, ""]))
    printed, clean = mypy(script)
    assert not clean
    by_line = {}
    for line in printed.splitlines():
        number = line.split(":")[1] if line.count(":") > 1 else ""
        by_line[number] = by_line.get(number, "") + line
    for number, (mistake, words) in enumerate(MISTAKES.items(), len(before) + 1):
        assert words in by_line.get(str(number), ""), (mistake, printed)
    assert not {str(i) for i in range(1, len(before) + 1)} & set(by_line), printed


def test_the_script_runs(tmp_path):
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(
        [sys.executable, SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
