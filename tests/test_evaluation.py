"""The bound to an asked-for error: right on average, as exact as asked, for few rows."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from test_bernoulli import enumerated_bound
from test_given import conditional, data, log_p

from pyro_diffusion import (
    MLP,
    BernoulliDiffusion,
    DataPrediction,
    DiffusionModel,
    EnumeratedDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    HierarchicalVAE,
    LadderEncoder,
    LevelPrediction,
    LinearDecaySchedule,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    OptimalVariance,
    PosteriorVariance,
    Standardize,
    elbo_terms,
    evaluate_bound,
    summary,
)
from pyro_diffusion.bounds.plan import GroupMoments, Timesteps
from pyro_diffusion.bounds.pooled import FREEDOM, Pooled, Stage
from pyro_diffusion.bounds.rows import Rows
from pyro_diffusion.chains.time import Time
from pyro_diffusion.given import Given
from pyro_diffusion.likelihoods import GaussianLikelihood
from pyro_diffusion.processes import GaussianProcess


class Zeros(torch.nn.Module):
    """A network that has not learned anything."""

    def __init__(self, *shape):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x_t, log_snr):
        return self.bias.expand(len(x_t), *self.bias.shape)


def gaussian(num_timesteps, std=(0.5, 2.0), scale=1.0):
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=12, log_snr_min=-14)
    mean = torch.tensor([0.3, -0.5], dtype=torch.float64)
    return GaussianDenoiser(mean, scale * torch.tensor(std, dtype=torch.float64), schedule)


@pytest.mark.parametrize("num_timesteps", [1, 2, 5, 50])
def test_whole_paths_are_exact_where_the_denoiser_is(num_timesteps):
    diffusion = DiffusionModel(gaussian(num_timesteps))
    law = diffusion.denoiser.data_distribution
    x_0 = law.sample((40,))
    result = evaluate_bound(diffusion, x_0, standard_error=1e-3)
    torch.testing.assert_close(result.elbo, law.log_prob(x_0), atol=5e-3, rtol=0)
    assert result.mean().monte_carlo_error < 1e-3
    if num_timesteps > 1:
        assert result.estimator in ("path", "control variate")
        assert not len(result.shares)


def test_kernels_without_a_formula_are_summed_by_log_ratios():
    schedule = LogSNRSchedule(20, log_snr_max=12, log_snr_min=-14)
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser([0.3, 0.7], means, 0.4, schedule)
    x_0 = denoiser.data_distribution.sample((40,))
    result = evaluate_bound(DiffusionModel(denoiser), x_0, standard_error=1e-3)
    torch.testing.assert_close(
        result.elbo, denoiser.data_distribution.log_prob(x_0), atol=5e-3, rtol=0
    )


class HeavyTails(GaussianProcess):
    """Noise whose KL to the prior has no formula."""

    def noised(self, x_0, log_snr):
        normal = super().noised(x_0, log_snr).base_dist
        return dist.StudentT(9.0, normal.loc, normal.scale).to_event(1)


class HeavyTailed(GaussianDenoiser):
    """A denoiser of such states."""

    @property
    def process(self):
        return HeavyTails(self.schedule, self.event_shape)


def test_a_prior_term_without_a_formula_is_refused():
    """A single draw of it would be part of no error."""
    mean, std = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    diffusion = DiffusionModel(HeavyTailed(mean, std, LogSNRSchedule(5)))
    with pytest.raises(ValueError, match="site x_T: got no formula"):
        evaluate_bound(diffusion, mean.expand(3, 2), standard_error=0.1)


@pytest.mark.parametrize("num_timesteps", [50, math.inf])
def test_error_is_honest_and_met(num_timesteps):
    """40 evaluations of one data set: z-scores of unit variance around a truth that is known otherwise."""
    pyro.set_rng_seed(1)
    diffusion = DiffusionModel(gaussian(50, scale=1.1))
    x_0 = gaussian(50).data_distribution.sample((60,))
    if num_timesteps == math.inf:
        truth, error = diffusion.denoiser.data_distribution.log_prob(x_0).mean().item(), 0.0
    else:
        terms = elbo_terms(
            diffusion.model, diffusion.guide, x_0, num_particles=100, progress=False
        )  # log-ratios along paths: quiet, for the denoiser is nearly exact
        truth, error = terms.mean()[:2]
    asked, z = 0.4, []
    for _ in range(40):
        result = evaluate_bound(diffusion, x_0, standard_error=asked, num_timesteps=num_timesteps)
        assert result.mean().monte_carlo_error <= asked
        assert result.estimator == "timesteps"
        z.append((result.mean().value - truth) / math.hypot(result.mean().monte_carlo_error, error))
    z = torch.tensor(z)
    assert abs(z.mean()) < 3 / math.sqrt(40)
    assert 0.7 < z.std() < 1.35


def test_fewer_rows_than_a_full_sum():
    torch.manual_seed(0)
    schedule = LogSNRSchedule(1000, log_snr_max=4.0, log_snr_min=-8.0)
    denoiser = NeuralDenoiser(
        Zeros(16, 5), schedule, (16,), prediction=LevelPrediction(5), variance=PosteriorVariance()
    )
    diffusion, x_0 = DiffusionModel(denoiser), torch.randint(5, (200, 16))
    result = evaluate_bound(diffusion, x_0, standard_error=0.1)
    assert result.rows < result.full_rows / 5
    # zeros are exact for uniform levels: log p = −16 ln 5 a datum, and the bound is close below it
    bits = result.bits_per_dim()
    assert abs(bits.value - math.log2(5)) < 4 * bits.monte_carlo_error + 0.01


def test_a_transform_adds_its_volume_without_noise():
    x_0 = 100 + 30 * torch.randn(50, 2, dtype=torch.float64)
    transform = Standardize.from_data(x_0)
    plain = DiffusionModel(gaussian(20, std=(1.0, 1.0)))
    scaled = DiffusionModel(gaussian(20, std=(1.0, 1.0)), transform=transform)
    inside = evaluate_bound(plain, transform(x_0), standard_error=1e-3)
    outside = evaluate_bound(scaled, x_0, standard_error=1e-3)
    shift = transform.log_abs_det_jacobian(x_0, transform(x_0)).reshape(50, -1).sum(1)
    torch.testing.assert_close(outside.elbo, inside.elbo + shift, atol=5e-3, rtol=0)
    # by single timesteps, too, where the reconstruction is drawn
    truth = plain.denoiser.data_distribution.log_prob(transform(x_0)).add(shift).mean().item()
    drawn = evaluate_bound(scaled.with_num_timesteps(2000), x_0, standard_error=0.5)
    assert drawn.estimator == "timesteps"
    assert abs(drawn.mean().value - truth) < 4 * drawn.monte_carlo_error


def test_bits():
    pyro.set_rng_seed(0)
    heartbeats = torch.eye(5, dtype=torch.float64).repeat(1, 4)
    diffusion = BernoulliDiffusion(EnumeratedDenoiser(heartbeats, LinearDecaySchedule(20)))
    terms = elbo_terms(
        diffusion.model, diffusion.posterior_guide, heartbeats.repeat(20, 1), num_particles=50
    )
    result = evaluate_bound(diffusion, heartbeats.repeat(20, 1), standard_error=0.01)
    error = math.hypot(result.mean().monte_carlo_error, terms.mean().monte_carlo_error)
    assert abs(result.mean().value - terms.mean().value) < 4 * error


def test_continuous_bound_is_the_limit():
    pyro.set_rng_seed(0)
    diffusion = DiffusionModel(gaussian(10))
    x_0 = diffusion.denoiser.data_distribution.sample((100,))
    truth = diffusion.denoiser.data_distribution.log_prob(x_0).mean().item()
    result = evaluate_bound(diffusion, x_0, standard_error=0.05, num_timesteps=math.inf)
    assert abs(result.mean().value - truth) < 4 * result.mean().monte_carlo_error
    assert result.full_rows == math.inf


def test_rows_have_a_limit_and_nonsense_is_refused():
    diffusion = DiffusionModel(gaussian(50))
    x_0 = torch.zeros(50, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="1e-09 would need about") as caught:
        result = evaluate_bound(diffusion, x_0, standard_error=1e-9, max_rows=1)
    assert caught[0].filename == __file__
    assert result.rows < 40_000
    assert "network rows" in repr(result)
    with pytest.warns(UserWarning, match="network rows leave"):  # the last stage is cut short
        result = evaluate_bound(diffusion, x_0, standard_error=1e-9, max_rows=60_000)
    assert result.monte_carlo_error > 0
    assert evaluate_bound(diffusion, x_0, standard_error=0.5, max_rows=math.inf).rows < 40_000
    for error in (0, -1.0, math.inf, "small"):
        with pytest.raises(ValueError, match="argument 'standard_error'"):
            evaluate_bound(diffusion, x_0, standard_error=error)


def test_one_hard_datum_has_an_honest_error():
    """Most of the noise in one of 40 data, which a pilot may miss (whole paths, a wrong x̂_0)."""
    pyro.set_rng_seed(2)

    class TooSmall(torch.nn.Module):
        def forward(self, x_t, log_snr):
            return 0.8 * log_snr.sigmoid().sqrt()[:, None] * x_t

    denoiser = NeuralDenoiser(
        TooSmall(), LogSNRSchedule(5), (2,), prediction=DataPrediction()
    ).double()
    x_0 = 0.05 * torch.randn(40, 2, dtype=torch.float64)
    x_0[0] = torch.tensor([4.0, -4.0])
    diffusion = DiffusionModel(denoiser)
    torch.set_default_dtype(torch.float64)
    try:
        truth = elbo_terms(
            diffusion.model, diffusion.posterior_guide, x_0, num_particles=4000
        ).mean()
        results = [evaluate_bound(diffusion, x_0, standard_error=0.2) for _ in range(30)]
    finally:
        torch.set_default_dtype(torch.float32)
    z = torch.tensor([(float(r.mean()) - truth.value) / r.monte_carlo_error for r in results])
    assert (z.abs() < 2.5).float().mean() > 0.85
    assert z.abs().max() < 10
    assert max(r.monte_carlo_error for r in results) <= 0.2


def test_looking_at_the_error_hardly_biases_the_bound():
    """Rare large KLs of bits, one datum: stopping at every small spread raised the bound by 0.11 nats."""
    pyro.set_rng_seed(3)
    heartbeats = torch.eye(5, dtype=torch.float64).repeat(1, 2)
    diffusion = BernoulliDiffusion(EnumeratedDenoiser(heartbeats, LinearDecaySchedule(200)))
    bounds = [
        evaluate_bound(diffusion, heartbeats[:1], standard_error=0.3).mean().value
        for _ in range(30)
    ]
    mean, error = np.mean(bounds), np.std(bounds) / math.sqrt(30)
    assert abs(mean - enumerated_bound(diffusion, 2)) < 3 * error + 0.03


def test_a_term_that_is_not_finite_is_named():
    diffusion = DiffusionModel(gaussian(50))
    diffusion.denoiser.mean.fill_(math.nan)
    with pytest.raises(ValueError, match=r"NaN|nan"):
        evaluate_bound(diffusion, torch.zeros(5, 2, dtype=torch.float64), standard_error=0.1)
    with pytest.raises(ValueError, match="argument 'num_timesteps'"):
        evaluate_bound(
            DiffusionModel(gaussian(5)),
            torch.zeros(5, 2).double(),
            standard_error=1.0,
            num_timesteps=2.9,
        )


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"batch_size": -1}, "batch_size"),
        ({"max_rows": "9"}, "max_rows"),
        ({"num_timesteps": "inf"}, "math.inf"),
        ({"num_timesteps": math.nan}, "math.inf"),
    ],
)
def test_other_arguments_are_refused_in_words(given, argument):
    x_0 = torch.zeros(5, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=argument):
        evaluate_bound(DiffusionModel(gaussian(5)), x_0, standard_error=1.0, **given)


def test_programs_and_denoisers_of_another_kind_are_refused():
    diffusion, x_0 = DiffusionModel(gaussian(5)), torch.zeros(5, 2, dtype=torch.float64)
    for wrong in (diffusion.model, diffusion.continuous(), "diffusion"):
        with pytest.raises(
            ValueError, match="argument 'model': got a .* expected a DiffusionModel"
        ):
            evaluate_bound(wrong, x_0, standard_error=1.0)
        with pytest.raises(ValueError, match="argument '(family|model|guide)'"):
            summary(wrong, x_0)
        with pytest.raises(ValueError, match="argument 'diffusion'"):
            OptimalVariance.from_data(wrong, x_0)
    bits = EnumeratedDenoiser(torch.eye(3, dtype=torch.long), LinearDecaySchedule(5))
    with pytest.raises(ValueError, match="a chain of bits, which has no score"):
        DiffusionModel(bits, likelihood=GaussianLikelihood())
    with pytest.raises(ValueError, match="a chain of bits, which has no score"):
        OptimalVariance.from_data(BernoulliDiffusion(bits), torch.eye(3))
    with pytest.raises(ValueError, match=r"data of shape \(5, 3\)"):
        summary(diffusion, torch.zeros(5, 3, dtype=torch.float64))


# The error is honest.


@pytest.mark.parametrize(("count", "target"), [(400, 0.1), (10, 0.5)])
def test_error_is_honest_for_a_trained_network_of_bits(count, target):
    """Rare large terms, and allocation by what was drawn: z of about unit variance, 40 times."""
    pyro.set_rng_seed(0)
    probs = torch.rand(12, 16) ** 3
    x_0 = (torch.rand(2000, 16) < probs[torch.randint(12, (2000,))]).float()
    network = MLP((16,), hidden_size=16, num_blocks=1)
    diffusion = BernoulliDiffusion(NeuralBernoulliDenoiser(network, LinearDecaySchedule(20), (16,)))
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    for _ in range(100):
        svi.step(x_0[torch.randint(1000, (200,))])
    x_0 = x_0[1000 : 1000 + count]
    particles = 40_000 // count
    terms = elbo_terms(diffusion, x_0, num_particles=particles, progress=False).mean()
    results = [evaluate_bound(diffusion, x_0, standard_error=target) for _ in range(40)]
    assert max(r.monte_carlo_error for r in results) <= target
    errors = [math.hypot(r.monte_carlo_error, terms.monte_carlo_error) for r in results]
    z = torch.tensor([float(r.mean()) - terms.value for r in results]) / torch.tensor(errors)
    assert 0.65 < z.std() < 1.4
    assert abs(z.mean()) < 0.8


@pytest.mark.parametrize(("count", "num_blocks"), [(1, 1), (10, 1), (100, 3), (1000, 31)])
def test_offsets_are_spread_over_each_block(count, num_blocks):
    """One point in each cell of a block's grid, in an order of its own in each replicate."""
    diffusion = DiffusionModel(gaussian(50))
    x_0 = torch.zeros(count, 2, dtype=torch.float64)
    way = Timesteps(Rows(diffusion, x_0, Given(), Time.of(50), 2048))
    assert way.num_blocks == num_blocks
    assert way.num_blocks * (way.num_replicates - 1) >= 56
    offsets = way._offsets(20)
    for block in range(num_blocks):
        mine = offsets[:, way.block == block]
        cells = (mine * mine.shape[1]).floor().sort(1).values
        assert (cells == torch.arange(mine.shape[1])).all()
    assert (offsets.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 20) ** 0.5


