"""Draws and terms in ArviZ's schema, comparison, calibration: against closed forms and the estimators."""

import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyro_diffusion import (
    MLP,
    AlphaSchedule,
    BernoulliLikelihood,
    BottomUpEncoder,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    Evidence,
    GaussianDenoiser,
    HierarchicalVAE,
    LadderEncoder,
    LogSNRSchedule,
    NeuralDenoiser,
    active_units,
    compare,
    elbo_terms,
    importance_evidence,
    plot_compare,
    plot_khat,
    plot_pit,
    randomized_pit,
    simulation_based_calibration,
    to_arviz,
)

MEAN, STD = torch.tensor([0.5, -1.0]), torch.tensor([0.5, 2.0])


def gaussian(num_timesteps=5, mean=MEAN, std=STD):
    """The exact chain of N(mean, std²), with nothing left of the datum at the end."""
    alpha = torch.linspace(0.95, 0.5, num_timesteps)
    alpha[-1] = 1e-24
    mean, std = (x.to(torch.get_default_dtype()) for x in (mean, std))
    return DiffusionModel(GaussianDenoiser(mean, std, AlphaSchedule(alpha)))


def scales(diffusion, t):
    """a_t and σ_t."""
    t = torch.as_tensor(t)
    return diffusion.schedule.signal(t).numpy(), diffusion.schedule.noise(t).numpy()


def ladder(latent_sizes=(3, 2)):
    encoder = LadderEncoder((2,), latent_sizes, hidden_size=16)
    return HierarchicalVAE((2,), latent_sizes, encoder=encoder, hidden_size=16)


def model(x_0):
    """An ordinary program: y ~ N(z, 0.5²), z ~ N(0, 1)."""
    with pyro.plate("data", len(x_0), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x_0), 1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.expand(-1, 2), 0.5).to_event(1), obs=x_0)


def guide(x_0):
    """Its exact posterior."""
    with pyro.plate("data", len(x_0), dim=-1):
        pyro.sample("z", dist.Normal(4 * x_0.sum(-1, keepdim=True) / 9, 1 / 3).to_event(1))


def assert_near(draws, mean, variance, over):
    """Mean over independent draws within five standard errors, and the variance too."""
    count = draws.shape[over]
    error = (variance / count) ** 0.5
    assert (np.abs(draws.mean(over) - mean) < 5 * error).all()
    assert (np.abs(draws.var(over) / variance - 1) < 5 * math.sqrt(2 / count)).all()


# ---------------------------------------------------------------- to_arviz


def test_what_each_group_holds(double):
    """Posterior E2, prior and predictions in closed form, for the exact chain of a Gaussian."""
    diffusion, x_0 = gaussian(4), torch.tensor([[0.0, 1.0], [2.0, -3.0], [0.5, -1.0]])
    draws = to_arviz(diffusion, x_0, num_draws=4000, timesteps=[1, 3])
    signal, noise = (
        f(torch.tensor([1, 3])).numpy()
        for f in (diffusion.schedule.signal, diffusion.schedule.noise)
    )
    x = draws["posterior"]["x"]
    assert x.dims == ("chain", "draw", "data", "timestep", "x_dim_0")
    assert list(x["timestep"].values) == [1, 3]
    mean = signal[:, None] * x_0.numpy()[:, None]
    assert_near(x.values[0], mean, np.broadcast_to(noise[:, None] ** 2, mean.shape), 0)

    variance = signal[:, None] ** 2 * STD.numpy() ** 2 + noise[:, None] ** 2
    assert_near(draws["prior"]["x"].values[0], signal[:, None] * MEAN.numpy(), variance, 0)
    assert_near(draws["prior_predictive"]["x_0"].values[0], MEAN.numpy(), STD.numpy() ** 2, 0)

    again = draws["posterior_predictive"]["x_0"]
    assert again.dims == ("chain", "draw", "data", "timestep", "x_0_dim_0")
    gain = signal[:, None] * STD.numpy() ** 2 / variance  # x̂_0 = m + gain (x_t − a m)
    mean = MEAN.numpy() + gain * signal[:, None] * (x_0.numpy()[:, None] - MEAN.numpy())
    left = STD.numpy() ** 2 * noise[:, None] ** 2 / variance + (gain * noise[:, None]) ** 2
    assert_near(again.values[0], mean, np.broadcast_to(left, mean.shape), 0)

    np.testing.assert_array_equal(draws["observed_data"]["x_0"].values, x_0.numpy())
    alpha_bar = diffusion.schedule.alpha_bar(torch.arange(1, 5)).numpy()
    np.testing.assert_allclose(draws["constant_data"]["alpha_bar"].values, alpha_bar)
    assert not hasattr(draws, "log_likelihood")  # facts 20


