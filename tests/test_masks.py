"""Missing data: the bound of the observed part."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import log_normal
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import AffineTransform

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.chains import GenerativeChain
from pyro_diffusion.denoisers import (
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LevelPrediction,
    NeuralDenoiser,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedGaussianLikelihood,
    PoissonLikelihood,
)
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import LogSNRSchedule

GUIDES = ["guide", "posterior_guide"]


def random_mask(*shape):
    mask = torch.rand(shape) < 0.5
    mask.view(shape[0], -1)[:, 0] = True
    return mask


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("event_shape", [(4,), (2, 3)])
@pytest.mark.parametrize("num_timesteps", [1, 2, 12])
def test_every_draw_is_the_exact_marginal(num_timesteps, event_shape, guide, double):
    """With the exact denoiser each draw is log p of the observed entries, an identity."""
    schedule = LogSNRSchedule(num_timesteps, log_snr_min=-60.0)
    mean, std = torch.randn(event_shape), 0.2 + torch.rand(event_shape)
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, schedule))
    x, mask = torch.randn(6, *event_shape), random_mask(6, *event_shape)
    x_missing = torch.where(mask, x, float("nan"))
    entries = log_normal(x.numpy(), mean.numpy(), std.numpy() ** 2)
    expected = np.where(mask, entries, 0.0).reshape(6, -1).sum(1)

    loss = Trace_ELBO().loss(diffusion.model, getattr(diffusion, guide), x_missing, mask=mask)
    assert -loss == pytest.approx(expected.sum(), rel=1e-10)
    terms = elbo_terms(
        diffusion.model, getattr(diffusion, guide), x_missing, mask=mask, analytic_kl=False
    )
    np.testing.assert_allclose(terms.elbo, expected, rtol=1e-9, atol=1e-9)
    assert terms.event_size == mask.sum().item() / 6
    nats_per_entry = -expected.sum() / mask.sum().item()
    assert terms.bits_per_dim().value == pytest.approx(nats_per_entry / math.log(2))


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda e: type(e).__name__
)
def test_subsampled_programs_have_the_same_bound(elbo, double):
    denoiser = GaussianDenoiser(torch.zeros(3), torch.tensor([0.3, 1.0, 2.0]), LogSNRSchedule(8))
    diffusion = DiffusionModel(denoiser)
    x, mask = torch.randn(500, 3), random_mask(500, 3)
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x, mask=mask)
    pair = diffusion.subsampled(4)
    draws = [-elbo.loss(pair.model, pair.guide, x, mask=mask) / 500 for _ in range(40)]
    error = np.hypot(np.std(draws) / 40**0.5, terms.mean().monte_carlo_error)
    assert abs(np.mean(draws) - terms.mean().value) < 5 * error


class Dense(nn.Module):
    """A network in which every entry depends on every other."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x_t, log_snr):
        return torch.tanh(x_t @ self.weight.mT + 0.1 * log_snr[:, None])


@pytest.mark.parametrize("guide", GUIDES)
def test_it_is_the_chain_of_the_observed_entries(guide, double):
    """Entries that depend on one another: the bound is that of a model which has no others."""
    weight, schedule = torch.randn(3, 3), LogSNRSchedule(4, log_snr_max=3.0, log_snr_min=-3.0)
    whole = DiffusionModel(NeuralDenoiser(Dense(weight), schedule, (3,)))
    part = DiffusionModel(NeuralDenoiser(Dense(weight[:2, :2].clone()), schedule, (2,)))
    x, mask = torch.randn(5, 3), torch.tensor([True, True, False]).expand(5, 3)
    masked = elbo_terms(whole.model, getattr(whole, guide), x, mask=mask, num_particles=4000)
    alone = elbo_terms(part.model, getattr(part, guide), x[:, :2], num_particles=4000)
    error = torch.hypot(masked.standard_error, alone.standard_error)
    assert ((masked.elbo - alone.elbo).abs() < 5 * error).all()
    whole_bound = elbo_terms(whole.model, getattr(whole, guide), x, num_particles=4000)
    assert ((masked.elbo - whole_bound.elbo).abs() > 10 * error).any()


