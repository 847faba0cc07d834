"""Sequential Monte Carlo against chains whose own log p is known, exact and wrong ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from pyro_diffusion import (
    MLP,
    AlphaSchedule,
    BernoulliDiffusion,
    DataPrediction,
    DiffusionModel,
    EnumeratedDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LevelPrediction,
    LinearDecaySchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    NeuralDenoiser,
    PosteriorVariance,
    VarianceExploding,
    importance_evidence,
    ode_log_likelihood,
    smc_evidence,
)
from pyro_diffusion.walk import ReverseWalk


def gaussian(num_timesteps, dimension=3):
    """The exact chain of a Gaussian, with nothing left of the datum at the end."""
    alpha = torch.linspace(0.99, 0.7, num_timesteps)
    alpha[-1] = 1e-24
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(dimension, generator=generator)
    std = 0.3 + torch.rand(dimension, generator=generator)
    return DiffusionModel(GaussianDenoiser(mean, std, AlphaSchedule(alpha)))


class Scaled(nn.Module):
    """x̂_0 of an exact denoiser with its noise estimate, or itself, multiplied."""

    def __init__(self, exact, noise=1.0, datum=1.0):
        super().__init__()
        self.exact, self.noise, self.datum = [exact], noise, datum

    def forward(self, x, log_snr):
        exact = self.exact[0]
        signal = exact.schedule.scales(log_snr)[0][:, None]
        x_0_hat = exact.x_0_hat(x, log_snr)
        if self.noise == 1.0:
            return self.datum * x_0_hat
        return (x - self.noise * (x - signal * x_0_hat)) / signal


def wrong(num_timesteps, dimension, **factors):
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=8.0, log_snr_min=-10.0)
    generator = torch.Generator().manual_seed(0)
    mean = 0.3 * torch.randn(dimension, generator=generator)
    std = 0.3 + torch.rand(dimension, generator=generator)
    exact = GaussianDenoiser(mean, std, schedule)
    denoiser = NeuralDenoiser(
        Scaled(exact, **factors), schedule, (dimension,), prediction=DataPrediction()
    )
    x_0 = mean + std * torch.randn(2, dimension, generator=generator)
    return DiffusionModel(denoiser), x_0


def log_evidence(diffusion, x_0):
    """log p of a chain of affine kernels with independent entries, by pushing N(0, 1) through it."""
    dimension = x_0.shape[-1]
    mean, variance = torch.zeros(dimension), torch.ones(dimension)
    for t in range(diffusion.schedule.num_timesteps, 0, -1):
        ends = (torch.zeros(1, dimension), torch.ones(1, dimension))
        at_zero, at_one = (diffusion.denoiser(x, t) for x in ends)
        slope = (at_one.mean - at_zero.mean)[0]
        mean = slope * mean + at_zero.mean[0]
        variance = slope**2 * variance + at_zero.variance[0]
    return dist.Normal(mean, variance.sqrt()).to_event(1).log_prob(x_0)


@pytest.mark.parametrize("num_timesteps", [1, 2, 20])
def test_an_exact_denoiser_has_constant_weights(double, num_timesteps):
    """Test number one: log p(x_0) to 1e-8, every effective sample size the number of particles."""
    diffusion, x_0 = gaussian(num_timesteps), torch.randn(5, 3)
    evidence = smc_evidence(diffusion, x_0, num_particles=16)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    torch.testing.assert_close(evidence.log_evidence, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(evidence.ess_by_timestep, torch.full((num_timesteps, 5), 16.0))
    assert evidence.standard_error.max() < 1e-8
    assert evidence.reliable.all()


def test_paths_that_are_even_already_are_not_resampled(double):
    """A mixture's exact chain: the look-ahead is only near, the paths' weights are constant."""
    alpha = torch.linspace(0.95, 0.5, 8)
    alpha[-1] = 1e-24
    modes = torch.tensor([[-2.0], [1.0]])
    denoiser = GaussianMixtureDenoiser(
        [0.3, 0.7], modes, torch.tensor([[0.2], [0.5]]), AlphaSchedule(alpha)
    )
    x_0 = torch.linspace(-2, 2, 5)[:, None]
    evidence = smc_evidence(DiffusionModel(denoiser), x_0, num_particles=64)
    expected = denoiser.data_distribution.log_prob(x_0)
    torch.testing.assert_close(evidence.log_evidence, expected, rtol=1e-8, atol=1e-8)
    assert evidence.reliable.all()


def test_a_noise_estimate_that_is_a_fifth_too_large(double):
    """Close and trusted, with the spread of its runs, where importance weights are off and flagged."""
    diffusion, x_0 = wrong(100, 64, noise=1.2)
    x_0 = x_0[:1].expand(8, 64)  # eight estimates of one number
    expected = log_evidence(diffusion, x_0)
    evidence = smc_evidence(diffusion, x_0, num_particles=256)
    weights = importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=1024)
    errors = [(e.log_evidence - expected).square().mean().sqrt() for e in (evidence, weights)]
    assert errors[0] < 0.8
    assert errors[0] < 0.5 * errors[1]
    assert 0.4 < evidence.standard_error.square().mean().sqrt() / errors[0] < 2.5
    assert evidence.reliable.sum() >= 6
    assert not weights.reliable.any()


def test_heavy_tails_on_the_way_are_flagged(double):
    """A few huge steps with a bad estimate: runs agree on a number that is low, and the tail tells."""
    diffusion, x_0 = wrong(6, 4, noise=1.3)
    evidence = smc_evidence(diffusion, x_0, num_particles=1024)
    assert (evidence.log_evidence < log_evidence(diffusion, x_0)).all()
    assert not evidence.reliable.any()


def test_an_estimate_that_defeats_every_method_is_flagged(double):
    diffusion, x_0 = wrong(100, 64, datum=1.05)
    evidence = smc_evidence(diffusion, x_0, num_particles=64, num_pilot=32)
    assert (evidence.log_evidence < log_evidence(diffusion, x_0) - 5).all()
    assert not evidence.reliable.any()
    assert "reliable for 0" in repr(evidence)


def test_the_estimate_is_unbiased(double):
    """Ẑ, not its logarithm: the mean over many small runs is p(x_0), resampling and all."""
    diffusion, x_0 = wrong(30, 6, noise=1.2)
    copies = x_0[:1].expand(400, 6)
    evidence = smc_evidence(diffusion, copies, num_particles=24, num_runs=2, num_pilot=25)
    assert (evidence.ess_by_timestep.min(0).values < 12).any()  # there was something to resample
    ratio = (evidence.log_evidence - log_evidence(diffusion, x_0[:1])).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 5 * error
    assert error < 0.15


@pytest.mark.parametrize("kind", ["levels", "posterior variance", "image"])
def test_any_model_has_one(kind):
    """Another estimate of the same number: the two agree within their errors."""
    torch.manual_seed(0)
    outputs, prediction, variance, shape = 1, None, None, (2,)
    x_0 = torch.randn(3, 2)
    if kind == "levels":
        outputs, prediction, x_0 = 3, LevelPrediction(3), torch.randint(3, (3, 2))
    elif kind == "posterior variance":
        variance = PosteriorVariance()
    else:
        shape, x_0 = (2, 2), torch.randn(3, 2, 2)
    network = MLP(shape, hidden_size=8, num_blocks=1, num_outputs=outputs)
    schedule = LogSNRSchedule(4, log_snr_max=2.0, log_snr_min=-6.0)
    denoiser = NeuralDenoiser(network, schedule, shape, prediction=prediction, variance=variance)
    diffusion = DiffusionModel(denoiser)
    one = smc_evidence(diffusion, x_0, num_particles=4000)
    two = importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=20_000)
    error = (one.standard_error.square() + two.standard_error.square()).sqrt()
    assert ((one.log_evidence - two.log_evidence).abs() < 5 * error + 0.02).all()
    assert one.log_evidence.dtype == torch.float64
    assert one.data == two.data
    assert one.measure == two.measure == ("mass" if kind == "levels" else "density")


def test_arguments():
    diffusion = gaussian(3)
    for argument, number in (("num_particles", 1), ("num_runs", 1), ("num_pilot", 24)):
        with pytest.raises(ValueError, match=f"argument '{argument}': got {number}"):
            smc_evidence(diffusion, torch.zeros(2, 3), **{"num_particles": 8, argument: number})
    with pytest.raises(ValueError, match="argument 'x_0'"):
        smc_evidence(diffusion, torch.full((2, 3), math.nan), num_particles=8)


def test_chunks_change_nothing_but_the_noise(double):
    """More data than fit into one pass: each datum has its own pilot and particles."""
    diffusion, x_0 = wrong(20, 4, noise=1.1)
    pyro.set_rng_seed(0)
    x_0 = x_0[:1].expand(20, 4)
    evidence = smc_evidence(diffusion, x_0, num_particles=1024)  # 8 data a pass
    assert evidence.log_evidence.shape == (20,)
    assert evidence.ess_by_timestep.shape == (20, 20)
    expected = log_evidence(diffusion, x_0[:1])
    assert ((evidence.log_evidence - expected).abs() < 6 * evidence.standard_error + 0.05).all()


@pytest.mark.parametrize("t", [1, 10, 20])
@pytest.mark.parametrize("explode", [False, True])
def test_probability_of_a_state(t, explode):
    """The exact chain's log p(x_t), on either scale, with constant weights; the flow's, too."""
    pyro.set_rng_seed(0)
    schedule = LogSNRSchedule(20, log_snr_max=8.0, log_snr_min=-60.0)
    schedule = VarianceExploding(schedule) if explode else schedule
    mean = torch.tensor([0.3, -0.5], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    denoiser = GaussianDenoiser.from_covariance(mean, covariance, schedule)
    diffusion = DiffusionModel(denoiser)
    x_t = diffusion.process.marginal(denoiser.data_distribution.sample((6,)), t).sample()
    signal, noise = schedule.signal(t), schedule.noise(t)
    law = MultivariateNormal(signal * mean, signal**2 * covariance + noise**2 * torch.eye(2))
    evidence = smc_evidence(diffusion, x_t, num_particles=30, state=t)
    torch.testing.assert_close(evidence.log_evidence, law.log_prob(x_t), rtol=0, atol=1e-8)
    assert evidence.reliable.all()
    flow = ode_log_likelihood(diffusion, x_t, state=t, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flow.log_evidence, law.log_prob(x_t), rtol=0, atol=1e-3)


def test_bits_and_timesteps_outside_are_refused():
    bits = BernoulliDiffusion(EnumeratedDenoiser(torch.eye(3), LinearDecaySchedule(5)))
    with pytest.raises(ValueError, match="Gaussian kernels"):
        smc_evidence(bits, torch.eye(3), num_particles=10)
    schedule = MonotoneSchedule(5, event_shape=(3,))
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(3), torch.ones(3), schedule))
    with pytest.raises(ValueError, match="argument 'state'"):
        smc_evidence(diffusion, torch.eye(3), num_particles=10, state=6)
    with pytest.raises(ValueError, match="argument 'schedule'"):
        smc_evidence(diffusion, torch.eye(3), num_particles=10, state=2)


@pytest.mark.parametrize("explode", [False, True])
def test_look_ahead_to_a_state_is_its_conditional_mean(explode):
    """E[x_s | x_t] by regression; where weights are constant nothing else asks for it."""
    schedule = LogSNRSchedule(20)
    schedule = VarianceExploding(schedule) if explode else schedule
    denoiser = GaussianDenoiser(
        torch.tensor([0.3]).double(), torch.tensor([0.5]).double(), schedule
    )
    target, x_t = ReverseWalk(DiffusionModel(denoiser), 5), torch.randn(7, 1).double()
    signal, noise = schedule.signal(torch.tensor([5, 12])), schedule.noise(torch.tensor([5, 12]))
    of_state, of_x_t = (signal * 0.5).square() + noise.square()
    ratio = signal[1] / signal[0]
    expected = signal[0] * 0.3 + ratio * of_state / of_x_t * (x_t - signal[1] * 0.3)
    torch.testing.assert_close(target.estimate(x_t, 7, target.look(x_t, 7)), expected)
