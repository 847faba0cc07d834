"""Terms and totals of the bound against closed forms, for every way to compute it."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GaussianReverseChain, alpha_bar
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_diffusion.bounds import Estimate, elbo_terms, snr_weight
from pyro_diffusion.denoisers import (
    DataPrediction,
    ForwardVariance,
    GaussianDenoiser,
    NeuralDenoiser,
    PosteriorVariance,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import DiscretizedGaussianLikelihood, GaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.processes.gaussian import chain_step
from pyro_diffusion.reading import footprint, rows_within
from pyro_diffusion.schedules import AlphaSchedule, LinearSchedule, LogSNRSchedule

pytestmark = pytest.mark.usefixtures("double")

ALPHA = np.array([0.95, 0.8, 0.6, 0.5, 0.3])
SCHEDULE = AlphaSchedule(ALPHA.tolist())
X_0 = np.array([[0.7, -1.1], [2.0, 0.1], [-0.4, 0.3]])
# A misfit model: the chain is exact for a law that the data do not follow.
MEAN, STD = np.array([0.3, -0.5]), np.array([0.6, 1.4])


def misfit(device="cpu"):
    schedule = AlphaSchedule(ALPHA.tolist())  # its own: moving a model moves its schedule
    denoiser = GaussianDenoiser(torch.tensor(MEAN), torch.tensor(STD), schedule)
    return DiffusionModel(denoiser).to(device)


def closed_form(name):
    """A term summed over the two independent dimensions, rows by timestep, columns by datum."""
    oracles = [GaussianReverseChain.exact(ALPHA, MEAN[i], STD[i]) for i in range(2)]
    return sum(getattr(oracle, name)(X_0[:, i]) for i, oracle in enumerate(oracles))


def assert_within(values, errors, expected, sigmas=5.0):
    values, errors = np.asarray(values.cpu()), np.asarray(errors.cpu())
    assert (np.abs(values - expected) <= sigmas * errors + 1e-10).all(), (
        values - expected
    ) / errors


class Affine(nn.Module):
    """x̂_0 = slope x_t + intercept, as a network that predicts the datum."""

    def forward(self, x_t, log_snr):
        return 0.8 * x_t + 0.1


@pytest.mark.parametrize("analytic_kl", [None, False])
def test_E10_matching_terms(analytic_kl, device):
    diffusion = misfit(device)
    terms = elbo_terms(
        diffusion.model,
        diffusion.posterior_guide,
        torch.tensor(X_0, device=device),
        num_particles=20_000,
        analytic_kl=analytic_kl,
    )
    error = terms.term_standard_error
    assert terms.is_kl
    assert terms.kinds == ("log-likelihood",) + ("KL",) * 5
    assert_within(terms.reconstruction, error[0], closed_form("reconstruction"))
    assert_within(terms.transition, error[1:-1], closed_form("transition_kl"))
    assert_within(terms.prior, error[-1], closed_form("prior_kl"))
    assert_within(terms.elbo, terms.standard_error, closed_form("elbo"))


def test_E11_consistency_terms(device):
    diffusion = misfit(device)
    terms = elbo_terms(
        diffusion.model,
        diffusion.guide,
        torch.tensor(X_0, device=device),
        num_particles=20_000,
    )
    error = terms.term_standard_error
    assert not terms.is_kl
    assert terms.kinds == ("log-likelihood",) + ("log-ratio",) * 4 + ("KL",)
    assert_within(terms.reconstruction, error[0], closed_form("reconstruction"))
    assert_within(terms.transition, error[1:-1], closed_form("log_ratio"))
    assert_within(terms.prior, error[-1], closed_form("prior_log_ratio"))
    assert_within(terms.elbo, terms.standard_error, closed_form("elbo"))


def test_both_forms_have_the_same_total_and_another_split():
    total = (
        closed_form("reconstruction") - closed_form("log_ratio").sum(0)
        - closed_form("prior_log_ratio")
    )  # fmt: skip
    np.testing.assert_allclose(total, closed_form("elbo"), rtol=1e-12)
    assert np.abs(closed_form("log_ratio") - closed_form("transition_kl")).min() > 0.1


def test_the_printed_kl_form_of_the_consistency_term_is_another_number():
    """E KL(q(x_t|x_{t-1}) ‖ p(x_t|x_{t+1})) of the lecture notes: 0.4 nats and more off a term."""
    difference = closed_form("printed_consistency_kl") - closed_form("log_ratio")
    assert (difference > 0.39).all()
    # and at the exact reverse chain it misses log p(x_0), which the log-ratio form gives
    oracle = GaussianReverseChain.exact(np.append(ALPHA, 1e-24), MEAN[0], STD[0])
    printed = (
        oracle.reconstruction(0.7) - oracle.printed_consistency_kl(0.7).sum(0)
        - oracle.prior_log_ratio(0.7)
    )  # fmt: skip
    assert oracle.elbo(0.7) == pytest.approx(oracle.log_evidence(0.7), abs=1e-10)
    assert oracle.log_evidence(0.7) - printed > 1


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 5])
def test_the_bound_is_below_the_evidence_of_the_model(num_timesteps):
    alpha = ALPHA[:num_timesteps]
    for mean, std in ((0.3, 0.6), (-0.5, 1.4)):
        oracle = GaussianReverseChain.exact(alpha, mean, std)
        assert oracle.elbo(0.7) <= oracle.log_evidence(0.7) + 1e-12


def estimates(diffusion, x_0, device):
    """Mean and standard error of the bound by each of the ways to compute it."""
    x_0 = torch.tensor(x_0, device=device)
    big = x_0.repeat(2_000, 1)
    one, many = diffusion.subsampled(1), diffusion.subsampled(len(x_0))
    every = diffusion.subsampled(diffusion.schedule.num_timesteps)
    pairs = {
        "sequential": (Trace_ELBO, diffusion.model, diffusion.guide),
        "posterior": (Trace_ELBO, diffusion.model, diffusion.posterior_guide),
        "posterior, analytic": (TraceMeanField_ELBO, diffusion.model, diffusion.posterior_guide),
        "1 timestep": (Trace_ELBO, one.model, one.guide),
        "1 timestep, analytic": (TraceMeanField_ELBO, one.model, one.guide),
        "N timesteps": (TraceMeanField_ELBO, many.model, many.guide),
        "T timesteps": (TraceMeanField_ELBO, every.model, every.guide),
        "T timesteps, sampled": (Trace_ELBO, every.model, every.guide),
    }
    for name, (elbo, model, guide) in pairs.items():
        draws = torch.tensor([-elbo().loss(model, guide, big) / 2_000 for _ in range(12)])
        yield name, draws.mean(), draws.std() / 12**0.5


def test_all_bounds_agree_with_the_closed_form(device):
    # N = T − 2 here; the next test has N = T
    for name, value, error in estimates(misfit(device), X_0, device):
        assert abs(value - closed_form("elbo").sum()) < 5 * error, name


def test_all_bounds_agree_when_there_are_as_many_data_as_timesteps(device):
    """N = T = 5: a coefficient padded along the wrong axis would go unnoticed by shape."""
    x_0 = np.concatenate([X_0, X_0[:2] - 1.0])
    oracles = [GaussianReverseChain.exact(ALPHA, MEAN[i], STD[i]) for i in range(2)]
    expected = sum(oracle.elbo(x_0[:, i]) for i, oracle in enumerate(oracles)).sum()
    for name, value, error in estimates(misfit(device), x_0, device):
        assert abs(value - expected) < 5 * error, name


@pytest.mark.parametrize("dropped", ["prior", "reconstruction"])
@pytest.mark.parametrize("pair", ["sequential", "posterior", "subsampled"])
def test_the_comparison_notices_a_missing_term(dropped, pair):
    """On purpose: mask the prior or the datum's site out of the programs, and the totals differ."""
    diffusion, x_0 = misfit(), torch.tensor(X_0).repeat(8_000, 1)
    site = "x_5" if dropped == "prior" else "x_0"
    programs = {
        "sequential": (diffusion.model, diffusion.guide),
        "posterior": (diffusion.model, diffusion.posterior_guide),
        "subsampled": (diffusion.subsampled(5).model, diffusion.subsampled(5).guide),
    }[pair]

    class Drop(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == site:
                msg["mask"] = False

    def without(program):
        def run(*args, **kwargs):
            with Drop():
                return program(*args, **kwargs)

        return run

    model, guide = (without(program) for program in programs)
    draws = torch.tensor([-Trace_ELBO().loss(model, guide, x_0) / 8_000 for _ in range(12)])
    error = draws.std() / 12**0.5
    assert abs(draws.mean() - closed_form("elbo").sum()) > 6 * error


@pytest.mark.parametrize("variance", [PosteriorVariance(), ForwardVariance()])
def test_other_variances_and_a_network(variance):
    """An affine network: the closed form with the kernels that it implies."""
    denoiser = NeuralDenoiser(
        Affine(), SCHEDULE, (1,), prediction=DataPrediction(), variance=variance
    )
    diffusion, x_0 = DiffusionModel(denoiser), torch.tensor([[0.4], [1.3]])
    bar, t = alpha_bar(ALPHA), np.arange(1, 6)
    of_x_0 = np.sqrt(bar[t - 1]) * (1 - ALPHA) / (1 - bar[t])
    of_x_t = np.sqrt(ALPHA) * (1 - bar[t - 1]) / (1 - bar[t])
    oracle = GaussianReverseChain(
        ALPHA,
        of_x_t + 0.8 * of_x_0,
        0.1 * of_x_0,
        variance(chain_step(torch.tensor(t), SCHEDULE)).numpy(),
    )
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, num_particles=20_000)
    error = terms.term_standard_error
    assert_within(terms.reconstruction, error[0], oracle.reconstruction(x_0[:, 0].numpy()))
    assert_within(terms.transition, error[1:-1], oracle.transition_kl(x_0[:, 0].numpy()))


