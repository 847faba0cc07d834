"""Extremes give right numbers, or a ``ValueError`` in words: sizes, scales, dtypes, ends of schedules."""

import math
import warnings

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from oracles import GaussianReverseChain, log_normal
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

from pyro_diffusion.bounds import elbo_terms, evaluate_bound
from pyro_diffusion.chains import ProgramPair
from pyro_diffusion.denoisers import (
    DataPrediction,
    GaussianDenoiser,
    LevelPrediction,
    NeuralDenoiser,
    NoisePrediction,
    OptimalVariance,
    VelocityPrediction,
)
from pyro_diffusion.diagnostics import to_arviz
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import importance_evidence, ode_log_likelihood, smc_evidence, summary
from pyro_diffusion.hvae import HierarchicalVAE, LadderEncoder
from pyro_diffusion.likelihoods import (
    DiscretizedGaussianLikelihood,
    GaussianLikelihood,
    PoissonLikelihood,
)
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import (
    AlphaSchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    VarianceExploding,
)
from pyro_diffusion.scoring import log_density
from pyro_diffusion.training.objectives import bound_by_datum
from pyro_diffusion.transforms import Standardize


def hierarchy(encoder, **arguments):
    """A small hierarchical VAE over three numbers."""
    sizes = (4, 2)
    encoder = LadderEncoder((3,), sizes, hidden_size=8) if encoder == "ladder" else None
    return HierarchicalVAE((3,), sizes, encoder=encoder, hidden_size=8, **arguments)