def test_sample_stats_are_the_paths_densities(double):
    """log q from E1, written out over the kept states; the weight of an exact chain is log p(x_0)."""
    diffusion, x_0 = gaussian(3), torch.randn(4, 2)
    draws = to_arviz(diffusion, x_0, num_draws=30, timesteps=[1, 2, 3])
    alpha = np.array([0.95, 0.725, 1e-24])
    x = np.concatenate(
        [np.broadcast_to(x_0.numpy()[:, None], (1, 30, 4, 1, 2)), draws["posterior"]["x"].values],
        axis=3,
    )
    mean, variance = np.sqrt(alpha)[:, None] * x[:, :, :, :-1], 1 - alpha[:, None]
    log_q = stats.norm.logpdf(x[:, :, :, 1:], mean, np.sqrt(variance)).sum((-1, -2))
    sample_stats = draws["sample_stats"]
    np.testing.assert_allclose(sample_stats["log_q"].values, log_q, rtol=1e-9)
    expected = dist.Normal(MEAN.double(), STD.double()).log_prob(x_0).sum(-1).numpy()
    weight = sample_stats["log_weight"].values
    np.testing.assert_allclose(weight, np.broadcast_to(expected, weight.shape), rtol=1e-9)
    np.testing.assert_allclose(sample_stats["lp"].values, log_q + weight, rtol=1e-9)
    assert (draws["importance"]["pareto_k"].values == -math.inf).all()
    np.testing.assert_allclose(draws["importance"]["ess"].values, 30)


def neural():
    network = MLP((2,), hidden_size=8, num_blocks=1)
    nn.init.normal_(network.decode.weight, std=0.3)
    return DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(12), (2,)))


@pytest.mark.parametrize("build", [neural, ladder, lambda: (model, guide)])
def test_bound_and_importance_are_the_estimators(build):
    """The same numbers as elbo_terms and importance_evidence with the same noise, chunks included."""
    family, x_0 = build(), torch.randn(7, 2)
    pair = family if isinstance(family, tuple) else (family.model, family.posterior_guide)
    results = []
    for run in (
        lambda: to_arviz(family, x_0, num_draws=30, batch_size=50),
        lambda: elbo_terms(*pair, x_0, num_particles=30, analytic_kl=False, batch_size=50),
        lambda: importance_evidence(*pair, x_0, num_particles=30, batch_size=50),
    ):
        pyro.set_rng_seed(5)
        results.append(run())
    draws, terms, evidence = results
    means = np.array(terms.term_means())
    for column, name in enumerate(("term", "monte_carlo_error", "sampling_error")):
        np.testing.assert_allclose(draws["bound"][name].values, means[:, column])
    assert tuple(draws["bound"]["kind"].values) == terms.kinds
    assert tuple(draws["bound"]["site"].values) == terms.site_names
    importance = draws["importance"]
    np.testing.assert_allclose(importance["evidence"].values, evidence.log_evidence)
    np.testing.assert_allclose(importance["pareto_k"].values, evidence.pareto_k)
    np.testing.assert_allclose(importance["elbo"].values, terms.elbo)
    np.testing.assert_allclose(
        draws["sample_stats"]["log_weight"].mean(("chain", "draw")).values, terms.elbo
    )


