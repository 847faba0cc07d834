"""Identities that hold for every schedule, length, dtype, event shape, batch, scale, likelihood, mask."""

import math

import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import (
    DataPrediction,
    ForwardVariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LearnedVariance,
    LevelPrediction,
    NeuralDenoiser,
    NoisePrediction,
    PosteriorVariance,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedGaussianLikelihood,
    GaussianLikelihood,
    PoissonLikelihood,
)
from pyro_diffusion.networks import MLP
from pyro_diffusion.processes import forward_marginal, forward_posterior, forward_transition
from pyro_diffusion.schedules import (
    AlphaSchedule,
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    VarianceExploding,
)
from pyro_diffusion.transforms import Standardize

#: Any schedule is drawn, also such whose noise hides the data.
pytestmark = pytest.mark.filterwarnings("ignore:argument 'x_0'. got states of a root mean square")
FAST = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
EVENT_SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (2, 1, 3)])
GUIDES = st.sampled_from(["guide", "posterior_guide"])


@st.composite
def schedules(draw, *, to_noise=False):
    """Any schedule of 1 to 9 steps; ``to_noise`` for those that leave nothing of the data."""
    num_timesteps = draw(st.integers(1, 9))
    high, span = draw(st.floats(-1.0, 9.0)), draw(st.floats(1.0, 16.0))
    kinds = [lambda: LogSNRSchedule(num_timesteps, log_snr_max=high, log_snr_min=high - span)]
    if to_noise:
        kinds = [lambda: LogSNRSchedule(num_timesteps, log_snr_max=high, log_snr_min=-60.0)]
    else:
        kinds += [lambda: LinearSchedule(num_timesteps), lambda: CosineSchedule(num_timesteps)]
        kinds += [
            lambda: LogSNRSchedule(
                num_timesteps, log_snr_max=high, log_snr_min=high - span, learnable=True
            ),
            lambda: AlphaSchedule(torch.linspace(0.95, 0.3, num_timesteps).tolist()),
        ]
    schedule = draw(st.sampled_from(kinds))()
    return VarianceExploding(schedule) if draw(st.booleans()) else schedule


@st.composite
def denoisers(draw, event_shape):
    """A network of random weights: any prediction of real data, any variance."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    prediction = draw(
        st.sampled_from(
            [NoisePrediction(), DataPrediction(), VelocityPrediction(), ScorePrediction()]
        )
    )
    variance = draw(st.sampled_from([ForwardVariance(), PosteriorVariance(), LearnedVariance()]))
    network = MLP(event_shape, hidden_size=8, num_blocks=1, num_outputs=1 + variance.num_outputs)
    nn.init.normal_(network.decode.weight, std=0.3)
    schedule = draw(schedules())
    return NeuralDenoiser(network, schedule, event_shape, prediction=prediction, variance=variance)


def likelihoods(event_shape):
    """Likelihood, the chain's event shape and data of shape ``(n,) + event_shape``."""
    whole = lambda k: lambda n: torch.randint(0, k, (n, *event_shape))  # noqa: E731
    real = lambda n: torch.randn(n, *event_shape)  # noqa: E731
    return st.sampled_from(
        [
            (None, event_shape, real),
            (GaussianLikelihood(0.5, learnable=True), event_shape, real),
            (DiscretizedGaussianLikelihood(4), event_shape, whole(4)),
            (BernoulliLikelihood(), event_shape, whole(2)),
            (CategoricalLikelihood(3), (*event_shape, 3), whole(3)),
            (PoissonLikelihood(6.0), event_shape, whole(7)),
        ]
    )


@st.composite
def masks(draw, shape):
    """``None``, or observed entries of data of that shape, at least one for each datum."""
    if not draw(st.booleans()):
        return None
    mask = torch.rand(shape) < 0.6
    mask.view(shape[0], -1)[:, 0] = True
    return mask


@FAST
@given(schedules())
def test_schedules(schedule):
    t = torch.arange(schedule.num_timesteps + 1)
    with torch.no_grad():
        a, s = schedule.signal(t), schedule.noise(t)
        assert (schedule.log_snr(t).diff() < 0).all()
        torch.testing.assert_close((a / s)[1:] ** 2, schedule.snr(t)[1:])
        torch.testing.assert_close(schedule.alpha(t).cumprod(0), schedule.alpha_bar(t))
        torch.testing.assert_close(schedule.beta(t), 1 - schedule.alpha(t), atol=1e-12, rtol=1e-9)
        scale = a**2 + s**2 if not isinstance(schedule, VarianceExploding) else a
        torch.testing.assert_close(scale, torch.ones_like(scale))