def test_every_group_has_a_share_of_the_rows():
    """Also one whose rows have shown no noise; and neighbours of a noisy one have more than others."""
    moments = GroupMoments(torch.ones(8, dtype=torch.float64))
    moments.update(torch.arange(8).repeat(50), torch.randn(400, dtype=torch.float64) * 0)
    assert (moments.shares(0.2) > 0.1).all()  # nothing known: even
    terms = torch.zeros(400, dtype=torch.float64)
    terms[4::8] = torch.randn(50, dtype=torch.float64)
    moments.update(torch.arange(8).repeat(50), terms)
    shares = moments.shares(0.2)
    assert abs(shares.sum() - 1) < 1e-12
    assert (shares[4] > shares[3]) & (shares[3] > shares[2]) & (shares[5] > shares[6])
    assert (shares >= 0.2 / 8 - 1e-12).all()
    assert shares[0] > 0.07


def test_moments_of_groups_are_those_of_all_terms_together():
    moments, parts = GroupMoments(torch.ones(3, dtype=torch.float64)), []
    for _ in range(4):
        group, terms = torch.randint(3, (30,)), 5 + torch.randn(30, dtype=torch.float64)
        moments.update(group, terms)
        parts.append((group, terms))
    group, terms = (torch.cat(x) for x in zip(*parts, strict=True))
    for g in range(3):
        mine = terms[group == g]
        torch.testing.assert_close(moments.mean[g], mine.mean())
        torch.testing.assert_close(moments.squares[g] / (moments.count[g] - 1), mine.var())