def test_E12_the_kl_is_a_weighted_squared_error():
    """With β̃ and an estimate that ignores x_t the KL has no expectation left: equal to 1e-12."""

    class Fixed(nn.Module):
        def forward(self, x_t, log_snr):
            return torch.full_like(x_t, 0.25)

    denoiser = NeuralDenoiser(
        Fixed(), SCHEDULE, (2,), prediction=DataPrediction(), variance=PosteriorVariance()
    )
    diffusion = DiffusionModel(denoiser)
    terms = elbo_terms(
        diffusion.model, diffusion.posterior_guide, torch.tensor(X_0), num_particles=2
    )
    bar = alpha_bar(ALPHA)
    snr = bar[1:] / (1 - bar[1:])
    square = ((X_0 - 0.25) ** 2).sum(-1)
    expected = 0.5 * (snr[:-1] - snr[1:])[:, None] * square
    np.testing.assert_allclose(terms.transition, expected, rtol=1e-11)
    t = torch.arange(1, 5)
    np.testing.assert_allclose(snr_weight(SCHEDULE, t), 0.5 * (snr[:-1] - snr[1:]), rtol=1e-12)
    for outside in (0, 5):
        with pytest.raises(ValueError, match="argument 't'"):
            snr_weight(SCHEDULE, outside)


