"""Conditional models against closed forms: x ∣ c ~ N(W c + b, s²), and the component of a mixture as context.

Along the exact reverse chain every path weighs log p(x∣c), so that all estimators agree datum by datum.
"""

import functools
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_diffusion import (
    MLP,
    AncestralSampler,
    DataPrediction,
    DDIMSampler,
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    Guidance,
    LearnedVariance,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    ODESampler,
    Standardize,
    bound_by_datum,
    elbo_terms,
    evaluate_bound,
    importance_evidence,
    ode_log_likelihood,
    plot_denoised,
    plot_trajectory,
    smc_evidence,
    to_arviz,
)
from pyro_diffusion.evidence import summary

WEIGHT = torch.tensor([[1.0, -0.5], [0.3, 0.8], [0.0, 2.0]], dtype=torch.float64)
BIAS = torch.tensor([0.2, -1.0, 0.5], dtype=torch.float64)
STD = torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0]], dtype=torch.float64)
MIXTURE = [0.5, 0.3, 0.2]


def schedule(num_timesteps=6):
    return LogSNRSchedule(num_timesteps, log_snr_max=25.0, log_snr_min=-60.0)


def regression(num_timesteps=6):
    return GaussianDenoiser.from_regression(WEIGHT, BIAS, STD, schedule(num_timesteps))


def mixture(num_timesteps=6, stds=0.6):
    return GaussianMixtureDenoiser(MIXTURE, MEANS, stds, schedule(num_timesteps))


def regression_data(n=5):
    context = torch.randn(n, 2, dtype=torch.float64)
    x_0 = context @ WEIGHT.T + BIAS + STD * torch.randn(n, 3, dtype=torch.float64)
    exact = dist.Normal(context @ WEIGHT.T + BIAS, STD).to_event(1)
    return x_0, context, exact.log_prob(x_0)


def mixture_data(n=5):
    context = torch.arange(n) % 3
    x_0 = MEANS[context] + 0.6 * torch.randn(n, 2, dtype=torch.float64)
    return x_0, context, dist.Normal(MEANS[context], 0.6).to_event(1).log_prob(x_0)


ORACLES = {"regression": (regression, regression_data), "mixture": (mixture, mixture_data)}


@pytest.fixture(params=list(ORACLES))
def oracle(request):
    """An exact model, its data, their context, and log p(x∣c)."""
    denoiser, data = ORACLES[request.param]
    pyro.set_rng_seed(0)
    return DiffusionModel(denoiser()), *data()


def equal(ours, exact, atol=1e-7):
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=atol)


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
def test_every_path_weighs_the_conditional_log_density(oracle, guide):
    """The zero-variance identity, datum by datum, through chunks and particles, in both orders."""
    diffusion, x_0, context, exact = oracle
    pair = diffusion.model, getattr(diffusion, guide)
    for size in (4, None):
        terms = elbo_terms(
            *pair, x_0, num_particles=3, analytic_kl=False, batch_size=size, context=context
        )
        equal(terms.elbo, exact)
        equal(terms.standard_error, torch.zeros(5).double())
    evidence = importance_evidence(*pair, x_0, num_particles=3, context=context)
    equal(evidence.log_evidence, exact)


def test_all_other_estimators_agree_datum_by_datum(oracle):
    diffusion, x_0, context, exact = oracle
    smc = smc_evidence(diffusion, x_0, num_particles=25, num_runs=2, num_pilot=25, context=context)
    equal(smc.log_evidence, exact)
    flow = ode_log_likelihood(diffusion, x_0, context=context, rtol=1e-8, atol=1e-8, batch_size=2)
    equal(flow.log_evidence, exact, atol=1e-5)
    bound = evaluate_bound(diffusion, x_0, standard_error=1e-3, context=context).mean()
    assert abs(bound.value - exact.mean()) < 4 * bound.monte_carlo_error + 1e-8
    singles = elbo_terms(diffusion, x_0, num_particles=4000, context=context)
    assert ((singles.elbo - exact).abs() < 4 * singles.standard_error + 1e-8).all()
    loss = SVI(diffusion.model, diffusion.guide, Adam({}), Trace_ELBO()).evaluate_loss(x_0, context)
    equal(torch.tensor(-loss).double(), exact.sum(), atol=1e-5)  # Pyro adds in its own order