@pytest.mark.parametrize("build", [neural, ladder, lambda: (model, guide)])
def test_netcdf_and_arviz_take_it(build, tmp_path):
    family, x_0 = build(), torch.randn(3, 2)
    draws = to_arviz(family, x_0, num_draws=30)
    draws.to_netcdf(tmp_path / "draws.nc")
    again = arviz.from_netcdf(tmp_path / "draws.nc")
    for group in ("posterior", "prior", "prior_predictive", "posterior_predictive", "sample_stats"):
        for name, values in draws[group].data_vars.items():
            assert values.sizes["chain"] == 1
            np.testing.assert_array_equal(again[group][name].values, values.values)
    names = list(draws["posterior"].data_vars)
    numbers = sum(values[0, 0].size for values in draws["posterior"].data_vars.values())
    assert len(arviz.summary(draws, var_names=names, kind="stats")) == numbers
    arviz.plot_forest(draws, var_names=names)


def test_latents_of_other_shapes_are_variables_by_site():
    draws = to_arviz(ladder((3, 2)), torch.randn(4, 2), num_draws=30)
    sizes = {name: x.sizes for name, x in draws["posterior"].data_vars.items()}
    assert sizes["x_1"]["x_1_dim_0"] == 3
    assert sizes["x_2"]["x_2_dim_0"] == 2
    assert list(draws["posterior_predictive"]["timestep"].values) == [1, 2]
    draws = to_arviz((model, guide), torch.randn(4, 2), num_draws=30)
    assert dict(draws["posterior_predictive"]["y"].sizes) == {
        "chain": 1,
        "draw": 30,
        "data": 4,
        "y_dim_0": 2,
    }
    assert dict(draws["prior"]["z"].sizes) == {"chain": 1, "draw": 30, "data": 4, "z_dim_0": 1}


def test_an_ordinary_pairs_predictions(double):
    """Closed forms: z | y has mean 4(y_1 + y_2)/9 and variance 1/9; y has variance 1.25."""
    x_0 = torch.tensor([[1.0, 0.5], [-2.0, 0.0]])
    draws = to_arviz((model, guide), x_0, num_draws=4000)
    mean = (4 * x_0.sum(-1, keepdim=True) / 9).numpy()
    assert_near(draws["posterior"]["z"].values[0], mean, np.full((2, 1), 1 / 9), 0)
    assert_near(draws["prior"]["z"].values[0], np.zeros((2, 1)), np.ones((2, 1)), 0)
    predicted = draws["posterior_predictive"]["y"].values[0]
    assert_near(predicted, np.broadcast_to(mean, (2, 2)), np.full((2, 2), 1 / 9 + 0.25), 0)
    assert_near(
        draws["prior_predictive"]["y"].values[0], np.zeros((2, 2)), np.full((2, 2), 1.25), 0
    )
    np.testing.assert_array_equal(draws["observed_data"]["y"].values, x_0.numpy())


def test_few_timesteps_are_kept_and_images_keep_their_axes():
    network = MLP((4, 4), hidden_size=8, num_blocks=1)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(100), (4, 4))
    diffusion = DiffusionModel(denoiser, DiscretizedGaussianLikelihood(5))
    draws = to_arviz(diffusion, torch.randint(5, (2, 4, 4)), num_draws=25)
    assert dict(draws["posterior"]["x"].sizes) == {
        "chain": 1, "draw": 25, "data": 2, "timestep": 5, "x_dim_0": 4, "x_dim_1": 4,
    }  # fmt: skip
    assert list(draws["posterior"]["timestep"].values) == [1, 26, 51, 75, 100]
    assert draws["bound"].sizes["timestep"] == 101
    assert set(np.unique(draws["posterior_predictive"]["x_0"].values)) <= set(range(5))