@FAST
@given(schedules(), EVENT_SHAPES, st.integers(1, 4), st.data())
def test_kernels_are_conditionals_of_one_joint(schedule, event_shape, n, data):
    """E1 × E2 = E2 × E3 at any point, for t that differs over the batch."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    if schedule.num_timesteps < 2:
        return
    x_0, x_prev, x_t = torch.randn(3, n, *event_shape, dtype=torch.float64)
    t = torch.randint(2, schedule.num_timesteps + 1, (n,))
    dim = len(event_shape)
    left = forward_transition(x_prev, t, schedule, event_dim=dim).log_prob(x_t)
    left = left + forward_marginal(x_0, t - 1, schedule, event_dim=dim).log_prob(x_prev)
    right = forward_marginal(x_0, t, schedule, event_dim=dim).log_prob(x_t)
    right = right + forward_posterior(x_t, x_0, t, schedule, event_dim=dim).log_prob(x_prev)
    torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7)


@FAST
@given(st.data(), EVENT_SHAPES, st.integers(1, 5), GUIDES)
def test_every_draw_is_the_log_density(data, event_shape, n, guide):
    """The zero-variance identity: one or many modes, any unit, whatever is missing, any scale."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    schedule = data.draw(schedules(to_noise=True))
    double = {"dtype": torch.float64}
    if data.draw(st.booleans()):
        denoiser = GaussianDenoiser(
            torch.randn(event_shape, **double), 0.1 + torch.rand(event_shape, **double), schedule
        )
        mask = data.draw(masks((n, *event_shape)))
    else:
        denoiser = GaussianMixtureDenoiser(
            [0.2, 0.8], torch.randn(2, *event_shape, **double), 0.3, schedule
        )
        mask = None
    scale = data.draw(st.sampled_from([None, 1e-6, 3.0, 1e6]))
    transform = None if scale is None else Standardize(torch.tensor(0.7 * scale, **double), scale)
    diffusion = DiffusionModel(denoiser, transform=transform)
    y = torch.randn(n, *event_shape, **double)
    x = y if transform is None else transform.inv(y)
    law = denoiser.data_distribution
    if mask is None:
        expected = law.log_prob(y) - math.log(scale or 1) * max(1, math.prod(event_shape))
    else:
        entries = (law.base_dist if event_shape else law).log_prob(y) - math.log(scale or 1)
        expected = torch.where(mask, entries, 0.0).reshape(n, -1).sum(1)
        x = torch.where(mask, x, math.nan)
    loss = Trace_ELBO().loss(diffusion.model, getattr(diffusion, guide), x, mask=mask)
    assert -loss == pytest.approx(expected.sum().item(), rel=1e-9, abs=1e-8)


@FAST
@given(st.data(), EVENT_SHAPES, st.integers(1, 4))
def test_the_two_orders_are_one_joint(data, event_shape, n):
    """log q of a trajectory, and with it every draw of the bound, does not know the guide's order."""
    denoiser = data.draw(denoisers(event_shape)).double()
    diffusion = DiffusionModel(denoiser)
    x_0 = torch.randn(n, *event_shape, dtype=torch.float64)
    mask = data.draw(masks(x_0.shape))
    trace = poutine.trace(diffusion.guide).get_trace(x_0, mask=mask)
    sums = []
    for guide in (diffusion.guide, diffusion.posterior_guide):
        replayed = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(x_0, mask=mask)
        sums.append(replayed.log_prob_sum().item())
    # states of one datum's chain are nearly functions of one another where the signal is large
    assert sums[1] == pytest.approx(sums[0], rel=1e-7, abs=1e-7)


