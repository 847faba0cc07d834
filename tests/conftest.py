"""Options and fixtures of the suite. Oracles are in ``oracles.py``, written from the formulas."""

import os

import matplotlib
import pyro
import pytest
import torch

matplotlib.use("Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # one thread for each worker, and for the examples it starts: more would fight for the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the models of the suite are on")


@pytest.fixture(scope="session")
def device(request):
    """The device under test: ``--device``, CPU by default."""
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit(f"--device {name}: torch sees no CUDA device", returncode=2)
    return torch.device(name)


@pytest.fixture(autouse=True)
def _clean_process():
    """A fixed seed and an empty param store for each test, and the process left as it was."""
    pyro.clear_param_store()
    pyro.set_rng_seed(20261121)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def double():
    """float64 as torch's default dtype."""
    torch.set_default_dtype(torch.float64)
