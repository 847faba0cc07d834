"""Missing entries given observed ones under the joint model, against closed forms and sums."""

import math

import numpy as np
import pyro
import pytest
import torch
from enumerated import all_values, coupled, discrete, masses_of_states, masses_of_two_entries
from oracles import MixturePosterior
from pyro.distributions.transforms import permute
from torch.distributions import MultivariateNormal, Normal, Transform, constraints
from torch.distributions.transforms import AffineTransform, StackTransform, StickBreakingTransform

from pyro_diffusion import (
    CategoricalLikelihood,
    DataPrediction,
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    Logit,
    LogSNRSchedule,
    MonotoneSchedule,
    NeuralDenoiser,
    Standardize,
    impute,
    smc_evidence,
)
from pyro_diffusion.given import Given
from pyro_diffusion.inference import PosteriorSamples, runs
from pyro_diffusion.inference.imputation import Observed
from pyro_diffusion.reading import footprint, reading

NAN = math.nan
MEAN = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5, 1.0, 0.2], dtype=torch.float64)
COVARIANCE = 0.9 ** (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs().double()
MASKS = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]).bool()


def imputed(diffusion, x_0, mask, num_samples=9, **settings):
    return impute(diffusion, x_0, mask, num_samples, progress=False, **settings)


def schedule(num_timesteps, log_snr_max=8.0, log_snr_min=-16.0):
    return LogSNRSchedule(num_timesteps, log_snr_max=log_snr_max, log_snr_min=log_snr_min)


def gaps(x_0, mask):
    return torch.where(mask, x_0, NAN)


def conditionals(x_0, mask, weights, means, covariances):
    """log p(x_obs), and the mean and standard deviation of all entries given them, row by row in numpy."""
    found = []
    for x, observed in zip(x_0.numpy(), mask.numpy(), strict=True):
        rows = np.eye(len(x))[observed]
        exact = MixturePosterior.of(
            weights, means, covariances, rows, x[observed], np.zeros((len(rows),) * 2)
        )
        std = np.sqrt(np.diag(exact.covariance).clip(0))
        found.append((exact.log_evidence, exact.mean, std))
    return [torch.tensor(np.array(values)) for values in zip(*found, strict=True)]


def check(draws, exact, errors=5.0, bias=0.0):
    """Evidence, means and standard deviations, each within its errors."""
    log_p, mean, std = exact
    assert ((draws.log_evidence - log_p).abs() < errors * draws.standard_error + 1e-6 + bias).all()
    for statistic, value in ((draws.mean(), mean), (draws.std(), std)):
        room = errors * statistic.standard_error + 1e-6 + bias
        assert ((statistic.value - value).abs() < room).all()


# Oracles.