@pytest.mark.parametrize("kind", ["subsampled", "continuous"])
def test_pairs_at_random_timesteps_are_unbiased_given_a_context(kind):
    pyro.set_rng_seed(0)
    x_0, context, exact = regression_data(4)
    # A short range of log-SNR, where the terms have moderate noise; the end is left out of the chain's law.
    curve = LogSNRSchedule(8, log_snr_max=6.0, log_snr_min=-9.0)
    diffusion = DiffusionModel(GaussianDenoiser.from_regression(WEIGHT, BIAS, STD, curve))
    pair = getattr(diffusion, kind)(num_timesteps=16)
    rows, given = x_0.repeat(500, 1), context.repeat(500, 1)
    draws = bound_by_datum(pair.model, pair.guide, rows, context=given).reshape(500, 4)
    if kind == "subsampled":
        exact = elbo_terms(
            diffusion.model, diffusion.guide, x_0, num_particles=2000, context=context
        ).elbo
        error = 0.02
    else:
        error = 0.05  # the continuous chain's bound ends at log-SNR 6, where x_1 still has noise
        exact = ode_log_likelihood(diffusion, x_0, context=context).log_evidence
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / math.sqrt(500) + error).all()


def test_summary_has_all_groups_for_conditional_data():
    pyro.set_rng_seed(0)
    curve = LogSNRSchedule(10, log_snr_max=14.0)
    diffusion = DiffusionModel(GaussianDenoiser.from_regression(WEIGHT, BIAS, STD, curve))
    x_0, context, exact = regression_data(30)
    result = summary(diffusion, x_0, context=context)
    assert list(result.groups()) == ["chain, T = 10", "chain, T → ∞", "probability flow"]
    for row in result.rows:
        assert abs(row.value.value - exact.mean()) < 0.1, row


def test_a_mixture_is_conditional_by_row_and_unconditional_without_a_context():
    """One denoiser has log p(x), log p(x∣c), and both in one batch by dropped rows."""
    pyro.set_rng_seed(0)
    diffusion = DiffusionModel(mixture())
    x_0, context, conditional = mixture_data(6)
    whole = diffusion.denoiser.data_distribution.log_prob(x_0)
    equal(importance_evidence(diffusion, x_0, num_particles=2).log_evidence, whole)
    null = torch.tensor([True, False, True, False, False, True])
    mixed = importance_evidence(diffusion, x_0, num_particles=2, context=context, null=null)
    equal(mixed.log_evidence, torch.where(null, whole, conditional))
    equal(diffusion.denoiser.conditional_distribution(context).log_prob(x_0), conditional)
    equal(
        regression().conditional_distribution(torch.zeros(2, 2).double()).mean,
        BIAS.expand(2, 3).clone(),
    )
    # Bayes' rule: the mixture of the conditional densities is the density.
    each = [
        importance_evidence(
            diffusion, x_0, num_particles=2, context=torch.full((6,), k)
        ).log_evidence
        for k in range(3)
    ]
    equal((torch.stack(each) + torch.tensor(MIXTURE).double().log()[:, None]).logsumexp(0), whole)


def test_a_mask_and_a_context_together_have_the_law_of_the_observed_part():
    pyro.set_rng_seed(0)
    diffusion = DiffusionModel(regression())
    x_0, context, _ = regression_data()
    mask = torch.rand(5, 3) < 0.6
    mask[:, 0] |= ~mask.any(1)
    exact = dist.Normal(context @ WEIGHT.T + BIAS, STD).log_prob(x_0)
    seen = importance_evidence(
        diffusion, x_0.where(mask, math.nan), num_particles=3, mask=mask, context=context
    )
    equal(seen.log_evidence, exact.where(mask, 0.0).sum(1))


