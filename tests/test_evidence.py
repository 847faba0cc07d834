"""Evidence above the bound: exact where the weights are constant, the model's own log p elsewhere."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GaussianReverseChain, log_normal
from pyro import poutine

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import EnumeratedDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import Evidence, average, fingerprint, importance_evidence
from pyro_diffusion.schedules import AlphaSchedule, LogSNRSchedule

GUIDES = ["guide", "posterior_guide"]
ALPHA = np.array([0.95, 0.8, 0.6, 0.5, 0.3])
MEAN, STD = 0.3, 0.6
X_0 = np.array([0.7, -1.1, 2.0])


def misfit():
    """The exact chain of N(0.3, 0.6²), cut short: x_T is not yet N(0, 1), so that it fits nothing."""
    schedule = AlphaSchedule(ALPHA.tolist())
    return DiffusionModel(GaussianDenoiser(torch.tensor([MEAN]), torch.tensor([STD]), schedule))


@pytest.mark.parametrize("x_0", X_0)
def test_E9_the_gap_is_the_kl_of_the_joints(x_0):
    """In closed form on both sides: log p(x_0) − ELBO, and KL(q(x_{1:T} | x_0) ‖ p(x_{1:T} | x_0))."""
    oracle = GaussianReverseChain.exact(ALPHA, MEAN, STD)
    assert oracle.gap(x_0) == pytest.approx(oracle.log_evidence(x_0) - oracle.elbo(x_0), rel=1e-10)
    other = GaussianReverseChain.exact(ALPHA, MEAN, STD, 1 - ALPHA)
    assert other.gap(x_0) == pytest.approx(other.log_evidence(x_0) - other.elbo(x_0), rel=1e-10)
    assert other.gap(x_0) > oracle.gap(x_0) > 0


@pytest.mark.parametrize("guide", GUIDES)
def test_E9_measured(guide, double):
    """Evidence and bound of one model differ by that KL, within five errors of both."""
    diffusion, x_0 = misfit(), torch.tensor(X_0)[:, None]
    guide = getattr(diffusion, guide)
    evidence = importance_evidence(diffusion.model, guide, x_0, num_particles=4000)
    terms = elbo_terms(diffusion.model, guide, x_0, num_particles=4000, analytic_kl=False)
    oracle = GaussianReverseChain.exact(ALPHA, MEAN, STD)
    expected = np.array([oracle.gap(x) for x in X_0])
    error = torch.hypot(evidence.standard_error, terms.standard_error).numpy()
    gap = (evidence.log_evidence - terms.elbo).numpy()
    assert (np.abs(gap - expected) < 5 * error).all()


@pytest.mark.parametrize("guide", GUIDES)
def test_a_misfit_has_its_own_log_p(guide, double):
    diffusion, x_0 = misfit(), torch.tensor(X_0)[:, None]
    evidence = importance_evidence(
        diffusion.model, getattr(diffusion, guide), x_0, num_particles=4000
    )
    expected = GaussianReverseChain.exact(ALPHA, MEAN, STD).log_evidence(X_0)
    error = evidence.standard_error.numpy()
    assert (np.abs(evidence.log_evidence.numpy() - expected) < 5 * error).all()
    assert (error < 0.05).all()
    # the law of the data is another number, which the estimate must not be mistaken for
    law = log_normal(X_0, MEAN, STD**2)
    assert (np.abs(evidence.log_evidence.numpy() - law) > 5 * error).any()


def test_the_error_is_that_of_repetitions(double):
    diffusion, x_0 = misfit(), torch.tensor(X_0)[:, None].repeat(200, 1)
    evidence = importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=100)
    spread = evidence.log_evidence.reshape(200, 3).std(0)
    claimed = evidence.standard_error.reshape(200, 3).square().mean(0).sqrt()
    torch.testing.assert_close(claimed, spread, rtol=0.25, atol=0.0)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("kind", ["Gaussian", "mixture"])
def test_constant_weights_are_exact(kind, guide, double):
    schedule = LogSNRSchedule(20, log_snr_min=-60.0)
    denoiser = GaussianDenoiser(torch.randn(3), torch.tensor([0.3, 1.0, 2.0]), schedule)
    if kind == "mixture":
        denoiser = GaussianMixtureDenoiser([0.4, 0.6], torch.randn(2, 3), 0.5, schedule)
    diffusion, x_0 = DiffusionModel(denoiser), torch.randn(5, 3)
    evidence = importance_evidence(
        diffusion.model, getattr(diffusion, guide), x_0, num_particles=30
    )
    expected = denoiser.data_distribution.log_prob(x_0)
    torch.testing.assert_close(evidence.log_evidence, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(evidence.ess, torch.full((5,), 30.0))
    assert evidence.standard_error.max() < 1e-10
    assert (evidence.pareto_k == -math.inf).all()


def test_the_observed_part_under_a_mask(double):
    schedule = LogSNRSchedule(8, log_snr_min=-60.0)
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(3), torch.ones(3), schedule))
    x_0, mask = torch.randn(6, 3), torch.rand(6, 3) < 0.5
    mask[:, 0] = True
    evidence = importance_evidence(
        diffusion.model, diffusion.posterior_guide, x_0, num_particles=5, mask=mask
    )
    expected = torch.where(mask, dist.Normal(0.0, 1.0).log_prob(x_0), 0.0).sum(1)
    torch.testing.assert_close(evidence.log_evidence, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loc", [0.0, -2000.0])
def test_the_average_of_given_weights(loc, double):
    """log of the mean, its error, and (Σ w)² / Σ w², for weights far below one as well."""
    log_weights = loc + torch.randn(50, 3)
    evidence = average(log_weights)
    weights = np.exp(log_weights.numpy() - loc)
    mean = weights.mean(0)
    np.testing.assert_allclose(evidence.log_evidence, loc + np.log(mean), rtol=1e-12)
    error = weights.std(0, ddof=1) / 50**0.5 / mean
    np.testing.assert_allclose(evidence.standard_error, error, rtol=1e-9)
    ess = weights.sum(0) ** 2 / (weights**2).sum(0)
    np.testing.assert_allclose(evidence.ess, ess, rtol=1e-9)


def test_chunks_and_scales_change_nothing_but_the_draws(double):
    diffusion, x_0 = misfit(), torch.tensor(X_0)[:, None]
    whole = importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=3000)
    parts = importance_evidence(
        diffusion.model, diffusion.guide, x_0, num_particles=3000, batch_size=700
    )
    model, guide = (poutine.scale(p, scale=7.0) for p in (diffusion.model, diffusion.guide))
    scaled = importance_evidence(model, guide, x_0, num_particles=3000)
    for other in (parts, scaled):
        error = torch.hypot(whole.standard_error, other.standard_error)
        assert ((whole.log_evidence - other.log_evidence).abs() < 5 * error).all()
        assert other.ess.max() <= 3000


def test_a_plain_vae(double):
    """z ~ N(0, 1), x | z ~ N(z, 1), guide N(x/2 + 0.3, 1): log p(x) is that of N(0, 2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.3, 1.0))

    x = torch.linspace(-2.0, 2.0, 5)
    evidence = importance_evidence(model, guide, x, num_particles=20_000)
    expected = log_normal(x.numpy(), 0.0, 2.0)
    assert (
        np.abs(evidence.log_evidence.numpy() - expected) < 5 * evidence.standard_error.numpy()
    ).all()
    assert (evidence.pareto_k < 0.5).all()


