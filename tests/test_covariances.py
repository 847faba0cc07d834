"""The covariance that draws of a model show, and how far the Jacobian of an estimate stands for it."""

import pyro
import pytest
import torch
from torch import nn

from pyro_diffusion import (
    DataPrediction,
    DiffusionModel,
    GaussianDenoiser,
    GaussianLikelihood,
    GaussianMixtureDenoiser,
    LinearGaussian,
    LogSNRSchedule,
    NeuralDenoiser,
    posterior_samples,
)
from pyro_diffusion.given import Given
from pyro_diffusion.inference.covariance import Covariances
from pyro_diffusion.processes.gaussian import chain_step


@pytest.fixture(autouse=True)
def _double(double):
    """Oracles in float64."""


CURVE = LogSNRSchedule(30, log_snr_max=6.0, log_snr_min=-8.0)


class Wrapped(nn.Module):
    """x̂_0 of an exact denoiser and a turn, an antisymmetric part of its Jacobian at large noise."""

    def __init__(self, exact, turn=0.0):
        super().__init__()
        self.exact, self.turn = [exact], turn

    def forward(self, x_t, log_snr):
        turned = torch.stack((-x_t[..., 1], x_t[..., 0]), -1)
        known = self.exact[0].x_0_hat(x_t, log_snr)
        return known + self.turn * torch.sigmoid(-log_snr)[:, None] * turned


def as_network(exact, turn=0.0):
    network = Wrapped(exact, turn)
    return DiffusionModel(NeuralDenoiser(network, CURVE, (2,), prediction=DataPrediction()))


def gaussian():
    covariance = torch.tensor([[1.0, 0.6], [0.6, 1.5]])
    return GaussianDenoiser.from_covariance(torch.zeros(2), covariance, CURVE), covariance


def mixture():
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5]])
    return GaussianMixtureDenoiser([0.5, 0.5], means, 0.4, CURVE)


def test_the_mean_covariance_of_draws():
    """Of a Gaussian it is Bayes' rule, at every timestep; the least is the variance of the last kernel."""
    exact, covariance = gaussian()
    found = Covariances.of_draws(as_network(exact), Given(), 1)
    assert found.errors.shape == (31, 256, 2)
    for t in (2, 15, 30):
        snr = CURVE.snr(t)
        expected = torch.linalg.inv(torch.linalg.inv(covariance) + snr * torch.eye(2))
        ours = found.mean(torch.eye(2), t)
        # second moments of 256 draws: a spread of 9 %
        torch.testing.assert_close(
            ours, expected, rtol=0, atol=0.4 * expected.diagonal().max().item()
        )
    noisy = DiffusionModel(as_network(exact).denoiser, GaussianLikelihood(0.3))
    found = Covariances.of_draws(noisy, Given(), 1)
    torch.testing.assert_close(found.least, torch.full((2,), 0.09))


def test_a_jacobian_that_predicts_the_errors_is_trusted():
    """A mixture's covariance depends on the state, and its exact Jacobian knows how."""
    pyro.set_rng_seed(0)
    right = Covariances.of_draws(as_network(mixture()), Given(), 1)
    middle = slice(12, 22)  # where the modes are told apart
    assert right.trust[middle].mean() > 0.6
    assert ((right.trust >= 0) & (right.trust <= 1)).all()
    wrong = Covariances.of_draws(as_network(mixture(), turn=0.0), Given(), 1)
    wrong.trust[:] = 0.0
    rows, pulled = torch.eye(2)[None, None], torch.randn(1, 1, 2, 2)
    mixed = wrong.mixed(rows, pulled, 15)
    torch.testing.assert_close(mixed, wrong.mean(rows, 15))  # nothing of the Jacobian is left
    assert right.exactly().trust.min() == 1


def test_a_covariance_that_is_one_stays_as_it_is():
    exact, covariance = gaussian()
    found = Covariances.of_draws(as_network(exact), Given(), 1).exactly()
    snr = CURVE.snr(15)
    truth = torch.linalg.inv(torch.linalg.inv(covariance) + snr * torch.eye(2))
    rows = torch.randn(5, 3, 1, 2)
    pulled = rows @ truth
    assert torch.equal(found.mixed(rows, pulled, 15), pulled)


def test_a_negative_direction_becomes_a_positive_one():
    """What comes out is above the last kernel's variance in every direction."""
    exact, _ = gaussian()
    found = Covariances.of_draws(as_network(exact), Given(), 1).exactly()
    rows = torch.eye(2).expand(4, 1, 2, 2)
    wrong = torch.tensor([[0.2, 0.9], [0.9, -0.5]]).expand(4, 1, 2, 2)
    lifted = found.mixed(rows, wrong, 20) @ rows.mT
    values = torch.linalg.eigvalsh(0.5 * (lifted + lifted.mT) - torch.diag(found.least))
    assert (values > 0).all()
    # rows that only fill up stay empty
    padded = torch.cat((rows, torch.zeros(4, 1, 1, 2)), -2)
    filled = found.mixed(padded, torch.cat((wrong, torch.zeros(4, 1, 1, 2)), -2), 20)
    assert (filled[..., 2, :] == 0).all()
    torch.testing.assert_close(filled[..., :2, :], lifted, rtol=0, atol=0.05)


@pytest.mark.parametrize("turn", [0.0, 0.15])
def test_a_jacobian_that_is_no_covariance_does_no_harm(turn):
    """Its antisymmetric part is large at large t; log p(y) of the chain is known from its draws."""
    exact, _ = gaussian()
    diffusion = as_network(exact, turn)
    likelihood = LinearGaussian(torch.tensor([[1.0, 0.5]]), torch.tensor([1.2]), 0.5)
    draws = posterior_samples(
        diffusion, likelihood, 9, num_particles=150, num_runs=8, progress=False
    )
    x_0 = diffusion.sample(40_000)
    density = torch.distributions.Normal(x_0 @ torch.tensor([1.0, 0.5]), 0.5)
    weights = density.log_prob(torch.tensor(1.2)).exp()
    error = (draws.standard_error**2 + (weights.std() / weights.mean()) ** 2 / 40_000).sqrt()
    assert abs(draws.log_evidence - weights.mean().log()) < 4 * error
    assert draws.reliable
    assert chain_step(30, CURVE).signal < 0.03
