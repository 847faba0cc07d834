"""Calibration of posteriors: right ones pass, ones that are wrong on purpose do not, in any units.

The posterior is that of θ ~ N(0, diag unit²) given x = θ + noise: N(g x, diag s²) with g = 1 / (1 + ν²) and
s = unit · ν / √(1 + ν²), where ν is the noise in units of the prior.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_diffusion import (
    expected_coverage,
    plot_pit,
    randomized_pit,
    simulation_based_calibration,
)
from pyro_diffusion.chains import BottomUpGuide, GenerativeChain

UNIT = torch.tensor([1.0, 1e3, 1.0], dtype=torch.float64)
NOISE, DRAWS = 0.5, 49
SHIFT = torch.tensor(
    [0.3, 0.0, 0.0], dtype=torch.float64
)  # in standard deviations of the posterior


def simulated(n):
    """Truths, observations, and the mean and standard deviation of the exact posterior."""
    theta = torch.randn(n, 3, dtype=torch.float64) * UNIT
    x = theta + NOISE * UNIT * torch.randn(n, 3, dtype=torch.float64)
    return theta, x, x / (1 + NOISE**2), UNIT * NOISE / (1 + NOISE**2) ** 0.5


def drawn(mean, std, shift=0.0):
    return mean + std * (shift + torch.randn(DRAWS, *mean.shape, dtype=torch.float64))


def p_value(u):
    return stats.kstest(u.numpy(), "uniform").pvalue


def by_hand(theta, draws, width):
    """The formula with loops over data, in NumPy: reference points mirrored to one side of the mean."""
    low, high = np.quantile(theta, [0.05, 0.95], axis=0)
    rng = np.random.default_rng(3)
    side, u = rng.choice([-1, 1], theta.shape[1]), []
    for n in range(len(theta)):
        all_of_them = np.concatenate([theta[n][None], draws[:, n]])
        middle = all_of_them.mean(0)
        point = rng.uniform(low, high)
        point = middle + side * np.abs(point - middle)
        distance = (((all_of_them - point) / width) ** 2).sum(1)
        u.append(((distance[1:] < distance[0]).sum() + rng.uniform()) / (len(draws) + 1))
    return torch.tensor(u)


# ---------------------------------------------------------------- expected coverage


def test_the_right_posterior_is_uniform():
    """20 data sets: each p-value, their own uniformity, and all values together."""
    found, p = [], []
    for _ in range(20):
        theta, _, mean, std = simulated(300)
        found.append(expected_coverage(theta, drawn(mean, std)))
        p.append(p_value(found[-1]))
    assert found[0].shape == (300,)
    assert found[0].dtype == torch.float64
    assert all(((u > 0) & (u < 1)).all() for u in found)
    assert min(p) > 1e-3
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert p_value(torch.cat(found)) > 0.01


@pytest.mark.parametrize("n", [8, 20])
def test_few_truths_are_enough_for_a_scale(n):
    """The widths come from the truths, and the sides from the truths and draws: neither costs uniformity."""
    found = []
    for _ in range(400):
        theta, _, mean, std = simulated(n)
        found.append(expected_coverage(theta, drawn(mean, std)[:5]))
    assert p_value(torch.cat(found)) > 0.01


def test_a_shift_of_one_coordinate_is_found_in_any_units():
    """0.3 standard deviations of a coordinate whose neighbour is a thousand times as large."""
    theta, _, mean, std = simulated(4000)
    wrong = drawn(mean, std, SHIFT)
    assert p_value(expected_coverage(theta, wrong)) < 1e-4
    ranks = randomized_pit(theta, wrong)
    assert p_value(ranks[:, 0]) < 1e-10
    assert min(p_value(ranks[:, 1]), p_value(ranks[:, 2])) > 0.01


def test_a_few_extreme_truths_do_not_hide_a_coordinate():
    """The widths are of quantiles: with the range of the truths, one of 1e6 would hide the coordinate."""
    theta, x, _, _ = simulated(4000)
    far = torch.zeros(4000, 3, dtype=torch.float64)
    far[:20, 0] = 1e6
    mean, std = x / (1 + NOISE**2), UNIT * NOISE / (1 + NOISE**2) ** 0.5
    assert p_value(expected_coverage(theta + far, drawn(mean + far, std, SHIFT))) < 1e-4
    assert p_value(expected_coverage(theta + far, drawn(mean + far, std))) > 0.01


def test_without_scaling_the_shift_goes_unseen():
    """The same procedure by hand, once with the widths of the truths and once in their own units."""
    theta, _, mean, std = simulated(4000)
    right, wrong = drawn(mean, std).numpy(), drawn(mean, std, SHIFT).numpy()
    width = np.ptp(np.quantile(theta, [0.05, 0.95], axis=0), axis=0)
    assert p_value(by_hand(theta.numpy(), right, width)) > 0.01
    assert p_value(by_hand(theta.numpy(), wrong, width)) < 1e-4
    assert p_value(by_hand(theta.numpy(), wrong, np.ones(3))) > 0.01


def test_units_do_not_matter():
    """In other units, with other origins, the same numbers from the same noise."""
    theta, x, mean, std = simulated(200)
    draws = drawn(mean, std, SHIFT)
    for references in (None, x):
        credibilities = []
        for scale, origin in ((1.0, 0.0), (1 / UNIT, 5.0), (1024.0, -3.0)):
            pyro.set_rng_seed(2)
            moved = (y if y is None else y * scale + origin for y in (theta, draws, references))
            theta_, draws_, references_ = moved
            credibilities.append(expected_coverage(theta_, draws_, references=references_))
        torch.testing.assert_close(credibilities[1], credibilities[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(credibilities[2], credibilities[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("factor", "sign"), [(0.7, -1), (1.4, 1)])
def test_a_wrong_width_and_its_direction(factor, sign):
    """Too narrow: the balls of probability 0.9 contain the truth too seldom; too wide: too often."""
    theta, _, mean, std = simulated(1000)
    draws = drawn(mean, factor * std)
    u = expected_coverage(theta, draws)
    error = math.sqrt(0.9 * 0.1 / 1000)
    assert p_value(u) < 1e-6
    assert sign * ((u <= 0.9).double().mean() - 0.9) > 4 * error
    around_estimate = expected_coverage(theta, draws, references=mean)
    assert sign * ((around_estimate <= 0.5).double().mean() - 0.5) > 6 * math.sqrt(0.25 / 1000)
    assert max(p_value(u) for u in randomized_pit(theta, draws).T) < 1e-3


def test_the_prior_passes_unless_the_references_depend_on_the_data():
    """What uniform values do not show, and what finds it: references of x, and the log score."""
    theta, x, mean, std = simulated(2000)
    prior, posterior = dist.Normal(torch.zeros(3), UNIT), dist.Normal(mean, std)
    draws = drawn(torch.zeros(2000, 3), UNIT)
    assert p_value(expected_coverage(theta, draws)) > 0.01
    corner = (-2 * UNIT).expand(2000, 3)
    assert p_value(expected_coverage(theta, draws, references=corner)) > 0.01
    assert min(p_value(u) for u in randomized_pit(theta, draws).T) > 0.01
    log_q = [prior.log_prob(y).sum(-1) for y in (theta, draws)]
    assert p_value(randomized_pit(*log_q)) > 0.01

    assert p_value(expected_coverage(theta, draws, references=x)) < 1e-50
    assert p_value(expected_coverage(theta, drawn(mean, std), references=x)) > 0.01
    gain = posterior.log_prob(theta).sum(-1) - log_q[0]
    expected = 1.5 * math.log(1 + 1 / NOISE**2)  # the mutual information, nats
    assert abs(gain.mean() - expected) < 5 * gain.std() / 2000**0.5


def test_a_ball_around_the_mean_has_a_known_probability():
    """With the mean as reference and no scale between coordinates, 1 − u is the rank of the density."""
    theta, _, mean, std = simulated(500)
    draws = drawn(mean, std)
    u = expected_coverage(theta / std, draws / std, references=mean / std)
    # the widths of the truths are nearly those of the posterior, up to a common factor
    squares = (((theta - mean) / std) ** 2).sum(-1)
    exact = torch.tensor(stats.chi2.cdf(squares.numpy(), 3))
    assert (u - exact).abs().mean() < 0.06  # that of 49 draws: 0.04
    log_q = [dist.Normal(mean, std).log_prob(y).sum(-1) for y in (theta, draws)]
    assert (1 - randomized_pit(*log_q) - exact).abs().mean() < 0.06


def test_events_of_any_shape_and_ties():
    """Numbers, images and whole numbers; equal distances are broken at random."""
    assert expected_coverage(torch.randn(30), torch.randn(9, 30)).shape == (30,)
    flat = torch.randn(30, 4), torch.randn(9, 30, 4)
    found = []
    for shape in ((4,), (2, 2)):
        pyro.set_rng_seed(0)
        found.append(expected_coverage(flat[0].view(30, *shape), flat[1].view(9, 30, *shape)))
    assert torch.equal(*found)
    counts = torch.randint(3, (2000, 1)), torch.randint(3, (19, 2000, 1))
    assert p_value(expected_coverage(*counts)) > 0.01
    plot_pit(found[0])
    ranks = randomized_pit(*flat)
    plot_pit(ranks[:, 0])
    with pytest.raises(ValueError, match=r"'pit': got shape \(30, 4\); expected one .* Draw each"):
        plot_pit(ranks)
    plt.close("all")


def test_errors_of_coverage():
    theta, draws = torch.randn(20, 2), torch.randn(5, 20, 2)
    gap = theta.clone()
    gap[3, 1] = math.nan
    flat = theta.clone()
    flat[:, 1] = 4.0
    for arguments, says in (
        ((theta, draws[:, :19]), r"'draws': got shape \(5, 19, 2\) for truths of shape \(20, 2\); .*Draw S"),
        ((theta, draws[0]), r"'draws': got shape \(20, 2\)"),
        ((theta, draws[:0]), r"'draws': got shape \(0, 20, 2\).*at least one draw"),
        ((theta[:0], draws[:, :0]), r"'draws': got shape \(5, 0, 2\)"),
        ((theta[0, 0], draws[:, 0, 0]), r"'draws': got shape \(5,\) for truths of shape \(\)"),
        ((gap, draws), "'theta': got 1 NaN or infinite values of 40; expected finite"),
        ((theta, draws / 0), "'draws': got 200 NaN or infinite"),
        ((flat, draws), "'theta': got the same number at the 5 % and the 95 % quantile of coordinate 1; "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            expected_coverage(*arguments)
    for references, says in (
        (theta[:1], r"'references': got shape \(1, 2\) for truths of shape \(20, 2\)"),
        (gap, "'references': got 1 NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            expected_coverage(theta, draws, references=references)


# ---------------------------------------------------------------- ranks


def test_coordinates_are_ranked_one_by_one():
    theta, draws = torch.randn(40, 3), torch.randn(9, 40, 3)
    pit = randomized_pit(theta, draws)
    assert pit.shape == (40, 3)
    below = (draws < theta).sum(0)
    assert torch.equal((pit * 10).floor().long(), below)
    with pytest.raises(ValueError, match=r"argument 'draws': got shape \(9, 40, 2\)"):
        randomized_pit(theta, draws[..., :2])


@pytest.mark.parametrize(("factor", "sign"), [(0.7, 1), (1.4, -1)])
def test_the_rank_of_the_density_finds_a_wrong_width(factor, sign):
    """Too narrow: the truth is too often where the density is low."""
    theta, _, mean, std = simulated(1000)
    for scale, passes in ((1.0, True), (factor, False)):
        posterior = dist.Normal(mean, scale * std)
        draws = drawn(mean, scale * std)
        u = randomized_pit(posterior.log_prob(theta).sum(-1), posterior.log_prob(draws).sum(-1))
        assert (p_value(u) > 0.01) == passes
    assert sign * ((u < 0.1).double().mean() - 0.1) > 4 * math.sqrt(0.09 / 1000)


# ---------------------------------------------------------------- a conditional family


def unused(x_t, t):
    """The transition of a chain of one step."""


def conditional(slope=1.0):
    """x_1 ~ N(0, 1), x_0 ~ N(x_1 + c, 0.5²), c from a label and a number, and the exact guide for slope 1."""

    def mean(context):
        return context["number"] + 3.0 * context["label"]

    def likelihood(x_1, context):
        return dist.Normal(x_1 + mean(context)[:, None], 0.5).to_event(1)

    def encoder(x_0, t, context):
        assert not context["label"].is_floating_point()
        return dist.Normal(0.8 * (x_0 - slope * mean(context)[:, None]), 0.2**0.5).to_event(1)

    def prior():
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    model = GenerativeChain(prior, unused, likelihood, num_timesteps=1)
    return model, BottomUpGuide(encoder, num_timesteps=1)


def contexts(n):
    return {"number": torch.randn(n), "label": torch.randint(3, (n,))}


def first(states):
    return states["x_1"][:, 0]


def test_simulation_based_calibration_of_a_conditional_family():
    """Uniform for the exact guide, and not where it gets the context wrong; batches keep their rows."""
    context = contexts(800)
    for batch_size in (10_000, 333):
        pit = simulation_based_calibration(
            conditional(), first, num_draws=19, batch_size=batch_size, context=context
        )
        assert pit.shape == (800,)
        assert p_value(pit) > 0.01
    wrong = simulation_based_calibration(conditional(0.8), first, num_draws=19, context=context)
    assert p_value(wrong) < 1e-6


def test_a_context_has_a_row_for_each_simulation():
    with pytest.raises(ValueError, match="'context': got 5 rows for 9 simulations; .*Expand"):
        simulation_based_calibration(conditional(), first, num_simulations=9, context=contexts(5))
    uneven = contexts(5) | {"label": torch.zeros(4).long()}
    with pytest.raises(ValueError, match="'context': got 4 and 5 rows for 5 simulations"):
        simulation_based_calibration(conditional(), first, context=uneven)
    with pytest.raises(ValueError, match="'context': got a tensor without rows"):
        simulation_based_calibration(conditional(), first, context=torch.tensor(1.0))
    pit = simulation_based_calibration(conditional(), first, num_simulations=5, context=contexts(5))
    assert pit.shape == (5,)


def test_rows_without_a_context_are_told_to_both_programs():
    seen = []

    def likelihood(x_1, context, null):
        seen.append(null.tolist())
        return dist.Normal(x_1 + torch.where(null, 0.0, context)[:, None], 0.5).to_event(1)

    def encoder(x_0, t, context, null):
        seen.append(null.tolist())
        mean = torch.where(null, 0.0, context)[:, None]
        return dist.Normal(0.8 * (x_0 - mean), 0.2**0.5).to_event(1)

    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    model = GenerativeChain(lambda: prior, unused, likelihood, num_timesteps=1)
    pair = model, BottomUpGuide(encoder, num_timesteps=1)
    null = torch.tensor([True, False, False])
    simulation_based_calibration(
        pair, first, num_draws=2, context=torch.tensor([1.0, 2.0, 3.0]), null=null
    )
    assert seen == [null.tolist(), null.tolist() * 2]