def test_E15_bits_per_dim_and_the_two_errors():
    diffusion = misfit()
    terms = elbo_terms(diffusion.model, diffusion.guide, torch.tensor(X_0), num_particles=64)
    bits = terms.bits_per_dim()
    assert bits.value == pytest.approx(-terms.elbo.mean().item() / (2 * math.log(2)))
    nats = terms.mean()
    assert nats.value == pytest.approx(terms.elbo.mean().item())
    noise = terms.standard_error.square()
    assert nats.monte_carlo_error == pytest.approx((noise.sum().sqrt() / 3).item())
    variance = terms.elbo.var().item()
    spread = max(
        variance - noise.mean().item(), variance
    )  # resolution of 3 data: sqrt(2 / (3 - 1))
    assert nats.sampling_error == pytest.approx((spread / 3) ** 0.5)
    unit = 2 * math.log(2)
    assert bits[1:] == pytest.approx([error / unit for error in nats[1:]])
    assert "Monte Carlo" in str(bits)
    assert "sampling" in str(bits)
    assert float(bits) == bits.value


def test_a_spread_hidden_by_noise_is_not_reported_as_none():
    """400 equal data: the sampling error is the smallest that could be told from none, never zero."""
    diffusion, x_0 = misfit(), torch.tensor(X_0[:1]).repeat(400, 1)
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, num_particles=4)
    bound = terms.mean()
    assert 0 < bound.sampling_error < bound.monte_carlo_error
    # and where data differ by much more than the noise, it is the textbook standard error
    spread = torch.tensor(X_0[:1]) + 3 * torch.randn(400, 2)
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, spread, num_particles=64)
    assert terms.mean().sampling_error == pytest.approx(terms.elbo.std().item() / 20, rel=0.05)