@pytest.mark.parametrize("num_draws", [1, 2, 24])
@pytest.mark.parametrize("build", [neural, ladder, lambda: (model, guide)])
def test_few_draws_have_an_unknown_k(build, num_draws, tmp_path):
    family, x_0 = build(), torch.randn(3, 2)
    with pytest.warns(
        UserWarning, match=f"'num_draws': got {num_draws}, so that Pareto k is unknown"
    ):
        draws = to_arviz(family, x_0, num_draws=num_draws)
    importance = draws["importance"]
    # the pair's posterior is exact, and two constant weights are enough to see that
    unknown = not isinstance(family, tuple) or num_draws == 1
    assert (importance["pareto_k"].isnull() == unknown).all()
    assert importance["evidence"].notnull().all()
    assert importance["evidence_standard_error"].isnull().all() == (num_draws == 1)
    assert draws["posterior"].sizes["draw"] == num_draws
    draws.to_netcdf(tmp_path / "draws.nc")
    again = arviz.from_netcdf(tmp_path / "draws.nc")
    assert (again["importance"]["pareto_k"].isnull() == unknown).all()


def test_who_reads_an_unknown_k_copes():
    """It is not reliable, has no picture, and is not compared."""
    pair = neural()
    few = importance_evidence(pair.model, pair.guide, torch.randn(3, 2), num_particles=10)
    assert few.pareto_k.isnan().all()
    assert not few.reliable.any()
    assert "reliable for 0" in repr(few)
    with pytest.raises(ValueError, match="Draw at least 25 particles"):
        plot_khat(few)
    with pytest.raises(ValueError, match="too few for Pareto k"):
        compare({"a": few, "b": few})
    with pytest.warns(UserWarning, match="Pareto k is unknown"):
        draws = to_arviz(gaussian(), torch.randn(3, 2), num_draws=2)
    assert (draws["importance"]["pareto_k"].values == -math.inf).all()  # constant weights are exact


