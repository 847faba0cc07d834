"""The simulators and the bijection of ``examples/simulation_based_inference.py``, against their formulas."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

HERE = Path(__file__).parent
N = 40_000


@pytest.fixture(scope="module")
def sbi():
    """The example as a module."""
    path = HERE.parent / "examples/simulation_based_inference.py"
    spec = importlib.util.spec_from_file_location("simulation_based_inference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_moments(x, mean, covariance):
    """Means, and covariances as means of products, within five standard errors."""
    x, mean, covariance = x.double(), torch.as_tensor(mean).double(), covariance.double()
    error = x.std(0) / len(x) ** 0.5
    assert ((x.mean(0) - mean).abs() < 5 * error).all(), (x.mean(0), mean)
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    error = products.std(0) / len(x) ** 0.5
    assert ((products.mean(0) - covariance).abs() < 5 * error).all(), products.mean(0) - covariance


def test_gaussian_linear(sbi):
    """θ and x together have the covariance 0.1 ((I, I), (I, 2 I))."""
    theta, x = sbi.TASKS["gaussian_linear"].pairs(N, "cpu")
    eye = torch.eye(10)
    covariance = torch.cat([torch.cat([eye, eye], 1), torch.cat([eye, 2 * eye], 1)], 0)
    assert_moments(torch.cat([theta, x], 1), torch.zeros(20), 0.1 * covariance)


def test_the_exact_posterior_is_that_of_bayes(sbi):
    """p(θ∣x) = p(θ) p(x∣θ) / p(x) with x ~ N(0, 0.2 I)."""
    theta, x = sbi.TASKS["gaussian_linear"].pairs(7, "cpu")

    def log_normal(x, variance):
        return torch.distributions.Normal(0.0, variance**0.5).log_prob(x).sum(-1)

    expected = log_normal(theta, 0.1) + log_normal(x - theta, 0.1) - log_normal(x, 0.2)
    torch.testing.assert_close(sbi.gaussian_posterior(x).log_prob(theta), expected)


@pytest.mark.parametrize("theta", [(0.3, 0.4), (-0.6, 0.1)])
def test_two_moons(sbi, theta):
    """Moments of a half circle of radius N(0.1, 0.01²) around the point that θ and −θ reversed share."""
    t_1, t_2 = theta
    x = sbi.two_moons(torch.tensor(theta).expand(N, 2))
    centre = [0.25 - abs(t_1 + t_2) / math.sqrt(2), (t_2 - t_1) / math.sqrt(2)]
    square = (0.1**2 + 0.01**2) / 2  # E r² E cos² a, and the same for the sine
    mean = 0.1 * 2 / math.pi  # E r E cos a
    covariance = torch.diag(torch.tensor([square - mean**2, square]))
    assert_moments(x, [centre[0] + mean, centre[1]], covariance)


def test_the_reference_posterior_of_two_moons_is_where_the_simulator_says(sbi, monkeypatch):
    """For draws of p(θ∣x) the radius is N(0.1, 0.01²) and the angle in ±π/2, because the prior is flat."""
    with np.load(HERE / "data/two_moons_reference.npz") as file:
        found = [(file[f"x_{n}"], file[f"posterior_{n}"]) for n in range(1, 6)]
    monkeypatch.setattr(torch, "rand", lambda n: torch.full((n,), 0.5))  # the angle is 0
    monkeypatch.setattr(torch, "randn", torch.zeros)  # the radius is 0.1
    radii = []
    for x, posterior in found:
        theta = torch.tensor(posterior)
        crescent = torch.tensor(x) - sbi.two_moons(theta) + torch.tensor([0.1, 0.0])
        assert (crescent[:, 0] > -1e-3).all()
        radii.append(crescent.norm(dim=-1).double())
        # (−θ₂, −θ₁) gives the same observations, so that there are two moons
        torch.testing.assert_close(sbi.two_moons(-theta.flip(-1)), sbi.two_moons(theta))
        assert 0.2 < (theta.sum(-1) > 0).double().mean() < 0.8
    radius = torch.cat(radii)
    assert abs(radius.mean() - 0.1) < 5 * 0.01 / len(radius) ** 0.5
    assert abs(radius.std() - 0.01) < 5 * 0.01 / (2 * len(radius)) ** 0.5


@pytest.mark.parametrize("x", [(-0.2, 0.1), (-0.7, 0.45), (0.3, 0.0)])
def test_the_exact_posterior_of_two_moons(sbi, x):
    """Its density integrates to one, also where the box or x cuts off a part, and its draws have it."""
    posterior = sbi.TwoMoonsPosterior(torch.tensor(x))
    draws = posterior.sample((2_000,))
    assert (draws.abs() < 1).all()
    edges = torch.arange(-1, 1, 1 / 400) + 1 / 800
    grid = torch.cartesian_prod(edges, edges)
    density = posterior.log_prob(grid).double().exp()
    reachable = torch.tensor(x)[0] + grid.sum(-1).abs() / 2**0.5 >= 0.25  # the angle is in ±π/2
    density = torch.where(reachable, density, 0.0) / 400**2
    assert abs(density.sum() - 1) < 0.05
    for power in (1, 2):
        moment = (density[:, None] * grid**power).sum(0)
        error = (draws**power).std(0) / len(draws) ** 0.5
        assert (((draws**power).mean(0) - moment).abs() < 5 * error + 0.02).all()


def test_the_exact_posterior_of_two_moons_is_that_of_the_reference(sbi):
    """The distribution of each parameter, for every observation."""
    with np.load(HERE / "data/two_moons_reference.npz") as file:
        for n in range(1, 6):
            draws = sbi.TwoMoonsPosterior(torch.tensor(file[f"x_{n}"])).sample((2_000,))
            for ours, theirs in zip(draws.T, file[f"posterior_{n}"].T, strict=True):
                assert stats.ks_2samp(ours, theirs).pvalue > 1e-4


def test_slcp(sbi):
    """Four independent draws of N(m, S), with S from the parameters; the signs of θ₃ and θ₄ do not count."""
    theta = torch.tensor([0.7, -2.0, -1.5, 1.1, 0.8])
    s_1, s_2, rho = 1.5**2, 1.1**2, math.tanh(0.8)
    block = torch.tensor([[s_1**2, rho * s_1 * s_2], [rho * s_1 * s_2, s_2**2]])
    covariance = torch.block_diag(*[block + 1e-6 * torch.eye(2)] * 4)
    assert_moments(sbi.slcp(theta.expand(N, 5)), [0.7, -2.0] * 4, covariance)


@pytest.mark.parametrize("name", ["gaussian_linear", "two_moons", "slcp"])
def test_the_bijection_makes_the_prior_normal(sbi, name):
    """log p(θ) = log N(y; 0, I) + log |det ∂y/∂θ|, and the draws of y are normal."""
    task = sbi.TASKS[name]
    theta, _ = task.pairs(2_000, "cpu")
    y = task.transform(theta)
    log_det = task.transform.log_abs_det_jacobian(theta, y).sum(-1)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(-1) + log_det
    torch.testing.assert_close(log_p, task.prior.log_prob(theta), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(task.transform.inv(y), theta, rtol=1e-4, atol=1e-4)
    for coordinate in y.T:
        assert stats.kstest(coordinate, "norm").pvalue > 1e-4


def test_c2st(sbi):
    """0.5 for draws of the same distribution; the best classifier's accuracy for a shift by 2: Φ(1)."""
    draws, reference = torch.randn(2, 600, 2)
    assert abs(sbi.c2st(draws, reference) - 0.5) < 0.06
    shifted = draws + torch.tensor([2.0, 0.0])
    assert abs(sbi.c2st(shifted, reference) - stats.norm.cdf(1)) < 0.06