@pytest.mark.parametrize("num_timesteps", [1, 3, 40])
@pytest.mark.parametrize("curves", [False, True], ids=["one curve", "curves"])
def test_independent_entries_have_constant_weights(num_timesteps, curves):
    """log p(x_obs) to rounding for any number of steps; gaps are drawn from their own law."""
    curve = schedule(num_timesteps, log_snr_min=-40.0)
    if curves:
        curve = MonotoneSchedule(
            num_timesteps, log_snr_max=9.0, log_snr_min=-40.0, event_shape=(4,)
        )
        with torch.no_grad():
            curve.interior += torch.linspace(-0.5, 0.5, 4)[:, None] * torch.arange(
                curve.num_pieces + 1
            )
    denoiser = GaussianDenoiser(MEAN, STD, curve)
    x_0 = denoiser.data_distribution.sample((5,))
    draws = imputed(
        DiffusionModel(denoiser), gaps(x_0, MASKS), MASKS, num_particles=50, num_runs=10
    )
    exact = (Normal(MEAN, STD).log_prob(x_0) * MASKS).sum(-1)
    torch.testing.assert_close(draws.log_evidence, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(draws.ess, torch.full((5,), 500.0).double(), rtol=1e-6, atol=0)
    assert draws.standard_error.max() < 1e-6
    assert draws.reliable.all()
    check(draws, (exact, torch.where(MASKS, x_0, MEAN), torch.where(MASKS, 0, STD)))


def test_a_correlated_gaussian():
    """Every row has its own mask; log p(x_obs), conditional means and standard deviations."""
    denoiser = GaussianDenoiser.from_covariance(MEAN, COVARIANCE, schedule(40))
    x_0 = denoiser.data_distribution.sample((5,))
    draws = imputed(DiffusionModel(denoiser), gaps(x_0, MASKS), MASKS, num_particles=60)
    exact = conditionals(x_0, MASKS, [1.0], MEAN[None].numpy(), COVARIANCE[None].numpy())
    check(draws, exact, bias=1e-3)
    assert (draws.ess > 0.8 * 960).all()
    assert draws.reliable.all()
    # With nothing missing there is nothing to draw: log p(x_0), without an error.
    whole = denoiser.data_distribution.log_prob(x_0[4])
    assert draws.log_evidence[4].item() == pytest.approx(whole.item(), abs=1e-3)
    assert draws.standard_error[4] < 1e-6


WEIGHTS = [0.3, 0.5, 0.2]
MEANS = torch.tensor([[-2.0, 0.5, 0.0], [1.5, 1.0, -1.0], [0.0, -2.0, 1.0]], dtype=torch.float64)
STDS = torch.tensor([[0.5, 0.3, 1.0], [0.4, 0.8, 0.6], [0.6, 0.4, 0.5]], dtype=torch.float64)


def mixture(num_timesteps=25):
    return GaussianMixtureDenoiser(WEIGHTS, MEANS, STDS, schedule(num_timesteps))


def test_a_mixture():
    """Gaps with two modes, whose weights come out; one row of each pattern."""
    x_0 = torch.tensor([[-0.5, 0.6, 0.2], [1.0, -1.0, 0.0], [0.2, 0.5, -0.5]]).double()
    mask = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 0]]).bool()
    covariances = torch.diag_embed(STDS**2).numpy()
    exact = conditionals(x_0, mask, WEIGHTS, MEANS.numpy(), covariances)
    draws = imputed(DiffusionModel(mixture()), gaps(x_0, mask), mask, num_particles=150)
    check(draws, exact)
    assert draws.reliable.all()


def test_quantiles_of_a_gap():
    denoiser = GaussianDenoiser.from_covariance(MEAN[:2], COVARIANCE[:2, :2], schedule(30))
    x_0, mask = torch.tensor([[1.0, NAN]]).double(), torch.tensor([[True, False]])
    draws = imputed(DiffusionModel(denoiser), x_0, mask, num_particles=200)
    law = Normal(-1.0 + 0.9 * 0.7, math.sqrt(1 - 0.81))
    for q in (0.1, 0.5, 0.9):
        found = draws.quantile(q)
        exact = law.icdf(torch.tensor(q)).item()
        assert abs(found.value[0, 1] - exact) < 4.5 * found.standard_error[0, 1]
        assert found.value[0, 0] == 1
        assert found.standard_error[0, 0] == 0


# Units.


def test_standardised_data():
    """The density of observed entries is in the user's units, and so are the draws."""
    mean, std = torch.tensor([300.0, -5.0]).double(), torch.tensor([20.0, 0.1]).double()
    denoiser = GaussianDenoiser.from_covariance(
        torch.zeros(2).double(), COVARIANCE[:2, :2], schedule(30)
    )
    diffusion = DiffusionModel(denoiser, transform=Standardize(mean, std))
    x_0, mask = torch.tensor([[310.0, NAN], [NAN, -5.2], [290.0, -5.0]]).double(), None
    mask = ~x_0.isnan()
    whole = x_0.nan_to_num()
    covariance = torch.outer(std, std) * COVARIANCE[:2, :2]
    exact = conditionals(whole, mask, [1.0], mean[None].numpy(), covariance[None].numpy())
    check(imputed(diffusion, x_0, mask, num_particles=80), exact, bias=1e-3)


