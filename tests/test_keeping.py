"""The best parameters of a guide, by paired bounds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_diffusion import KeepBest, global_evidence
from pyro_diffusion.inference import AutoDiffusion

Y = torch.tensor([0.4, 1.9, 0.7, 1.1], dtype=torch.float64)


def model(y):
    """A mean of normal data with a learned scale: log p(y) has a closed form."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def kl(guide, y):
    """From the guide to the posterior at scale 1."""
    variance = 1 / (1 + len(y))
    posterior = dist.Normal(y.sum() * variance, variance**0.5)
    return torch.distributions.kl_divergence(
        dist.Normal(guide.loc[0], guide.scale[0]), posterior
    ).item()


def kept(guide, **options):
    return KeepBest(model, guide, Y, max_plate_nesting=1, **options)


def test_the_gain_is_the_difference_of_the_bounds(double):
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    best = kept(guide, num_particles=4000)
    before = kl(guide, Y)
    with torch.no_grad():
        guide.loc.add_(0.2)
    gain = best.update()
    assert abs(gain.value - (before - kl(guide, Y))) < 4 * gain.standard_error
    assert gain.standard_error < 0.02
    assert gain.kept == (gain.value > gain.standard_error)


def test_the_best_parameters_come_back_those_of_the_model_included(double):
    guide = AutoMultivariateNormal(model, init_scale=0.4)
    best = kept(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=8))
    for _ in range(60):
        svi.step(Y)
    assert best.update().kept
    values = guide.loc.item(), guide.scale.item(), pyro.param("scale").item()
    bound = best.bound
    with torch.no_grad():
        guide.loc.add_(1.0)
        pyro.get_param_store()._params["scale"].sub_(3.0)
    worse = best.update()
    assert not worse.kept
    assert worse.value < -1
    assert best.bound == bound
    best.restore()
    assert (guide.loc.item(), guide.scale.item(), pyro.param("scale").item()) == values
    found = global_evidence(model, guide, Y, num_particles=400, progress=False)
    assert abs(found.elbo - bound) < 5 * found.elbo_standard_error


def test_equal_parameters_are_not_a_gain_and_the_random_numbers_go_on(double):
    guide = AutoMultivariateNormal(model)
    best = kept(guide, num_particles=50)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gain = best.update()
    assert gain == (0.0, 0.0, False)
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize(("shift", "taken"), [(-0.1, False), (0.07, False), (0.1, True)])
def test_a_gain_below_its_own_error_is_not_kept(double, monkeypatch, shift, taken):
    """The error of these 51 differences is 0.0833."""
    best = kept(AutoMultivariateNormal(model), num_particles=51)
    changed = best._log_weights + torch.linspace(-1.0, 1.0, 51) + shift
    monkeypatch.setattr(best, "_read", lambda: changed)
    gain = best.update()
    assert gain == (pytest.approx(shift), pytest.approx(0.0833, abs=1e-4), taken)


def test_parameters_that_are_not_finite_are_not_kept(double):
    guide = AutoMultivariateNormal(model)
    best = kept(guide, num_particles=50)
    with torch.no_grad():
        guide.loc.fill_(math.nan)
    with pytest.warns(UserWarning, match="these parameters are not kept"):
        gain = best.update()
    assert gain == (-math.inf, 0.0, False)
    best.restore()
    assert guide.loc.isfinite().all()


def test_a_chain_does_not_end_worse_than_its_base(double):
    base = AutoMultivariateNormal(model, init_scale=0.4)
    SVI(model, base, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(Y)
    guide = AutoDiffusion(model, 4, base)
    best = kept(guide, num_particles=200)
    start = best.bound
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3.0}), Trace_ELBO())  # far too large
    for _ in range(5):
        svi.step(Y)
        best.update()
    best.restore()
    assert kept(guide, num_particles=200).bound >= start - 1e-9


def test_programs_without_parameters_have_nothing_to_keep():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="argument 'guide': got programs without parameters"):
        KeepBest(guide, guide, num_particles=10)


@pytest.mark.parametrize("count", [1, 0, 2.5, "many"])
def test_a_number_of_draws_that_is_no_number_of_draws_is_named(count):
    with pytest.raises(ValueError, match="argument 'num_particles'"):
        KeepBest(model, AutoNormal(model), Y, num_particles=count)
