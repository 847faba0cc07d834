r"""What guided draws follow where it is known: N(0, 1) without and N(m, v) with a context.

In units of the datum, :math:`y = x_t / a_t`, and by the ratio of variances :math:`\rho = \sigma_t^2 / a_t^2`,
the guided score is linear,

    s(y, ρ) = −(1 + w) (y − m) / (v + ρ) + w y / (1 + ρ) .

As ρ falls to that of x_1 the probability flow moves by s / 2, and the reverse diffusion by s with noise of
variance one for each unit of ρ. Means and variances follow from two ordinary differential equations, which
scipy solves here. The last step is Tweedie's :math:`\hat x_0 = y + \rho\, s`.
"""

import math

import numpy as np
import pyro
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm

from pyro_diffusion import (
    DDIMSampler,
    DiffusionModel,
    GaussianMixtureDenoiser,
    Guidance,
    LogSNRSchedule,
    ODESampler,
)
from pyro_diffusion.denoisers import Denoised, Denoiser

M, V = 0.8, 0.4


class TwoGaussians(Denoiser):
    """Exact for N(0, 1) without a context, and for N(m c, v) with the context c."""

    dtype = torch.float64

    def __init__(self, schedule, variance=V):
        super().__init__(schedule, (1,))
        self.variance = variance

    def denoise(self, x_t, log_snr, context=None, null=None):
        a, noise = self.schedule.scales(log_snr)
        given = torch.full((len(x_t), 1), context is not None)
        given = given if null is None else given & ~null[:, None]
        mean = 0.0 if context is None else torch.where(given, M * context, 0.0)
        variance = torch.where(given, self.variance, 1.0).double()
        gain = a * variance / (a**2 * variance + noise**2)
        return Denoised(mean + gain * (x_t - a * mean))


CONTEXT = torch.ones(1, 1, dtype=torch.float64)


def model(num_timesteps=1281, end=8.0, **settings):
    curve = LogSNRSchedule(num_timesteps, log_snr_max=end, log_snr_min=-end)
    return DiffusionModel(TwoGaussians(curve, **settings))


def solved(diffusion, w, eta):
    """Mean and variance of the draws in the limit of small steps, by the equations above."""
    v, schedule = diffusion.denoiser.variance, diffusion.schedule
    rho_1, rho_T = (math.exp(-schedule.log_snr(t)) for t in (1, schedule.num_timesteps))
    pull = lambda rho: (1 + w) / (v + rho) - w / (1 + rho)  # noqa: E731
    push = lambda rho: (1 + w) * M / (v + rho)  # noqa: E731

    def slope(u, state):  # by u = log ρ
        rho, (mean, variance) = math.exp(u), state
        move = push(rho) - pull(rho) * mean
        spread = eta - (1 + eta) * pull(rho) * variance
        return [-rho * move * (1 + eta) / 2, -rho * spread]

    start = [0.0, 1 / float(diffusion.schedule.signal(schedule.num_timesteps)) ** 2]
    ends = (math.log(rho_T), math.log(rho_1))
    mean, variance = solve_ivp(slope, ends, start, rtol=1e-10, atol=1e-12).y[:, -1]
    last = 1 - rho_1 * pull(rho_1)
    return last * mean + rho_1 * push(rho_1), last**2 * variance


def mean_and_std(sampler):
    """Of a sampler without noise, which is a linear map of x_T."""
    low, high = sampler(2, torch.tensor([[-1.0], [1.0]]).double(), context=CONTEXT).flatten()
    return np.array([(low + high) / 2, (high - low) / 2])


@pytest.mark.parametrize("w", [2.0, -0.5])
@pytest.mark.parametrize(("kind", "order"), [(DDIMSampler, 1), (ODESampler, 2)])
def test_guided_samplers_converge_to_the_guided_flow_with_their_orders(kind, order, w):
    diffusion = model()
    mean, variance = solved(diffusion, w, eta=0)
    steps = np.array([40, 80, 160, 320])
    errors = []
    for n in steps:
        sampler = kind(diffusion, int(n) + 1, guidance=Guidance(w))
        errors.append(np.abs(mean_and_std(sampler) - [mean, math.sqrt(variance)]))
    slopes = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slopes == pytest.approx([-order, -order], abs=0.25)
    assert max(errors[-1]) < (0.02 if order == 1 else 3e-4)


@pytest.mark.parametrize("kind", [DDIMSampler, ODESampler])
def test_noise_leads_to_the_law_of_the_guided_diffusion(kind):
    """Within four standard errors of 20,000 draws, and the bias of 321 steps."""
    pyro.set_rng_seed(0)
    diffusion, w, n = model(), 2.0, 20_000
    mean, variance = solved(diffusion, w, eta=1)
    draws = kind(diffusion, 321, eta=1.0, guidance=Guidance(w))(n, context=CONTEXT)
    std = math.sqrt(variance)
    bias = 0.04 if kind is DDIMSampler else 0.01
    assert abs(draws.mean() - mean) < (4 / math.sqrt(n) + bias) * std
    assert abs(draws.std() / std - 1) < 4 / math.sqrt(2 * n) + bias