@pytest.mark.parametrize("kind", ["logit", "one for each entry"])
def test_transforms_that_bend(kind):
    """Shares in (0, 1), of all entries or of the first: the Jacobian of the observed entries alone."""
    denoiser = GaussianDenoiser.from_covariance(
        torch.zeros(2).double(), COVARIANCE[:2, :2], schedule(30)
    )
    transform = Logit()
    if kind == "one for each entry":
        transform = StackTransform([Logit(), AffineTransform(1.0, 0.5).inv], dim=-1)
    diffusion = DiffusionModel(denoiser, transform=transform)
    inside = torch.tensor([[0.7, -0.3], [-1.0, 0.4], [0.2, 0.6]]).double()
    x_0, mask = transform.inv(inside), torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()
    draws = imputed(diffusion, gaps(x_0, mask), mask, num_particles=100)
    log_p, mean, _ = conditionals(
        inside, mask, [1.0], np.zeros((1, 2)), COVARIANCE[None, :2, :2].numpy()
    )
    volume = transform.log_abs_det_jacobian(x_0, inside)
    exact = log_p + (volume * mask).sum(-1)
    assert ((draws.log_evidence - exact).abs() < 4.5 * draws.standard_error + 1e-3).all()
    # Medians go through a transform that increases.
    median = transform.inv(mean)
    found = draws.quantile(0.5)
    room = 4.5 * found.standard_error + 1e-3
    assert ((found.value - median).abs() < room)[:2].all()
    assert torch.equal(draws.particles[..., mask], x_0[mask].expand(16, 100, -1))


# Whole numbers, bits and categories, by sums over all data.


def summed(log_p, values, x_0, mask):
    """log p(x_obs), means and standard deviations from the masses of all ``values``."""
    found = []
    for x, observed in zip(x_0, mask, strict=True):
        fits = ((values == x) | ~observed).all(-1)
        kept = log_p.masked_fill(~fits, -math.inf)
        share = kept.softmax(0)[:, None]
        mean = (share * values).sum(0)
        found.append((kept.logsumexp(0), mean, (share * (values - mean).square()).sum(0).sqrt()))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", ["bits", "enumerated bits", "categories"])
