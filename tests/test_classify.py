"""The race between classes of ``examples/classify.py``, against posteriors that are known."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from pyro_diffusion import DiffusionModel, GaussianMixtureDenoiser, LogSNRSchedule

PATH = Path(__file__).parent.parent / "examples/classify.py"
spec = importlib.util.spec_from_file_location("classify", PATH)
classify = importlib.util.module_from_spec(spec)
spec.loader.exec_module(classify)

WEIGHTS = [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def mixture():
    """Three classes that overlap, 400 data of each kind, and their exact posterior."""
    torch.manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [1.2, 0.0], [0.5, 1.0]], dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(
        WEIGHTS, means, 0.5, LogSNRSchedule(30, log_snr_max=6.0, log_snr_min=-30.0)
    )
    x_0 = denoiser.data_distribution.sample((400,))
    log_prior = torch.tensor(WEIGHTS, dtype=torch.float64).log()
    log_p = torch.stack([
        -(x_0 - mean).square().sum(-1) / (2 * 0.25) - math.log(2 * math.pi * 0.25) for mean in means
    ], -1)  # fmt: skip
    return DiffusionModel(denoiser), x_0, log_prior, log_p


def test_posterior_agrees_with_the_exact_one_within_its_error(mixture):
    diffusion, x_0, log_prior, log_p = mixture
    torch.manual_seed(1)
    looks = (16, 64)
    found = classify.race(
        classify.drawn_bounds(diffusion, x_0, draws=8), len(x_0), log_prior, looks
    )
    exact = (log_prior + log_p).log_softmax(-1)
    whole = found.racing.all(1)  # a class that has left was far behind when it was last seen
    error = found.log_posterior(log_prior) - exact
    z = (error / found.standard_error(log_prior))[whole]
    print(whole.sum(), found.decided.sum(), z.std(), z.mean(), error[whole].std(), found.standard_error(log_prior)[whole].mean())
    assert False
