"""Test number one. With the exact reverse chain of Gaussian data every draw of the one-sample bound

is log p(x_0): schedule, kernels, chain order, site names, plates and event dimensions all enter.
"""

import numpy as np
import pytest
import torch
from oracles import log_normal
from pyro.infer import Trace_ELBO

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.schedules import AlphaSchedule

GUIDES = ["guide", "posterior_guide"]
NUM_TIMESTEPS = [1, 2, 10, 50]


def ending_in_noise(num_timesteps):
    """A schedule with ᾱ_T < 1e-24: the identity holds up to √ᾱ_T times the mean."""
    alpha = np.linspace(0.99, 0.7, num_timesteps)
    alpha[-1] = 1e-24
    return AlphaSchedule(alpha.tolist())


@pytest.mark.parametrize("num_timesteps", NUM_TIMESTEPS)
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("event_shape", [(3,), (2, 4)])
def test_every_draw_is_the_log_density(num_timesteps, guide, event_shape, double, device):
    mean = torch.randn(event_shape, device=device)
    std = 0.1 + torch.rand(event_shape, device=device)
    denoiser = GaussianDenoiser(mean, std, ending_in_noise(num_timesteps).to(device))
    diffusion = DiffusionModel(denoiser)
    x_0 = (
        torch.randn(5, *event_shape, device=device).exp() - 2 * mean
    )  # not of that law: asymmetric
    expected = log_normal(x_0.cpu().numpy(), mean.cpu().numpy(), (std**2).cpu().numpy()).sum()

    for _ in range(3):
        loss = Trace_ELBO().loss(diffusion.model, getattr(diffusion, guide), x_0)
        assert abs(-loss / expected - 1) < 1e-10


@pytest.mark.parametrize("num_timesteps", NUM_TIMESTEPS)
@pytest.mark.parametrize("guide", GUIDES)
def test_full_covariance(num_timesteps, guide, double, device):
    factor = torch.randn(4, 4, device=device)
    covariance, mean = (
        factor @ factor.mT + torch.eye(4, device=device),
        torch.randn(4, device=device),
    )
    schedule = ending_in_noise(num_timesteps).to(device)
    diffusion = DiffusionModel(GaussianDenoiser.from_covariance(mean, covariance, schedule))
    x_0 = torch.randn(5, 4, device=device).exp()
    error = (x_0 - mean).cpu().numpy()
    covariance = covariance.cpu().numpy()
    squares = np.einsum("ni,ij,nj->n", error, np.linalg.inv(covariance), error)
    expected = -0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1]).sum()

    loss = Trace_ELBO().loss(diffusion.model, getattr(diffusion, guide), x_0)
    assert abs(-loss / expected - 1) < 1e-10


@pytest.mark.parametrize("num_timesteps", NUM_TIMESTEPS)
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("event_shape", [(), (2,), (2, 3)])
def test_multimodal_data(num_timesteps, guide, event_shape, double, device):
    """The exact reverse kernel of a mixture is a mixture; the identity holds with it."""
    weights = torch.tensor([0.2, 0.5, 0.3], device=device)
    means = 2 * torch.randn(3, *event_shape, device=device)
    stds = 0.1 + torch.rand(3, *event_shape, device=device)
    schedule = ending_in_noise(num_timesteps).to(device)
    diffusion = DiffusionModel(GaussianMixtureDenoiser(weights, means, stds, schedule))
    x_0 = torch.randn(5, *event_shape, device=device).exp()
    entries = [
        log_normal(x_0.cpu().numpy(), means[k].cpu().numpy(), stds[k].cpu().numpy() ** 2)
        for k in range(3)
    ]
    logs = np.stack([entry.reshape(5, -1).sum(1) for entry in entries])
    expected = np.log((weights.cpu().numpy()[:, None] * np.exp(logs)).sum(0)).sum()
    for _ in range(3):
        loss = Trace_ELBO().loss(diffusion.model, getattr(diffusion, guide), x_0)
        assert abs(-loss / expected - 1) < 1e-10


@pytest.mark.parametrize("guide", GUIDES)
def test_elbo_terms_add_up_to_it_without_spread(guide, double, device):
    mean, std = torch.tensor([0.5, -1.0], device=device), torch.tensor([0.3, 2.0], device=device)
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, ending_in_noise(20).to(device)))
    x_0 = torch.randn(4, 2, device=device)
    terms = elbo_terms(diffusion.model, getattr(diffusion, guide), x_0, analytic_kl=False)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    torch.testing.assert_close(terms.elbo, expected, rtol=1e-10, atol=1e-10)
    assert terms.standard_error.max() < 1e-10


@pytest.mark.parametrize("guide", GUIDES)
def test_float32_at_full_length(guide, device):
    """T = 1000, D = 784: less than 0.01 nats a draw in float32."""
    from pyro_diffusion.schedules import CosineSchedule

    mean, std = 0.3 * torch.randn(784, device=device), 0.1 + torch.rand(784, device=device)
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, CosineSchedule(1000).to(device)))
    x_0 = diffusion.denoiser.data_distribution.sample((2,))
    terms = elbo_terms(
        diffusion.model, getattr(diffusion, guide), x_0, num_particles=4, analytic_kl=False
    )
    spread_of_a_draw = terms.standard_error * 4**0.5
    assert spread_of_a_draw.max() < 0.01
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    assert (terms.elbo - expected).abs().max() < 0.05
