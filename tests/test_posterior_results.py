"""What ``posterior_samples`` returns, how it is computed, and what it refuses.

Shapes for one posterior and several, statistics whose errors are calibrated, common random numbers, chunks,
memory, and bad input in four beats.
"""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import MixturePosterior
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import Normal

from pyro_diffusion import (
    MLP,
    DataPrediction,
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    HierarchicalVAE,
    LinearGaussian,
    LogSNRSchedule,
    NeuralDenoiser,
    posterior_samples,
)
from pyro_diffusion.inference import (
    PosteriorSamples,
    Statistic,
    covariance,
    iterative,
    runs,
    twisted,
)
from pyro_diffusion.reading import footprint

WEIGHTS = [0.4, 0.6]
MEANS = torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=torch.float64)
STDS = torch.tensor([[0.5, 0.7], [0.8, 0.5]], dtype=torch.float64)
ROW = torch.tensor([[1.0, 0.5]], dtype=torch.float64)


def sampled(diffusion, likelihood, num_samples=9, **settings):
    return posterior_samples(diffusion, likelihood, num_samples, progress=False, **settings)


def schedule(num_timesteps):
    return LogSNRSchedule(num_timesteps, log_snr_max=8.0, log_snr_min=-16.0)


def mixture(num_timesteps=8):
    return DiffusionModel(GaussianMixtureDenoiser(WEIGHTS, MEANS, STDS, schedule(num_timesteps)))


def exact(y, noise=0.5):
    covariances = torch.diag_embed(STDS**2).numpy()
    return MixturePosterior.of(WEIGHTS, MEANS.numpy(), covariances, ROW.numpy(), [y], [[noise**2]])


def measured(*y, noise=0.5):
    """One measurement for a single number, several for more."""
    return LinearGaussian(ROW, torch.tensor(y)[:, None].double(), noise)


def function_of(*y, noise=0.5):
    values = torch.tensor(y).double()
    return lambda x: Normal(x @ ROW[0], noise).log_prob(values if len(values) > 1 else values[0])


KINDS = {"closed form": measured, "function": function_of}


# Shapes.


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_one_posterior(kind):
    draws = sampled(mixture(), KINDS[kind](0.3), 7, num_particles=30, num_runs=4)
    assert isinstance(draws, PosteriorSamples)
    assert draws.samples.shape == (7, 2)
    assert draws.particles.shape == (4, 30, 2)
    assert draws.log_weights.shape == (4, 30)
    assert draws.ess_by_timestep.shape == (8,)
    for number in (
        draws.log_evidence,
        draws.standard_error,
        draws.ess,
        draws.pareto_k,
        draws.reliable,
    ):
        assert number.shape == ()
    assert draws.mean().value.shape == draws.std().standard_error.shape == (2,)
    assert draws.quantile(0.5).value.shape == (2,)
    assert draws.log_weights.exp().sum().item() == pytest.approx(1)
    assert draws.ess.item() == pytest.approx(1 / draws.log_weights.exp().square().sum().item())
    assert not draws.is_biased
    assert not draws.samples.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_several_posteriors(kind):
    y = (0.3, -1.0, 2.0)
    draws = sampled(mixture(), KINDS[kind](*y), 7, num_particles=200, num_runs=8)
    assert draws.samples.shape == (7, 3, 2)
    assert draws.particles.shape == (8, 200, 3, 2)
    assert draws.log_weights.shape == (8, 200, 3)
    assert draws.ess_by_timestep.shape == (8, 3)
    for number in (
        draws.log_evidence,
        draws.standard_error,
        draws.ess,
        draws.pareto_k,
        draws.reliable,
    ):
        assert number.shape == (3,)
    assert draws.mean().value.shape == draws.quantile(0.2).standard_error.shape == (3, 2)
    torch.testing.assert_close(draws.log_weights.exp().sum((0, 1)), torch.ones(3).double())
    for n, value in enumerate(y):
        oracle = exact(value)
        assert abs(draws.log_evidence[n] - oracle.log_evidence) < 4.5 * draws.standard_error[n]
        mean = draws.mean()
        error = (mean.value[n] - torch.tensor(oracle.mean)).abs() / mean.standard_error[n]
        assert error.max() < 4.5


