import numpy as np
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from scipy.stats import norm

from pyro_diffusion.denoisers import NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import (
    DiscretizedGaussian,
    DiscretizedGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
)
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule


@pytest.mark.parametrize("num_levels", [2, 3, 17, 256])
@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.3, 5.0])
def test_probabilities_sum_to_one(num_levels, scale, double, device):
    likelihood = DiscretizedGaussianLikelihood(num_levels, scale).to(device)
    x_0_hat = torch.tensor([-30.0, -1.2, -1.0, -0.3, 0.0, 0.7, 1.0, 4.0], device=device)
    distribution = likelihood(x_0_hat)
    log_prob = distribution.log_prob(distribution.enumerate_support())
    assert log_prob.shape == (num_levels, 8)
    torch.testing.assert_close(
        log_prob.exp().sum(0), torch.ones(8, device=device), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_against_differences_of_normal_cdfs(num_levels, double):
    scale, x_0_hat = 0.2, np.array([-1.1, -0.5, 0.0, 0.31, 0.99])
    level = np.arange(num_levels)[:, None]
    centre, half = 2 * level / (num_levels - 1) - 1, 1 / (num_levels - 1)
    upper = np.where(level == num_levels - 1, np.inf, centre + half)
    lower = np.where(level == 0, -np.inf, centre - half)
    expected = norm.cdf(upper, x_0_hat, scale) - norm.cdf(lower, x_0_hat, scale)
    distribution = DiscretizedGaussianLikelihood(num_levels, scale)(torch.tensor(x_0_hat))
    log_prob = distribution.log_prob(torch.tensor(level))
    np.testing.assert_allclose(log_prob.exp(), expected, rtol=1e-8, atol=1e-12)


def test_far_tails_are_finite_and_so_are_gradients():
    """A level 1,000 standard deviations away: the difference of two CDFs would be 0 − 0."""
    x_0_hat = torch.tensor([-1.0, 1.0], requires_grad=True)
    likelihood = DiscretizedGaussianLikelihood(17, 2e-3, learnable=True)
    log_prob = likelihood(x_0_hat).log_prob(torch.tensor([[0], [8], [15], [16]]))
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert x_0_hat.grad.isfinite().all()
    assert likelihood.log_scale.grad.isfinite()
    # log Φ(−z) ≈ −z²/2 − log(z √2π) from the nearer edge of the bin, z = 468.75
    expected = norm.logsf((1 - 1 / 16) / 2e-3)
    assert log_prob[1, 0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [10.0, 999.0, 1001.0, 1e5, 1e8])
def test_gradients_far_out_are_those_of_the_tail(dtype, distance):
    """d log Φ(z)/dz → −z: an untrained network is that far from a fine level."""
    scale = 5e-4
    x_0_hat = torch.tensor([scale * distance], dtype=dtype, requires_grad=True)
    log_prob = DiscretizedGaussianLikelihood(256, scale)(x_0_hat).log_prob(torch.tensor([0.0]))
    log_prob.sum().backward()
    z = (1 + scale * distance - 1 / 255) / scale
    assert -x_0_hat.grad.item() * scale == pytest.approx(z, rel=1e-3)


@pytest.mark.parametrize("schedule", [CosineSchedule, LinearSchedule, LogSNRSchedule])
def test_eight_bit_data_train_from_the_first_step(schedule):
    """Rows far from the datum are masked, but their gradients must be numbers all the same."""
    denoiser = NeuralDenoiser(MLP((16,), hidden_size=32, num_blocks=1), schedule(1000), (16,))
    diffusion = DiffusionModel(denoiser, DiscretizedGaussianLikelihood(256, learnable=True))
    pair, x_0 = diffusion.subsampled(1), torch.randint(0, 256, (256, 16))
    loss = TraceMeanField_ELBO()(pair.model, pair.guide)
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(20):
        optimiser.zero_grad()
        loss(x_0).backward()
        assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)
        optimiser.step()