def test_bad_input():
    diffusion, x_0 = gaussian(), torch.randn(3, 2)
    with pytest.raises(
        ValueError, match="'num_draws': got 0; expected a whole number of at least 1"
    ):
        to_arviz(diffusion, x_0, num_draws=0)
    for timesteps, got in (([0], "0"), ([6], "6"), ([1.5], "1.5"), ([], r"\[\]")):
        with pytest.raises(ValueError, match=f"argument 'timesteps': got {got}"):
            to_arviz(diffusion, x_0, timesteps=timesteps)
    with pytest.raises(ValueError, match="argument 'timesteps'.*HierarchicalVAE"):
        to_arviz(ladder(), x_0, timesteps=[1])
    for family in (model, (model,), (1, 2), "model"):
        with pytest.raises(ValueError, match="argument '(family|model|guide)'"):
            to_arviz(family, x_0)
    fast = diffusion.subsampled()
    with pytest.raises(ValueError, match="subsampled pair"):
        to_arviz((fast.model, fast.guide), x_0)

    def other_latents(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("w", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))

    with pytest.raises(ValueError, match="latent sites: got programs that differ"):
        to_arviz((model, other_latents), x_0)

    def global_model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(loc, torch.ones(2)).to_event(1), obs=x)

    def global_guide(x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'loc': got a site outside of every plate"):
        to_arviz((global_model, global_guide), x_0)

    def broken(x):
        with pyro.plate("data", len(x), dim=-1):
            z = torch.where(torch.arange(len(x)) == 1, math.nan, 0.0)[:, None]
            pyro.sample("z", dist.Normal(z, 1.0, validate_args=False).to_event(1))

    with pytest.raises(ValueError, match=r"site 'z', its log-probability or KL: got 1 NaN"):
        to_arviz((model, broken), x_0)
    with pytest.raises(ValueError, match="argument 'x_0'"):
        to_arviz(diffusion, torch.zeros(0, 2))


# ---------------------------------------------------------------- a chain continued


@pytest.mark.parametrize("t", [1, 3, 4])
def test_a_chain_continued_from_a_state(double, t):
    """p(x_0 | x_t) of the exact chain: mean and variance of Bayes' rule, site names as in the whole."""
    diffusion = gaussian(4)
    x_t = torch.tensor([[0.3, -0.4]])
    program = diffusion.model.from_state(x_t.expand(20_000, 2), t)
    assert program.site_names == tuple(f"x_{s}" for s in range(t + 1))
    x_0 = program(num_samples=20_000).numpy()
    signal, noise = scales(diffusion, t)
    variance = signal**2 * STD.numpy() ** 2 + noise**2
    mean = MEAN.numpy() + signal * STD.numpy() ** 2 / variance * (
        x_t.numpy()[0] - signal * MEAN.numpy()
    )
    assert_near(x_0, mean, STD.numpy() ** 2 * noise**2 / variance, 0)


# ---------------------------------------------------------------- compare


def evidences(num_particles=50, x_0=None, **stds):
    x_0 = torch.randn(40, 2) * STD + MEAN if x_0 is None else x_0
    found = {}
    for name, std in stds.items():
        diffusion = gaussian(std=STD * std)
        found[name] = importance_evidence(
            diffusion.model, diffusion.guide, x_0, num_particles=num_particles
        )
    return found


def elpd(table):
    return table["elpd_loo" if "elpd_loo" in table else "elpd"]


def test_compare_ranks_the_truth_first():
    found = evidences(wide=1.5, truth=1.0, narrow=0.6)
    table = compare(found)
    assert table.index[0] == "truth"
    assert set(table["score"]) == {"evidence"}
    for name, evidence in found.items():
        assert elpd(table)[name] == pytest.approx(evidence.log_evidence.sum().item())
        error = evidence.standard_error.square().sum().sqrt().item()
        assert table["mc_error"][name] == pytest.approx(error)


def fake(log_evidence, elbo, k):
    log_evidence, elbo, k = (torch.tensor(x, dtype=torch.float64) for x in (log_evidence, elbo, k))
    ones = torch.ones_like(k)
    return Evidence(
        log_evidence,
        0.1 * ones,
        50 * ones,
        k,
        None,
        elbo,
        0.2 * ones,
        "importance weights",
        10_000,
        "word",
    )


def test_a_datum_with_a_large_k_is_scored_by_every_models_bound():
    one = fake([-1.0, -2.0, -3.0], [-1.5, -2.5, -3.5], [0.1, 0.9, -math.inf])
    two = fake([-1.1, -1.0, -9.0], [-1.2, -5.0, -9.9], [0.1, 0.2, 0.3])
    table = compare({"one": one, "two": two})
    assert set(table["score"]) == {"evidence of 2 data, bound of 1"}
    assert elpd(table)["one"] == pytest.approx(-1.0 - 2.5 - 3.0)
    assert elpd(table)["two"] == pytest.approx(-1.1 - 5.0 - 9.0)
    assert table["mc_error"]["one"] == pytest.approx(math.sqrt(0.1**2 + 0.2**2 + 0.1**2))
    bad = fake([0.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.7, 1.0, 2.0])
    table = compare({"one": one, "bad": bad})
    assert set(table["score"]) == {"bound"}
    assert elpd(table)["bad"] == pytest.approx(-3.0)


def test_compare_refuses_what_cannot_be_compared():
    x_0 = torch.randn(10, 2)
    one = evidences(x_0=x_0, a=1.0)["a"]
    other_data = evidences(x_0=x_0.flip(0), a=1.0)["a"]
    with pytest.raises(ValueError, match="'two' and 'one' with other data"):
        compare({"one": one, "two": other_data})
    with pytest.raises(ValueError, match=r"num_particles \(60 and 50\)"):
        compare({"one": one, "two": evidences(60, x_0, a=1.0)["a"]})
    with pytest.raises(ValueError, match=r"estimator \('sequential Monte Carlo'"):
        compare({"one": one, "two": one._replace(estimator="sequential Monte Carlo")})
    with pytest.raises(ValueError, match="two models or more"):
        compare({"one": one})
    for wrong in ([one, one], None):
        with pytest.raises(ValueError, match="two models or more"):
            compare(wrong)
    few = importance_evidence(neural().model, neural().guide, x_0, num_particles=10)
    with pytest.raises(ValueError, match="got estimates from 10 draws, too few for Pareto k"):
        compare({"one": few, "two": few})
    bare = fake([0.0], [0.0], [0.9])._replace(elbo=None)
    with pytest.raises(ValueError, match="no bound to rank them by"):
        compare({"one": bare, "two": bare})


# ---------------------------------------------------------------- calibration


def last(states):
    return states["x_3"][:, 0]


def test_simulation_based_calibration_of_an_exact_guide(double):
    """The forward chain is the posterior of the exact reverse chain: uniform, for any statistic."""
    for statistic in (last, lambda states: states["x_1"].sum(-1) - states["x_4"][:, 1]):
        pit = simulation_based_calibration(
            gaussian(), statistic, num_simulations=2000, num_draws=19
        )
        assert stats.kstest(pit.numpy(), "uniform").pvalue > 0.01
    pair = (gaussian().model, gaussian().guide)
    pit = simulation_based_calibration(pair, last, num_simulations=200, num_draws=9, batch_size=64)
    assert stats.kstest(pit.numpy(), "uniform").pvalue > 0.01


def test_simulation_based_calibration_finds_a_guide_that_is_not_the_posterior(double):
    class Shifted(nn.Module):
        def __init__(self, denoiser):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x_t, log_snr):
            return self.denoiser.x_0_hat(x_t, log_snr) + 0.3

    from pyro_diffusion import DataPrediction

    exact = gaussian().denoiser
    wrong = NeuralDenoiser(Shifted(exact), exact.schedule, (2,), prediction=DataPrediction())
    pit = simulation_based_calibration(
        DiffusionModel(wrong), last, num_simulations=2000, num_draws=19
    )
    assert stats.kstest(pit.numpy(), "uniform").pvalue < 1e-3