@pytest.mark.parametrize("encoder", ["bottom-up", "ladder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_scale_leaves_the_layers_their_dtype(encoder, dtype):
    """A likelihood's scale is float64, whatever the layers are; fixed and learned are one number."""
    bounds = []
    for learnable in (False, True):
        torch.manual_seed(0)
        vae = hierarchy(encoder, likelihood=GaussianLikelihood(0.3, learnable=learnable))
        for layers in (vae.encoder, vae.decoder):
            layers.to(dtype)
        assert vae.dtype == dtype
        assert vae.sample(2).dtype == dtype
        terms = elbo_terms(vae.model, vae.guide, torch.randn(5, 3, dtype=dtype), progress=False)
        bounds.append(terms.elbo)
    torch.testing.assert_close(*bounds, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("encoder", ["bottom-up", "ladder"])
def test_layers_of_half_precision(encoder, scale):
    """The chain is in float32, and the bound that of the same numbers in float64, to bfloat16's rounding."""
    likelihood = None if scale is None else GaussianLikelihood(scale)
    vae = hierarchy(encoder, likelihood=likelihood).to(torch.bfloat16)
    x_0, bounds = torch.randn(20, 3), []
    for layers in (torch.bfloat16, torch.float64):
        vae.to(layers)
        torch.manual_seed(0)
        data = x_0.to(torch.promote_types(layers, torch.float32))
        terms = elbo_terms(vae.model, vae.guide, data, num_particles=500, progress=False)
        bounds.append(terms.mean())
        assert vae.sample(2).dtype == data.dtype
    rounding = 5 * torch.finfo(torch.bfloat16).eps * abs(bounds[1].value)
    error = 5 * sum(bound.monte_carlo_error for bound in bounds)
    assert abs(bounds[0].value - bounds[1].value) < rounding + error


@pytest.mark.parametrize("count", [1, 100, 10_000, 1_000_000, 1_000_000_000])
def test_large_counts_in_float32(count):
    """Against scipy in float64; in float32 n log ρ − ρ − log n! of a million is off by a nat."""
    root = (count**-0.5) * torch.randn(200)
    kernel = PoissonLikelihood(max_count=count)(1 + root)
    counts = torch.poisson(torch.full((200,), float(count), dtype=torch.float64)).long()
    expected = scipy.stats.poisson(kernel.rate.double().numpy()).logpmf(counts.numpy())
    found = log_density(kernel, counts.float() if count < 2**24 else counts.double())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def gaussian(scale=1.0, num_timesteps=20, dtype=torch.float64, **ends):
    """The exact chain of two numbers, and three data of their law's size."""
    mean, std = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    schedule = LogSNRSchedule(num_timesteps, **ends)
    denoiser = GaussianDenoiser(scale * mean.to(dtype), scale * std.to(dtype), schedule)
    x_0 = scale * torch.tensor([[0.1, 0.2], [1.0, -3.0], [0.0, 2.0]], dtype=dtype)
    return DiffusionModel(denoiser), x_0


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("log_snr_max", [8.0, 14.0, 20.0, 30.0, 40.0])
def test_noise_is_not_lost_in_rounding(log_snr_max, scale, dtype, guide):
    """The exact chain's every path is log p(x_0); where states cannot hold the noise, words.

    In float32 a log-SNR of 40 was wrong by 5,000 nats, and said ± 0.1.
    """
    diffusion, x_0 = gaussian(scale, 20, dtype, log_snr_max=log_snr_max, log_snr_min=-60.0)
    arguments = diffusion.model, getattr(diffusion, guide), x_0
    rounding = torch.finfo(dtype).eps * 3 * scale / math.exp(-log_snr_max / 2)
    if rounding > 1:
        with pytest.raises(ValueError, match=r"rounding; expected .*Standardize"):
            elbo_terms(*arguments, progress=False)
        return
    terms = elbo_terms(*arguments, num_particles=16, analytic_kl=False, progress=False)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0).double()
    allowed = (0.02 if dtype == torch.float32 else 1e-3) + 0.3 * rounding
    torch.testing.assert_close(terms.elbo, expected, rtol=0, atol=allowed)


def test_a_single_particle_is_not_called_reliable():
    """One weight is the same as itself, and says nothing of the others."""
    diffusion, x_0 = gaussian(num_timesteps=5)
    evidence = importance_evidence(
        diffusion.model, diffusion.guide, x_0, num_particles=1, progress=False
    )
    assert evidence.pareto_k.isnan().all()
    assert not evidence.reliable.any()
    exact = importance_evidence(
        diffusion.model, diffusion.guide, x_0, num_particles=1, state=5, progress=False
    )  # of x_T there is nothing to average
    expected = diffusion.prior().log_prob(x_0)
    torch.testing.assert_close(exact.log_evidence, expected)
    assert exact.reliable.all()
    assert (exact.standard_error == 0).all()


@pytest.mark.parametrize("exploding", [False, True])
def test_the_flow_of_a_chain_of_one_step(exploding):
    """It is the curve's, which a grid of one step has left but for its end: 3 nats below."""
    mean, std = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    schedule = LogSNRSchedule(1, log_snr_max=20.0, log_snr_min=-20.0)
    schedule = VarianceExploding(schedule) if exploding else schedule
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, schedule))
    x_0 = torch.tensor([[0.1, 0.2], [1.0, -3.0]]).double()
    found = ode_log_likelihood(diffusion, x_0, rtol=1e-7, atol=1e-7).log_evidence
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)  # √ᾱ_T times the mean


