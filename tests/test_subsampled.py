"""Random timesteps: unbiased in every setting, constant in cost, and the sequential pair at T = 1."""

import numpy as np
import pyro
import pytest
import torch
from oracles import GaussianReverseChain, posterior_coefficients
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_diffusion.chains import ImportanceTimesteps, StratifiedTimesteps, UniformTimesteps
from pyro_diffusion.denoisers import (
    DataPrediction,
    GaussianDenoiser,
    NeuralDenoiser,
    PosteriorVariance,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import DiscretizedGaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import AlphaSchedule, LogSNRSchedule

ALPHA = np.array([0.95, 0.8, 0.6, 0.5, 0.3])
MEAN, STD = np.array([0.3, -0.5]), np.array([0.6, 1.4])
X_0 = np.array([[0.7, -1.1], [2.0, 0.1], [-0.4, 0.3]])


def misfit(device):
    denoiser = GaussianDenoiser(
        torch.tensor(MEAN), torch.tensor(STD), AlphaSchedule(ALPHA.tolist())
    )
    return DiffusionModel(denoiser).to(device)


def closed_form():
    oracles = [GaussianReverseChain.exact(ALPHA, MEAN[i], STD[i]) for i in range(2)]
    return sum(oracle.elbo(X_0[:, i]) for i, oracle in enumerate(oracles)).sum()


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("num_timesteps", [1, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}],
)
def test_unbiased(elbo, num_timesteps, settings, double, device):
    pair = misfit(device).subsampled(num_timesteps)
    settings = settings | ({"max_plate_nesting": 2} if settings.get("vectorize_particles") else {})
    x_0 = torch.tensor(X_0, device=device).repeat(500, 1)
    draws = torch.tensor(
        [-elbo(**settings).loss(pair.model, pair.guide, x_0) / 500 for _ in range(25)]
    )
    assert abs(draws.mean() - closed_form()) < 5 * draws.std() / 25**0.5


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_unbiased_for_any_share_of_the_reconstruction_term(share, double, device):
    pair = misfit(device).subsampled(2, timesteps=StratifiedTimesteps(share))
    x_0 = torch.tensor(X_0, device=device).repeat(2000, 1)
    draws = [-TraceMeanField_ELBO().loss(pair.model, pair.guide, x_0) / 2000 for _ in range(40)]
    draws = torch.tensor(draws)
    assert abs(draws.mean() - closed_form()) < 5 * draws.std() / 40**0.5


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_gradients_are_unbiased(elbo, double, device):
    """The gradient in a learned affine x̂_0 against that of the posterior-ordered analytic bound."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor([0.8, 0.1]))

        def forward(self, x_t, log_snr):
            return self.slope[0] * x_t + self.slope[1]

    network = Affine()
    denoiser = NeuralDenoiser(
        network, AlphaSchedule(ALPHA.tolist()), (2,), prediction=DataPrediction(),
        variance=PosteriorVariance(),
    )  # fmt: skip
    diffusion = DiffusionModel(denoiser).to(device)
    pair, x_0 = diffusion.subsampled(2), torch.tensor(X_0, device=device).repeat(500, 1)

    def gradients(loss, model, guide, number):
        for _ in range(number):
            value = loss.differentiable_loss(model, guide, x_0)
            (gradient,) = torch.autograd.grad(value / 500, network.slope)
            yield gradient

    ours = torch.stack(list(gradients(elbo(), pair.model, pair.guide, 60)))
    exact = torch.stack(
        list(gradients(TraceMeanField_ELBO(), diffusion.model, diffusion.posterior_guide, 60))
    )
    error = (ours.var(0) / 60 + exact.var(0) / 60).sqrt()
    assert ((ours.mean(0) - exact.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("num_timesteps", [1, 4])
@pytest.mark.parametrize("length", [2, 10, 1000])
@pytest.mark.parametrize("likelihood", [None, DiscretizedGaussianLikelihood(5)])
def test_exactly_k_rows_a_datum_at_any_length(num_timesteps, length, likelihood, device):
    rows = []

    class Counting(MLP):
        def forward(self, x_t, log_snr):
            rows.append(len(x_t))
            return super().forward(x_t, log_snr)

    denoiser = NeuralDenoiser(Counting((2,), hidden_size=8), LogSNRSchedule(length), (2,))
    diffusion = DiffusionModel(denoiser, likelihood).to(device)
    pair, x_0 = diffusion.subsampled(num_timesteps), torch.ones(6, 2, device=device)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        rows.clear()
        elbo.loss(pair.model, pair.guide, x_0)
        assert rows == [6 * num_timesteps]


def test_timesteps_are_drawn_per_datum_and_stratified_over_the_batch(device):
    diffusion = misfit(device)
    pair = diffusion.subsampled(3)
    trace = poutine.trace(pair.guide).get_trace(torch.tensor(X_0, device=device).repeat(100, 1))
    t = trace.nodes["t"]["value"]
    assert t.shape == (3, 300)
    counts = torch.bincount(t.flatten(), minlength=6)[1:]
    expected = 900 * torch.tensor([0.2] * 5)  # π(1) = max(0.1, 1/T) = 0.2
    assert ((counts.cpu() - expected).abs() <= 2).all()


def test_particles_have_timesteps_of_their_own(device):
    """Vectorised particles draw t anew, stratified over particles as well."""
    pair = misfit(device).subsampled(1)
    x_0 = torch.tensor(X_0, device=device)
    with pyro.plate("particles", 50, dim=-3):
        t = poutine.trace(pair.guide).get_trace(x_0).nodes["t"]["value"]
    assert t.shape == (50, 1, 3)
    assert len(t.flatten(1).unique(dim=0)) > 10


def test_sites_that_carry_add_nothing(double, device):
    diffusion = misfit(device)
    pair, x_0 = diffusion.subsampled(2), torch.tensor(X_0, device=device)
    guide = poutine.trace(pair.guide).get_trace(x_0)
    model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(x_0)
    for trace in (guide, model):
        trace.compute_log_prob()
        for name in ("t", "x_t"):
            assert trace.nodes[name]["log_prob_sum"] == 0
    t = guide.nodes["t"]["value"]
    assert ((model.nodes["x_0"]["log_prob"] != 0) == (t == 1)).all()
    assert ((model.nodes["x_{t-1}"]["log_prob"] != 0) == (t > 1)).all()


def test_one_step_is_the_sequential_pair(device):
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), AlphaSchedule([1e-24]))
    diffusion = DiffusionModel(denoiser).to(device).double()
    pair = diffusion.subsampled(1)
    x_0 = torch.tensor(X_0, device=device)
    pyro.set_rng_seed(2)
    loss = Trace_ELBO().loss(pair.model, pair.guide, x_0)
    pyro.set_rng_seed(2)
    assert loss == Trace_ELBO().loss(diffusion.model, diffusion.posterior_guide, x_0)
    expected = denoiser.data_distribution.log_prob(x_0).sum().item()
    assert -loss == pytest.approx(expected, rel=1e-10)


def test_the_reconstruction_share_pays():
    """Drawn once in T = 1000 and weighted by 1000, the reconstruction term dominates the variance."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.full((2,), 0.5), LogSNRSchedule(1000))
    diffusion, x_0 = DiffusionModel(denoiser), 0.5 * torch.randn(256, 2)

    def spread(share):
        pair = diffusion.subsampled(1, timesteps=StratifiedTimesteps(share))
        losses = [TraceMeanField_ELBO().loss(pair.model, pair.guide, x_0) for _ in range(60)]
        return torch.tensor(losses).std()

    assert spread(1e-3) > 2 * spread(0.1)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("classic", [True, False])