def laws(w, v=V):
    """Variances of the docstring: flow, diffusion, tilted law."""
    noisy = (v - v ** (2 + 2 * w)) / ((1 - v) * (1 + 2 * w))
    return v ** (1 + w), noisy, v / (1 + w - w * v)


@pytest.mark.parametrize("w", [0.5, 2.0, 4.0])
def test_guided_draws_differ_from_the_tilted_law_by_the_formula(w):
    """The three variances of the docstring, of the equations, and of the sampler's draws."""
    diffusion = model(4001, end=20.0)
    flow, noisy, tilted = laws(w)
    assert solved(diffusion, w, eta=0)[1] == pytest.approx(flow, rel=1e-5)
    assert solved(diffusion, w, eta=1)[1] == pytest.approx(noisy, rel=1e-5)
    drawn = mean_and_std(ODESampler(diffusion, guidance=Guidance(w)))
    assert tilted - drawn[1] ** 2 == pytest.approx(tilted - flow, rel=2e-3)
    assert flow < noisy < tilted
    assert flow < 0.92 * noisy
    assert noisy < 0.92 * tilted
    # The tilted law's mean, from p(x∣c)^(1+w) p(x)^(−w), is not that of the draws either.
    mean = tilted * (1 + w) * M / V
    assert drawn[0] == pytest.approx(solved(diffusion, w, eta=0)[0], rel=1e-3)
    assert drawn[0] > 1.1 * mean


def test_zero_and_minus_one_are_the_laws_of_the_model():
    diffusion = model(4001, end=20.0)
    for w, law in ((0.0, (M, V)), (-1.0, (0.0, 1.0))):
        assert laws(w) == pytest.approx((law[1],) * 3)
        drawn = mean_and_std(ODESampler(diffusion, guidance=Guidance(w)))
        assert drawn == pytest.approx([law[0], math.sqrt(law[1])], abs=1e-3)


def test_equal_variances_are_the_case_in_which_the_tilted_law_is_drawn():
    """The score with noise is then the tilted law's, N((1 + w) m, 1)."""
    diffusion, w = model(4001, end=20.0, variance=1.0), 3.0
    drawn = mean_and_std(ODESampler(diffusion, guidance=Guidance(w)))
    assert drawn == pytest.approx([(1 + w) * M, 1.0], abs=1e-3)
    assert solved(diffusion, w, eta=1) == pytest.approx(((1 + w) * M, 1.0), abs=1e-3)


WEIGHTS, MEANS, STDS = (
    np.array([0.5, 0.3, 0.2]),
    np.array([-1.0, 1.0, 2.0]),
    np.array([0.5, 0.7, 1]),
)


def mixture(num_timesteps):
    means, stds = torch.tensor(MEANS)[:, None], torch.tensor(STDS)[:, None]
    curve = LogSNRSchedule(num_timesteps, log_snr_max=12.0, log_snr_min=-12.0)
    return DiffusionModel(GaussianMixtureDenoiser(torch.tensor(WEIGHTS), means, stds, curve))


def test_the_guided_flow_of_a_mixture_is_that_of_its_score():
    """Quantiles of x_T through the sampler, and through scipy's solver with the score by hand."""
    diffusion, w, c = mixture(1000), 1.5, 1
    z = norm.ppf((np.arange(9) + 0.5) / 9)

    def slope(u, y):
        rho = math.exp(u)
        scores = -(y[:, None] - MEANS) / (STDS**2 + rho)
        r = WEIGHTS * norm.pdf(y[:, None], MEANS, np.sqrt(STDS**2 + rho))
        without = (r / r.sum(1, keepdims=True) * scores).sum(1)
        return -rho / 2 * ((1 + w) * scores[:, c] - w * without)

    a_T = float(diffusion.schedule.signal(1000))
    exact = solve_ivp(slope, (12.0, -12.0), z / a_T, rtol=1e-9, atol=1e-11).y[:, -1]
    sampler = ODESampler(diffusion, guidance=Guidance(w))
    ours = sampler(9, torch.tensor(z)[:, None], context=c)[:, 0]
    assert ours.numpy() == pytest.approx(exact, abs=1e-3)
    assert (ours.diff() > 0).all()  # a monotone map, as in any flow of one dimension


@pytest.mark.parametrize("kind", [DDIMSampler, ODESampler])
def test_a_mixture_has_guided_draws_with_noise(kind):
    """Its kernel at the end is a Gaussian around the guided estimate, with little noise."""
    pyro.set_rng_seed(0)
    n = 4000
    plain, guided = (
        kind(mixture(200), eta=1.0, guidance=Guidance(w))(n, context=1)[:, 0] for w in (0.0, 1e-9)
    )
    for draws in (plain, guided):
        assert abs(draws.mean() - MEANS[1]) < 0.7 * (4 / math.sqrt(n) + 0.05)
        assert abs(draws.std() / 0.7 - 1) < 4 / math.sqrt(2 * n) + 0.05