def test_one_step_without_a_curve_has_no_flow():
    """A single α is no curve: the flow refuses, and the summary leaves it out."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), AlphaSchedule([1e-3]))
    diffusion, x_0 = DiffusionModel(denoiser), torch.randn(3, 2)
    with pytest.raises(ValueError, match="AlphaSchedule of 1 steps.*Use LinearSchedule"):
        ode_log_likelihood(diffusion, x_0)
    assert list(summary(diffusion, x_0).groups()) == ["chain, T = 1"]


def network(shape, num_outputs=1):
    """A small MLP whose output is not zero."""
    mlp = MLP(shape, hidden_size=8, num_blocks=1, num_outputs=num_outputs)
    torch.nn.init.normal_(mlp.decode.weight, std=0.3)
    return mlp


def neural(shape, schedule, likelihood=None, num_outputs=1, **arguments):
    """A diffusion model with a small network."""
    denoiser = NeuralDenoiser(network(shape, num_outputs), schedule, shape, **arguments)
    return DiffusionModel(denoiser, likelihood)


def take_steps(diffusion, x_0, pairs=("subsampled", "posterior", "forward"), **given):
    """Steps of SVI, whose losses, gradients and parameters are finite."""
    for kind in pairs:
        pair = {
            "subsampled": lambda: diffusion.subsampled(2),
            "continuous": lambda: diffusion.continuous(2),
            "posterior": lambda: ProgramPair(diffusion.model, diffusion.posterior_guide),
            "forward": lambda: ProgramPair(diffusion.model, diffusion.guide),
        }[kind]()
        elbo = Trace_ELBO() if kind == "forward" else TraceMeanField_ELBO()
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-3}), elbo)
        assert all(math.isfinite(svi.step(x_0, **given)) for _ in range(2))
        gradients = torch.autograd.grad(
            elbo.differentiable_loss(pair.model, pair.guide, x_0, **given),
            list(diffusion.parameters()),
            allow_unused=True,
        )
        assert all(g is None or g.isfinite().all() for g in gradients)
        assert all(p.isfinite().all() for p in diffusion.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_data_of_any_scale_standardized(scale, dtype):
    """Every number that there is of log p is that of N(m, s²), in the data's units."""
    torch.manual_seed(0)
    loc, std = scale * torch.tensor([3.0, -5.0], dtype=dtype), scale * torch.tensor([1.0, 0.2])
    truth = dist.Normal(loc, std.to(dtype)).to_event(1)
    transform = Standardize(loc, std.to(dtype))
    schedule = LogSNRSchedule(10, log_snr_max=16.0, log_snr_min=-25.0)
    ones = torch.ones(2, dtype=dtype)
    diffusion = DiffusionModel(GaussianDenoiser(0 * ones, ones, schedule), transform=transform)
    x_0 = truth.sample((6,))
    expected, found = truth.log_prob(x_0).double(), estimates(diffusion, x_0)
    for values in found.values():
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-3)
    whole = summary(diffusion, x_0)  # which asserts that they agree
    assert whole.rows[0].value.value == pytest.approx(expected.mean().item(), abs=0.5)
    samples = (diffusion.sample(4000).double() - loc) / std
    assert (samples.mean(0).abs() < 5 / 4000**0.5).all()
    assert (samples.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5
    draws = to_arviz(diffusion, x_0, num_draws=30, timesteps=[1])
    evidence = draws["importance"]["evidence"].values
    np.testing.assert_allclose(evidence, expected, atol=2e-3)


def estimates(diffusion, x_0):
    """Estimates of log p(x_0) that are exact for an exact chain, up to √ᾱ_T and the flow's σ_1."""
    model, guides = diffusion.model, (diffusion.guide, diffusion.posterior_guide)
    found = {
        str(guide): elbo_terms(
            model, guide, x_0, num_particles=2, analytic_kl=False, progress=False
        ).elbo
        for guide in guides
    }
    evidence = importance_evidence(model, guides[0], x_0, num_particles=30, progress=False)
    found["importance"] = evidence.log_evidence
    found["sequential"] = smc_evidence(
        diffusion, x_0, num_particles=30, progress=False
    ).log_evidence
    found["flow"] = ode_log_likelihood(diffusion, x_0).log_evidence
    return found


@pytest.mark.parametrize("num_timesteps", [1, 2, 12])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_data_of_any_scale_as_they_are(scale, num_timesteps):
    """The closed form, where the end is far from the data, or the data are far below the noise of x_1."""
    diffusion, x_0 = gaussian(scale, num_timesteps, log_snr_max=6.0, log_snr_min=-6.0)
    alpha = diffusion.schedule.alpha(torch.arange(1, num_timesteps + 1)).numpy()
    expected = sum(
        GaussianReverseChain.exact(alpha, scale * mean, scale * std).elbo(x_0[:, i].numpy())
        for i, (mean, std) in enumerate([(0.3, 0.5), (-1.0, 2.0)])
    )
    terms = elbo_terms(
        diffusion.model, diffusion.posterior_guide, x_0, num_particles=200, progress=False
    )
    error = 5 * terms.standard_error.numpy() + 1e-9 * np.abs(expected)
    assert (np.abs(terms.elbo.numpy() - expected) < error).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that were not enough
        result = evaluate_bound(diffusion, x_0, standard_error=0.05, max_rows=1e4)
    # A group of timesteps has a millionth of the rows at least, and is not always seen.
    unseen = 1e-6 * num_timesteps * abs(expected.mean())
    assert abs(result.mean().value - expected.mean()) < 5 * result.monte_carlo_error + unseen


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("exploding", [False, True])
@pytest.mark.parametrize("by_entry", [False, True])
@pytest.mark.parametrize("end", [20.0, 40.0])
def test_ends_far_out(end, by_entry, exploding, guide):
    """log p(x_0) on every path, to √ᾱ_T; by the chain without end within its error; samples of the law."""
    shape = (2,) if by_entry else ()
    schedule = MonotoneSchedule(12, log_snr_max=end, log_snr_min=-end, event_shape=shape)
    schedule = VarianceExploding(schedule) if exploding else schedule
    mean, std = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, schedule))
    x_0 = torch.tensor([[0.1, 0.2], [1.0, -3.0]]).double()
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    terms = elbo_terms(
        diffusion.model, getattr(diffusion, guide), x_0, analytic_kl=False, progress=False
    )
    tolerance = 20 * math.exp(-end / 2) + 1e-7
    torch.testing.assert_close(terms.elbo, expected, rtol=0, atol=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = evaluate_bound(
            diffusion, x_0, standard_error=0.5, max_rows=2e4, num_timesteps=math.inf
        )
    assert abs(limit.mean().value - expected.mean()) < 5 * limit.monte_carlo_error
    samples = (diffusion.sample(4000) - mean) / std
    assert (samples.mean(0).abs() < 5 / 4000**0.5).all()
    assert (samples.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("num_timesteps", [1, 3])
def test_a_number_is_a_vector_of_one(num_timesteps):
    """Event shapes () and (1,) have one bound, draw by draw, one evidence and one flow."""
    schedule = LogSNRSchedule(num_timesteps)
    vector = neural((1,), schedule)
    number = neural((), schedule)
    number.denoiser.network.load_state_dict(vector.denoiser.network.state_dict())
    x_0, found = torch.randn(3), []
    for diffusion, data in ((vector, x_0[:, None]), (number, x_0)):
        torch.manual_seed(0)
        terms = elbo_terms(diffusion.model, diffusion.posterior_guide, data, progress=False)
        torch.manual_seed(0)
        evidence = importance_evidence(
            diffusion.model, diffusion.guide, data, num_particles=30, progress=False
        )
        torch.manual_seed(0)
        runs = smc_evidence(diffusion, data, num_particles=30, progress=False)
        flow = ode_log_likelihood(diffusion, data)
        torch.manual_seed(0)
        samples = diffusion.sample(3).reshape(3)
        found.append((terms.elbo, *(e.log_evidence for e in (evidence, runs, flow)), samples))
        take_steps(diffusion, data, ("subsampled", "continuous", "posterior", "forward"))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_single_datum(shape):
    """Monte Carlo errors as ever, no sampling error, and the numbers of that datum among others."""
    diffusion = DiffusionModel(
        GaussianDenoiser(torch.zeros(shape), torch.ones(shape), LogSNRSchedule(5))
    )
    x_0 = 0.5 * torch.ones(1, *shape)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0).item()
    means = [
        elbo_terms(diffusion.model, diffusion.guide, x_0, progress=False).mean(),
        evaluate_bound(diffusion, x_0, standard_error=0.1).mean(),
        importance_evidence(
            diffusion.model, diffusion.guide, x_0, num_particles=30, progress=False
        ).mean(),
        smc_evidence(diffusion, x_0, num_particles=30, progress=False).mean(),
    ]
    for mean in means:
        assert abs(mean.value - expected) < 5 * mean.monte_carlo_error + 0.01
        assert math.isnan(mean.sampling_error)
    assert "nan (sampling)" in str(summary(diffusion, x_0))
    draws = to_arviz(diffusion, x_0, num_draws=30)
    assert draws["importance"]["evidence"].values == pytest.approx(expected, abs=0.01)
    take_steps(neural(shape, LogSNRSchedule(5)), x_0, ("subsampled", "continuous", "posterior"))


def test_one_particle():
    """The exact chain's bound is right with one, and no error is claimed."""
    diffusion, x_0 = gaussian(num_timesteps=5, log_snr_min=-40.0)
    terms = elbo_terms(
        diffusion.model, diffusion.guide, x_0, num_particles=1, analytic_kl=False, progress=False
    )
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    torch.testing.assert_close(terms.elbo, expected, rtol=0, atol=1e-7)
    assert terms.standard_error.isnan().all()
    assert terms.term_standard_error.isnan().all()
    assert math.isnan(terms.mean().monte_carlo_error)


def test_constant_columns():
    """No density, hence no standard deviation to divide by; squared errors have a floor."""
    x_0 = torch.randn(64, 3)
    x_0[:, 1] = 2.5
    with pytest.raises(ValueError, match="constant in the data.*Drop it"):
        Standardize.from_data(x_0)
    schedule = LogSNRSchedule(8)
    known = NeuralDenoiser(Known(0 * x_0[0]), schedule, (3,), prediction=DataPrediction())
    variance = OptimalVariance.from_data(DiffusionModel(known), 0 * x_0)  # without any error
    denoiser = NeuralDenoiser(
        Known(0 * x_0[0]), schedule, (3,), prediction=DataPrediction(), variance=variance
    )
    diffusion = DiffusionModel(denoiser)
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, 0 * x_0, progress=False)
    # The floor of 1e-12 takes little of any KL, and the density at x_0 is that of its standard deviation.
    assert terms.transition.abs().max() < 1e-4
    first = diffusion.denoiser(torch.zeros(1, 3), 1).log_prob(torch.zeros(1, 3)).item()
    assert terms.reconstruction.mean().item() == pytest.approx(first, abs=1e-3)