def test_the_statistic_sees_rows_and_the_datum(double):
    seen = {}

    def statistic(states):
        seen.update({name: x.shape for name, x in states.items()})
        return (states["x_0"] * states["x_1"]).sum(-1)

    pit = simulation_based_calibration(gaussian(), statistic, num_simulations=30, num_draws=4)
    assert pit.shape == (30,)
    assert ((pit > 0) & (pit < 1)).all()
    assert set(seen) == {f"x_{t}" for t in range(6)}
    assert seen["x_1"] == (120, 2)
    with pytest.raises(ValueError, match=r"argument 'statistic': got values of shape \(30, 2\)"):
        simulation_based_calibration(gaussian(), lambda states: states["x_1"], num_simulations=30)


def test_randomized_pit_of_tensors():
    pyro.set_rng_seed(0)
    one = randomized_pit(torch.randn(500), torch.randn(19, 500))
    pyro.set_rng_seed(0)
    assert torch.equal(one, randomized_pit(torch.randn(500), torch.randn(19, 500)))
    assert stats.kstest(one.numpy(), "uniform").pvalue > 0.01
    counts = randomized_pit(torch.randint(3, (500,)), torch.randint(3, (19, 500)))
    assert stats.kstest(counts.numpy(), "uniform").pvalue > 0.01
    with pytest.raises(ValueError, match="argument 'draws'"):
        randomized_pit(torch.randn(5), torch.randn(5))


# ---------------------------------------------------------------- active units


class Encoder(nn.Module):
    """N((w x_1, 0.05 x_2, 0), 1): one number that says much, one little, one nothing."""

    def forward(self, x):
        mean = torch.stack([x[..., 0], 0.05 * x[..., 1], torch.zeros_like(x[..., 0])], -1)
        return dist.Normal(mean, 1.0).to_event(1)