@pytest.mark.parametrize("state", [1, 3, 6])
def test_the_evidence_of_a_state_is_conditional(state):
    """log p(x_t∣c) = log N(a (W c + b), a² s² + σ²), by weights, by particles, and at T by the prior."""
    pyro.set_rng_seed(0)
    diffusion = DiffusionModel(regression())
    _, context, _ = regression_data()
    a, sigma = diffusion.schedule.signal(state), diffusion.schedule.noise(state)
    law = dist.Normal(a * (context @ WEIGHT.T + BIAS), (a**2 * STD**2 + sigma**2).sqrt()).to_event(
        1
    )
    x_t = law.sample()
    ours = importance_evidence(
        diffusion.model, diffusion.guide, x_t, num_particles=3, state=state, context=context
    )
    equal(ours.log_evidence, law.log_prob(x_t), atol=1e-7)
    particles = smc_evidence(
        diffusion, x_t, num_particles=25, num_runs=2, num_pilot=25, state=state, context=context
    )
    equal(particles.log_evidence, law.log_prob(x_t), atol=1e-7)


def test_the_flow_passes_gradients_to_the_context():
    pyro.set_rng_seed(0)
    x_0, context, _ = regression_data(3)
    context.requires_grad_()
    flow = ode_log_likelihood(DiffusionModel(regression()), x_0, context=context)
    (ours,) = torch.autograd.grad(flow.log_evidence.sum(), context)
    exact = ((x_0 - context.detach() @ WEIGHT.T - BIAS) / STD**2) @ WEIGHT
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


def test_a_transform_and_a_context_together():
    """In the user's units: x = 3 z + 2, with z ∣ c ~ N(W c + b, s²)."""
    pyro.set_rng_seed(0)
    z, context, exact = regression_data()
    units = Standardize(torch.full((3,), 2.0).double(), torch.full((3,), 3.0).double())
    diffusion = DiffusionModel(regression(), transform=units)
    ours = importance_evidence(diffusion, 3 * z + 2, num_particles=2, context=context)
    equal(ours.log_evidence, exact - 3 * math.log(3))