class Known(torch.nn.Module):
    """A network that always says the same."""

    def __init__(self, datum):
        super().__init__()
        self.datum = torch.nn.Parameter(datum)

    def forward(self, x_t, log_snr):
        return self.datum.expand(x_t.shape)


def test_a_hierarchy_of_constant_data():
    """The density of a point is limited by the least scale of a layer, and nothing becomes NaN."""
    vae = HierarchicalVAE((2,), (2,), hidden_size=8)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.05}), Trace_ELBO())
    x_0 = torch.tensor([[1e3, 0.0]]).repeat(32, 1)
    losses = [svi.step(x_0) for _ in range(100)]
    assert all(math.isfinite(loss) for loss in losses)
    bound = elbo_terms(vae.model, vae.guide, x_0, progress=False).mean().value
    least = dist.Normal(0.0, 1e-4).log_prob(torch.tensor(0.0)).item()
    assert -losses[0] / 32 < bound < 2 * least


@pytest.mark.parametrize(
    "prediction", [NoisePrediction(), VelocityPrediction(), LevelPrediction(5)]
)
def test_a_network_of_bfloat16(prediction):
    """The bound of the same numbers in float64, to what eight bits of a network's output leave."""
    levels = prediction.num_outputs > 1
    schedule = LogSNRSchedule(20, log_snr_max=3.0, log_snr_min=-6.0)
    arguments = {"prediction": prediction, "num_outputs": prediction.num_outputs}
    half = neural((3,), schedule, **arguments)
    half.denoiser.network.bfloat16()
    double = neural((3,), schedule, **arguments)
    double.denoiser.network.double().load_state_dict(half.denoiser.network.state_dict())
    x_0 = torch.randint(5, (40, 3)) if levels else torch.randn(40, 3)
    means = [
        elbo_terms(d.model, d.posterior_guide, x_0, num_particles=50, progress=False).mean()
        for d in (half, double)
    ]
    assert half.sample(2).dtype == (torch.int64 if levels else torch.float32)
    error = 5 * math.hypot(*(mean.monte_carlo_error for mean in means))
    rounding = 5 * torch.finfo(torch.bfloat16).eps * abs(means[1].value)
    assert abs(means[0].value - means[1].value) < error + rounding
    take_steps(half, x_0)