def test_discrete_states(kind):
    """Joint masses of bits and categories that depend on one another."""
    diffusion, values = discrete(kind)
    log_p = masses_of_states(diffusion, values)
    size = values.shape[-1]
    mask = all_values(2, size)[1:].bool()  # every pattern
    x_0 = values[log_p.argmax()].expand(len(mask), size).clone()
    x_0[0] = values[log_p.argsort()[len(values) // 2]]
    draws = imputed(diffusion, gaps(x_0, mask), mask, num_particles=200)
    check(draws, summed(log_p, values, x_0, mask))
    assert torch.equal(draws.samples[:, mask], x_0[mask].expand(9, -1))
    assert (draws.standard_error < 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.long, torch.uint8])
def test_data_of_whole_numbers_may_be_integers(dtype):
    """What stands in the gaps of integers is ignored."""
    diffusion, values = discrete("categories")
    log_p = masses_of_states(diffusion, values)
    x_0, mask = torch.tensor([[2, 99], [0, 1]]).to(dtype), torch.tensor([[1, 0], [1, 1]]).bool()
    draws = imputed(diffusion, x_0, mask, num_particles=200)
    exact = summed(log_p, values, x_0.double(), mask)
    check(draws, exact)
    assert (draws.samples[:, 0, 0] == 2).all()
    assert set(draws.samples[:, 0, 1].tolist()) <= {0, 1, 2}


COUPLED = {
    "levels by logits": all_values(3, 2), "levels": all_values(3, 2), "counts": all_values(20, 2),
    "bits by threshold": all_values(2, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", COUPLED)
def test_whole_numbers_with_real_states(kind):
    """Entries coupled by a network, whose joint masses a grid of states knows."""
    diffusion, values = coupled(kind), COUPLED[kind]
    log_p = masses_of_two_entries(diffusion, values)
    assert log_p.logsumexp(0).item() == pytest.approx(0, abs=1e-3)
    x_0 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    mask = torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()
    draws = imputed(diffusion, gaps(x_0, mask), mask, num_particles=200)
    check(draws, summed(log_p, values, x_0, mask))
    assert torch.equal(draws.samples[:, mask].double(), x_0[mask].expand(9, -1))


def test_real_numbers_of_any_network():
    """A joint density by a network that is not exact: p(x_0) is its chain's own, on a grid."""
    diffusion = coupled("real")
    line = torch.linspace(-5, 5, 101).double()
    x_0 = torch.tensor([[0.5, NAN], [NAN, -0.4], [0.5, -0.4]]).double()
    mask = ~x_0.isnan()
    first = torch.stack((torch.full((101,), 0.5).double(), line), -1)
    second = torch.stack((line, torch.full((101,), -0.4).double()), -1)
    log_p = masses_of_two_entries(
        diffusion, torch.cat((first, second, torch.tensor([[0.5, -0.4]]).double()))
    )
    draws = imputed(diffusion, x_0, mask, num_particles=300)
    exact = torch.stack((
        log_p[:101].logsumexp(0) + math.log(0.1), log_p[101:202].logsumexp(0) + math.log(0.1), log_p[202]
    ))  # fmt: skip
    assert ((draws.log_evidence - exact).abs() < 4.5 * draws.standard_error + 1e-4).all()
    mean = (log_p[:101].softmax(0) * line).sum()
    assert abs(draws.mean().value[0, 1] - mean) < 4.5 * draws.mean().standard_error[0, 1]


def test_categories_with_real_states():
    """One-hot states of three numbers an entry, against frequencies of 200,000 draws of the model."""
    torch.manual_seed(0)
    curve = schedule(4, log_snr_max=1.0, log_snr_min=-6.0)
    mean, std = 0.3 * torch.randn(2, 3).double(), 0.5 + torch.rand(2, 3).double()
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, curve), CategoricalLikelihood(3, 0.6))
    numbers = diffusion.sample(200_000)
    x_0 = torch.tensor([[1.0, NAN], [NAN, 2.0], [0.0, 2.0]]).double()
    mask = ~x_0.isnan()
    draws = imputed(diffusion, x_0, mask, num_particles=200)
    for n in range(3):
        share = ((numbers == x_0[n]) | ~mask[n]).all(-1).double().mean()
        room = 4 * draws.standard_error[n] + 4 / math.sqrt(200_000 * share)
        assert abs(draws.log_evidence[n] - share.log()) < room
    of_gap = draws._replace(particles=torch.nn.functional.one_hot(draws.particles[..., 0, 1].long(), 3),
                            log_weights=draws.log_weights[..., 0]).mean()  # fmt: skip
    frequencies = torch.bincount(numbers[numbers[:, 0] == 1, 1].long(), minlength=3)
    share = frequencies / frequencies.sum()
    assert ((of_gap.value - share).abs() < 4 * of_gap.standard_error + 0.01).all()


# What a joint model means: conditional densities integrate to one.


def integral(log_joint, log_condition, step):
    return (log_joint - log_condition).exp().sum().item() * step


def test_conditional_densities_integrate_to_one_and_masked_evidences_do_not():
    """p(x_a ∣ x_b) over a line of x_a for ρ = 0.9, beside the difference of two masked evidences.

    The chain of the observed part is another model: here x_b without x_a has a standard deviation that the
    denoiser's wrong estimate of the gap gives it.
    """
    covariance = COVARIANCE[:2, :2]
    denoiser = GaussianDenoiser.from_covariance(torch.zeros(2).double(), covariance, schedule(30))
    diffusion = DiffusionModel(denoiser)
    x_b, line = 1.5, torch.linspace(-2, 4, 31).double()
    x_0 = torch.stack((line, torch.full_like(line, x_b)), -1)
    joint = imputed(diffusion, x_0, torch.ones_like(x_0).bool(), num_particles=30, num_runs=2)
    alone = imputed(
        diffusion,
        torch.tensor([[NAN, x_b]]).double(),
        torch.tensor([[False, True]]),
        num_particles=200,
    )
    assert integral(joint.log_evidence, alone.log_evidence, 0.2) == pytest.approx(1, abs=0.02)
    exact = Normal(0.9 * x_b, math.sqrt(0.19)).log_prob(line)
    ours = joint.log_evidence - alone.log_evidence
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="entries depend on one another"):
        smc_evidence(diffusion, x_0, num_particles=30, mask=torch.ones_like(x_0).bool())