@pytest.mark.parametrize(
    ("count", "num_data", "num_blocks"), [(64, 5, 1), (8, 64, 16), (4, 40, 40)]
)
def test_stages_pool_to_a_mean_with_its_error(count, num_data, num_blocks):
    """Gaussian replicates of blocks with noises of their own, in two stages: z, and degrees of freedom."""
    torch.manual_seed(0)
    block, z, freedoms = torch.arange(num_data) % num_blocks, [], []
    noise = 0.5 + torch.rand(num_blocks, dtype=torch.float64)
    for _ in range(400):
        pooled = Pooled()
        for size in (count, 3 * count):
            shared = torch.randn(count, num_blocks, dtype=torch.float64) * noise
            values = 7 + shared[:, block] * math.sqrt(count / size)
            pooled.add(Stage(values, block, size))
        z.append(((pooled.mean.mean() - 7) / pooled.error).item())
        freedoms.append(pooled.freedom)
    assert pooled.size == 4 * count
    assert abs(np.std(z) - 1) < 4 / math.sqrt(800)
    assert abs(np.mean(z)) < 4 / math.sqrt(400)
    # The second stage has three quarters of the weight, and so has its variance: 1.6 stages' freedom.
    effective = 1.6 * (count - 1) * noise.square().sum() ** 2 / noise.pow(4).sum()
    assert 0.6 < np.median(freedoms) / effective.item() < 1.1