def test_too_few_particles_have_no_pareto_k():
    """NaN, unless the weights are constant and there is nothing to ask."""
    log_weights = torch.stack([torch.zeros(24), torch.randn(24)], 1).double()
    k = average(log_weights).pareto_k
    assert k[0] == -math.inf
    assert k[1].isnan()
    assert average(torch.randn(25, 1).double()).pareto_k.isfinite().all()


def test_the_bound_comes_from_the_same_draws():
    diffusion, x_0 = misfit(), torch.tensor(X_0, dtype=torch.float32)[:, None]
    pyro.set_rng_seed(0)
    evidence = importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=30)
    pyro.set_rng_seed(0)
    terms = elbo_terms(diffusion.model, diffusion.guide, x_0, num_particles=30)
    torch.testing.assert_close(evidence.elbo, terms.elbo)
    torch.testing.assert_close(evidence.elbo_standard_error, terms.standard_error)
    assert evidence.num_particles == 30


def test_data_have_a_word_of_their_own():
    x = torch.randn(5, 2)
    mask = torch.rand(5, 2) < 0.5
    words = [fingerprint(y) for y in (x, x.flip(0), x.reshape(2, 5), x[:4])] + [
        fingerprint(x, mask)
    ]
    assert len(set(words)) == 5
    assert fingerprint(x.double()) == fingerprint(x) == words[0]
    assert fingerprint(torch.where(mask, x, 7.0), mask) == words[-1]