class Regressed(torch.nn.Module):
    """x̂_0 = A(λ) x, a linear denoiser with one matrix for each of a few log-SNRs: it can be exact."""

    def __init__(self, log_snrs):
        super().__init__()
        self.log_snrs = log_snrs
        self.matrix = torch.nn.Parameter(0.5 * torch.eye(2).double().repeat(len(log_snrs), 1, 1))

    def forward(self, x_t, log_snr):
        nearest = (log_snr[:, None] - self.log_snrs).abs().argmin(1)
        return (self.matrix[nearest] @ x_t.unsqueeze(-1)).squeeze(-1)


def fitted(num_timesteps=25):
    """A denoiser of 20,000 correlated data by least squares at every timestep: a fitted model."""
    torch.manual_seed(0)
    curve = schedule(num_timesteps, log_snr_min=-8.0)
    x_0 = MultivariateNormal(torch.zeros(2).double(), COVARIANCE[:2, :2]).sample((20_000,))
    network = Regressed(curve.log_snr(torch.arange(1, num_timesteps + 1)))
    for t in range(1, num_timesteps + 1):
        x_t = curve.signal(t) * x_0 + curve.noise(t) * torch.randn_like(x_0)
        network.matrix.data[t - 1] = torch.linalg.lstsq(x_t, x_0).solution.T
    return DiffusionModel(NeuralDenoiser(network, curve, (2,), prediction=DataPrediction()))


def test_conditional_densities_of_a_fitted_model():
    """Its conditionals integrate to one; a masked evidence is off, and the difference does not."""
    diffusion = fitted()
    x_b, line = 1.5, torch.linspace(-2.5, 4.75, 30).double()
    x_0 = torch.stack((line, torch.full_like(line, x_b)), -1)
    whole, gap = torch.ones_like(x_0).bool(), torch.tensor([[False, True]])
    joint = imputed(diffusion, x_0, whole, num_particles=50, num_runs=6)
    alone = imputed(diffusion, torch.tensor([[NAN, x_b]]).double(), gap, num_particles=150)
    assert integral(joint.log_evidence, alone.log_evidence, 0.25) == pytest.approx(1, abs=0.03)
    # p(x_0) is the same number by another estimator.
    other = smc_evidence(diffusion, x_0[13:17], num_particles=150)
    error = (joint.log_evidence[13:17] - other.log_evidence).abs()
    assert (error < 4 * (joint.standard_error[13:17] + other.standard_error) + 0.01).all()
    masked = smc_evidence(
        diffusion, torch.tensor([[0.0, x_b]]).double(), num_particles=150, mask=gap
    )
    off = masked.log_evidence - Normal(0.0, 1.0).log_prob(torch.tensor(x_b))
    assert abs(alone.log_evidence - Normal(0.0, 1.0).log_prob(torch.tensor(x_b))) < 0.1
    assert abs(off) > 0.3
    assert abs(integral(joint.log_evidence, masked.log_evidence, 0.25) - 1) > 0.2


# Shapes, and what stays as it is.


def image(num_timesteps=10, dtype=torch.float32):
    return DiffusionModel(
        GaussianDenoiser(torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3), schedule(num_timesteps))
    )