def test_sampling_is_rounding_and_agrees_with_the_probabilities(double):
    distribution = DiscretizedGaussianLikelihood(5, 0.4)(torch.tensor([-0.9, 0.2]))
    draws = distribution.sample((40_000,))
    assert set(draws.unique().tolist()) <= {0, 1, 2, 3, 4}
    for level in range(5):
        p = distribution.log_prob(torch.tensor(level)).exp()
        frequency = (draws == level).double().mean(0)
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-9).all()
    np.testing.assert_allclose(distribution.mean, draws.mean(0), atol=0.03)
    np.testing.assert_allclose(distribution.variance, draws.var(0), atol=0.03)


def test_embedding_fills_the_unit_interval():
    likelihood = DiscretizedGaussianLikelihood(17)
    embedded = likelihood.embed(torch.arange(17))
    torch.testing.assert_close(embedded, torch.linspace(-1, 1, 17))
    assert likelihood.embed(torch.arange(17, dtype=torch.uint8)).dtype == torch.get_default_dtype()
    assert likelihood.embed(torch.arange(17).double()).dtype == torch.float64


def test_expand_and_support():
    distribution = DiscretizedGaussian(torch.zeros(3), torch.tensor(0.1), 4)
    expanded = distribution.expand((2, 3))
    assert expanded.batch_shape == (2, 3)
    assert expanded.sample((5,)).shape == (5, 2, 3)
    assert distribution.support.check(torch.tensor([0.0, 3.0, 4.0, 0.5])).tolist() == [1, 1, 0, 0]
    assert distribution.enumerate_support(expand=False).shape == (4, 1)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_gaussian_likelihood_is_a_normal(scale, double):
    likelihood = GaussianLikelihood(scale)
    x, x_0_hat = torch.randn(4, 3), torch.randn(4, 3)
    expected = norm.logpdf(x.numpy(), x_0_hat.numpy(), scale)
    np.testing.assert_allclose(likelihood(x_0_hat).log_prob(x), expected, rtol=1e-12)
    assert likelihood.embed(x) is x
    assert not list(likelihood.parameters())


@pytest.mark.parametrize(
    "build",
    [GaussianLikelihood, lambda scale, **kw: DiscretizedGaussianLikelihood(17, scale, **kw)],
)
def test_a_learnable_scale_starts_where_it_is_told(build):
    likelihood = build(0.3, learnable=True)
    assert likelihood.scale.item() == pytest.approx(0.3, rel=1e-12)
    assert [name for name, _ in likelihood.named_parameters()] == ["log_scale"]
    likelihood(torch.zeros(3)).log_prob(torch.zeros(3)).sum().backward()
    assert likelihood.log_scale.grad.isfinite()
    restored = build(1.0, learnable=True)
    restored.load_state_dict(likelihood.state_dict())
    assert restored.scale == likelihood.scale


def test_a_double_scale_does_not_promote_a_float_chain():
    for likelihood in (GaussianLikelihood(0.5), DiscretizedGaussianLikelihood(17)):
        assert likelihood(torch.zeros(3)).log_prob(torch.zeros(3)).dtype == torch.float32


def test_base_class_is_abstract():
    with pytest.raises(TypeError):
        Likelihood()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: GaussianLikelihood(0.0), "'scale'.*got 0.0"),
        (lambda: GaussianLikelihood(float("nan")), "'scale'.*got nan"),
        (lambda: DiscretizedGaussianLikelihood(17, -1.0), "'scale'.*got -1"),
        (lambda: DiscretizedGaussianLikelihood(1), "'num_levels'.*got 1"),
        (
            lambda: DiscretizedGaussianLikelihood(16).embed(torch.tensor([3, 16])),
            "got the value 16;",
        ),
        (lambda: DiscretizedGaussianLikelihood(16).embed(torch.tensor([-1])), "got the value -1;"),
        (
            lambda: DiscretizedGaussianLikelihood(16).embed(torch.tensor([0.5])),
            "got the value 0.5;",
        ),
    ],
)
def test_bad_input_is_refused_in_words(call, says):
    with pytest.raises(ValueError, match=says):
        call()