SAMPLERS = {
    "program": lambda d: lambda n, context: d.sample(n, context=context),
    "ancestral": AncestralSampler,
    "DDIM": DDIMSampler,
    "DDIM with noise": lambda d: DDIMSampler(d, eta=1.0),
    "flow": ODESampler,
}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_draws_have_the_conditional_mean_and_covariance(name):
    """4,000 draws for each of two contexts, within four standard errors (and the steps' bias)."""
    pyro.set_rng_seed(0)
    curve = LogSNRSchedule(60, log_snr_max=14.0, log_snr_min=-14.0)
    diffusion = DiffusionModel(GaussianDenoiser.from_regression(WEIGHT, BIAS, STD, curve))
    sampler, n = SAMPLERS[name](diffusion), 4000
    context = torch.tensor([[1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    draws = sampler(2 * n, context=context.repeat_interleave(n, 0)).reshape(2, n, 3)
    bias = {"DDIM": 0.03, "DDIM with noise": 0.1, "flow": 0.03}.get(name, 0.0)  # of 60 steps
    error = (draws.mean(1) - context @ WEIGHT.T - BIAS).abs() / STD
    assert error.max() < 4 / math.sqrt(n) + bias
    assert ((draws.std(1) / STD - 1).abs() < 4 / math.sqrt(2 * n) + bias).all()


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_one_context_is_for_all_draws(name):
    diffusion = DiffusionModel(mixture())
    sampler = SAMPLERS[name](diffusion)
    results = []
    for context in (torch.tensor([1, 1, 1, 1]), torch.tensor([1]), torch.tensor(1), 1, np.int64(1)):
        pyro.set_rng_seed(1)
        results.append(sampler(4, context=context))
    assert all(torch.equal(draws, results[0]) for draws in results)
    pyro.set_rng_seed(1)
    assert not torch.equal(sampler(4, context=torch.tensor(0)), results[0])


def test_a_sampler_of_a_network_agrees_with_its_program():
    """The fused step, the kernel's own path and the program draw the same from one seed."""
    pyro.set_rng_seed(0)
    context = torch.randn(5, 3)
    drawn = []
    for variance in (None, LearnedVariance()):
        network = MLP(
            (2,), hidden_size=8, num_blocks=1, context_shape=(3,), num_outputs=1 + bool(variance)
        )
        nn.init.normal_(network.decode.weight)
        diffusion = DiffusionModel(
            NeuralDenoiser(network.double(), LogSNRSchedule(6), (2,), variance=variance)
        )
        for run in (diffusion.sample, AncestralSampler(diffusion)):
            pyro.set_rng_seed(2)
            drawn.append(
                run(5, context=context)
            )  # a context in float32 is cast to the network's dtype
        torch.testing.assert_close(drawn[-1], drawn[-2])
        pyro.set_rng_seed(2)
        assert not torch.allclose(diffusion.sample(5, context=context.flip(0)), drawn[-1])
    compiled = AncestralSampler(diffusion)
    compiled.compile(backend="eager")
    pyro.set_rng_seed(2)
    torch.testing.assert_close(compiled(5, context=context), drawn[-1])


# Guidance.


def oracle_samplers(**settings):
    """A sampler of each kind that takes guidance, on the mixture."""
    diffusion = DiffusionModel(mixture(20))
    return [kind(diffusion, **settings) for kind in (DDIMSampler, ODESampler)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_guidance_of_zero_is_the_plain_conditional_sampler_exactly(eta):
    context = torch.tensor([0, 1, 2, 2])
    network = MLP((2,), hidden_size=8, num_blocks=1, num_classes=3, null_token=True)
    nn.init.normal_(network.decode.weight)
    neural = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(8), (2,)))
    for diffusion in (DiffusionModel(mixture(8)), neural):
        for kind in (
            AncestralSampler,
            lambda d, **settings: DDIMSampler(d, eta=eta, **settings),
            lambda d, **settings: ODESampler(d, eta=eta, **settings),
        ):
            draws = []
            for guidance in (None, Guidance(0)):
                pyro.set_rng_seed(0)
                draws.append(kind(diffusion, guidance=guidance)(4, context=context))
            assert torch.equal(*draws)


def test_guidance_of_minus_one_is_the_unconditional_sampler():
    context = torch.tensor([0, 1, 2, 2])
    for plain, guided in zip(
        oracle_samplers(), oracle_samplers(guidance=Guidance(-1)), strict=True
    ):
        x_T = torch.randn(4, 2).double()
        torch.testing.assert_close(guided(4, x_T, context=context), plain(4, x_T))


def test_guided_estimates_follow_the_formula_in_one_call_of_the_network():
    pyro.set_rng_seed(0)
    rows = []

    class Noted(MLP):
        def forward(self, x_t, log_snr, context=None, null=None):
            rows.append((len(x_t), None if null is None else int(null.sum())))
            return super().forward(x_t, log_snr, context, null)

    network = Noted((2,), hidden_size=8, num_blocks=1, num_classes=3, null_token=True).double()
    nn.init.normal_(network.decode.weight)
    nn.init.normal_(network.context.null)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(8), (2,), prediction=DataPrediction())
    x_t, context, level = torch.randn(4, 2).double(), torch.tensor([0, 1, 2, 2]), torch.tensor(1.0)
    given = denoiser.x_0_hat(x_t, level.double(), context=context)
    without = denoiser.x_0_hat(x_t, level.double())
    assert not torch.allclose(given, without)
    rows.clear()
    guided = Guidance(1.5).of(denoiser).x_0_hat(x_t, level.double(), context=context)
    equal(guided, given + 1.5 * (given - without))
    assert rows == [(8, 4)]
    rows.clear()
    DDIMSampler(DiffusionModel(denoiser), guidance=Guidance(1.5))(4, context=context)
    assert rows == [(8, 4)] * 8


def test_levels_are_guided_by_their_logits():
    pyro.set_rng_seed(0)
    network = MLP((2,), hidden_size=8, num_blocks=1, num_outputs=3, num_classes=2, null_token=True)
    nn.init.normal_(network.decode.weight)
    nn.init.normal_(network.context.null)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(8), (2,), prediction=LevelPrediction(3))
    x_t, level, context = torch.randn(4, 2), torch.tensor(1.0), torch.tensor([0, 1, 1, 0])
    given, without = denoiser.denoise(x_t, level, context=context), denoiser.denoise(x_t, level)
    guided = Guidance(2.0).of(denoiser).denoise(x_t, level, context=context)
    torch.testing.assert_close(guided.logits, 3 * given.logits - 2 * without.logits)
    torch.testing.assert_close(guided.x_0_hat, 3 * given.x_0_hat - 2 * without.x_0_hat)
    draws = ODESampler(DiffusionModel(denoiser), guidance=Guidance(2.0))(4, context=context)
    assert draws.dtype == torch.long or set(draws.unique().tolist()) <= {0, 1, 2}