@FAST
@given(st.data(), EVENT_SHAPES, st.integers(1, 4), st.sampled_from([torch.float32, torch.float64]))
def test_shapes_and_dtypes(data, event_shape, n, dtype):
    """Sites, samples and terms for every likelihood; the chain keeps its dtype."""
    likelihood, chain_shape, draw = data.draw(likelihoods(event_shape))
    denoiser = data.draw(denoisers(chain_shape)).to(dtype)
    diffusion = DiffusionModel(denoiser, likelihood)
    x_0, last = draw(n), diffusion.schedule.num_timesteps
    mask = data.draw(masks(x_0.shape))
    for program in (diffusion.guide, diffusion.posterior_guide, diffusion.model):
        trace = poutine.trace(program).get_trace(x_0, mask=mask)
        trace.compute_log_prob()
        for t in range(1, last + 1):
            site = trace.nodes[f"x_{t}"]
            assert site["value"].shape == (n, *chain_shape)
            assert site["value"].dtype == dtype
            assert site["log_prob"].shape == (n,)
    assert trace.nodes["x_0"]["fn"].event_shape == event_shape
    assert trace.nodes["x_0"]["log_prob"].shape == (n,)
    assert diffusion.sample(2).shape == (2, *event_shape)
    terms = elbo_terms(diffusion.model, diffusion.guide, x_0, mask=mask, num_particles=2)
    assert terms.transition.shape == (last - 1, n)
    assert terms.elbo.dtype == torch.float64
    observed = x_0.numel() if mask is None else int(mask.sum())
    assert terms.event_size == observed / n
    size = diffusion.subsampled(3)
    for objective in (Trace_ELBO, TraceMeanField_ELBO):
        loss = objective(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
        assert math.isfinite(loss.loss(size.model, size.guide, x_0, mask=mask))


@settings(FAST, max_examples=25)
@given(st.data(), st.sampled_from([(), (2,), (2, 2)]), st.sampled_from([1, 2, 3]))
def test_all_three_bounds_agree(data, event_shape, num_draws):
    """Sequential, posterior-ordered and subsampled, for any likelihood, mask and network."""
    likelihood, chain_shape, draw = data.draw(likelihoods(event_shape))
    diffusion = DiffusionModel(data.draw(denoisers(chain_shape)).double(), likelihood)
    x_0 = draw(2)
    mask = data.draw(masks(x_0.shape))
    x_0, mask = (x if x is None else x.repeat(150, *(1,) * len(event_shape)) for x in (x_0, mask))
    pair = diffusion.subsampled(num_draws)
    programs = [
        (Trace_ELBO(), diffusion.model, diffusion.guide),
        (Trace_ELBO(), diffusion.model, diffusion.posterior_guide),
        (TraceMeanField_ELBO(), diffusion.model, diffusion.posterior_guide),
        (Trace_ELBO(), pair.model, pair.guide),
        (TraceMeanField_ELBO(), pair.model, pair.guide),
    ]
    pyro.set_rng_seed(0)
    draws = np.array(
        [
            [2 / len(x_0) * elbo.loss(model, guide, x_0, mask=mask) for _ in range(12)]
            for elbo, model, guide in programs
        ]
    )
    mean, error = draws.mean(1), draws.std(1, ddof=1) / 12**0.5
    # twelve draws, so Student's t with few degrees of freedom: six errors, and rounding
    allowed = 6 * np.hypot(error[:, None], error) + 1e-6 * np.abs(mean)
    assert (np.abs(mean[:, None] - mean) <= allowed).all(), (mean, error)


@FAST
@given(st.data(), st.integers(2, 6), EVENT_SHAPES)
def test_levels_are_exact_for_independent_entries(data, num_levels, event_shape):
    """With logits that are the prior, p(x_0 | x_1) is Bayes' rule, at any noise and any scale."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    log_prior = torch.randn(*event_shape, num_levels, dtype=torch.float64).log_softmax(-1)

    class Prior(nn.Module):
        def forward(self, x_t, log_snr):
            return log_prior.expand(len(x_t), *log_prior.shape)

    schedule = data.draw(schedules())
    prediction = LevelPrediction(num_levels)
    diffusion = DiffusionModel(
        NeuralDenoiser(Prior(), schedule, event_shape, prediction=prediction)
    )
    x_1 = torch.randn(3, *event_shape, dtype=torch.float64)
    level = prediction.embed(torch.arange(num_levels, dtype=torch.float64))
    with torch.no_grad():
        a, s = schedule.signal(1), schedule.noise(1)
        expected = log_prior - 0.5 * ((x_1[..., None] - a * level) / s) ** 2
        kernel = diffusion.decode(x_1)
    kernel = kernel.base_dist if hasattr(kernel, "base_dist") else kernel
    torch.testing.assert_close(kernel.probs, expected.softmax(-1), rtol=1e-7, atol=1e-9)
