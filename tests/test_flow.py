"""The probability flow against densities that are known, of data and of states."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import ExpTransform

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    VarianceExploding,
    ode_log_likelihood,
)

WEIGHTS, MEANS, STDS = (0.3, 0.7), (-1.0, 1.0), (0.2, 0.5)


def mixture(exploding=False):
    schedule = LogSNRSchedule(10, log_snr_max=14.0, log_snr_min=-22.0)
    if exploding:
        schedule = VarianceExploding(schedule)
    means, stds = torch.tensor(MEANS)[:, None], torch.tensor(STDS)[:, None]
    return DiffusionModel(GaussianMixtureDenoiser(WEIGHTS, means, stds, schedule))


def test_density_of_data(double):
    """Facts' mixture: within 1e-3 nats."""
    diffusion, x_0 = mixture(), torch.linspace(-2.0, 2.5, 19)[:, None]
    evidence = ode_log_likelihood(diffusion, x_0, rtol=1e-7, atol=1e-7)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    assert (evidence.log_evidence - expected).abs().max() < 1e-3
    assert (evidence.standard_error == 0).all()
    assert evidence.reliable.all()
    assert "rtol=1e-07" in evidence.estimator


@pytest.mark.parametrize("state", [1, 5, 10])
def test_density_of_states(double, state):
    """q(x_t) is the mixture with noise, for t = 1, T/2 and T."""
    diffusion = mixture()
    signal, noise = (
        f(torch.tensor(state)) for f in (diffusion.schedule.signal, diffusion.schedule.noise)
    )
    x_t = signal * torch.linspace(-2.0, 2.5, 9)[:, None] + noise * torch.randn(9, 1)
    parts = dist.Normal(
        signal * torch.tensor(MEANS), (signal**2 * torch.tensor(STDS) ** 2 + noise**2).sqrt()
    )
    expected = dist.MixtureSameFamily(dist.Categorical(torch.tensor(WEIGHTS)), parts).log_prob(
        x_t[:, 0]
    )
    found = ode_log_likelihood(diffusion, x_t, state=state, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.log_evidence, expected, rtol=0.0, atol=2e-4)


def test_a_variance_exploding_chain_has_the_same_density(double):
    x_0 = torch.linspace(-2.0, 2.5, 7)[:, None]
    found = ode_log_likelihood(mixture(exploding=True), x_0, rtol=1e-7, atol=1e-7)
    expected = mixture().denoiser.data_distribution.log_prob(x_0)
    assert (found.log_evidence - expected).abs().max() < 1e-3


def wide():
    schedule = LogSNRSchedule(5, log_snr_max=14.0, log_snr_min=-22.0)
    return DiffusionModel(
        GaussianDenoiser(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8), schedule)
    )


def test_the_stochastic_trace_has_an_honest_error(double):
    """Random signs are exact for a diagonal Jacobian; a network's is not, and the error says by how much."""
    x_0 = torch.randn(4, 8)
    exact = wide().denoiser.data_distribution.log_prob(x_0)
    found = ode_log_likelihood(wide(), x_0, num_probes=3, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.log_evidence, exact, rtol=0.0, atol=1e-3)
    torch.manual_seed(0)
    network = MLP((8,), hidden_size=16, num_blocks=1)
    torch.nn.init.normal_(network.decode.weight, std=0.2)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(5, log_snr_max=4.0, log_snr_min=-6.0), (8,))
    diffusion = DiffusionModel(denoiser)
    exact = ode_log_likelihood(diffusion, x_0)
    found = ode_log_likelihood(diffusion, x_0, num_probes=200)
    assert (found.standard_error > 1e-4).all()
    assert ((found.log_evidence - exact.log_evidence).abs() < 5 * found.standard_error + 1e-3).all()


def test_units_of_the_user(double):
    """A transform's volume is in it: log-normal data."""
    schedule = LogSNRSchedule(5, log_snr_max=14.0, log_snr_min=-22.0)
    denoiser = GaussianDenoiser(torch.zeros(1), torch.ones(1), schedule)
    diffusion = DiffusionModel(denoiser, transform=ExpTransform().inv)
    x_0 = torch.tensor([[0.5], [1.0], [3.0]])
    found = ode_log_likelihood(diffusion, x_0, rtol=1e-7, atol=1e-7)
    expected = dist.LogNormal(0.0, 1.0).log_prob(x_0[:, 0])
    assert (found.log_evidence - expected).abs().max() < 1e-3


def test_what_the_flow_has_no_density_of():
    diffusion, x_0 = wide(), torch.randn(3, 8)
    for state in (-1, 6, 1.0):
        with pytest.raises(ValueError, match="argument 'state'"):
            ode_log_likelihood(diffusion, x_0, state=state)
    with pytest.raises(ValueError, match="argument 'num_probes': got 1"):
        ode_log_likelihood(diffusion, x_0, num_probes=1)
    levels = torch.randint(3, (4, 8))
    grey = DiffusionModel(diffusion.denoiser, DiscretizedGaussianLikelihood(3))
    network = MLP((8,), num_outputs=3, hidden_size=8, num_blocks=1)
    schedule = LogSNRSchedule(3)
    logits = NeuralDenoiser(network, schedule, (8,), prediction=LevelPrediction(3))
    for model in (grey, DiffusionModel(logits)):
        with pytest.raises(ValueError, match=r"argument 'diffusion'.*Dequantise"):
            ode_log_likelihood(model, levels)
    found = ode_log_likelihood(grey, torch.randn(2, 8), state=1)  # but of states it has
    assert found.log_evidence.isfinite().all()
    with pytest.raises(ValueError, match="argument 'x_0'"):
        ode_log_likelihood(diffusion, torch.full((2, 8), math.nan))


def test_many_dimensions_take_probes_and_chunks():
    schedule = LogSNRSchedule(3, log_snr_max=6.0, log_snr_min=-10.0)
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(100), torch.ones(100), schedule))
    x_0 = torch.randn(5, 100)
    found = ode_log_likelihood(diffusion, x_0, batch_size=2)
    assert "8 probes" in found.estimator
    assert found.log_evidence.dtype == torch.float64
    expected = diffusion.denoiser.data_distribution.log_prob(x_0).double()
    torch.testing.assert_close(found.log_evidence, expected, rtol=0.0, atol=0.2)


def test_the_solver_asks_about_the_log_snrs_of_the_curve_only():
    """A slow start made the solver guess a first step of a thousand, and then one of zero."""
    schedule = LogSNRSchedule(5, log_snr_max=14.0, log_snr_min=-30.0)
    mean, std = torch.tensor([0.3]).double(), torch.tensor([2.0]).double()
    denoiser = GaussianDenoiser(mean, std, schedule)
    asked, denoise = [], denoiser.denoise

    def listening(x_t, log_snr):
        asked.append(float(log_snr))
        return denoise(x_t, log_snr)

    denoiser.denoise = listening
    x_0 = torch.tensor([[0.04742070755472291]]).double()
    value = ode_log_likelihood(DiffusionModel(denoiser), x_0, rtol=1e-3, atol=1e-3).log_evidence
    exact = torch.distributions.Normal(0.3, 2.0).log_prob(x_0)[:, 0]
    torch.testing.assert_close(value, exact, rtol=0, atol=0.03)
    assert min(asked) >= -30.0 - 1e-9
    assert max(asked) <= 14.0 + 1e-9