def test_guided_draws_follow_neither_the_conditional_nor_the_tilted_law():
    """The law by the exact flow of one dimension, a monotone map, beside p(x) p(c∣x)^(1+w) / Z."""
    pyro.set_rng_seed(0)
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(
        [0.5, 0.5], means, 1.0, LogSNRSchedule(400, log_snr_min=-16.0)
    )
    x = torch.linspace(-9, 12, 4001, dtype=torch.float64)[:, None]
    conditional = denoiser.conditional_distribution(torch.ones(len(x), dtype=torch.long)).log_prob(
        x
    )
    unconditional = denoiser.data_distribution.log_prob(x)
    n, w = 4001, 2.0
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n).double() + 0.5) / n)[:, None]
    sampler = ODESampler(DiffusionModel(denoiser), guidance=Guidance(w))
    draws = sampler(n, z, context=torch.tensor(1)).squeeze(-1)  # quantiles of the guided law
    tilted = ((1 + w) * conditional - w * unconditional).exp()
    tilted = tilted / tilted.sum()
    mean = (tilted * x[:, 0]).sum()
    plain = ODESampler(DiffusionModel(denoiser))(n, z, context=torch.tensor(1))
    assert abs(plain.mean() - 1) < 2e-3
    assert abs(plain.std() - 1) < 2e-2
    assert draws.mean() - 1 > 0.1
    assert abs(draws.mean() - mean) > 0.05


# What users meet on the way.


def test_to_arviz_has_conditional_draws_of_the_model(oracle):
    diffusion, x_0, context, exact = oracle
    draws = to_arviz(
        diffusion, x_0, num_draws=400, timesteps=[1, 6], batch_size=300, context=context
    )
    assert dict(draws["prior"]["x"].sizes)["data"] == 5
    assert draws["prior_predictive"]["x_0"].dims[:3] == ("chain", "draw", "data")
    ours = torch.tensor(draws["prior_predictive"]["x_0"].values[0])
    law = diffusion.denoiser.conditional_distribution(context)
    assert ((ours.mean(0) - law.mean).abs() < 4 * law.stddev / 20).all()
    # From x_6, which is pure noise, a reconstruction is a draw given the context; from x_1 it is the datum.
    again = torch.tensor(draws["posterior_predictive"]["x_0"].values[0])
    assert ((again[:, :, 1].mean(0) - law.mean).abs() < 4 * law.stddev / 20).all()
    assert ((again[:, :, 0] - x_0).abs() < 1e-3).all()
    equal(torch.tensor(draws["importance"]["evidence"].values), exact)
    assert torch.equal(torch.tensor(draws["constant_data"]["context"].values), context)
    assert "log_snr" in draws["constant_data"]


def test_programs_inside_of_a_handler_of_pyro_get_their_context(oracle):
    """Pyro's handlers have an argument ``context`` of their own; a reader passes it by position."""
    diffusion, x_0, context, exact = oracle
    pair = [poutine.scale(p, scale=2.0) for p in (diffusion.model, diffusion.posterior_guide)]
    terms = elbo_terms(*pair, x_0, num_particles=2, analytic_kl=False, context=context)
    equal(terms.elbo, exact)
    assert bound_by_datum(*pair, x_0, context=context).shape == (5,)
    draws = to_arviz(*pair, x_0, num_draws=30, context=context)
    equal(torch.tensor(draws["importance"]["evidence"].values), exact)
    assert torch.equal(torch.tensor(draws["constant_data"]["context"].values), context)