def log_mass(level, num_levels, scale):
    """log of the Gaussian's mass between the edges of a level's bin, those at the ends at infinity."""
    with mpmath.workdps(60):
        lower, upper = (
            (mpmath.mpf(2 * level + side) / (num_levels - 1) - 1) / mpmath.mpf(scale)
            for side in (-1, 1)
        )
        lower = -mpmath.inf if level == 0 else lower
        upper = mpmath.inf if level == num_levels - 1 else upper
        if lower > 0:
            lower, upper = -upper, -lower
        return float(mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower)))


SCALES = [1e-6, 1e-3, 1.0, 1e3, 1e6]


@pytest.mark.parametrize("scale", SCALES)
def test_a_gaussian_likelihood_of_any_scale(scale):
    """N(x_0; 0, s²) of an estimate that is zero; steps of SVI move the scale, and stay finite."""
    diffusion = neural(
        (2,), LogSNRSchedule(4), GaussianLikelihood(scale, learnable=True),
        prediction=DataPrediction(),
    )  # fmt: skip
    torch.nn.init.zeros_(diffusion.denoiser.network.decode.weight)
    x_0 = torch.randn(5, 2)
    terms = elbo_terms(diffusion.model, diffusion.guide, x_0, progress=False)
    expected = log_normal(x_0.double().numpy(), 0.0, scale**2).sum(1)
    np.testing.assert_allclose(terms.reconstruction.numpy(), expected, rtol=1e-5)
    take_steps(diffusion, x_0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_levels", [2, 17, 65536])
def test_a_discretised_gaussian_of_any_scale(num_levels, scale):
    """Masses of the levels about an estimate of zero, in sixty digits."""
    levels = torch.tensor([[0, num_levels // 2, num_levels - 1]])
    likelihood = DiscretizedGaussianLikelihood(num_levels, scale, learnable=True)
    found = likelihood(torch.zeros(1, 3).double()).log_prob(levels.double())[0].tolist()
    expected = [log_mass(level, num_levels, scale) for level in levels[0].tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)
    if num_levels == 17:
        diffusion = neural((3,), LogSNRSchedule(4, log_snr_max=3.0), likelihood)
        take_steps(diffusion, levels.repeat(4, 1))


@pytest.mark.parametrize("num_levels", [2, 17])
def test_levels_of_which_one_occurs(num_levels):
    """A network of zeros is exact for uniform levels: without end its bound is −D log K, for any of them."""
    schedule = LogSNRSchedule(10, log_snr_max=8.0, log_snr_min=-14.0)
    arguments = {"num_outputs": num_levels, "prediction": LevelPrediction(num_levels)}
    uniform = neural((3,), schedule, **arguments)
    torch.nn.init.zeros_(uniform.denoiser.network.decode.weight)
    expected = -3 * math.log(num_levels)
    for level in (0, num_levels - 1):
        x_0 = torch.full((4, 3), level)
        limit = evaluate_bound(uniform, x_0, standard_error=0.05, num_timesteps=math.inf)
        assert abs(limit.mean().value - expected) < 5 * limit.monte_carlo_error
        take_steps(neural((3,), schedule, **arguments), x_0)


def test_masks_with_all_or_nothing_in_a_row():
    """All: no mask. One entry: its marginal. Nothing in a column: the others'. Nothing in a row: words."""
    diffusion, x_0 = gaussian(num_timesteps=5, log_snr_min=-40.0)
    laws = [dist.Normal(0.3, 0.5), dist.Normal(-1.0, 2.0)]
    expected = torch.stack([law.log_prob(x_0[:, i]) for i, law in enumerate(laws)], 1)
    for mask in (
        [[True, True]] * 3, [[True, False], [False, True], [True, True]], [[False, True]] * 3
    ):  # fmt: skip
        mask = torch.tensor(mask)
        holes = torch.where(mask, x_0, torch.nan)
        for guide in (diffusion.guide, diffusion.posterior_guide):
            terms = elbo_terms(
                diffusion.model, guide, holes, mask=mask, analytic_kl=False, progress=False
            )
            total = torch.where(mask, expected, 0.0).sum(1)
            torch.testing.assert_close(terms.elbo, total, rtol=0, atol=1e-6)
    nothing = torch.tensor([[True, True], [False, False], [True, False]])
    with pytest.raises(ValueError, match=r"without any observed entry, the first at row 1.*Drop"):
        elbo_terms(diffusion.model, diffusion.guide, x_0, mask=nothing, progress=False)
    take_steps(neural((2,), LogSNRSchedule(5)), x_0.float(), mask=torch.tensor([[True, False]] * 3))


@pytest.mark.parametrize("count", [1, 10_000, 100_000_000])
def test_a_bound_of_large_counts(count):
    """In float32 the bound of the same network in float64, on the same noise."""
    torch.manual_seed(0)
    likelihood = PoissonLikelihood(count)
    schedule = LogSNRSchedule(5, log_snr_max=min(max(math.log(count), 1.0), 14.0))
    single = neural((2,), schedule, likelihood, prediction=VelocityPrediction())
    double = neural((2,), schedule, likelihood, prediction=VelocityPrediction())
    double.denoiser.network.double().load_state_dict(single.denoiser.network.state_dict())
    x_0 = torch.poisson(torch.full((30, 2), float(count), dtype=torch.float64)).long()
    rates = []
    for diffusion in (single, double):
        x_1 = torch.linspace(-1, 1, 60).reshape(30, 2).to(diffusion.dtype)
        rates.append(log_density(diffusion.decode(x_1), x_0.to(diffusion.dtype)))
    torch.testing.assert_close(*rates, rtol=1e-3, atol=1e-3)
    take_steps(single, x_0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_steps_at_random(dtype):
    """The subsampled pair and ``evaluate_bound``: log p(x_0), which an exact chain's bound is."""
    mean, std = torch.tensor([0.3, -1.0]).to(dtype), torch.tensor([0.5, 2.0]).to(dtype)
    schedule = LogSNRSchedule(10_000, log_snr_max=10.0, log_snr_min=-20.0)
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, schedule))
    x_0 = torch.tensor([[0.1, 0.2], [1.0, -3.0]], dtype=dtype)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0).double().mean().item()
    result = evaluate_bound(diffusion, x_0, standard_error=0.1)
    assert abs(result.mean().value - expected) < 5 * result.monte_carlo_error
    pair = diffusion.subsampled(200)
    bounds = bound_by_datum(pair.model, pair.guide, x_0.repeat(200, 1)).double()
    error = 5 * bounds.std().item() / 400**0.5
    assert abs(bounds.mean().item() - expected) < error


def test_ten_thousand_steps_in_float32():
    """Every site of the chain: log p(x_0), to 0.01 nats."""
    schedule = LogSNRSchedule(10_000, log_snr_max=10.0, log_snr_min=-25.0)
    diffusion = DiffusionModel(GaussianDenoiser(torch.tensor([0.3]), torch.tensor([0.7]), schedule))
    x_0 = torch.tensor([[0.1]])
    terms = elbo_terms(
        diffusion.model, diffusion.guide, x_0, num_particles=1, analytic_kl=False, progress=False
    )
    expected = diffusion.denoiser.data_distribution.log_prob(x_0).double()
    torch.testing.assert_close(terms.elbo, expected, rtol=0, atol=0.01)
    assert terms.transition.shape == (9_999, 1)