def test_an_estimate_formats_as_its_value_and_tells_one_particle():
    estimate = Estimate(-1.2345, 0.01, 0.02)
    assert f"{estimate:.2f}" == "-1.23"
    assert f"{estimate}" == str(estimate)
    alone = Estimate(-1.2345, float("nan"), 0.14)
    assert str(alone) == "-1.23 ± 0.14 (Monte Carlo and sampling)"


def test_printing_is_short_and_shows_digits_that_mean_something():
    assert str(Estimate(1.23456, 0.012, 0.2)) == "1.235 ± 0.012 (Monte Carlo) ± 0.2 (sampling)"
    assert "± 5e-05 (Monte Carlo)" in str(Estimate(0.00471, 5e-5, 2e-4))
    terms = elbo_terms(misfit().model, misfit().posterior_guide, torch.tensor(X_0))
    assert repr(terms).startswith("ELBOTerms(3 data, 5 KLs, elbo=-")


def test_standard_errors_are_those_of_repeated_evaluations():
    """The spread of 200 evaluations with 16 particles is what a single one says it is."""
    diffusion, x_0 = misfit(), torch.tensor(X_0)
    runs = [
        elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, num_particles=16)
        for _ in range(200)
    ]
    for values, errors in (
        ([run.elbo for run in runs], [run.standard_error for run in runs]),
        ([run.reconstruction for run in runs], [run.term_standard_error[0] for run in runs]),
    ):
        observed = torch.stack(values).var(0)
        claimed = torch.stack(errors).square().mean(0)
        # a variance from 200 draws has a relative error of about 10 %, more for heavy tails
        assert ((observed / claimed - 1).abs() < 0.5).all()


def test_one_particle_has_no_monte_carlo_error():
    diffusion = misfit()
    terms = elbo_terms(diffusion.model, diffusion.guide, torch.tensor(X_0), num_particles=1)
    assert terms.standard_error.isnan().all()
    assert math.isnan(terms.mean().monte_carlo_error)
    assert terms.mean().sampling_error > 0
    one = elbo_terms(diffusion.model, diffusion.guide, torch.tensor(X_0[:1]), num_particles=4)
    assert math.isnan(one.mean().sampling_error)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 1000])
def test_chunks_change_nothing_but_the_draws(batch_size):
    """Means and errors add up over chunks of data and of particles alike."""
    diffusion, x_0 = misfit(), torch.tensor(X_0)
    terms = elbo_terms(
        diffusion.model, diffusion.posterior_guide, x_0, num_particles=400, batch_size=batch_size
    )
    assert_within(terms.elbo, terms.standard_error, closed_form("elbo"))
    whole = elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, num_particles=400)
    ratio = terms.term_standard_error / whole.term_standard_error
    assert ((ratio[whole.term_standard_error > 1e-9] - 1).abs() < 0.5).all()