def test_shapes_and_types():
    """The axis of data is always there; float32 data stay float32, bit for bit."""
    mask = torch.rand(4, 2, 3) < 0.5
    mask[:, 0, 0] = True
    x_0 = torch.randn(4, 2, 3)
    draws = imputed(image(), gaps(x_0, mask), mask, 7, num_particles=30, num_runs=3)
    assert isinstance(draws, PosteriorSamples)
    assert draws.samples.shape == (7, 4, 2, 3)
    assert draws.particles.shape == (3, 30, 4, 2, 3)
    assert draws.log_weights.shape == (3, 30, 4)
    assert draws.ess_by_timestep.shape == (10, 4)
    assert draws.log_evidence.shape == draws.reliable.shape == draws.pareto_k.shape == (4,)
    assert draws.mean().value.shape == draws.quantile(0.5).value.shape == (4, 2, 3)
    assert draws.samples.dtype == torch.float32
    assert torch.equal(draws.samples[:, mask], x_0[mask].expand(7, -1))
    assert torch.equal(draws.particles[:, :, mask], x_0[mask].expand(3, 30, -1))
    assert draws.samples.isfinite().all()
    assert (draws.samples[:, ~mask].std(0) > 0).all()
    assert draws.resample(3).shape == (3, 4, 2, 3)
    one = imputed(image(), x_0[:1], mask[:1], num_particles=30, num_runs=2)
    assert one.log_evidence.shape == (1,)
    assert "each of 1 posterior," in repr(one)


def test_what_stands_in_a_gap_does_not_matter():
    """NaN, a number, infinity: the same draws with the same seed; the caller's data stay as they are."""
    mask = torch.tensor([[[1, 0, 1], [0, 1, 0]]]).bool()
    x_0, found = torch.randn(1, 2, 3), []
    for value in (NAN, 0.0, 1e30, math.inf):
        given = torch.where(mask, x_0, value)
        kept = given.clone()
        pyro.set_rng_seed(1)
        found.append(imputed(image(4), given, mask, num_particles=30, num_runs=2))
        assert torch.equal(given.nan_to_num(), kept.nan_to_num())
    for other in found[1:]:
        assert torch.equal(other.samples, found[0].samples)
        assert torch.equal(other.log_evidence, found[0].log_evidence)


def test_a_row_does_not_depend_on_the_others():
    """Common random numbers: a row alone has the numbers that it has among others."""
    denoiser = GaussianDenoiser.from_covariance(MEAN, COVARIANCE, schedule(10))
    x_0 = denoiser.data_distribution.sample((5,))
    found = []
    for rows in (slice(None), slice(1, 2)):
        pyro.set_rng_seed(1)
        found.append(
            imputed(
                DiffusionModel(denoiser),
                gaps(x_0, MASKS)[rows],
                MASKS[rows],
                num_particles=60,
                num_runs=8,
                common_noise=True,
            )
        )
    whole, one = found
    difference = abs(whole.log_evidence[1] - one.log_evidence[0])
    assert difference < 4 * (whole.standard_error[1] + one.standard_error[0])
    twice = imputed(
        DiffusionModel(denoiser), gaps(x_0, MASKS)[[1, 1]], MASKS[[1, 1]], num_particles=60,
        num_runs=2, common_noise=True,
    )  # fmt: skip
    assert torch.equal(twice.particles[:, :, 0], twice.particles[:, :, 1])
    assert twice.log_evidence[0] == twice.log_evidence[1]


@pytest.mark.parametrize("columns", [8, 16])
def test_chunks_of_rows(columns, monkeypatch):
    """Rows with more and with fewer gaps in chunks of one and of two; the numbers are exact."""
    monkeypatch.setattr(runs.Runs, "_columns", lambda self: columns)
    denoiser = GaussianDenoiser(MEAN, STD, schedule(5, log_snr_min=-40.0))
    x_0 = denoiser.data_distribution.sample((5,))
    draws = imputed(DiffusionModel(denoiser), gaps(x_0, MASKS), MASKS, num_particles=30, num_runs=8)
    exact = (Normal(MEAN, STD).log_prob(x_0) * MASKS).sum(-1)
    torch.testing.assert_close(draws.log_evidence, exact, rtol=0, atol=1e-6)
    assert torch.equal(draws.samples[:, MASKS], x_0[MASKS].expand(9, -1))


