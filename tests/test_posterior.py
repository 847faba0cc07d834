"""Draws of p(x_0) times a likelihood, with their evidence, against exact models.

Oracles come first, in float64: conjugate Gaussians and mixtures (``oracles.py``), integrals on a grid, and
sums over all values of discrete data. Monte Carlo results are within five of their own standard errors,
which sixteen runs give (Student's t with 15 degrees of freedom exceeds five once in 6,000 times).
"""

import math

import numpy as np
import pyro
import pytest
import torch
from enumerated import by_entry, discrete, masses_of_an_entry, masses_of_states, values_of
from oracles import MixturePosterior, gaussian_posterior
from torch import nn
from torch.distributions import ExpTransform, Laplace, Normal, Poisson, StudentT

from pyro_diffusion import (
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LinearDecaySchedule,
    LinearGaussian,
    LogSNRSchedule,
    MonotoneSchedule,
    NeuralBernoulliDenoiser,
    Standardize,
    VarianceExploding,
    posterior_samples,
)
from pyro_diffusion.inference.conjugate import Noise
from pyro_diffusion.inference.twisted import Path
from pyro_diffusion.walk import ReverseWalk

FEW = "ignore:argument 'log_likelihood'.*effective particles"


def sampled(diffusion, likelihood, num_samples=9, **settings):
    return posterior_samples(diffusion, likelihood, num_samples, progress=False, **settings)


def schedule(num_timesteps, log_snr_max=8.0, log_snr_min=-30.0):
    return LogSNRSchedule(num_timesteps, log_snr_max=log_snr_max, log_snr_min=log_snr_min)


def within(statistic, exact, errors=5.0):
    """Whether a statistic is what it should be."""
    exact = torch.as_tensor(exact)
    return bool(((statistic.value - exact).abs() < errors * statistic.standard_error + 1e-7).all())


def evidence_within(draws, exact, errors=5.0):
    """Whether Ẑ is within its errors. They are those of Ẑ, in units of Ẑ."""
    ratio = (torch.as_tensor(exact) - draws.log_evidence).exp()
    return bool(((ratio - 1).abs() < errors * draws.standard_error + 1e-7).all())


# Gaussian oracles.

