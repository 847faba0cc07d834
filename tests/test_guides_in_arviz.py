"""Draws of automatic guides in ArviZ's schema: names, weights, and resampled draws."""

import copy

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_diffusion import global_evidence, to_arviz
from pyro_diffusion.inference import AutoDiffusion

Y = torch.tensor([0.5, 1.2, -0.3], dtype=torch.float64)


def model(y, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def made(kind):
    guide = kind(model)
    guide(Y)
    return guide


@pytest.mark.parametrize("nesting", [None, 1])
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDiffusion])
def test_draws_and_weights_are_labelled(double, kind, nesting):
    guide, count = made(kind), 30
    torch.manual_seed(2)
    found = to_arviz(guide, Y, num_draws=count, max_plate_nesting=nesting, progress=False)
    torch.manual_seed(2)
    evidence = global_evidence(
        model, guide, Y, num_particles=count, max_plate_nesting=nesting, progress=False
    )
    assert dict(found["posterior"].sizes) == {"chain": 1, "draw": count, "w_dim_0": 3}
    assert set(found["posterior"].data_vars) == {"z", "w"}
    stats = found["sample_stats"]
    weights = stats["log_weight"].values[0]
    assert abs(weights - (stats["lp"] - stats["log_q"]).values[0]).max() < 1e-10
    if nesting:  # else the guide's initial values draw random numbers at every run
        assert abs(weights - evidence.log_weights.numpy()).max() < 1e-9
        assert float(found["importance"]["evidence"]) == pytest.approx(evidence.log_evidence)
        assert float(found["importance"]["pareto_k"]) == pytest.approx(evidence.pareto_k)


def test_resampled_draws_are_draws_of_the_posterior(double):
    guide = AutoMultivariateNormal(model, init_scale=1.0)
    guide(Y)
    found = to_arviz(guide, Y, num_draws=8000, max_plate_nesting=1, progress=False)
    z, again = found["posterior"]["z"].values, found["resampled"]["z"].values
    ess = float(found["importance"]["ess"])
    variance = 0.25
    assert abs(z.std() - 1.0) < 0.05
    assert abs(again.mean() - Y.sum().item() * variance) < 5 * (variance / ess) ** 0.5
    assert abs(again.std() - variance**0.5) < 5 * (variance / ess) ** 0.5


def test_arguments_go_by_name_too(double):
    guide = made(AutoNormal)
    found = to_arviz(guide, Y, scale=3.0, num_draws=30, max_plate_nesting=1, progress=False)
    other = to_arviz(guide, Y, num_draws=30, max_plate_nesting=1, progress=False)
    assert float(found["importance"]["elbo"]) != float(other["importance"]["elbo"])


def test_a_guide_stands_beside_nuts_in_a_forest(double):
    found = to_arviz(made(AutoDiffusion), Y, num_draws=50, max_plate_nesting=1, progress=False)
    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run(Y)
    nuts = az.from_dict(posterior={k: v[None].numpy() for k, v in mcmc.get_samples().items()})
    axes = az.plot_forest([nuts, found], model_names=["NUTS", "AutoDiffusion"])
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert {"z", "w[0]"} <= {label.split(": ")[-1] for label in labels}
    plt.close("all")


def test_a_guide_that_lost_its_model_says_so(double):
    guide = copy.deepcopy(made(AutoNormal))
    with pytest.raises(
        ValueError, match="argument 'guide': got a guide that was copied or unpickled"
    ):
        to_arviz(guide, Y, num_draws=30)