def test_active_units(double):
    """Variances over data of the posterior means: 1, 0.0025 and 0."""
    vae = HierarchicalVAE((2,), (3,), encoder=BottomUpEncoder.from_layers([Encoder()]))
    x_0 = torch.randn(4000, 2)
    assert active_units(vae.guide, x_0)["x_1"].tolist() == [True, False, False]
    assert active_units(vae.guide, x_0, threshold=0.001)["x_1"].tolist() == [True, True, False]
    two = ladder((3, 2))
    units = active_units(two.guide, x_0)
    assert {name: x.shape for name, x in units.items()} == {"x_1": (3,), "x_2": (2,)}
    with pytest.raises(
        ValueError, match=r"'len\(x_0\)': got 1; expected a whole number of at least 2"
    ):
        active_units(vae.guide, x_0[:1])
    with pytest.raises(ValueError, match="'num_particles': got 1; expected a whole number"):
        active_units(vae.guide, x_0, num_particles=1)


def test_noise_of_few_draws_makes_no_unit_active(double):
    """A level whose mean depends on the level above only: its spread is noise, and is taken out."""

    class Above(nn.Module):
        def forward(self, h):
            return dist.Normal(3 * h[..., :1], 1.0).to_event(1)

    class Nothing(nn.Module):
        def forward(self, x):
            return dist.Normal(torch.zeros_like(x), 1.0).to_event(1)

    vae = HierarchicalVAE((2,), (2, 1), encoder=BottomUpEncoder.from_layers([Nothing(), Above()]))
    units = active_units(vae.guide, torch.randn(20_000, 2), num_particles=2, threshold=0.2)
    assert not units["x_2"].any()


# ---------------------------------------------------------------- pictures


def test_plots():
    import matplotlib.pyplot as plt

    x_0 = torch.randn(40, 2)
    found = {}
    for name in ("one", "two"):
        diffusion = neural()
        found[name] = importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=30)
    assert plot_khat(found["one"]) is not None
    assert plot_compare(compare(found)) is not None
    assert plot_pit(torch.rand(200)) is not None
    plt.close("all")


# ---------------------------------------------------------------- found by fresh eyes


def test_latents_in_a_plate_of_their_own_keep_their_draws(double):
    """As many parts as trajectories, so that a wrong axis would go unnoticed: y ~ N(Σ z, 0.1²) exactly."""
    num_parts = 50

    def parts_model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", num_parts, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(num_parts, len(x)), 1.0))
            pyro.sample("y", dist.Normal(z.sum(0), 0.1), obs=x)

    def parts_guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", num_parts, dim=-2):
            numbers = torch.arange(num_parts, dtype=x.dtype)[:, None].expand(-1, len(x))
            pyro.sample("z", dist.Normal(numbers, 0.01))

    draws = to_arviz((parts_model, parts_guide), torch.tensor([0.0, 5.0]), num_draws=25)
    assert draws["posterior"]["z"].shape == (1, 25, 2, num_parts)
    total = draws["posterior"]["z"].sum("z_dim_0")
    np.testing.assert_allclose(draws["posterior_predictive"]["y"].values, total.values, atol=0.6)
    np.testing.assert_allclose(total.values, 1225, atol=0.5)


def test_factors_are_no_data():
    def with_factor(x_0):
        model(x_0)
        with pyro.plate("more", len(x_0), dim=-1):
            pyro.factor("penalty", torch.zeros(len(x_0)))

    draws = to_arviz((with_factor, guide), torch.randn(3, 2), num_draws=25)
    assert set(draws["observed_data"].data_vars) == {"y"}
    assert set(draws["posterior_predictive"].data_vars) == {"y"}


def test_calibration_needs_a_datum_of_that_name():
    def elsewhere(num_samples=1):
        with pyro.plate("data", num_samples, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(num_samples), 1.0))

    with pytest.raises(ValueError, match=r"the sites z; expected the datum at site 'x_0'"):
        simulation_based_calibration((elsewhere, guide), last)


def test_compare_says_how_low_the_sums_are():
    """log p̂ is low by half its variance: a column, for data scored by evidence."""
    one = fake([-1.0, -2.0, -3.0], [-1.5, -2.5, -3.5], [0.1, 0.9, -math.inf])
    table = compare({"one": one, "two": one})
    np.testing.assert_allclose(table["mc_bias"], 0.5 * 2 * 0.1**2)
    few = one._replace(pareto_k=torch.tensor([0.1, 0.4, 0.2]).double(), num_particles=30)
    assert set(compare({"one": few, "two": few})["score"]) == {"evidence of 2 data, bound of 1"}