def test_results_are_unscaled_float64_and_the_modes_come_back(device):
    network = MLP((2,), hidden_size=8, num_blocks=1, dropout=0.5).float()
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(4), (2,))).to(device)
    diffusion.denoiser.network.blocks.eval()
    before = {name: module.training for name, module in diffusion.named_modules()}
    x_0 = torch.randn(3, 2, device=device).float()
    programs, results = (diffusion.model, diffusion.posterior_guide), []
    for scale in (1.0, 7.0):
        pyro.set_rng_seed(1)
        results.append(elbo_terms(*(poutine.scale(x, scale) for x in programs), x_0))
    torch.testing.assert_close(results[0].elbo, results[1].elbo)
    terms = elbo_terms(*programs, x_0)
    for values in (*terms[:5], *results[1][:5]):
        assert values.dtype == torch.float64
        assert values.device.type == device.type
        assert not values.requires_grad
    assert terms.transition.shape == (3, 3)
    assert terms.term_standard_error.shape == (5, 3)
    assert terms.site_names == ("x_0", "x_1", "x_2", "x_3", "x_4")
    assert before == {name: module.training for name, module in diffusion.named_modules()}


def test_dropout_is_off_while_the_bound_is_read():
    modes = set()

    class Watching(MLP):
        def forward(self, x_t, log_snr):
            modes.add(self.training)
            return super().forward(x_t, log_snr)

    network = Watching((2,), hidden_size=8, dropout=0.5)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(3), (2,)).double())
    elbo_terms(diffusion.model, diffusion.posterior_guide, torch.tensor(X_0))
    diffusion.sample(2)
    assert modes == {False}
    assert network.training


def test_to_dataset_round_trips_through_netcdf(tmp_path):
    import xarray

    diffusion = misfit()
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, torch.tensor(X_0))
    dataset = terms.to_dataset()
    assert dict(dataset.sizes) == {"timestep": 4, "data": 3}
    assert dataset["transition"].dims == ("timestep", "data")
    assert dataset["timestep"].values.tolist() == [1, 2, 3, 4]
    assert all(dataset[name].attrs["units"] == "nats per datum" for name in dataset.data_vars)
    assert dataset.attrs["kind"] == "KL"
    rebuilt = dataset["reconstruction"] - dataset["transition"].sum("timestep") - dataset["prior"]
    np.testing.assert_allclose(rebuilt, dataset["elbo"])
    dataset.to_netcdf(tmp_path / "bound.nc")
    with xarray.open_dataset(tmp_path / "bound.nc") as loaded:
        xarray.testing.assert_identical(loaded.load(), dataset)


def test_a_chain_of_one_step_has_no_transition_terms():
    diffusion = DiffusionModel(
        GaussianDenoiser(torch.zeros(2), torch.ones(2), AlphaSchedule([0.3]))
    )
    for guide in (diffusion.guide, diffusion.posterior_guide):
        terms = elbo_terms(diffusion.model, guide, torch.tensor(X_0))
        assert terms.transition.shape == (0, 3)
        assert terms.is_kl
        assert terms.to_dataset().sizes["timestep"] == 0


def test_discretised_data_never_exceed_probability_one():
    """A bound on a log-mass: at most zero nats, whatever the model."""
    denoiser = NeuralDenoiser(MLP((4,), hidden_size=8), LogSNRSchedule(10), (4,))
    diffusion = DiffusionModel(denoiser.double(), DiscretizedGaussianLikelihood(5))
    x_0 = torch.randint(0, 5, (20, 4))
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, num_particles=20)
    assert (terms.reconstruction <= 0).all()
    assert terms.elbo.max() < 0
    assert terms.event_size == 4


def test_with_a_likelihood_the_reconstruction_is_its_own():
    diffusion = misfit()
    diffusion.likelihood = GaussianLikelihood(0.7)
    terms = elbo_terms(
        diffusion.model, diffusion.posterior_guide, torch.tensor(X_0), num_particles=20_000
    )
    bar, expected = ALPHA[0], 0.0
    for i in range(2):
        gain = np.sqrt(bar) * STD[i] ** 2 / (bar * STD[i] ** 2 + 1 - bar)
        bias = X_0[:, i] - MEAN[i] - gain * np.sqrt(bar) * (X_0[:, i] - MEAN[i])
        square = bias**2 + gain**2 * (1 - bar)
        expected = expected - 0.5 * (np.log(2 * np.pi * 0.49) + square / 0.49)
    assert_within(terms.reconstruction, terms.term_standard_error[0], expected)


# Programs that are not of this package