def test_one_y_in_a_batch_of_one_is_one_posterior():
    """A y of shape (1,) + that of a measurement is a batch of one; it has no axis of posteriors."""
    one = sampled(
        mixture(), LinearGaussian(ROW, torch.tensor([[0.3]]), 0.5), num_particles=30, num_runs=2
    )
    assert one.log_evidence.shape == ()


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 2)])
def test_data_of_any_shape(shape):
    """Images: event axes at the end, of draws and statistics."""
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(shape), torch.ones(shape), schedule(6)))
    y = torch.randn(2, 1)
    for likelihood in (
        LinearGaussian(torch.ones(1, math.prod(shape)), y, 1.0),
        lambda x: Normal(x.flatten(-len(shape)).sum(-1), 1.0).log_prob(y[:, 0]),
    ):
        draws = sampled(diffusion, likelihood, 5, num_particles=30, num_runs=3)
        assert draws.samples.shape == (5, 2, *shape)
        assert draws.std().value.shape == (2, *shape)
        law = Normal(0.0, math.sqrt(1 + math.prod(shape)))
        torch.testing.assert_close(
            draws.log_evidence.float(), law.log_prob(y[:, 0]), rtol=0, atol=2e-3
        )


def test_a_function_of_one_batch_axis():
    """One that takes (B,) + event alone, such as a network of two axes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(1), nn.Linear(2, 1), nn.Flatten(0)).double()

    def log_likelihood(x):
        if x.dim() != 2:
            raise ValueError("a batch of data, please")
        return Normal(network(x), 1.0).log_prob(torch.tensor(0.3).double())

    draws = sampled(mixture(), log_likelihood, num_particles=30, num_runs=2)
    assert draws.log_evidence.shape == ()
    weight, bias = network[1].weight[0].detach(), network[1].bias.item()
    same = LinearGaussian(weight[None], torch.tensor([0.3 - bias]).double(), 1.0)
    other = sampled(mixture(), same, num_particles=400, num_runs=8)
    assert abs(draws.log_evidence - other.log_evidence) < 0.2


# Contexts.

WEIGHT = torch.tensor([[1.0, -0.5], [0.3, 0.8]], dtype=torch.float64)
BIAS = torch.tensor([0.2, -1.0], dtype=torch.float64)
STD = torch.tensor([0.5, 1.0], dtype=torch.float64)


def regression():
    return DiffusionModel(GaussianDenoiser.from_regression(WEIGHT, BIAS, STD, schedule(6)))


def of_regression(context, y, noise=1.0):
    """log p(y ∣ c) of the first entry."""
    mean = (context @ WEIGHT.T + BIAS)[..., 0]
    return Normal(mean, math.sqrt(0.25 + noise**2)).log_prob(y)


CONTEXT = torch.tensor([[0.5, 1.0], [-1.0, 0.2], [0.0, 0.0]], dtype=torch.float64)
FIRST = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("context", "y", "shape"),
    [
        (CONTEXT[:1], [0.7], ()),
        (CONTEXT, [0.7], (3,)),
        (CONTEXT[:1], [0.7, -2.0], (2,)),
        (CONTEXT, [0.7, -2.0, 1.0], (3,)),
    ],
    ids=["one and one", "several contexts", "several y", "several of both"],
)
@pytest.mark.parametrize(
    "kind",
    [
        "closed form",
        "function",
    ],
)
def test_contexts_and_measurements(context, y, shape, kind):
    """One context for all, or a row for each posterior; every number is exact, row by row."""
    y = torch.tensor(y).double()
    likelihood = LinearGaussian(FIRST, y[:, None], 1.0)
    if kind == "function":
        values = y if len(y) > 1 else y[0]
        likelihood = lambda x: Normal(x[..., 0], 1.0).log_prob(values)  # noqa: E731
    draws = sampled(regression(), likelihood, 5, num_particles=40, num_runs=3, context=context)
    expected = of_regression(context, y).reshape(shape)
    assert draws.log_evidence.shape == shape
    assert draws.samples.shape == (5, *shape, 2)
    # What is left of a mean of one in x_T is e^-8 of it.
    torch.testing.assert_close(draws.log_evidence, expected, rtol=0, atol=5e-3)


def test_the_component_of_a_mixture_as_context():
    """A row for each datum, in chunks of a datum each as well."""
    context, y = torch.tensor([0, 1, 1, 0]), torch.tensor([0.3, 0.3, 2.0, -1.0]).double()
    law = Normal(MEANS[context] @ ROW[0], (STDS[context] ** 2 @ ROW[0] ** 2 + 0.25).sqrt())
    draws = sampled(
        mixture(), measured(*y.tolist()), num_particles=200, num_runs=8, context=context
    )
    error = (draws.log_evidence - law.log_prob(y)).abs()
    assert (error < 4 * draws.standard_error + 5e-3).all()


@pytest.mark.parametrize("chunk", [16, 4])
def test_contexts_stay_with_their_rows_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr(runs.Runs, "_columns", lambda self: chunk)
    y = torch.tensor([0.7, -2.0, 1.0]).double()
    draws = sampled(
        regression(),
        LinearGaussian(FIRST, y[:, None], 1.0),
        num_particles=40,
        num_runs=4,
        context=CONTEXT,
    )
    torch.testing.assert_close(draws.log_evidence, of_regression(CONTEXT, y), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (CONTEXT[:2], "argument 'context': got shape .2, 2. for 3 data"),
        (CONTEXT * math.nan, "argument 'context': got 6 NaN"),
        (None, "argument 'context'"),
        (torch.tensor([0, 1, 1]), "argument 'context'"),
    ],
    ids=["two rows", "NaN", "none", "labels"],
)
def test_contexts_that_do_not_fit(context, message):
    likelihood = LinearGaussian(FIRST, torch.zeros(3, 1), 1.0)
    with pytest.raises(ValueError, match=message):
        sampled(regression(), likelihood, num_particles=30, num_runs=2, context=context)


def test_a_context_of_a_model_that_takes_none():
    with pytest.raises(ValueError, match="argument 'context'"):
        sampled(
            DiffusionModel(GaussianDenoiser(BIAS, STD, schedule(3))), measured(0.3),
            num_particles=30, context=CONTEXT,
        )  # fmt: skip


# Statistics and their errors.


def test_errors_are_calibrated():
    """50 independent posteriors of one y: errors over their standard errors have a spread near one."""
    oracle = exact(0.4)
    draws = sampled(mixture(), measured(*[0.4] * 50), num_particles=50)
    q = [oracle.quantile(0.3, entry) for entry in range(2)]
    errors = {
        "evidence": ((draws.log_evidence - oracle.log_evidence) / draws.standard_error)[:, None],
        "mean": (draws.mean().value - torch.tensor(oracle.mean)) / draws.mean().standard_error,
        "std": (draws.std().value - torch.tensor(oracle.std)) / draws.std().standard_error,
        "quantile": (draws.quantile(0.3).value - torch.tensor(q))
        / draws.quantile(0.3).standard_error,
    }
    for name, z in errors.items():
        # t with 15 degrees of freedom has a spread of 1.07
        assert 0.75 < z.square().mean().sqrt() < 1.4, name
        assert abs(z.mean()) < 0.45, name


def test_statistics_by_hand():
    """Two runs of two particles, with weights 0.1, 0.2, 0.3, 0.4."""
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).double()
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()[..., None]
    nan = torch.tensor(math.nan)
    draws = PosteriorSamples(x[0], nan, nan, nan, nan[None], nan, x, weights.log())
    mean, std = draws.mean(), draws.std()
    assert mean.value.item() == pytest.approx(3.0)
    # run sums of w (x − 3): −0.2 − 0.2 = −0.4 and 0 + 0.4: sqrt(2 / 1 · 0.32)
    assert mean.standard_error.item() == pytest.approx(0.8)
    assert std.value.item() == pytest.approx(1.0)
    # of w ((x − 3)² − 1): 0.3 + 0 and −0.3 + 0, over 2 · 1
    assert std.standard_error.item() == pytest.approx(math.sqrt(2 * 0.18) / 2)
    assert [draws.quantile(q).value.item() for q in (0.05, 0.25, 0.5, 0.95)] == [1, 2, 3, 4]


def test_quantiles_are_ordered_and_within_the_particles():
    draws = sampled(mixture(), measured(0.4, 1.0), num_particles=50, num_runs=4)
    at = torch.stack([draws.quantile(q).value for q in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-6)])
    assert (at.diff(dim=0) >= 0).all()
    flat = draws.particles.flatten(0, 1)
    assert torch.equal(at[0], flat.amin(0))
    assert torch.equal(at[-1], flat.amax(0))
    with pytest.raises(ValueError, match="argument 'q': got 1.0; expected a number in"):
        draws.quantile(1.0)
    for q in (0.0, -1.0, math.nan, "words", None, [0.5, 0.9]):
        with pytest.raises(ValueError, match="argument 'q'"):
            draws.quantile(q)


def test_a_single_run_has_no_errors():
    draws = sampled(mixture(), measured(0.4), num_particles=100, num_runs=1)
    assert draws.standard_error.isnan()
    for statistic in (draws.mean(), draws.std(), draws.quantile(0.5)):
        assert statistic.value.isfinite().all()
        assert statistic.standard_error.isnan().all()
    assert not draws.reliable
    repr(draws)


def test_samples_follow_the_weights():
    """Frequencies among 20,000 draws are the weights of the particles, for each posterior by itself."""
    draws = sampled(mixture(), measured(0.4, 2.0), 20_000, num_particles=30, num_runs=2)
    for drawn in (draws.samples, draws.resample(20_000)):
        assert drawn.shape == (20_000, 2, 2)
        for n in range(2):
            particles = draws.particles[:, :, n].flatten(0, 1)
            share = (drawn[:, None, n] == particles).all(-1).double().mean(0)
            torch.testing.assert_close(
                share, draws.log_weights[:, :, n].exp().flatten(), rtol=0, atol=1e-4
            )
    # in random order: halves of the draws are alike
    half = draws.samples[:10_000].mean(0) - draws.samples[10_000:].mean(0)
    assert half.abs().max() < 0.06
    assert draws.resample(3).shape == (3, 2, 2)
    for number in (0, -1, 1.5, "words", None):
        with pytest.raises(ValueError, match="argument 'num_samples'"):
            draws.resample(number)


def test_draws_for_arviz():
    """Groups, dimensions and coordinates; chains of runs whose R-hat is near one."""
    az = pytest.importorskip("arviz")
    one = sampled(mixture(), measured(0.4), num_particles=200, num_runs=4).to_arviz()
    assert one.posterior.x_0.dims == ("chain", "draw", "x_0_dim_0")
    assert dict(one.posterior.sizes) == {"chain": 4, "draw": 200, "x_0_dim_0": 2}
    assert one.evidence.log_evidence.dims == ()
    assert one.evidence.ess_by_timestep.dims == ("timestep",)
    assert one.evidence.timestep.values.tolist() == list(range(1, 9))
    assert (az.rhat(one.posterior).x_0 < 1.1).all()
    draws = sampled(mixture(), measured(0.4, 1.0, 0.0), num_particles=50, num_runs=2)
    several = draws.to_arviz()
    assert several.posterior.x_0.dims == ("chain", "draw", "data", "x_0_dim_0")
    assert several.evidence.ess_by_timestep.dims == ("timestep", "data")
    for name in ("log_evidence", "standard_error", "ess", "pareto_k", "reliable"):
        assert several.evidence[name].dims == ("data",)
        assert several.evidence[name].values.tolist() == getattr(draws, name).tolist()
    chain = several.posterior.x_0.values[1, :, 2]
    possible = draws.particles[1, :, 2].numpy()
    assert {tuple(x) for x in chain.tolist()} <= {tuple(x) for x in possible.tolist()}


def test_what_is_printed():
    draws = sampled(mixture(), measured(0.4), 1234, num_particles=100, num_runs=4)
    text = repr(draws)
    assert text.startswith("PosteriorSamples: 1,234 draws, event shape (2,)\n")
    assert f"{draws.log_evidence:.4f} ± {draws.standard_error:.2g} nats" in text
    assert "4 of 100 particles" in text
    assert f"{draws.ess:.0f} draws at the end" in text
    assert "reliable          yes" in text
    assert "<table" in draws._repr_html_()
    several = sampled(mixture(), measured(0.4, 1.0), num_particles=100, num_runs=4)
    text = repr(several)
    assert "9 draws each of 2 posteriors, event shape (2,)" in text
    assert "2 of 2 posteriors" in text
    assert " to " in text
    statistic = Statistic(torch.tensor(1.25), torch.tensor(0.125))
    assert repr(statistic) == "1.25 ± 0.12"
    assert repr(draws.mean()).startswith("Statistic of shape (2,), largest error ")


def test_reliable_by_each_of_its_conditions():
    draws = sampled(mixture(), measured(0.4), num_particles=100, num_runs=4)
    assert draws.reliable
    for change in (
        {"ess": torch.tensor(9.0)},
        {"ess_by_timestep": draws.ess_by_timestep.clone().index_fill(0, torch.tensor(3), 9.0)},
        {"standard_error": torch.tensor(0.6)},
        {"pareto_k": torch.tensor(0.95)},
        {"standard_error": torch.tensor(math.nan)},
    ):
        assert not draws._replace(**change).reliable


# A single particle.


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_particle_is_uncorrected(kind):
    """Guidance: no evidence, a draw for each run, a result that says so; near the truth, not equal to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = sampled(mixture(), KINDS[kind](0.4), 600, num_particles=1, num_runs=3)
    assert draws.is_biased
    assert not draws.reliable
    assert draws.particles.shape == (600, 1, 2)
    for number in (draws.log_evidence, draws.standard_error, draws.ess, draws.pareto_k):
        assert number.isnan()
    assert draws.ess_by_timestep.isnan().all()
    assert "biased" in repr(draws)
    assert "nats" not in repr(draws)
    torch.testing.assert_close(draws.log_weights, torch.full((600, 1), -math.log(600)).double())
    # every draw once
    assert torch.equal(draws.samples.sort(0).values, draws.particles[:, 0].sort(0).values)
    assert (draws.mean().value - torch.tensor(exact(0.4).mean)).abs().max() < 0.3
    draws.quantile(0.5), draws.to_arviz()  # which work with equal weights


