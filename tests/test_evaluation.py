"""The bound to an asked-for error: right on average, as exact as asked, for few rows."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_bernoulli import enumerated_bound

from pyro_diffusion import (
    BernoulliDiffusion,
    DataPrediction,
    DiffusionModel,
    EnumeratedDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LevelPrediction,
    LinearDecaySchedule,
    LogSNRSchedule,
    NeuralDenoiser,
    OptimalVariance,
    PosteriorVariance,
    Standardize,
    elbo_terms,
    evaluate_bound,
    summary,
)
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
        with pytest.raises(ValueError, match="argument 'diffusion'"):
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