def test_units_of_a_level_that_hears_nothing_are_not_active(double):
    """At the defaults: eight units that follow the noise of the level below, none counted in 20 runs."""

    class Above(nn.Module):
        def forward(self, h):
            return dist.Normal(3 * h[..., :1].expand(*h.shape[:-1], 8), 1.0).to_event(1)

    class Nothing(nn.Module):
        def forward(self, x):
            return dist.Normal(torch.zeros_like(x), 1.0).to_event(1)

    vae = HierarchicalVAE((2,), (2, 8), encoder=BottomUpEncoder.from_layers([Nothing(), Above()]))
    active = [active_units(vae.guide, torch.randn(500, 2))["x_2"].any() for _ in range(20)]
    assert sum(active) <= 1


def test_active_units_of_other_laws():
    def flow(x):
        with pyro.plate("data", len(x), dim=-1):
            law = dist.TransformedDistribution(
                dist.Normal(x[:, 0], 0.1), [dist.transforms.ExpTransform()]
            )
            pyro.sample("z", law)

    assert active_units(flow, torch.randn(200, 2))["z"]

    def categories(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", dist.Categorical(logits=torch.zeros(len(x), 3)))

    with pytest.raises(ValueError, match="site 'c': got a Categorical, which has no mean"):
        active_units(categories, torch.randn(20, 2))


def test_compare_refuses_what_is_no_evidence_or_of_another_measure():
    x_0 = torch.randint(2, (10, 2)).float()
    vae = HierarchicalVAE((2,), (3,), BernoulliLikelihood(), hidden_size=8)
    density = HierarchicalVAE((2,), (3,), hidden_size=8)
    found = {
        name: importance_evidence(v.model, v.guide, x_0, num_particles=30)
        for name, v in {"mass": vae, "density": density}.items()
    }
    assert found["mass"].measure == "mass"
    with pytest.raises(ValueError, match=r"other measure \('density' and 'mass'\)"):
        compare(found)
    with pytest.raises(
        ValueError, match=r"evidence\['one'\]\": got ELBOTerms; expected an instance of Evidence"
    ):
        compare({"one": elbo_terms(vae.model, vae.guide, x_0), "two": found["mass"]})


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # pandas', inside ArviZ, once pytest repeats it
def test_compare_warns_where_guides_may_have_decided():
    """A better model with a loose guide loses on bounds: the table says so in words and columns."""
    better = fake([-1.0] * 3, [-9.0] * 3, [2.0] * 3)
    tighter = fake([-2.0] * 3, [-2.5] * 3, [0.1] * 3)
    with pytest.warns(UserWarning, match="order by evidence"):
        table = compare({"better": better, "tighter": tighter})
    assert list(table.index) == ["tighter", "better"]
    assert table["evidence"]["better"] == -3.0
    assert table["bound"]["better"] == -27.0
    assert dict(table["bad_k"]) == {"better": 3, "tighter": 0}


def test_statistics_that_test_nothing_are_refused(double):
    with pytest.raises(ValueError, match="the same for every draw of the guide"):
        simulation_based_calibration(
            gaussian(), lambda states: states["x_0"][:, 0], num_simulations=20
        )
    with pytest.raises(ValueError, match="argument 'statistic': got 'x_1'"):
        simulation_based_calibration(gaussian(), "x_1")
    with pytest.raises(ValueError, match="got a program that observes 'x_0'"):
        active_units(gaussian().model, torch.randn(5, 2))


def test_a_family_is_no_program():
    diffusion = gaussian()
    with pytest.raises(ValueError, match=r"got a DiffusionModel; expected one of its programs"):
        diffusion(torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"its .model, and its .posterior_guide"):
        elbo_terms(diffusion, diffusion, torch.randn(3, 2))