@pytest.mark.parametrize("plot", [plot_trajectory, plot_denoised])
def test_pictures_of_conditional_states(plot):
    pyro.set_rng_seed(0)
    diffusion = DiffusionModel(regression())
    x_0, context, _ = regression_data()
    assert plot(diffusion, x_0, timesteps=[1, 3], context=context).shape == (2, 2)
    with pytest.raises(ValueError, match="argument 'context': got none"):
        plot(diffusion, x_0)
    with pytest.raises(ValueError, match="expected a row for each"):
        plot(diffusion, x_0, context=context[:2])
    plt.close("all")


def test_a_program_that_takes_anything_by_name_gets_its_context_by_name(oracle):
    diffusion, x_0, context, exact = oracle

    def guide(x_0, **given):
        assert set(given) == {"context"}
        diffusion.guide(x_0, **given)

    terms = elbo_terms(diffusion.model, guide, x_0, analytic_kl=False, context=context)
    equal(terms.elbo, exact)
    again = functools.partial(guide)
    equal(elbo_terms(diffusion.model, again, x_0, analytic_kl=False, context=context).elbo, exact)


def test_parts_of_a_context_keep_their_names_in_arviz():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(3, 2)

        def forward(self, x_t, log_snr, context):
            assert context["class"].dtype == torch.long
            return self.embed(context["class"]) + context["where"] + 0 * x_t

    diffusion = DiffusionModel(NeuralDenoiser(Both(), LogSNRSchedule(3), (2,)))
    context = {"class": torch.tensor([0, 2]), "where": torch.randn(2, 2).double()}
    draws = to_arviz(diffusion, torch.randn(2, 2), num_draws=30, context=context)
    assert {"context_class", "context_where"} <= set(draws["constant_data"])
    assert diffusion.sample(7, {"class": 1, "where": np.ones((1, 2))}).shape == (7, 2)


def neural(**settings):
    network = MLP((2,), hidden_size=8, num_blocks=1, **settings)
    return DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(5), (2,)))