def test_an_error_that_rests_on_few_large_terms_is_not_believed():
    torch.manual_seed(0)
    block = torch.zeros(3, dtype=torch.long)
    few = torch.randn(64, 3, dtype=torch.float64) * 1e-3
    few[0] -= 5.0
    for values, settled in ((few, False), (few - few * (few < -1), True)):
        pooled = Pooled()
        pooled.add(Stage(values, block, 64))
        assert (pooled.freedom >= FREEDOM) == settled
        assert pooled.settled(0.2) == settled
        assert pooled.next_size(0.2, 1.0) >= 64


def test_the_next_stage_is_as_large_as_the_error_needs():
    torch.manual_seed(0)
    pooled, block = Pooled(), torch.zeros(1, dtype=torch.long)
    pooled.add(Stage(torch.randn(640, 1, dtype=torch.float64), block, 640))
    size = pooled.next_size(0.01, 1.0)
    assert abs((640 + size) * (0.9 * 0.01) ** 2 - pooled.variance / 640) < 0.01
    cheaper = pooled.next_size(0.01, 0.25)  # draws of a quarter of the variance
    after = (pooled.variance + cheaper * 0.25 * pooled.variance / 640) / (640 + cheaper) ** 2
    assert abs(after / (0.9 * 0.01) ** 2 - 1) < 0.01
    assert pooled.next_size(0.04, 1.0) >= 640