def likelihoods():
    return {
        "own": (None, (4,), lambda: torch.randn(6, 4)),
        "Bernoulli": (BernoulliLikelihood(), (4,), lambda: torch.randint(0, 2, (6, 4))),
        "levels": (DiscretizedGaussianLikelihood(5), (4,), lambda: torch.randint(0, 5, (6, 4))),
        "categories": (CategoricalLikelihood(3), (4, 3), lambda: torch.randint(0, 3, (6, 4))),
        "counts": (PoissonLikelihood(9), (4,), lambda: torch.randint(0, 10, (6, 4))),
    }


@pytest.mark.parametrize("case", likelihoods())
@pytest.mark.parametrize("program", [*GUIDES, "subsampled"])
def test_unobserved_values_do_not_matter(case, program):
    likelihood, event_shape, draw = likelihoods()[case]
    network = MLP(event_shape, hidden_size=16, num_blocks=1)
    nn.init.normal_(network.decode.weight)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(6), event_shape), likelihood)
    pair = diffusion.subsampled(3)
    model, guide = pair.model, pair.guide
    if program != "subsampled":
        model, guide = diffusion.model, getattr(diffusion, program)
    x, mask, other = draw(), random_mask(6, 4), draw()
    other = torch.where(mask, x, other)
    losses = []
    for data in (x, other, torch.where(mask, x.float(), float("nan"))):
        torch.manual_seed(0)
        losses.append(Trace_ELBO().loss(model, guide, data, mask=mask))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    torch.manual_seed(0)
    all_observed = Trace_ELBO().loss(model, guide, x, mask=torch.ones_like(mask))
    torch.manual_seed(0)
    assert Trace_ELBO().loss(model, guide, x) == pytest.approx(all_observed, rel=1e-6)


def test_training_on_incomplete_data_learns_the_entries_law(double):
    """A third of the entries missing at random: the mean of each entry is learned all the same."""
    torch.manual_seed(0)
    x = torch.randn(4000, 2) * 0.5 + torch.tensor([1.0, -0.5])
    mask = torch.rand(4000, 2) < 0.66
    keep = mask.any(1)
    x, mask = torch.where(mask, x, float("nan"))[keep], mask[keep]
    schedule = LogSNRSchedule(100, log_snr_max=4.0)
    network = MLP((2,), hidden_size=32, num_blocks=1).double()
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, (2,)))
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    for _ in range(400):
        rows = torch.randint(len(x), (128,))
        svi.step(x[rows], mask=mask[rows], num_data=len(x))
    exact = DiffusionModel(GaussianDenoiser(torch.tensor([1.0, -0.5]), 0.5, schedule))
    bound, best = (
        elbo_terms(d.model, d.posterior_guide, x[:400], mask=mask[:400], analytic_kl=False)
        for d in (diffusion, exact)
    )
    assert (best.elbo - bound.elbo).mean() < 0.15  # 1.8 before training
    drawn = diffusion.sample(2000)
    np.testing.assert_allclose(drawn.mean(0), [1.0, -0.5], atol=0.15)
    np.testing.assert_allclose(drawn.std(0), [0.5, 0.5], atol=0.1)


def test_a_chain_that_stands_alone_masks_only_the_data(double):
    """Latents of another size, as a hierarchical VAE has them, stay whole."""
    import pyro.distributions as dist
    from pyro import poutine

    chain = GenerativeChain(
        lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        lambda x, t: dist.Normal(x, 1.0).to_event(1),
        lambda x: dist.Normal(x.repeat(1, 2), 1.0).to_event(1),
        num_timesteps=2,
    )
    x, mask = torch.randn(5, 4), random_mask(5, 4)
    trace = poutine.trace(chain).get_trace(x, mask=mask)
    trace.compute_log_prob()
    latent = trace.nodes["x_1"]
    torch.testing.assert_close(latent["log_prob"], latent["fn"].log_prob(latent["value"]))
    entries = dist.Normal(latent["value"].repeat(1, 2), 1.0).log_prob(x)
    expected = torch.where(mask, entries, 0.0).sum(1)
    torch.testing.assert_close(trace.nodes["x_0"]["log_prob"], expected)