X_0 = torch.zeros(4, 2)
NULL = torch.tensor([True, False, False, True])
NUMBERS, CLASSES = {"context_shape": (3,)}, {"num_classes": 3}
BOTH = {"num_classes": 3, "null_token": True}
LABELS, C = torch.tensor([0, 1, 2, 3]), torch.zeros(4, 3)
BAD = {
    "rows": (NUMBERS, {"context": C[:3]}, "4 data; expected a row for each"),
    "shape": (NUMBERS, {"context": C[:, 1:]}, r"of shape \(N,\) \+ \(2,\) and .*\(N,\) \+ \(3,\)"),
    "labels": (CLASSES, {"context": LABELS}, "the value 3; expected a whole"),
    "real labels": (CLASSES, {"context": C[:, 0]}, r"float32; expected a whole number 0 … 2"),
    "NaN": (NUMBERS, {"context": math.nan * C}, "12 NaN or infinite values"),
    "none": (NUMBERS, {}, "no context for a network without a null token"),
    "unasked": ({}, {"context": C}, "whose network, MLP, takes none"),
    "no token": (
        NUMBERS,
        {"context": C, "null": NULL},
        "rows without a context for a network without",
    ),
    "null alone": (BOTH, {"null": NULL}, "argument 'null': got dropped rows without a context"),
    "null of floats": (
        BOTH,
        {"context": LABELS % 3, "null": C[:, 0]},
        "'null': got a Tensor of shape",
    ),
    "words": (
        CLASSES,
        {"context": ["a", "b", "c", "d"]},
        "argument 'context': .* expected numbers",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_context_that_does_not_fit_is_an_error_in_four_beats(case):
    """By every way in: programs, readers, samplers."""
    settings, given, says = BAD[case]
    diffusion = neural(**settings)
    pair = diffusion.subsampled()
    calls = [
        lambda: diffusion.model(X_0, **given),
        lambda: bound_by_datum(pair.model, pair.guide, X_0, **given),
        lambda: elbo_terms(diffusion, X_0, **given),
        lambda: evaluate_bound(diffusion, X_0, standard_error=0.1, **given),
        lambda: importance_evidence(diffusion, X_0, num_particles=2, **given),
        lambda: smc_evidence(diffusion, X_0, num_particles=2, **given),
        lambda: ode_log_likelihood(diffusion, X_0, **given),
        lambda: bound_by_datum(diffusion, X_0, **given),
        lambda: to_arviz(diffusion, X_0, num_draws=30, **given),
    ]
    if "null" not in given:
        calls += [
            lambda: diffusion.sample(4, **given),
            lambda: AncestralSampler(diffusion)(4, **given),
            lambda: ODESampler(diffusion)(4, **given),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=says) as error:
            call()
        assert re.search(r"argument '.*: got .*; expected .*\. [A-Z].*\.", str(error.value))


def test_a_context_on_another_device_is_an_error():
    network = MLP((2,), hidden_size=8, num_blocks=1, context_shape=(3,))
    denoiser = NeuralDenoiser(network, LogSNRSchedule(5), (2,))
    says = r"argument 'context': got a tensor on meta; expected cpu.*Call context.to\('cpu'\)"
    with pytest.raises(ValueError, match=says):
        denoiser(X_0, 3, context=torch.zeros(4, 3, device="meta"))


def test_one_context_without_an_axis_of_data_is_an_error_with_a_remedy():
    diffusion, context = neural(context_shape=(3,)), torch.zeros(3)
    for draw in (diffusion.sample, AncestralSampler(diffusion)):
        with pytest.raises(
            ValueError, match=r"shape \(3,\) for 5 data; .* Pass context\[None\] for one"
        ):
            draw(5, context=context)
        assert draw(5, context=context[None]).shape == (5, 2)


def test_a_gap_in_the_context_of_a_dropped_row_does_not_matter():
    """NaN where the context was dropped: neither the bound nor a gradient sees it."""
    pyro.set_rng_seed(0)
    diffusion = neural(context_shape=(3,), null_token=True)
    context = torch.randn(4, 3)
    null = torch.tensor([True, False, False, True])
    gaps = torch.where(null[:, None], math.nan, context)
    losses = []
    for given in (context, gaps):
        pyro.set_rng_seed(1)
        loss = -bound_by_datum(diffusion, X_0, context=given, null=null).sum()
        losses.append(loss.item())
        diffusion.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in diffusion.parameters())
    assert losses[0] == losses[1]


def test_errors_of_guidance_and_of_oracles():
    diffusion = DiffusionModel(mixture())
    for strength in (math.nan, math.inf, "2", True):
        with pytest.raises(ValueError, match=r"argument 'strength': got .*a finite number"):
            Guidance(strength)
    with pytest.raises(ValueError, match="argument 'guidance': got float"):
        ODESampler(diffusion, guidance=2.0)
    with pytest.raises(
        ValueError, match=r"argument 'context': got none for a sampler with Guidance\(2\)"
    ):
        ODESampler(diffusion, guidance=Guidance(2.0))(3)
    with pytest.raises(ValueError, match="argument 'denoised': got an estimate alone"):
        AncestralSampler(diffusion, guidance=Guidance(2.0))(3, context=1)
    with pytest.raises(ValueError, match="sampler with guidance: .* without a null token"):
        ODESampler(neural(num_classes=3), guidance=Guidance(2.0))(3, context=1)
    with pytest.raises(ValueError, match="argument 'weight': got shape"):
        GaussianDenoiser.from_regression(WEIGHT.T, BIAS, STD, schedule())
    with pytest.raises(ValueError, match="argument 'context': got none; expected a tensor"):
        DiffusionModel(regression()).sample(2)
    null = torch.tensor([True, False])
    with pytest.raises(ValueError, match="argument 'context': got dropped rows"):
        DiffusionModel(regression()).model(torch.zeros(2, 3), torch.zeros(2, 2), null=null)
    with pytest.raises(
        ValueError, match=r"got the value 3; expected the number of a component, 0 … 2"
    ):
        diffusion.sample(2, context=3)