def vae_model(x, loc=0.0):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
        pyro.sample("x", dist.Normal(2 * z + loc, 0.5 * torch.ones(3)).to_event(1), obs=x)


def vae_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) / 3, 0.4).to_event(1))


@pytest.mark.parametrize("analytic_kl", [None, False])
def test_a_plain_vae(analytic_kl):
    """p(z) = N(0, 1), p(x | z) = N(2z, 0.25 I_3), q(z | x) = N(mean(x)/3, 0.16)."""
    x = torch.randn(6, 3)
    terms = elbo_terms(vae_model, vae_guide, x, num_particles=20_000, analytic_kl=analytic_kl)
    loc = x.numpy().mean(-1) / 3
    kl = 0.5 * (0.16 + loc**2 - 1 - np.log(0.16))
    square = ((x.numpy() - 2 * loc[:, None]) ** 2 + 4 * 0.16).sum(-1)
    reconstruction = -1.5 * np.log(2 * np.pi * 0.25) - square / 0.5
    assert terms.transition.shape == (0, 6)
    assert terms.site_names == ("x", "z")
    assert_within(terms.prior, terms.term_standard_error[1], kl)
    assert_within(terms.reconstruction, terms.term_standard_error[0], reconstruction)
    assert_within(terms.elbo, terms.standard_error, reconstruction - kl)


def test_scaled_masked_and_inner_plates():
    """A model with data subsampling, a mask and a plate to the left: unscaled, masked, summed."""
    x = torch.randn(4, 2)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]]).bool()

    def model(x):
        with pyro.plate("data", 100, subsample=torch.arange(len(x)), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 2, dim=-2), poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    def guide(x):
        with pyro.plate("data", 100, subsample=torch.arange(len(x)), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    terms = elbo_terms(model, guide, x, num_particles=1_000, batch_size=4)
    expected = (-0.5 * (np.log(2 * np.pi) + x.numpy().T ** 2 + 1) * mask.numpy()).sum(0)
    assert_within(terms.reconstruction, terms.term_standard_error[0], expected)
    assert terms.prior.abs().max() < 1e-12


def test_an_order_that_departs_later_has_kls_before():
    """The last two latents are swapped: the guide draws c without b, so that the term of c is a log-ratio."""

    def chain(order):
        def program(x, observe=False):
            with pyro.plate("data", len(x), dim=-1):
                for name in order:
                    pyro.sample(name, dist.Normal(torch.zeros(1), 2.0).to_event(1))
                if observe:
                    pyro.sample("x", dist.Normal(0.0, torch.ones(3)).to_event(1), obs=x)

        return program

    def model(x):
        chain("abc")(x, observe=True)

    x = torch.randn(4, 3)
    terms = elbo_terms(model, chain("acb"), x)
    assert terms.kinds == ("log-likelihood", "log-ratio", "KL", "KL")
    assert elbo_terms(model, chain("abc"), x).is_kl
    with pytest.raises(ValueError, match="'analytic_kl'"):
        elbo_terms(model, chain("acb"), x, analytic_kl=True)


def test_deterministic_sites_are_no_data():
    x = torch.randn(6, 3)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
            pyro.deterministic("twice", 2 * z, event_dim=1)
            pyro.sample("x", dist.Normal(2 * z, 0.5 * torch.ones(3)).to_event(1), obs=x)

    terms = elbo_terms(model, vae_guide, x)
    assert terms.event_size == 3
    assert terms.site_names == ("x", "z")


def guide_with(**sites):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            for name in sites:
                pyro.sample(name, dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))

    return guide


def global_model(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(w, 1.0).expand([3]).to_event(1), obs=x)


def global_guide(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))


def unobserved_model(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))


def nan_model(x):
    vae_model(x, loc=torch.tensor(math.nan))