def test_both_ways_of_training_learn(elbo, classic, device):
    """200 steps on N(2, 0.3²): the bound improves by nats, with SVI.step and with a torch optimiser."""
    network = MLP((1,), hidden_size=32, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(50), (1,))).to(device)
    pair = diffusion.subsampled(2)
    x_0 = 2 + 0.3 * torch.randn(256, 1, device=device)

    def bound():
        return -TraceMeanField_ELBO(num_particles=20).loss(pair.model, pair.guide, x_0) / 256

    before = bound()
    if classic:
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 3e-3}), elbo())
        for _ in range(200):
            svi.step(x_0)
    else:
        loss = elbo()(pair.model, pair.guide)
        optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3)
        for _ in range(200):
            optimiser.zero_grad()
            loss(x_0).backward()
            optimiser.step()
    assert bound() > before + 1


@pytest.mark.parametrize("num_timesteps", [0, -1, 1.5])
def test_bad_numbers_of_timesteps_are_refused(num_timesteps, device):
    with pytest.raises(ValueError, match="'num_timesteps'.*got"):
        misfit(device).subsampled(num_timesteps)


def losses(pair, x_0, repeats):
    elbo = TraceMeanField_ELBO()
    return torch.tensor(
        [-elbo.loss(pair.model, pair.guide, x_0) * 3 / len(x_0) for _ in range(repeats)]
    )