MEAN = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5, 1.0, 0.2], dtype=torch.float64)
COVARIANCE = 0.9 ** (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs().double()
MIXING = torch.tensor(
    [[1.0, 0.5, -0.3, 0.0], [0.0, 1.0, 0.7, -0.2], [0.3, 0.0, 1.0, 1.0], [-1.0, 0.2, 0.1, 0.4]],
    dtype=torch.float64,
)
Y = torch.tensor([0.5, -0.4, 1.2, -2.0], dtype=torch.float64)


def correlated(num_timesteps, **ends):
    return GaussianDenoiser.from_covariance(MEAN, COVARIANCE, schedule(num_timesteps, **ends))


def independent(curve):
    return GaussianDenoiser(MEAN, STD, curve)


def curves(num_timesteps):
    """A schedule with a curve for each entry."""
    curve = MonotoneSchedule(num_timesteps, log_snr_max=9.0, log_snr_min=-30.0, event_shape=(4,))
    with torch.no_grad():
        curve.interior += torch.linspace(-1, 1, 4)[:, None] * torch.arange(curve.num_pieces + 1)
    return curve


ENTRIES = torch.eye(4, dtype=torch.float64)[[1, 3]]
INVARIANT = {
    "all entries, correlated": (correlated, COVARIANCE, MIXING),
    "an eigenvector": (correlated, COVARIANCE, torch.linalg.eigh(COVARIANCE).eigenvectors[:, [2]].T),
    "some entries": (lambda n: independent(schedule(n)), torch.diag(STD**2), ENTRIES),
    "curves": (lambda n: independent(curves(n)), torch.diag(STD**2), ENTRIES),
    "all entries, curves": (lambda n: independent(curves(n)), torch.diag(STD**2), MIXING),
    "exploding": (
        lambda n: independent(VarianceExploding(schedule(n))), torch.diag(STD**2), ENTRIES
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_timesteps", [1, 3, 60])
@pytest.mark.parametrize("name", INVARIANT)
def test_weights_are_constant_where_the_rows_span_an_invariant_subspace(name, num_timesteps):
    """Nothing is approximate then, for any number of steps: log Z is exact, and all particles count."""
    denoiser, covariance, rows = INVARIANT[name]
    diffusion, y = DiffusionModel(denoiser(num_timesteps)), Y[: len(rows)]
    exact = gaussian_posterior(
        MEAN.numpy(), covariance.numpy(), rows.numpy(), y.numpy(), 0.09 * np.eye(len(y))
    )
    draws = sampled(diffusion, LinearGaussian(rows, y, 0.3), num_particles=30, num_runs=2)
    assert draws.ess_by_timestep.shape == (num_timesteps,)
    assert draws.reliable
    if name == "all entries, curves":  # sums of numbers whose sizes differ by e^30 lose digits
        assert draws.log_evidence.item() == pytest.approx(exact.log_evidence, abs=1e-2)
        assert draws.ess > 0.995 * 60
        return
    # What x_T still knows of the datum is e^{-15} of it: the prior is not the chain's own end.
    assert draws.log_evidence.item() == pytest.approx(exact.log_evidence, abs=2e-5)
    assert draws.ess_by_timestep.min().item() == pytest.approx(30, rel=1e-8)
    assert draws.ess.item() == pytest.approx(60, rel=1e-8)
    torch.testing.assert_close(
        draws.log_weights, torch.full((2, 30), -math.log(60)).double(), rtol=0, atol=1e-5
    )
    assert draws.standard_error < 1e-5
    assert draws.pareto_k == -math.inf


def test_an_end_that_knows_the_datum():
    """Standard normal data and a chain that ends at log-SNR 0: the draw of x_T has to be twisted."""
    curve = schedule(4, log_snr_min=0.0)
    diffusion = DiffusionModel(
        GaussianDenoiser(torch.zeros(2).double(), torch.ones(2).double(), curve)
    )
    rows, y = torch.tensor([[1.0, 0.5]]).double(), one([3.0])
    draws = sampled(diffusion, LinearGaussian(rows, y, 0.5), num_particles=500)
    exact = gaussian_posterior(np.zeros(2), np.eye(2), rows.numpy(), y.numpy(), 0.25 * np.eye(1))
    assert draws.log_evidence.item() == pytest.approx(exact.log_evidence, abs=1e-7)
    assert draws.ess.item() == pytest.approx(8000)
    assert within(draws.mean(), exact.mean)
    assert within(draws.std(), exact.std)


def test_constant_weights_are_those_of_the_right_draws():
    """Means and covariances of draws with constant weights, in closed form."""
    diffusion = DiffusionModel(correlated(4))
    exact = gaussian_posterior(
        MEAN.numpy(), COVARIANCE.numpy(), MIXING.numpy(), Y.numpy(), 0.09 * np.eye(4)
    )
    draws = sampled(diffusion, LinearGaussian(MIXING, Y, 0.3), 20_000, num_particles=1000)
    assert within(draws.mean(), exact.mean)
    assert within(draws.std(), exact.std)
    error = draws.samples - torch.tensor(exact.mean)
    products = error[:, :, None] * error[:, None, :]
    spread = products.std(0) / math.sqrt(16_000)
    assert ((products.mean(0) - torch.tensor(exact.covariance)).abs() < 5 * spread).all()


def test_correlated_entries_keep_999_of_a_thousand_particles():
    """Two of four correlated entries, T = 100, two noises: 99.98 % with the conjugate proposal."""
    diffusion = DiffusionModel(correlated(100, log_snr_min=-12.0))
    y, scale = torch.tensor([[1.0, -0.5], [-1.0, 2.0]]).double(), torch.tensor([[1.0], [3.0]])
    likelihood = LinearGaussian(torch.eye(4)[[0, 3]], y, scale)
    draws = sampled(diffusion, likelihood, num_particles=50, num_runs=16)
    assert (draws.ess > 0.999 * 800).all()
    assert (draws.ess_by_timestep > 0.999 * 50).all()
    for n in range(2):
        exact = gaussian_posterior(
            MEAN.numpy(), COVARIANCE.numpy(), np.eye(4)[[0, 3]], y[n].numpy(),
            scale[n].item() ** 2 * np.eye(2),
        )  # fmt: skip
        # A mean of 2 is e^{-6} of it at the end: 0.005 in log p(y).
        assert abs(draws.log_evidence[n] - exact.log_evidence) < 4 * draws.standard_error[n] + 0.006
        at = draws._replace(
            particles=draws.particles[:, :, n], log_weights=draws.log_weights[:, :, n]
        )
        assert within(at.mean(), exact.mean, 4.5)
        assert within(at.std(), exact.std, 4.5)


@pytest.mark.parametrize("num_timesteps", [3, 10])
def test_a_few_large_steps_are_corrected(num_timesteps):
    """The look-ahead is rough, the weights are exact; with noise that is not small against a step."""
    diffusion = DiffusionModel(correlated(num_timesteps, log_snr_max=4.0))
    rows, y = MIXING[:2], Y[:2]
    draws = sampled(diffusion, LinearGaussian(rows, y, 1.0), num_particles=600)
    exact = gaussian_posterior(MEAN.numpy(), COVARIANCE.numpy(), rows.numpy(), y.numpy(), np.eye(2))
    assert draws.ess_by_timestep.min() < 0.97 * 600
    assert evidence_within(draws, exact.log_evidence)
    assert within(draws.mean(), exact.mean)
    assert within(draws.std(), exact.std)


def test_units_of_the_user():
    """Standardised data: a measurement, its evidence and the draws are in the user's units."""
    mean, std = torch.tensor([300.0, -5.0]).double(), torch.tensor([20.0, 0.1]).double()
    denoiser = GaussianDenoiser(torch.zeros(2).double(), torch.ones(2).double(), schedule(10))
    diffusion = DiffusionModel(denoiser, transform=Standardize(mean, std))
    rows, y = torch.tensor([[1.0, 100.0]]).double(), torch.tensor([-180.0]).double()
    exact = gaussian_posterior(
        mean.numpy(), np.diag(std.numpy() ** 2), rows.numpy(), y.numpy(), 25 * np.eye(1)
    )
    # The covariance of the chain is the unit matrix: every direction is invariant.
    draws = sampled(diffusion, LinearGaussian(rows, y, 5.0), num_particles=400)
    assert draws.log_evidence.item() == pytest.approx(exact.log_evidence, abs=1e-5)
    assert draws.ess.item() == pytest.approx(6400)
    assert within(draws.mean(), exact.mean)
    assert within(draws.std(), exact.std)
    # The same as a function of the datum.
    function = sampled(
        diffusion, lambda x: Normal(x @ rows[0], 5.0).log_prob(y[0]), num_particles=50
    )
    assert function.log_evidence.item() == pytest.approx(exact.log_evidence, abs=1e-5)


def test_a_measurement_through_a_transform_is_linearised_if_asked_for():
    """The sum of two log-normal numbers, against a grid."""
    denoiser = GaussianDenoiser(
        torch.zeros(2).double(), torch.tensor([0.5, 0.8]).double(), schedule(20)
    )
    diffusion = DiffusionModel(denoiser, transform=ExpTransform().inv)
    likelihood = LinearGaussian(torch.ones(1, 2), torch.tensor([4.0]), 0.5, linearize=True)
    draws = sampled(diffusion, likelihood, num_particles=150)
    z = torch.linspace(-6, 6, 801).double()
    law = (
        Normal(0.0, torch.tensor([0.5, 0.8]).double()).log_prob(torch.cartesian_prod(z, z)).sum(-1)
    )
    data = torch.cartesian_prod(z, z).exp()
    log_p = law + Normal(data.sum(-1), 0.5).log_prob(torch.tensor(4.0).double())
    exact = log_p.logsumexp(0) + 2 * math.log(12 / 800)
    assert evidence_within(draws, exact)
    assert within(draws.mean(), (log_p.softmax(0)[:, None] * data).sum(0))


def test_float32_is_float64_but_for_rounding():
    """The same problem in the default dtype: dtypes of the results, and constant weights to 1e-3."""
    denoiser = GaussianDenoiser(MEAN.float(), STD.float(), schedule(50))
    draws = sampled(
        DiffusionModel(denoiser), LinearGaussian(ENTRIES, Y[:2], 0.3), num_particles=30, num_runs=4
    )
    exact = gaussian_posterior(
        MEAN.numpy(), np.diag(STD.numpy() ** 2), ENTRIES.numpy(), Y[:2].numpy(), 0.09 * np.eye(2)
    )
    assert draws.samples.dtype == draws.particles.dtype == torch.float32
    numbers = (
        draws.log_evidence,
        draws.standard_error,
        draws.ess,
        draws.log_weights,
        draws.pareto_k,
    )
    assert {x.dtype for x in numbers} == {torch.float64}
    assert draws.log_evidence.item() == pytest.approx(exact.log_evidence, abs=1e-3)
    assert draws.ess > 119.9
    assert draws.reliable


def test_no_noise_is_an_equation():
    """A x_0 = y holds for every draw, and the evidence is the density of A x_0."""
    diffusion = DiffusionModel(correlated(50))
    draws = sampled(diffusion, LinearGaussian(MIXING[:2], Y[:2], 0.0), num_particles=100)
    exact = gaussian_posterior(
        MEAN.numpy(), COVARIANCE.numpy(), MIXING[:2].numpy(), Y[:2].numpy(), np.zeros((2, 2))
    )
    measured = draws.samples @ MIXING[:2].T
    torch.testing.assert_close(measured, Y[:2].expand_as(measured), rtol=0, atol=1e-7)
    assert abs(draws.log_evidence - exact.log_evidence) < 4 * draws.standard_error
    assert within(draws.mean(), exact.mean, 5)


# Mixtures, by both kinds of likelihood.

WEIGHTS = [0.2, 0.5, 0.3]
MEANS = torch.tensor([[-2.0, 0.5], [1.5, 1.0], [0.0, -2.0]], dtype=torch.float64)
STDS = torch.tensor([[0.5, 0.3], [0.4, 0.8], [0.6, 0.4]], dtype=torch.float64)
ROW = torch.tensor([[1.0, 0.5]], dtype=torch.float64)


def mixture(num_timesteps=25):
    return GaussianMixtureDenoiser(WEIGHTS, MEANS, STDS, schedule(num_timesteps, log_snr_min=-16.0))


def mixture_posterior(rows, y, noise):
    return MixturePosterior.of(
        WEIGHTS, MEANS.numpy(), torch.diag_embed(STDS**2).numpy(), rows.numpy(), y.numpy(),
        noise**2 * np.eye(len(y)),
    )  # fmt: skip


def shares(draws):
    """The posterior weights of the modes, from the particles' responsibilities under the prior's modes."""
    near = (draws.particles[..., None, :] - MEANS).div(STDS).square().sum(-1)
    log_p = torch.tensor(WEIGHTS).log() - 0.5 * near - STDS.log().sum(-1)
    return log_p.softmax(-1)


WAYS = {
    "closed form": lambda rows, y, noise: (LinearGaussian(rows, y, noise), {}),
    "gradient": lambda rows, y, noise: (
        lambda x: Normal(x @ rows.T, noise).log_prob(y).sum(-1), {}
    ),
    "four directions": lambda rows, y, noise: (
        lambda x: Normal(x @ rows.T, noise).log_prob(y).sum(-1), {"directions": 4}
    ),
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_mixture(way, count):
    """Evidence, means, standard deviations and mode weights in closed form."""
    rows, y, noise = (ROW, torch.tensor([0.3]).double(), 0.5) if count == 1 else (
        torch.eye(2).double(), torch.tensor([0.2, 0.1]).double(), 1.0)  # fmt: skip
    exact = mixture_posterior(rows, y, noise)
    assert exact.weights.min() > 0.01
    likelihood, settings = WAYS[way](rows, y, noise)
    draws = sampled(DiffusionModel(mixture()), likelihood, num_particles=150, **settings)
    assert evidence_within(draws, exact.log_evidence)
    assert within(draws.mean(), exact.mean)
    assert within(draws.std(), exact.std)
    of_modes = draws._replace(particles=shares(draws)).mean()
    assert within(of_modes, exact.weights)
    assert draws.standard_error < 0.1
    assert draws.reliable


def test_several_directions_see_several_measurements():
    """Four linear measurements as a function: with four directions the same law as LinearGaussian's."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(6).double()
    diffusion = DiffusionModel(GaussianDenoiser(mean, torch.ones(6).double(), schedule(10)))
    rows = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(4, generator=generator, dtype=torch.float64)
    exact = gaussian_posterior(mean.numpy(), np.eye(6), rows.numpy(), y.numpy(), 0.04 * np.eye(4))

    def log_likelihood(x):
        return Normal(x @ rows.T, 0.2).log_prob(y).sum(-1)

    four = sampled(diffusion, log_likelihood, num_particles=40, directions=4)
    assert four.log_evidence.item() == pytest.approx(exact.log_evidence, abs=1e-4)
    assert four.ess > 0.999 * 640
    with pytest.warns(UserWarning, match="effective particles"):
        one = sampled(diffusion, log_likelihood, num_particles=40)
    assert one.ess_by_timestep.min() < 20


# Likelihoods that are not Gaussian, against integrals on a grid.


def toy(dimension):
    if dimension == 1:
        means, stds = torch.tensor([[-1.0], [1.5]]), torch.tensor([[0.5], [0.8]])
    else:
        means, stds = (
            torch.tensor([[-1.0, 0.5], [1.5, 0.0]]),
            torch.tensor([[0.5, 0.7], [0.8, 0.5]]),
        )
    curve = schedule(25, log_snr_min=-16.0)
    return GaussianMixtureDenoiser([0.4, 0.6], means.double(), stds.double(), curve)


def integrated(denoiser, log_likelihood):
    """log Z, the mean and the standard deviation of each entry, by the trapezoidal rule."""
    (size,) = denoiser.event_shape
    line = torch.linspace(-8, 9, 40_001 if size == 1 else 601).double()
    points = torch.cartesian_prod(*[line] * size).reshape(-1, size)
    log_p = denoiser.data_distribution.log_prob(points) + log_likelihood(points)
    log_z = log_p.logsumexp(0) + size * math.log(17 / (len(line) - 1))
    share = log_p.softmax(0)[:, None]
    mean = (share * points).sum(0)
    return log_z, mean, (share * (points - mean).square()).sum(0).sqrt()


def one(value):
    return torch.tensor(value, dtype=torch.float64)


def inside(x, low, high):
    """Smooth where it is possible, and −∞ elsewhere."""
    possible = ((x > low) & (x < high)).all(-1)
    return torch.where(possible, Normal(x, 2.0).log_prob(one(0.3)).sum(-1), -math.inf)


LIKELIHOODS = {
    "heavy tails": (1, lambda x: StudentT(3.0, x[..., 0], 0.5).log_prob(one(1.2))),
    "counts": (1, lambda x: Poisson(x[..., 0].exp()).log_prob(one(4.0))),
    "a corner": (1, lambda x: Laplace(x[..., 0], 0.5).log_prob(one(-0.3))),
    "two modes": (1, lambda x: Normal(x[..., 0].square(), 0.7).log_prob(one(1.0))),
    "counts in two": (2, lambda x: Poisson(x.sum(-1).exp()).log_prob(one(3.0))),
    "a corner in two": (2, lambda x: Laplace(x, 1.0).log_prob(one([0.2, 0.4])).sum(-1)),
    "exponential": (1, lambda x: 0.5 * x[..., 0]),
}
BOXES = {
    "an interval": (1, lambda x: inside(x, -0.5, 1.0)),
    "a half-line": (1, lambda x: inside(x, 0.0, math.inf)),
    "a box": (2, lambda x: inside(x, -0.5, 1.0)),
}


def check_integrals(dimension, log_likelihood, num_particles=180):
    denoiser = toy(dimension)
    log_z, mean, std = integrated(denoiser, log_likelihood)
    draws = sampled(DiffusionModel(denoiser), log_likelihood, num_particles=num_particles)
    assert evidence_within(draws, log_z)
    assert within(draws.mean(), mean)
    assert within(draws.std(), std)
    assert draws.standard_error < 0.15
    return draws


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_likelihood_that_is_not_gaussian(name):
    check_integrals(*LIKELIHOODS[name])


@pytest.mark.parametrize("name", BOXES)
def test_data_may_be_impossible(name):
    draws = check_integrals(*BOXES[name])
    assert draws.samples.isfinite().all()
    assert BOXES[name][1](draws.samples).isfinite().all()


# Unbiased estimates of Z.


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("kind", ["linear", "function", "tempered"])
def test_the_estimate_is_unbiased(kind):
    """Ẑ, not its logarithm: 2,000 runs of four particles, resampling and all."""
    rows, y, noise = ROW, torch.tensor([0.3]).double(), 0.5
    exact = mixture_posterior(rows, y, noise)
    likelihood, settings = WAYS["gradient" if kind == "function" else "closed form"](rows, y, noise)
    if kind == "tempered":
        settings = {"tempering": torch.linspace(1, 0.2, 12)}
    draws = sampled(
        DiffusionModel(mixture(12)), likelihood, num_particles=4, num_runs=2000, **settings
    )
    assert draws.ess_by_timestep.min() < 3.6
    assert (draws.log_weights.logsumexp(1).exp().std() * 2000) > 0.1  # runs differ
    assert evidence_within(draws, exact.log_evidence)
    assert draws.standard_error < 0.08
    assert within(draws.mean(), exact.mean)


# Models whose networks say anything: the weights are exact for all of them.


def summed(log_p, x, log_likelihood):
    """log Z, mean and standard deviation of a law over values ``(V, D)``."""
    log_p = log_p + log_likelihood(x)
    share = log_p.softmax(0)[:, None]
    mean = (share * x).sum(0)
    return log_p.logsumexp(0), mean, (share * (x - mean).square()).sum(0).sqrt()


def check_sums(diffusion, log_likelihood, exact, **settings):
    """A posterior against sums over all data; the mean of one entry may be known without any error."""
    log_z, mean, std = exact
    draws = sampled(diffusion, log_likelihood, **settings)
    assert evidence_within(draws, log_z)
    assert within(draws.mean(), mean)
    assert within(draws.std(), std)
    return draws


def of_the_sum(scale, y):
    """A Gaussian measurement of the sum of the entries."""
    return lambda x: Normal(x.sum(-1), scale).log_prob(one(y))


@pytest.mark.parametrize("way", ["function", "closed form"])
@pytest.mark.parametrize("kind", ["real", "learned variance"])
def test_any_network(kind, way):
    """Two real entries with a chain each, and a measurement of their sum."""
    line = torch.linspace(-5, 5, 401).double()
    log_p = masses_of_an_entry(by_entry(kind, 1), line)
    joint = (log_p[:, None] + log_p).flatten() + 2 * math.log(10 / 400)
    exact = summed(joint, torch.cartesian_prod(line, line), of_the_sum(1.0, 0.8))
    likelihood = (
        of_the_sum(1.0, 0.8)
        if way == "function"
        else LinearGaussian(torch.ones(1, 2), one([0.8]), 1.0)
    )
    draws = check_sums(by_entry(kind, 2), likelihood, exact, num_particles=400)
    assert draws.pareto_k < 0.7


LEVELS = {
    "levels by logits": lambda x: Normal(x.double().sum(-1), 0.5).log_prob(one(4.0)),
    "levels": lambda x: Normal(x.sum(-1), 1.5).log_prob(one(4.0)),
    "counts": lambda x: 0.2 * (x[..., 0] - x[..., 1]),
    "bits by threshold": lambda x: 2.0 * (x[..., 0] * x[..., 1]) - x[..., 0],
}


@pytest.mark.parametrize("kind", LEVELS)
def test_whole_numbers(kind):
    """Levels, counts and bits with real states: a function, the kernels as proposals."""
    values = values_of(kind)
    log_p = masses_of_an_entry(by_entry(kind, 1), values)
    joint = (log_p[:, None] + log_p).flatten()
    exact = summed(joint, torch.cartesian_prod(values, values), LEVELS[kind])
    draws = check_sums(by_entry(kind, 2), LEVELS[kind], exact, num_particles=300)
    assert set(draws.samples.flatten().tolist()) <= set(values.tolist())
    assert draws.samples.dtype == by_entry(kind, 1).sample(1).dtype


@pytest.mark.parametrize("kind", ["levels by logits", "levels"])
def test_levels_with_a_linear_measurement(kind):
    """Guided by the levels as real numbers, and exact by the last weight."""
    values = values_of(kind)
    log_p = masses_of_an_entry(by_entry(kind, 1), values)
    joint = (log_p[:, None] + log_p).flatten()
    exact = summed(joint, torch.cartesian_prod(values, values), of_the_sum(0.5, 4.0))
    likelihood = LinearGaussian(torch.ones(1, 2), one([4.0]), 0.5)
    draws = check_sums(by_entry(kind, 2), likelihood, exact, num_particles=300)
    assert draws.samples.sum(-1).double().sub(4).abs().mean() < 0.7


def test_counts_are_linearised_if_asked_for():
    values = values_of("counts")
    log_p = masses_of_an_entry(by_entry("counts", 1), values)
    exact = summed(log_p, values[:, None], lambda x: Normal(x[..., 0], 1.0).log_prob(one(5.0)))
    likelihood = LinearGaussian(torch.ones(1, 1), one([5.0]), 1.0)
    with pytest.raises(ValueError, match="not affinely"):
        sampled(by_entry("counts", 1), likelihood)
    likelihood = LinearGaussian(torch.ones(1, 1), one([5.0]), 1.0, linearize=True)
    check_sums(by_entry("counts", 1), likelihood, exact, num_particles=300)


STATES = {
    "bits": lambda x: 1.5 * x[..., 0] - 2.0 * x[..., 1] * x[..., 2],
    "enumerated bits": lambda x: -2.0 * (x.sum(-1) - 1).square(),
    "categories": lambda x: torch.where(x[..., 0] == x[..., 1], -math.inf, 0.7 * x[..., 1]),
}


@pytest.mark.parametrize(
    "kind",
    [
        "bits",
        "enumerated bits",
        "categories",
    ],
)
def test_discrete_states(kind):
    """Bits and categories that depend on one another; an impossible combination of categories."""
    diffusion, values = discrete(kind)
    exact = summed(masses_of_states(diffusion, values), values, STATES[kind])
    draws = check_sums(diffusion, STATES[kind], exact, num_particles=300)
    assert STATES[kind](draws.samples.double()).isfinite().all()


def test_fair_bits_by_hand():
    """A network whose output is zero is exact for fair bits: p(1) = e^w / (1 + e^w) for each."""

    class Zero(nn.Module):
        def forward(self, x_t, log_snr):
            return 0 * x_t

    denoiser = NeuralBernoulliDenoiser(Zero(), LinearDecaySchedule(10), (2,))
    slopes = torch.tensor([1.0, -0.5])
    draws = sampled(DiffusionModel(denoiser), lambda x: x @ slopes, num_particles=500)
    assert evidence_within(draws, ((1 + slopes.double().exp()) / 2).log().sum())
    assert within(draws.mean(), slopes.double().sigmoid())


def test_bits_have_no_gaussian_measurement():
    diffusion, _ = discrete("bits")
    with pytest.raises(ValueError, match="argument 'log_likelihood'.*Pass a function"):
        sampled(diffusion, LinearGaussian(torch.ones(1, 3), one([1.0]), 1.0))


# Tempering.


def test_tempering_changes_the_way_and_not_the_end():
    """Exact with any exponents; ones are no tempering, to the last digit."""
    exact = mixture_posterior(ROW, one([0.3]), 0.2)
    diffusion, likelihood = DiffusionModel(mixture()), LinearGaussian(ROW, one([0.3]), 0.2)
    found = {}
    for name, tempering in (
        ("none", None), ("ones", [1.0] * 25), ("array", np.ones(25)), ("half", torch.linspace(1, 0.1, 25))
    ):  # fmt: skip
        pyro.set_rng_seed(3)
        found[name] = sampled(diffusion, likelihood, num_particles=150, tempering=tempering)
    for name in ("ones", "array"):
        assert torch.equal(found[name].particles, found["none"].particles)
        assert torch.equal(found[name].log_weights, found["none"].log_weights)
    assert not torch.equal(found["half"].particles, found["none"].particles)
    assert evidence_within(found["half"], exact.log_evidence)
    assert within(found["half"].mean(), exact.mean)
    # The likelihood arrives later: the particles are more even at large t, and less at small t.
    even = {name: found[name].ess_by_timestep for name in ("half", "none")}
    assert even["half"][12:].mean() > even["none"][12:].mean()


def test_the_exponent_acts_where_it_is_said_to():
    """Entry t − 1 is that of the factor of x_t: ψ of the timestep before it, by hand."""
    denoiser = GaussianDenoiser(torch.zeros(1).double(), torch.ones(1).double(), schedule(3))
    diffusion = DiffusionModel(denoiser)
    target = LinearGaussian(torch.ones(1, 1), one([2.0]), 0.5).target(diffusion)
    exponents = torch.tensor([1.0, 0.5, 0.2, 0.1])
    path = Path(ReverseWalk(diffusion), target, (4, 1), exponents, Noise())
    x_3 = 0.01 * torch.randn(4, 1, 1).double()  # which knows nothing of the datum
    for t, exponent in ((3, 0.2), (2, 0.5), (1, 1.0)):
        with torch.no_grad():
            log_psi = path.look(x_3, t).log_psi
        law = denoiser.denoise(x_3, diffusion.schedule.log_snr(t)).x_0_hat[..., 0]
        variance = 1 / (1 + diffusion.schedule.snr(t)) + 0.25 / exponent
        torch.testing.assert_close(log_psi, Normal(law, variance.sqrt()).log_prob(one(2.0)))


# Simulation-based calibration.


@pytest.mark.filterwarnings(FEW)
def test_ranks_of_simulated_data_are_uniform():
    """500 data of a mixture with a measurement each, all at once, and their ranks among draws."""
    from scipy import stats

    denoiser = mixture(10)
    x_0 = denoiser.data_distribution.sample((500,))
    y = x_0 @ ROW.T + 0.5 * torch.randn(500, 1).double()
    draws = sampled(
        DiffusionModel(denoiser), LinearGaussian(ROW, y, 0.5), 19, num_particles=32, num_runs=2
    )
    assert draws.samples.shape == (19, 500, 2)
    for entry in (draws.samples, (draws.samples @ ROW.T).expand(19, 500, 2)):
        truth = x_0 if entry is draws.samples else (x_0 @ ROW.T).expand(500, 2)
        ranks = (entry < truth).double().sum(0)
        for numbers in ((ranks + torch.rand_like(ranks)) / 20).T.numpy():
            assert stats.kstest(numbers, "uniform").pvalue > 0.01
            assert stats.cramervonmises(numbers, "uniform").pvalue > 0.01