@pytest.mark.parametrize("kind", ["bits", "categories"])
def test_chunks_of_discrete_rows(kind, monkeypatch):
    monkeypatch.setattr(runs.Runs, "_columns", lambda self: 16)
    diffusion, values = discrete(kind)
    log_p = masses_of_states(diffusion, values)
    x_0, mask = values[[0, -1, 3]], torch.ones(3, values.shape[-1]).bool()
    mask[:, -1] = False
    draws = imputed(diffusion, gaps(x_0, mask), mask, num_particles=200)
    check(draws, summed(log_p, values, x_0, mask))


def test_a_context_for_each_row():
    """x ∣ c ~ N(W c + b, s²): log p(x_obs ∣ c), row by row, and with one context for all."""
    weight, bias = (
        torch.tensor([[1.0, -0.5], [0.3, 0.8]]).double(),
        torch.tensor([0.2, -1.0]).double(),
    )
    std = torch.tensor([0.5, 1.0]).double()
    diffusion = DiffusionModel(GaussianDenoiser.from_regression(weight, bias, std, schedule(6)))
    context = torch.tensor([[0.5, 1.0], [-1.0, 0.2], [0.0, 0.3]]).double()
    x_0 = torch.tensor([[0.1, NAN], [NAN, 0.0], [0.3, -1.0]]).double()
    mask = ~x_0.isnan()
    for given in (context, context[:1]):
        draws = imputed(diffusion, x_0, mask, num_particles=100, num_runs=4, context=given)
        mean = (given @ weight.T + bias).expand(3, 2)
        exact = (Normal(mean, std).log_prob(x_0.nan_to_num()) * mask).sum(-1)
        torch.testing.assert_close(draws.log_evidence, exact, rtol=0, atol=1e-2)
        check(
            draws,
            (exact, torch.where(mask, x_0.nan_to_num(), mean), torch.where(mask, 0, std)),
            bias=1e-2,
        )


def test_a_single_particle_is_uncorrected():
    mask = torch.tensor([[[1, 0, 1], [0, 1, 0]]]).bool()
    draws = imputed(image(4), torch.randn(1, 2, 3), mask, 20, num_particles=1)
    assert draws.is_biased
    assert draws.log_evidence.isnan().all()
    assert not draws.reliable.any()
    assert draws.samples.shape == (20, 1, 2, 3)


def test_a_model_with_many_observed_entries():
    """More than sixty-four rows go by conjugate gradients; independent entries stay exact to a hundredth."""
    mean, std = torch.zeros(80).double(), torch.linspace(0.5, 1.5, 80).double()
    denoiser = GaussianDenoiser(mean, std, schedule(20, log_snr_min=-10.0))
    x_0 = std * torch.randn(2, 80).double()
    mask = torch.ones(2, 80).bool()
    mask[:, :5] = False
    draws = imputed(DiffusionModel(denoiser), gaps(x_0, mask), mask, num_particles=60, num_runs=8)
    exact = (Normal(mean, std).log_prob(x_0) * mask).sum(-1)
    assert ((draws.log_evidence - exact).abs() < 4.5 * draws.standard_error + 0.02).all()
    assert (draws.standard_error < 0.2).all()


# Bad input.


def call(x_0, mask, **settings):
    settings = {"num_particles": 30, "num_runs": 2} | settings
    return lambda: imputed(
        DiffusionModel(GaussianDenoiser(MEAN, STD, schedule(4))), x_0, mask, **settings
    )