def test_single_particles_of_several_posteriors():
    draws = sampled(mixture(), measured(0.4, 2.0), 50, num_particles=1)
    assert draws.samples.shape == (50, 2, 2)
    assert draws.log_evidence.shape == (2,)
    assert draws.log_evidence.isnan().all()
    assert not draws.reliable.any()
    assert "biased" in repr(draws)


# Common random numbers, and chunks.


def test_the_same_y_twice_is_the_same_posterior_under_common_noise():
    draws = sampled(mixture(), measured(0.4, 0.4), num_particles=40, num_runs=4, common_noise=True)
    assert torch.equal(draws.particles[:, :, 0], draws.particles[:, :, 1])
    assert torch.equal(draws.log_weights[..., 0], draws.log_weights[..., 1])
    assert draws.log_evidence[0] == draws.log_evidence[1]
    other = sampled(mixture(), measured(0.4, 0.4), num_particles=40, num_runs=4)
    assert not torch.equal(other.particles[:, :, 0], other.particles[:, :, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_common_noise_makes_differences_exact(kind):
    """The evidence of each run for two near y: their ratio has a far smaller spread."""
    spread = {}
    for common in (True, False):
        draws = sampled(
            mixture(), KINDS[kind](0.4, 0.42), num_particles=30, num_runs=60, common_noise=common
        )
        log_z = draws.log_weights.logsumexp(1)  # of the runs, up to a constant
        spread[common] = (log_z[:, 0] - log_z[:, 1]).std()
        oracle = exact(0.42).log_evidence - exact(0.4).log_evidence
        difference = draws.log_evidence[1] - draws.log_evidence[0]
        assert abs(difference - oracle) < 4.5 * spread[common] / math.sqrt(60)
    assert spread[True] < 0.3 * spread[False]


def test_runs_are_independent_under_common_noise():
    draws = sampled(mixture(), measured(0.4, 1.0), num_particles=30, num_runs=3, common_noise=True)
    assert not torch.equal(draws.particles[0], draws.particles[1])
    assert len(draws.log_weights.logsumexp(1)[:, 0].unique()) == 3


@pytest.mark.parametrize("columns", [2, 4, 6, 9, 12, 100])
def test_chunks_of_columns_have_the_same_law(columns, monkeypatch):
    """Runs and data in parts: exact, and with the axes where they belong."""
    monkeypatch.setattr(runs.Runs, "_columns", lambda self: columns)
    y = (0.4, -1.0, 2.0)
    draws = sampled(mixture(), measured(*y), num_particles=100, num_runs=4)
    assert draws.particles.shape == (4, 100, 3, 2)
    assert draws.ess_by_timestep.shape == (8, 3)
    for n, value in enumerate(y):
        error = abs(draws.log_evidence[n] - exact(value).log_evidence)
        assert error < 6 * draws.standard_error[n] + 0.01
        # particles belong to their measurement
        near = (draws.particles[:, :, n] @ ROW[0] - exact(value).mean @ ROW[0].numpy()).abs().mean()
        assert near < 1


@pytest.mark.parametrize("columns", [4, 8])
def test_chunks_share_their_numbers_under_common_noise(columns, monkeypatch):
    """One datum after another, two and then one: the same y has the same particles in each chunk."""
    monkeypatch.setattr(runs.Runs, "_columns", lambda self: columns)
    draws = sampled(
        mixture(), measured(0.4, 0.4, 0.4), num_particles=600, num_runs=4, common_noise=True
    )
    for n in (1, 2):
        assert torch.equal(draws.particles[:, :, 0], draws.particles[:, :, n])
        assert torch.equal(draws.log_weights[..., 0], draws.log_weights[..., n])


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_particles_have_the_same_law(rows, kind, monkeypatch):
    monkeypatch.setattr(runs, "ROWS", rows)
    draws = sampled(mixture(4), KINDS[kind](0.4), num_particles=20, num_runs=5)
    assert draws.particles.shape == (5, 20, 2)
    assert abs(draws.log_evidence - exact(0.4).log_evidence) < 5 * draws.standard_error
    whole = [len(x.unique()) for x in (draws.particles[..., 0], draws.log_weights)]
    assert min(whole) > 20


def test_a_small_budget_makes_chunks(monkeypatch):
    """The budget decides, and the result keeps its law."""
    made = []
    chunk = runs.Runs._chunk

    def counted(self, rows, count, bar):
        made.append((rows.stop - rows.start, count))
        return chunk(self, rows, count, bar)

    monkeypatch.setattr(runs.Runs, "_chunk", counted)
    sampled(mixture(4), measured(0.4, 1.0), num_particles=50, num_runs=4)
    assert made == [(2, 4)]
    monkeypatch.setattr(runs, "BUDGET", 2**18)
    made.clear()
    draws = sampled(mixture(4), measured(0.4, 1.0), num_particles=50, num_runs=4)
    assert len(made) > 1
    for n, value in enumerate((0.4, 1.0)):
        assert abs(draws.log_evidence[n] - exact(value).log_evidence) < 6 * draws.standard_error[n]


class Line(nn.Module):
    """A network without weights to speak of."""

    def forward(self, x_t, log_snr):
        return 0.5 * x_t


def wide(size):
    curve = LogSNRSchedule(2, log_snr_max=4.0)
    return DiffusionModel(NeuralDenoiser(Line(), curve, (size,), prediction=DataPrediction()))


WORKS = {
    "rows": (60, LinearGaussian(torch.eye(20, 60), torch.zeros(20), 1.0), {"num_particles": 30}),
    "data": (20, LinearGaussian(torch.ones(1, 20), torch.zeros(9, 1), 1.0), {"num_particles": 40}),
    "function": (400, lambda x: -0.5 * x.square().sum(-1), {"num_particles": 40, "directions": 2}),
    "many rows": (
        80,
        LinearGaussian(torch.eye(65, 80), torch.zeros(65), 1.0),
        {"num_particles": 30},
    ),
}


@pytest.mark.filterwarnings("ignore:argument 'log_likelihood'.*effective")
@pytest.mark.parametrize(
    "work",
    [
        "rows",
        "data",
        "function",
        "many rows",
    ],
)
def test_a_budget_of_memory_holds(work, monkeypatch):
    """Tensors beside the particles that are returned, gradients included; several times it without chunks."""
    budget = 2**21
    monkeypatch.setattr(runs, "BUDGET", budget)
    monkeypatch.setattr(iterative, "BUDGET", budget)
    monkeypatch.setattr(covariance, "BUDGET", budget)
    monkeypatch.setattr(runs, "ROWS", 256)
    size, likelihood, settings = WORKS[work]
    draws = []

    def call():
        draws.append(sampled(wide(size), likelihood, 2, num_runs=16, **settings))

    peak = footprint(call).peak
    results = draws[0].particles.nbytes + draws[0].log_weights.nbytes

    assert peak - 3 * results < budget


# Bad input.


def wrong(log_likelihood, **settings):
    settings = {"num_particles": 30, "num_runs": 2} | settings
    return lambda: sampled(mixture(4), log_likelihood, **settings)


def nan_at_the_end(x):
    """NaN where data are, and not at the probes of the first call."""
    return torch.where(
        x.sum(-1) > 1.2, math.nan, Normal(x.sum(-1), 1.0).log_prob(torch.tensor(1.0))
    )


WRONG = {
    "NaN": (wrong(lambda x: x.sum(-1) * math.nan), "argument 'log_likelihood': got .*NaN"),
    "NaN of some": (wrong(nan_at_the_end), "argument 'log_likelihood': got NaN for .*Return -inf"),
    "flat": (wrong(lambda x: 0 * x.sum(-1)), "flat: its gradient is zero; expected .* depends on x_0"),
    "no gradient": (wrong(lambda x: x.detach().sum(-1)), "without a gradient; expected .*detach"),
    "rounding": (wrong(lambda x: x.sum(-1).round()), "argument 'log_likelihood': got .*gradient"),
    "a single number": (wrong(lambda x: x.sum()), r"got shape \(\) .*; expected a number for each datum"),
    "a number an entry": (wrong(lambda x: x), "argument 'log_likelihood': got shape .*Sum over the entries"),
    "no tensor": (wrong(lambda x: 3.0), "argument 'log_likelihood': got .*no tensor"),
    "an error inside": (wrong(lambda x: x[..., 7]), "argument 'log_likelihood': got IndexError.*expected"),
    "-inf everywhere": (
        wrong(lambda x: torch.where(x.sum(-1) > 1e6, x.sum(-1), -math.inf)), "argument 'log_likelihood': got"
    ),
    "words": (wrong("words"), "argument 'log_likelihood': got a str; expected a function"),
    "a tensor": (wrong(torch.zeros(3)), "argument 'log_likelihood': got a Tensor"),
    "no samples": (lambda: sampled(mixture(4), measured(0.4), 0), "argument 'num_samples': got 0"),
    "no particles": (wrong(measured(0.4), num_particles=0), "argument 'num_particles': got 0"),
    "no runs": (wrong(measured(0.4), num_runs=0), "argument 'num_runs': got 0"),
    "half a run": (wrong(measured(0.4), num_runs=1.5), "argument 'num_runs': got 1.5"),
    "no directions": (wrong(function_of(0.4), directions=0), "argument 'directions': got 0"),
    "exponents of another number": (
        wrong(measured(0.4), tempering=[1.0, 0.5]), "argument 'tempering': got .*for each of 4 timesteps"
    ),
    "a single exponent": (wrong(measured(0.4), tempering=0.5), "argument 'tempering': got"),
    "exponents of zero": (
        wrong(measured(0.4), tempering=[0.0, 1.0, 1.0, 1.0]), r"'tempering': got the value 0; .*\(0, 1\]"
    ),
    "exponents above one": (wrong(measured(0.4), tempering=[2.0, 1.0, 1.0, 1.0]), "got the value 2"),
    "exponents of NaN": (wrong(measured(0.4), tempering=[math.nan, 1.0, 1.0, 1.0]), "argument 'tempering'"),
    "words as exponents": (wrong(measured(0.4), tempering="words"), "argument 'tempering'"),
    "no model": (lambda: sampled("words", measured(0.4)), "argument 'diffusion'"),
    "its program": (lambda: sampled(mixture(4).model, measured(0.4)), "argument 'diffusion'"),
    "another family": (lambda: sampled(HierarchicalVAE((2,), (1,)), measured(0.4)), "argument 'diffusion'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gets_four_beats(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert all(part in str(caught.value) for part in (": got ", "; expected ", ". "))


def test_weights_that_are_drawn_are_refused():
    class Drawn(PyroModule):
        def __init__(self):
            super().__init__()
            self.factor = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x_t, log_snr):
            return self.factor * x_t

    diffusion = DiffusionModel(NeuralDenoiser(Drawn(), schedule(3), (2,)))
    with pytest.raises(ValueError, match="argument 'diffusion': got .*PyroSample"):
        sampled(diffusion, measured(0.4))


def test_few_effective_particles_are_said():
    """A sharp likelihood in a few steps: the number, the timesteps, and the remedies."""
    diffusion = mixture(3)
    with pytest.warns(
        UserWarning, match="argument 'log_likelihood': got .* effective particles"
    ) as said:
        draws = sampled(
            diffusion, lambda x: -2e3 * (x.norm(dim=-1) - 1.0).square(), num_particles=40
        )
    text = str(said[0].message)
    assert f"got {draws.ess_by_timestep.min():.1f} effective particles of a run at t = " in text
    for part in (
        "expected at least ten",
        "more particles",
        "timesteps",
        "tempering=torch.logspace(0, -3, T)",
    ):
        assert part in text
    assert said[0].filename == __file__
    assert not draws.reliable


# What is left behind.


def test_a_seed_decides_everything():
    numbers = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        draws = sampled(mixture(4), measured(0.4), num_particles=30, num_runs=2)
        numbers.append((draws.samples, draws.log_evidence, torch.rand(3)))
    for one, two in zip(numbers[0], numbers[1], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(numbers[0][0], numbers[2][0])
    assert not torch.equal(numbers[0][2], numbers[2][2])


@pytest.mark.parametrize("common", [False, True])
def test_two_calls_are_two_results(common):
    """The global generator advances, with common noise as well."""
    one, two = (
        sampled(mixture(4), measured(0.4, 1.0), num_particles=30, num_runs=2, common_noise=common)
        for _ in range(2)
    )
    assert not torch.equal(one.particles, two.particles)
    assert not torch.equal(one.log_evidence, two.log_evidence)


def neural():
    torch.manual_seed(0)
    network = MLP((2,), hidden_size=8, num_blocks=1, dropout=0.5).double()
    return DiffusionModel(NeuralDenoiser(network, schedule(4), (2,)))


@pytest.mark.filterwarnings("ignore:argument 'log_likelihood'.*effective")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_left_as_it_was(kind):
    """In train mode, without gradients of its parameters; it is read without dropout."""
    diffusion = neural().train()
    for parameter in diffusion.parameters():
        parameter.grad = None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = sampled(diffusion, KINDS[kind](0.4), num_particles=30, num_runs=2)
    assert diffusion.training
    assert diffusion.denoiser.network.training
    assert all(parameter.grad is None for parameter in diffusion.parameters())
    assert all(parameter.requires_grad for parameter in diffusion.parameters())
    torch.manual_seed(1)
    two = sampled(diffusion.eval(), KINDS[kind](0.4), num_particles=30, num_runs=2)
    assert torch.equal(one.particles, two.particles)
    assert not diffusion.training
    assert not one.particles.requires_grad


@pytest.mark.filterwarnings("ignore:argument 'log_likelihood'.*effective")
@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_the_gradients_that_it_needs(kind, mode):
    model = neural()
    with mode():
        draws = sampled(model, KINDS[kind](0.4), num_particles=30, num_runs=2)
        assert torch.is_grad_enabled() is (mode is torch.enable_grad)
    assert not draws.log_evidence.requires_grad


def test_data_that_require_a_gradient_are_refused():
    """No gradient is cut in silence: of a context, of y, of what a function closes over."""
    context = CONTEXT.clone().requires_grad_()
    likelihood = LinearGaussian(FIRST, torch.zeros(3, 1), 1.0)
    with pytest.raises(ValueError, match="require a gradient"):
        sampled(regression(), likelihood, num_particles=30, num_runs=2, context=context)
    y = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="require a gradient"):
        sampled(mixture(3), LinearGaussian(ROW, y, 1.0), num_particles=30, num_runs=2)


def test_nothing_is_left_in_a_program_that_is_traced():
    """No site, no parameter, no effect of outer handlers."""
    diffusion = mixture(3)

    def program():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        return sampled(diffusion, measured(0.4), num_particles=30, num_runs=2)

    trace = poutine.trace(poutine.scale(program, 3.0)).get_trace()
    assert [name for name in trace.nodes if name[0] != "_"] == ["data", "z"]
    assert abs(trace.nodes["_RETURN"]["value"].log_evidence - exact(0.4).log_evidence) < 1
    assert not list(pyro.get_param_store().keys())


def test_a_progress_bar_is_shown_on_long_runs_only(capsys):
    posterior_samples(mixture(3), measured(0.4), 2, num_particles=30, num_runs=2)
    assert capsys.readouterr().err == ""


def test_steps_of_the_progress_bar(monkeypatch):
    """A step for each timestep of each chunk, and none of the rehearsal."""
    bars = []

    class Bar(runs.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})
            self.wanted, self.seen = kwargs.get("total"), 0
            bars.append(self)

        def update(self, n=1):
            self.seen += n

    monkeypatch.setattr(runs, "tqdm", Bar)
    monkeypatch.setattr(runs.Runs, "_columns", lambda self: 3)
    sampled(mixture(5), measured(0.4, 1.0), num_particles=30, num_runs=3)
    assert [(bar.wanted, bar.seen) for bar in bars] == [(10, 10)]


def test_modules_of_the_room_are_what_they_say():
    assert twisted.Path.__doc__
    assert {"samples", "log_evidence", "standard_error", "ess", "ess_by_timestep"} <= set(
        PosteriorSamples._fields
    )
