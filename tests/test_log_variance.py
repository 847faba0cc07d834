"""The variance of log-weights against closed forms, and what it keeps that the bound loses."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger

from pyro_diffusion import LogVarianceELBO, compile_elbo
from pyro_diffusion.inference import AutoDiffusion

#: the replayed latents of the model are detached too, so that the base has a wrong gradient
TOGETHER = {"vectorize_particles": True, "max_plate_nesting": 0}


def target():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def guide_of(loc, scale):
    def guide():
        m = pyro.param("m", torch.tensor(loc))
        s = pyro.param("s", torch.tensor(scale), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(m, s))

    return guide


def closed_form(m, s):
    """Half of Var[log N(z; 0, 1) - log N(z; m, s²)], z = m + s e: of -(m + s e)² / 2 + e² / 2."""
    return 0.5 * ((1 - s**2) ** 2 / 2 + (m * s) ** 2)


@pytest.mark.parametrize("together", [True, False])
def test_the_loss_is_half_of_the_variance(double, together):
    options = TOGETHER if together else {}
    elbo = LogVarianceELBO(num_particles=20_000 if together else 500, **options)
    guide = guide_of(0.7, 0.6)
    guide()
    loss = elbo.loss(target, guide)
    count = elbo.num_particles
    assert abs(loss / closed_form(0.7, 0.6) - 1) < 8 / count**0.5
    assert elbo.differentiable_loss(target, guide).item() == pytest.approx(
        loss, rel=12 / count**0.5
    )


def test_its_gradient_is_that_of_the_kl_on_average(double):
    """KL = (s² + m² - 1) / 2 - log s, whose gradient by (m, log s) is (m, s² - 1)."""
    guide, m, s = guide_of(0.7, 0.6), 0.7, 0.6
    elbo = LogVarianceELBO(num_particles=50_000, **TOGETHER)
    guide()
    store = pyro.get_param_store()
    elbo.loss_and_grads(target, guide)
    gradient = [store._params[name].grad.item() for name in ("m", "s")]
    assert gradient == pytest.approx([m, s**2 - 1], abs=0.03)


class Paths(Messenger):
    """Record the states of a chain, and put them back in later runs."""

    def __init__(self):
        super().__init__()
        self.values, self.number = [], None

    def _pyro_sample(self, msg):
        if ".x_" in msg["name"] and self.number is not None:
            msg["value"], msg["done"] = self.values[self.number], True
            self.number += 1

    def _pyro_post_sample(self, msg):
        if ".x_" in msg["name"] and self.number is None:
            self.values.append(msg["value"].detach())


def slope(loss, parameter):
    """The derivative by the first entry of a parameter, by central differences."""
    entry = parameter.data.reshape(-1)[:1]
    start, ends = entry.item(), []
    for step in (1e-5, -1e-5):
        entry.fill_(start + step)
        ends.append(loss())
    entry.fill_(start)
    return (ends[0] - ends[1]) / 2e-5


@pytest.mark.parametrize(
    "name",
    [
        "drift.gate",
        "drift.log_scale",
        "drift.network.decode.bias",
        "base.loc",
        "base.scale_unconstrained",
    ],
)
def test_the_gradient_of_a_chain_is_that_of_finite_differences_at_its_paths(double, name):
    def program():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("curved", -((z[..., 0] - 0.3 * z[..., 1] ** 2) ** 2))

    guide = AutoDiffusion(program, 3, partial(AutoDiagonalNormal, init_scale=0.7))
    guide()
    elbo, paths = LogVarianceELBO(num_particles=10, **TOGETHER), Paths()
    with paths:
        elbo.loss_and_grads(program, guide)

    def loss():
        paths.number = 0
        with paths:
            return elbo.loss(program, guide)

    parameter = dict(guide.named_parameters())[name]
    found = parameter.grad.reshape(-1)[0].item()
    assert abs(found) > 1e-3
    assert found == pytest.approx(slope(loss, parameter), rel=1e-5)


def test_the_posterior_has_no_loss_and_no_gradient(double):
    guide = guide_of(0.0, 1.0)
    guide()
    elbo = LogVarianceELBO(num_particles=5, **TOGETHER)
    assert elbo.loss_and_grads(target, guide) < 1e-30
    assert all(p.grad.abs() < 1e-12 for p in pyro.get_param_store()._params.values())


def test_svi_reports_the_variance_and_trains_the_guide_alone(double):
    def model(y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z[..., 0], scale), obs=y)

    y = torch.tensor([1.0, 2.0])
    guide = AutoMultivariateNormal(model, init_scale=0.5)
    elbo = LogVarianceELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = [svi.step(y) for _ in range(200)]
    assert losses[0] > 0.5 > 0.1 > sum(losses[-20:]) / 20
    assert svi.evaluate_loss(y) < 0.02
    assert pyro.param("scale").item() == 1.0
    variance = 1 / (1 / 4 + 2)
    torch.testing.assert_close(guide.loc[0].item(), 3 * variance, atol=0.1, rtol=0)


def mixture():
    """Weights 0.3 and 0.7, means ±2 on both axes, standard deviations 0.5."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    parts = [
        math.log(w) + dist.Normal(m, 0.5).log_prob(z).sum(-1) for w, m in ((0.3, 2), (0.7, -2))
    ]
    pyro.factor("mixture", torch.stack(parts).logsumexp(0))


def test_a_broad_start_keeps_both_modes():
    base = partial(AutoDiagonalNormal, init_scale=1.0)
    guide = AutoDiffusion(mixture, 8, base, init_scale=3.0)
    guide()
    guide.base.requires_grad_(False)
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2})
    svi = SVI(mixture, guide, optimizer, LogVarianceELBO(num_particles=256, **TOGETHER))
    for _ in range(90):
        svi.step()
    draws = guide.sample_posterior(2000, max_plate_nesting=0)["z"]
    assert 0.08 < (draws[:, 0] > 0).float().mean() < 0.5


def test_fewer_than_two_draws_have_no_variance():
    with pytest.raises(ValueError, match="argument 'num_particles': got 1"):
        LogVarianceELBO(num_particles=1)


def test_a_part_of_the_data_is_refused():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({}), LogVarianceELBO(4))
    with pytest.raises(
        ValueError, match="site 'y': got a scale, from a plate of a part of the data"
    ):
        svi.step(torch.zeros(4))


def test_compile_elbo_says_that_it_cannot_compile_it():
    with pytest.raises(ValueError, match="argument 'elbo': got LogVarianceELBO"):
        compile_elbo(target, guide_of(0.0, 1.0), LogVarianceELBO(4))


def test_the_bound_is_another_number(double):
    guide = guide_of(0.7, 0.6)
    guide()
    bound = Trace_ELBO(num_particles=20_000, **TOGETHER).loss(target, guide)
    kl = (0.6**2 + 0.7**2 - 1) / 2 - math.log(0.6)
    assert bound == pytest.approx(kl, abs=0.03)


@pytest.mark.parametrize("together", [True, False])
def test_a_point_is_refused(together):
    elbo = LogVarianceELBO(4, **(TOGETHER if together else {}))
    svi = SVI(target, AutoDelta(target), pyro.optim.Adam({}), elbo)
    with pytest.raises(ValueError, match="site 'z' of argument 'guide': got a point"):
        svi.step()