# What goes with the data, and other families.


def levels(num_timesteps=20):
    torch.manual_seed(0)
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=6.0, log_snr_min=-8.0)
    network = MLP((6,), num_outputs=5, hidden_size=16, num_blocks=1).double()
    return DiffusionModel(NeuralDenoiser(network, schedule, (6,), prediction=LevelPrediction(5)))


def masked(count):
    mask = torch.rand(count, 6) < 0.6
    mask[:, 0] = True
    return torch.randint(5, (count, 6)), mask


@pytest.mark.parametrize("error", [0.1, 0.03])
def test_a_mask_gives_the_bound_of_the_observed_part(error):
    diffusion = levels()
    x_0, mask = masked(50)
    terms = elbo_terms(diffusion, x_0, num_particles=200, mask=mask, progress=False)
    result = evaluate_bound(diffusion, x_0, standard_error=error, mask=mask)
    both = math.hypot(result.monte_carlo_error, terms.mean().monte_carlo_error)
    assert abs(result.mean().value - terms.mean().value) < 4 * both
    assert result.event_size == terms.event_size < 6
    noise = (result.standard_error.square() + terms.standard_error.square()).sqrt()
    assert ((result.elbo - terms.elbo).abs() < 5 * noise).float().mean() > 0.95
    other = torch.where(mask, x_0, 4 - x_0)  # what stands in a gap does not matter
    torch.manual_seed(1)
    ours = evaluate_bound(diffusion, x_0, standard_error=0.2, mask=mask).elbo
    torch.manual_seed(1)
    theirs = evaluate_bound(diffusion, other, standard_error=0.2, mask=mask).elbo
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_timesteps", [20, math.inf])
def test_a_mask_goes_with_a_transform_and_with_paths(num_timesteps):
    """NaN in the gaps; an exact chain of independent entries has the observed entries' log p as its bound."""
    x_0 = 100 + 30 * torch.randn(50, 2, dtype=torch.float64)
    transform = Standardize.from_data(x_0)
    diffusion = DiffusionModel(gaussian(20), transform=transform)
    mask = torch.rand(50, 2) < 0.6
    mask[:, 0] = True
    inside, mean = transform(x_0), diffusion.denoiser.mean
    law = dist.Normal(mean, diffusion.denoiser.variance.sqrt())
    truth = law.log_prob(inside) + transform.log_abs_det_jacobian(x_0, inside)
    truth = (truth * mask).sum(1)
    x_0 = torch.where(mask, x_0, math.nan)
    for error in (1e-3, 0.5) if num_timesteps == 20 else (0.2,):
        result = evaluate_bound(
            diffusion, x_0, standard_error=error, num_timesteps=num_timesteps, mask=mask
        )
        assert (result.estimator == "path") == (error == 1e-3)
        slack = 5e-3 if error == 1e-3 else 4 * result.monte_carlo_error
        assert abs(result.mean().value - truth.mean().item()) < slack