def test_every_law_of_timesteps_is_unbiased(double, device):
    """Uniform, and importance sampling with moments that were observed, after which π is uneven."""
    x_0 = torch.tensor(X_0, device=device).repeat(500, 1)
    importance = ImportanceTimesteps()
    for timesteps in (UniformTimesteps(), importance):
        pair = misfit(device).subsampled(2, timesteps=timesteps)
        if timesteps is importance:
            importance.observe(pair.model, pair.guide, x_0)
            assert set(importance.moments) == {1, 2, 3, 4, 5}
            pi = importance(5, torch.device("cpu")).log_pi.exp()
            assert pi.max() > 2 * pi.min()
        draws = losses(pair, x_0, 40)
        assert abs(draws.mean() - closed_form()) < 5 * draws.std() / 40**0.5


def test_observed_moments_are_those_of_the_terms(double):
    """Second moments of the KLs in closed form, and of the reconstruction, by timestep."""
    x_0 = torch.tensor(X_0).repeat(2000, 1)
    timesteps = ImportanceTimesteps(decay=0.0)
    pair = misfit("cpu").subsampled(5, timesteps=timesteps)
    timesteps.observe(pair.model, pair.guide, x_0)
    fresh = ImportanceTimesteps(decay=0.0)
    other = misfit("cpu").subsampled(5, timesteps=StratifiedTimesteps(0.3))
    fresh.observe(other.model, other.guide, x_0)
    for t in range(1, 6):  # the law that draws them does not matter
        assert fresh.moments[t] == pytest.approx(timesteps.moments[t], rel=0.15)
    before = dict(timesteps.moments)
    timesteps.decay = 0.5
    timesteps.observe(pair.model, pair.guide, x_0)
    for t, moment in timesteps.moments.items():
        assert moment == pytest.approx(before[t], rel=0.15)


def test_importance_sampling_is_quieter_than_uniform_draws(double):
    """At one draw a datum on a chain whose terms differ by orders of magnitude."""
    schedule = LogSNRSchedule(50, log_snr_max=6.0, log_snr_min=-8.0)
    wrong = GaussianDenoiser(torch.tensor(MEAN) + 1.0, torch.tensor(STD), schedule)
    diffusion = DiffusionModel(wrong)
    x_0 = torch.tensor(X_0).repeat(20, 1)
    importance = ImportanceTimesteps()
    spread = {}
    for name, timesteps in {"uniform": UniformTimesteps(), "importance": importance}.items():
        pair = diffusion.subsampled(1, timesteps=timesteps)
        if timesteps is importance:
            for _ in range(20):
                importance.observe(pair.model, pair.guide, x_0)
        spread[name] = losses(pair, x_0, 200).std().item()
    assert spread["importance"] < 0.5 * spread["uniform"]


def test_observing_wants_a_subsampled_pair():
    diffusion = misfit("cpu")
    with pytest.raises(ValueError, match=r"expected a subsampled pair"):
        ImportanceTimesteps().observe(diffusion.model, diffusion.posterior_guide, torch.tensor(X_0))


def test_observed_moments_in_closed_form(double):
    """E (Σ_i k_i + (b_i + s_i ε)² / 2v_i)², a KL's second moment over x_{t+1} ~ q, by hand."""
    x_0, timesteps = torch.tensor(X_0[:1]).repeat(40_000, 1), ImportanceTimesteps(decay=0.0)
    pair = misfit("cpu").subsampled(1, timesteps=StratifiedTimesteps(0.1))
    timesteps.observe(pair.model, pair.guide, x_0)
    bar = np.concatenate([[1.0], np.cumprod(ALPHA)])
    for t in range(1, 5):
        mean, variance = 0.0, 0.0
        for i in range(2):
            chain = GaussianReverseChain.exact(ALPHA, MEAN[i], STD[i])
            of_x_0, of_x_t, beta_tilde = posterior_coefficients(ALPHA, t + 1)
            slope, v = of_x_t - chain.slope[t], chain.variance[t]
            b = of_x_0 * X_0[0, i] - chain.intercept[t] + slope * np.sqrt(bar[t + 1]) * X_0[0, i]
            s2, ratio = slope**2 * (1 - bar[t + 1]), beta_tilde / v
            mean += 0.5 * (ratio - 1 - np.log(ratio) + (b**2 + s2) / v)
            variance += (4 * b**2 * s2 + 2 * s2**2) / (4 * v**2)
        assert timesteps.moments[t + 1] == pytest.approx(mean**2 + variance, rel=0.06)