def test_one_particle_and_printing():
    diffusion, x_0 = misfit(), torch.tensor(X_0, dtype=torch.float32)[:, None]
    evidence = importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=1)
    assert evidence.standard_error.isnan().all()
    assert evidence.log_evidence.dtype == torch.float64
    assert (evidence.ess == 1).all()
    heavy = Evidence(*torch.zeros(3, 2), torch.tensor([0.9, 0.1]), num_particles=10_000)
    assert "reliable for 1" in repr(heavy)
    assert heavy.mean().value == 0


def test_bad_programs_are_refused_in_words():
    diffusion, x_0 = misfit(), torch.tensor(X_0, dtype=torch.float32)[:, None]
    pair = diffusion.subsampled()
    with pytest.raises(ValueError, match="subsampled pair"):
        importance_evidence(pair.model, pair.guide, x_0, num_particles=2)
    with pytest.raises(ValueError, match="'num_particles': got 0"):
        importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=0)


@pytest.mark.parametrize("t", [1, 3, 4, 5])
def test_probability_of_a_state(double, t):
    """log p(x_t) of the exact chain is that of a t times, with noise: every draw, and with its site names."""
    alpha = torch.tensor([*ALPHA[:-1], 1e-24])
    diffusion = DiffusionModel(
        GaussianDenoiser(torch.tensor([MEAN]), torch.tensor([STD]), AlphaSchedule(alpha))
    )
    bar = alpha[:t].prod()
    x_t = torch.randn(5, 1)
    evidence = importance_evidence(diffusion.model, diffusion.guide, x_t, num_particles=30, state=t)
    expected = log_normal(
        x_t[:, 0].numpy(), bar.sqrt().item() * MEAN, (bar * STD**2 + 1 - bar).item()
    )
    np.testing.assert_allclose(evidence.log_evidence.numpy(), expected, rtol=1e-10, atol=1e-10)
    assert (evidence.pareto_k == -math.inf).all()


def test_probability_of_a_state_of_a_chain_that_fits_nothing(double):
    """Its own log p(x_t), by pushing N(0, 1) through the kernels above t."""
    diffusion, x_t = misfit(), torch.tensor(X_0)[:, None]
    oracle = GaussianReverseChain.exact(ALPHA, MEAN, STD)
    mean, variance = 0.0, 1.0
    for s in range(5, 2, -1):
        mean = oracle.slope[s - 1] * mean + oracle.intercept[s - 1]
        variance = oracle.slope[s - 1] ** 2 * variance + oracle.variance[s - 1]
    evidence = importance_evidence(
        diffusion.model, diffusion.guide, x_t, num_particles=5000, state=2
    )
    error = np.abs(evidence.log_evidence.numpy() - log_normal(X_0, mean, variance))
    assert (error < 5 * evidence.standard_error.numpy()).all()


def test_states_that_have_no_probability_here():
    diffusion, x_t = misfit(), torch.randn(3, 1)
    for state in (-1, 6, 1.0):
        with pytest.raises(
            ValueError, match=f"argument 'state': got {state}; expected a timestep in 0 … 5"
        ):
            importance_evidence(diffusion.model, diffusion.guide, x_t, num_particles=5, state=state)
    with pytest.raises(ValueError, match=r"got 2 for a GenerativeChain and a TopDownGuide"):
        importance_evidence(
            diffusion.model, diffusion.posterior_guide, x_t, num_particles=5, state=2
        )


@pytest.mark.parametrize("kind", ["numbers", "bits"])
def test_states_may_be_whole_numbers(kind):
    """Their evidence is that of the same states as floating numbers, draw by draw."""
    denoiser = GaussianDenoiser(torch.zeros(3), torch.ones(3), AlphaSchedule(ALPHA))
    if kind == "bits":
        denoiser = EnumeratedDenoiser(torch.eye(3), AlphaSchedule(ALPHA))
    diffusion, states = DiffusionModel(denoiser), torch.eye(3).long()
    evidence = []
    for x_t in (states, states.float()):
        torch.manual_seed(0)
        evidence.append(importance_evidence(diffusion, x_t, num_particles=20, state=2))
    torch.testing.assert_close(evidence[0].log_evidence, evidence[1].log_evidence)