@pytest.mark.parametrize("error", [0.2, 1e-3])
def test_a_mask_that_leaves_nothing_out_changes_nothing(error):
    diffusion, x_0 = DiffusionModel(gaussian(20)), torch.randn(50, 2, dtype=torch.float64)
    results = []
    for given in ({}, {"mask": torch.ones(50, 2, dtype=torch.bool)}):
        torch.manual_seed(3)
        results.append(evaluate_bound(diffusion, x_0, standard_error=error, **given))
    assert results[0].rows == results[1].rows
    torch.testing.assert_close(results[0].elbo, results[1].elbo, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_timesteps", [1, 5, 50])
def test_a_context_goes_with_its_rows(num_timesteps):
    """The zero-variance identity by paths, and the same mean by single timesteps."""
    pyro.set_rng_seed(0)
    diffusion = conditional(num_timesteps)
    x_0, context = data(40)
    exact = evaluate_bound(diffusion, x_0, standard_error=1e-3, context=context, batch_size=100)
    torch.testing.assert_close(exact.elbo, log_p(x_0, context), rtol=1e-8, atol=1e-8)
    drawn = evaluate_bound(diffusion, x_0, standard_error=0.5, context=context, batch_size=100)
    assert drawn.estimator == "timesteps"
    assert abs(drawn.mean().value - log_p(x_0, context).mean()) < 4 * drawn.monte_carlo_error + 1e-8
    wrong = {"mean": context["mean"].flip(0)}
    other = evaluate_bound(diffusion, x_0, standard_error=1e-3, context=wrong)
    torch.testing.assert_close(other.elbo, log_p(x_0, wrong), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ladder", [False, True])
def test_other_families_and_pairs_are_read_by_trajectories(ladder):
    torch.manual_seed(0)
    vae = HierarchicalVAE((2,), (3, 2), encoder=LadderEncoder((2,), (3, 2)) if ladder else None)
    x_0 = torch.randn(40, 2)
    terms = elbo_terms(vae, x_0, num_particles=1000, progress=False).mean()
    for arguments in ((vae, x_0), (vae.model, vae.guide, x_0)):
        result = evaluate_bound(*arguments, standard_error=0.03)
        both = math.hypot(result.monte_carlo_error, terms.monte_carlo_error)
        assert abs(result.mean().value - terms.value) < 4 * both
        assert result.monte_carlo_error <= 0.03
        assert result.estimator == ("KL" if ladder else "path")
        assert (result.full_rows, result.event_size) == (80, 2)
        assert result.rows % 80 == 0
    with pytest.raises(ValueError, match="argument 'num_timesteps': got 3 for programs"):
        evaluate_bound(vae, x_0, standard_error=0.03, num_timesteps=3)


def test_programs_take_a_mask_and_have_a_limit_of_rows():
    diffusion = levels(5)
    x_0, mask = masked(30)
    pair = diffusion.model, diffusion.posterior_guide
    result = evaluate_bound(*pair, x_0, standard_error=0.2, mask=mask, batch_size=50)
    terms = elbo_terms(*pair, x_0, num_particles=100, mask=mask, progress=False)
    both = math.hypot(result.monte_carlo_error, terms.mean().monte_carlo_error)
    assert abs(result.mean().value - terms.mean().value) < 4 * both
    assert result.event_size == terms.event_size
    with pytest.warns(UserWarning, match="argument 'max_rows'"):
        evaluate_bound(*pair, x_0, standard_error=1e-6, max_rows=10)
    with pytest.raises(ValueError, match="argument 'model': got a DiffusionModel"):
        evaluate_bound(diffusion, pair[1], x_0, standard_error=0.2)


def test_what_does_not_fit_is_refused_in_words():
    diffusion, x_0 = DiffusionModel(gaussian(5)), torch.zeros(5, 2, dtype=torch.float64)
    bits = BernoulliDiffusion(EnumeratedDenoiser(torch.eye(2), LinearDecaySchedule(5)))
    for call, words in (
        (lambda: evaluate_bound(diffusion, x_0, standard_error=1.0, masks=1), "argument 'masks'"),
        (
            lambda: evaluate_bound(diffusion, x_0, standard_error=1.0, mask=x_0[:2] == 0),
            "argument 'mask': got torch.bool of shape",
        ),
        (
            lambda: evaluate_bound(diffusion, x_0, standard_error=1.0, context=x_0),
            "argument 'context': got one for a GaussianDenoiser",
        ),
        (
            lambda: evaluate_bound(conditional(5), x_0, standard_error=1.0, context=x_0[:2]),
            "argument 'context': got shape .* a row for each datum",
        ),
        (
            lambda: evaluate_bound(
                bits, torch.eye(2), standard_error=1.0, mask=torch.ones(2, 2) > 0
            ),
            "no value for a gap",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