X_0, SEEN = torch.zeros(2, 4).double(), torch.ones(2, 4).bool()
WRONG = {
    "a mask of numbers": (call(X_0, torch.ones(2, 4)), "argument 'mask': got torch.float32.*mask.bool"),
    "a mask of one row": (call(X_0, SEEN[0]), r"argument 'mask': got torch.bool of shape \(4,\)"),
    "words as a mask": (call(X_0, "words"), "argument 'mask'"),
    "no mask": (call(X_0, None), "argument 'mask'"),
    "an empty row": (
        call(X_0, torch.tensor([[True] * 4, [False] * 4])), "argument 'mask': got 1 of 2 data without any"
    ),
    "gaps that are observed": (
        call(torch.full((2, 4), NAN), SEEN), "argument 'mask': got 8 NaN .* marks as observed"
    ),
    "an inverted mask": (
        call(torch.tensor([[NAN, 0.0, 0.0, 0.0]]), torch.tensor([[True, False, False, False]])), "inverted"
    ),
    "data of another shape": (call(torch.zeros(2, 3), torch.ones(2, 3).bool()), "got .*expected"),
    "a datum without an axis": (call(X_0[0], SEEN[0]), "got .*expected"),
    "no data": (call(None, SEEN), "argument 'x_0'"),
    "words as data": (call("words", SEEN), "argument 'x_0'"),
    "data that need a gradient": (call(X_0.clone().requires_grad_(), SEEN), "require a gradient"),
    "no samples": (call(X_0, SEEN, num_samples=0), "argument 'num_samples'"),
    "no particles": (call(X_0, SEEN, num_particles=0), "argument 'num_particles'"),
    "no runs": (call(X_0, SEEN, num_runs=0), "argument 'num_runs'"),
    "a context of none": (call(X_0, SEEN, context=torch.zeros(2, 1)), "argument 'context'"),
    "no model": (lambda: imputed("words", X_0, SEEN), "argument 'diffusion'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gets_four_beats(name):
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        wrong()
    assert all(part in str(caught.value) for part in (": got ", "; expected ", ". "))


class Turned(Transform):
    """A rotation: every entry of the chain is a sum of entries of the data."""

    bijective = True
    domain = codomain = constraints.real_vector

    def _call(self, x):
        return torch.stack((x[..., 0] - x[..., 1], x[..., 0] + x[..., 1]), -1) / math.sqrt(2)

    def _inverse(self, y):
        return torch.stack((y[..., 0] + y[..., 1], y[..., 1] - y[..., 0]), -1) / math.sqrt(2)

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros(x.shape[:-1])


MIXING = {"permutation": permute(2, torch.tensor([1, 0])), "rotation": Turned()}


@pytest.mark.parametrize("name", MIXING)
def test_transforms_that_mix_entries_are_refused(name):
    """An observed entry of the user's data would be none of the chain's."""
    denoiser = GaussianDenoiser(MEAN[:2], STD[:2], schedule(4))
    diffusion = DiffusionModel(denoiser, transform=MIXING[name])
    x_0, mask = torch.zeros(1, 2).double(), torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="argument 'diffusion': got .* mixes the entries"):
        imputed(diffusion, x_0, mask, num_particles=30, num_runs=2)


def test_a_transform_to_fewer_entries_is_refused():
    diffusion = DiffusionModel(
        GaussianDenoiser(MEAN.float(), STD.float(), schedule(4)),
        transform=StickBreakingTransform().inv,
    )
    x_0, mask = torch.full((1, 5), 0.2), torch.tensor([[True] * 4 + [False]])
    with pytest.raises(ValueError, match="argument 'mask': got shape .*; expected every entry"):
        imputed(diffusion, x_0, mask, num_particles=30, num_runs=2)


def test_the_choice_of_a_solver_holds_the_rows_of_no_datum():
    """The observed entries of 256 data as rows of a matrix would take 20 MB."""
    denoiser = GaussianDenoiser(torch.zeros(100).double(), torch.ones(100).double(), schedule(2))
    diffusion, x_0 = DiffusionModel(denoiser), torch.zeros(256, 100).double()
    with reading(diffusion):
        target = Observed(diffusion, x_0, torch.ones_like(x_0, dtype=torch.bool))
        settings = {"num_particles": 2, "num_runs": 2, "given": Given(), "exponents": torch.ones(3)}
        settings |= {"common_noise": False, "progress": False}
        made = footprint(lambda: runs.Runs(diffusion, target, 5, **settings))
    assert made.peak < 10e6
    assert runs.Runs(diffusion, target, 5, **settings).has_many