@pytest.mark.parametrize(
    ("model", "guide", "arguments", "says"),
    [
        (vae_model, guide_with(), {}, "the model samples 'z'.*same latent sites"),
        (vae_model, guide_with(z=1, w=1), {}, "the guide alone samples 'w'"),
        (global_model, global_guide, {}, "site 'w'.*outside of every plate.*data plate"),
        (unobserved_model, guide_with(z=1), {}, "1 latent and 0 observed"),
        (vae_model, vae_guide, {"num_particles": 0}, "'num_particles'.*got 0"),
        (vae_model, vae_guide, {"batch_size": -1}, "'batch_size'.*got -1"),
        (vae_model, vae_guide, {"x_0": [[1.0]]}, "'x_0'.*a list.*torch.as_tensor"),
        (vae_model, vae_guide, {"x_0": torch.zeros(0, 3)}, "'x_0'.*shape \\(0, 3\\)"),
    ],
)
def test_bad_programs_are_refused_in_words(model, guide, arguments, says):
    with pytest.raises(ValueError, match="(?s)" + says):
        elbo_terms(model, guide, **({"x_0": torch.randn(4, 3)} | arguments))


def test_a_nan_is_refused_with_its_site():
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site 'x'.*NaN"):
        elbo_terms(nan_model, vae_guide, torch.randn(4, 3))


def test_a_model_in_place_of_its_programs_is_refused():
    diffusion, x_0 = misfit(), torch.tensor(X_0)
    for pair in ((diffusion, diffusion.guide), (diffusion.model, diffusion)):
        with pytest.raises(ValueError, match="got a DiffusionModel; expected one of its programs"):
            elbo_terms(*pair, x_0)


@pytest.mark.parametrize("x_0", [X_0, X_0.tolist()])
def test_data_that_are_no_tensor_are_refused_as_data(x_0):
    with pytest.raises(ValueError, match="argument 'x_0': got a (ndarray|list)"):
        elbo_terms(misfit(), x_0)


def test_data_of_a_users_own_program_are_looked_at():
    """A program may hand other data to a model of this package than it was called with."""
    diffusion, x_0 = misfit(), torch.tensor(X_0)
    programs = (lambda x: diffusion.model(x.log()), lambda x: diffusion.guide(x.log()))
    with pytest.raises(ValueError, match="argument 'x_0': got .* NaN"):
        elbo_terms(*programs, x_0)


def test_a_subsampled_pair_is_refused():
    pair = misfit().subsampled(2)
    with pytest.raises(ValueError, match=r"subsampled pair.*posterior_guide"):
        elbo_terms(pair.model, pair.guide, torch.tensor(X_0))


def test_a_wrapped_subsampled_pair_is_refused():
    pair = misfit().subsampled(2)
    model, guide = (poutine.scale(program, 1.0) for program in pair.__dict__.values())
    with pytest.raises(ValueError, match=r"subsampled pair.*posterior_guide"):
        elbo_terms(model, guide, torch.tensor(X_0))


def test_a_guide_outside_the_data_plate_is_refused():
    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))

    with pytest.raises(ValueError, match="site 'z'.*outside of every plate"):
        elbo_terms(vae_model, guide, torch.randn(4, 3))


def test_masks_that_differ_are_refused():
    with pytest.raises(ValueError, match="site 'z'.*different masks in the guide"):
        elbo_terms(vae_model, poutine.mask(vae_guide, mask=False), torch.randn(4, 3))


def test_analytic_kls_of_the_forward_guide_are_refused():
    diffusion = misfit()
    with pytest.raises(ValueError, match=r"'analytic_kl'.*posterior_guide"):
        elbo_terms(diffusion.model, diffusion.guide, torch.tensor(X_0), analytic_kl=True)


def test_memory_stays_flat(device, monkeypatch):
    """T = 200, D = 784: the default chunk holds a budget of 4 MiB whatever N and the particles are."""
    budget = 2**22
    monkeypatch.setattr(rows_within, "__defaults__", (budget,))
    parts = torch.zeros(784), torch.ones(784), LinearSchedule(200)
    diffusion = DiffusionModel(GaussianDenoiser(*parts).to(device).float())
    for num_data, num_particles in ((4, 1), (20, 2)):
        x_0 = torch.randn(num_data, 784, device=device).float()
        programs = diffusion.model, diffusion.posterior_guide
        peak = footprint(lambda: elbo_terms(*programs, x_0, num_particles=num_particles)).peak  # noqa: B023
        assert peak < 2 * budget  # without a budget: 7 and 18 times as much