def test_masks_that_differ_between_the_programs_are_refused(double):
    """A bound with the terms of one set of entries and the guide of another is none."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
    diffusion, x, mask = DiffusionModel(denoiser), torch.randn(6, 2), random_mask(6, 2)
    mask[0, 1] = False
    for guide in GUIDES:
        model, guide = diffusion.model, getattr(diffusion, guide)
        for pair in ((model, partial(guide, mask=mask)), (partial(model, mask=mask), guide)):
            with pytest.raises(ValueError, match="got different masks in the guide"):
                elbo_terms(*pair, x, num_particles=1)
        both = (partial(model, mask=mask), partial(guide, mask=mask))
        assert elbo_terms(*both, x, num_particles=1).elbo.isfinite().all()


def test_bad_masks_are_refused_in_words():
    schedule, x = LogSNRSchedule(4), torch.randn(5, 2)
    network = MLP((2,), hidden_size=8, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, (2,)))
    ones = torch.ones(5, 2, dtype=torch.bool)
    for program in (
        diffusion.model,
        diffusion.guide,
        diffusion.posterior_guide,
        diffusion.subsampled().model,
        diffusion.subsampled().guide,
        lambda x, mask: elbo_terms(diffusion.model, diffusion.guide, x, mask=mask),
    ):
        for mask, says in [
            (ones[:, :1], r"'mask': got torch.bool of shape \(5, 1\); expected.*\(5, 2\)"),
            (ones[:4], r"'mask': got torch.bool of shape \(4, 2\)"),
            (ones.float(), "'mask': got torch.float32"),
            ([True], "'mask': got list"),
            (~ones, "'mask': got 5 of 5 data without any observed entry, the first at row 0"),
        ]:
            with pytest.raises(ValueError, match=says):
                program(x, mask=mask)
        with pytest.raises(ValueError, match=r"'x_0': got 1 NaN.*mask=x_0.isfinite"):
            program(torch.where(torch.arange(10).reshape(5, 2) == 3, float("nan"), x), mask=None)
    with pytest.raises(ValueError, match="'mask': got a mask without data"):
        diffusion.model(mask=ones)

    mixture = GaussianMixtureDenoiser([0.5, 0.5], torch.zeros(2, 2), 1.0, schedule)
    coupled = GaussianDenoiser.from_covariance(torch.zeros(2), torch.eye(2), schedule)
    for denoiser in (mixture, coupled):
        with pytest.raises(ValueError, match="'mask'.*entries depend on one another"):
            DiffusionModel(denoiser).model(x, mask=ones)
    levels = NeuralDenoiser(
        MLP((2,), hidden_size=8, num_blocks=1, num_outputs=3), schedule, (2,),
        prediction=LevelPrediction(3),
    )  # fmt: skip
    whole = DiffusionModel(levels, transform=AffineTransform(0.0, 1.0))
    with pytest.raises(ValueError, match="a mass has no Jacobian"):
        whole.model(torch.zeros(5, 2), mask=ones)


def test_a_chain_continued_from_a_state_keeps_the_mask(double):
    """Given x_2 the rest of the chain has the terms that it has in the whole."""
    diffusion = DiffusionModel(
        GaussianDenoiser(torch.zeros(3), torch.ones(3), LogSNRSchedule(4, log_snr_max=3.0))
    )
    x_0, mask = torch.randn(5, 3), torch.rand(5, 3) < 0.6
    mask[:, 0] = True
    states = {f"x_{t}": torch.randn(5, 3) for t in (1, 2, 3, 4)}
    traces = []
    for program in (diffusion.model, diffusion.model.from_state(states["x_2"], 2)):
        trace = poutine.trace(poutine.condition(program, data=states)).get_trace(x_0, mask=mask)
        trace.compute_log_prob()
        traces.append(trace)
    for name in ("x_1", "x_0"):
        torch.testing.assert_close(*(trace.nodes[name]["log_prob"] for trace in traces))
