import numpy as np
import pytest
import torch
from oracles import GaussianReverseChain, alpha_bar, posterior_coefficients
from torch import nn

from pyro_diffusion.denoisers import (
    Denoiser,
    ForwardVariance,
    GaussianDenoiser,
    NeuralDenoiser,
    PosteriorVariance,
)
from pyro_diffusion.kernels import chain_step, forward_marginal
from pyro_diffusion.networks import MLP
from pyro_diffusion.parameterizations import DataPrediction, NoisePrediction, Parameterization
from pyro_diffusion.schedules import AlphaSchedule, CosineSchedule, LinearSchedule

ALPHA = np.array([0.95, 0.8, 0.6, 0.3])
SCHEDULE = AlphaSchedule(ALPHA.tolist())


class Constant(nn.Module):
    """A network that answers with the value it was given."""

    def __init__(self, value, shape=None):
        super().__init__()
        self.value, self.shape = value, shape
        self.calls = []

    def forward(self, x_t, log_snr):
        self.calls.append((x_t.shape, log_snr.shape))
        return torch.full(self.shape or x_t.shape, self.value, dtype=x_t.dtype)


@pytest.mark.parametrize("prediction", [NoisePrediction(), DataPrediction()])
def test_E13_conversions_are_exact_both_ways(prediction, double):
    x_0, noise = torch.randn(100), torch.randn(100)
    signal, sigma = torch.tensor(0.6), torch.tensor(0.8)
    x_t = signal * x_0 + sigma * noise
    output = prediction.output(x_0, x_t, signal, sigma)
    expected = noise if isinstance(prediction, NoisePrediction) else x_0
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    recovered = prediction.x_0_hat(output, x_t, signal, sigma)
    torch.testing.assert_close(recovered, x_0, rtol=1e-12, atol=1e-12)


def test_parameterization_and_denoiser_are_abstract():
    for abstract in (Parameterization, Denoiser):
        with pytest.raises(TypeError):
            abstract()


@pytest.mark.parametrize("t", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction", [NoisePrediction(), DataPrediction()])
def test_E6_neural_kernel_is_the_posterior_at_the_estimate(t, prediction, double):
    denoiser = NeuralDenoiser(Constant(0.25), SCHEDULE, (3,), prediction=prediction)
    x_t, bar = torch.randn(5, 3), alpha_bar(ALPHA)
    estimate = np.full((5, 3), 0.25)
    if isinstance(prediction, NoisePrediction):
        estimate = (x_t.numpy() - np.sqrt(1 - bar[t]) * 0.25) / np.sqrt(bar[t])
    of_x_0, of_x_t, _ = posterior_coefficients(ALPHA, t)
    kernel = denoiser(x_t, t)
    assert (kernel.batch_shape, kernel.event_shape) == ((5,), (3,))
    np.testing.assert_allclose(kernel.mean, of_x_0 * estimate + of_x_t * x_t.numpy(), rtol=1e-11)
    np.testing.assert_allclose(kernel.variance, np.full((5, 3), 1 - ALPHA[t - 1]), rtol=1e-12)


def test_reverse_variances():
    step = chain_step(torch.arange(1, 5), SCHEDULE)
    bar = alpha_bar(ALPHA)
    beta = 1 - ALPHA
    np.testing.assert_allclose(ForwardVariance()(step), beta, rtol=1e-12)
    beta_tilde = (1 - bar[:-1]) / (1 - bar[1:]) * beta
    beta_tilde[0] = beta[0]  # a point mass has no density; the house puts β_1 there
    np.testing.assert_allclose(PosteriorVariance()(step), beta_tilde, rtol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 1.5])
def test_gaussian_kernels_are_bayes_rule(mean, double):
    std = np.array([0.1, 1.0, 3.0])
    denoiser = GaussianDenoiser(torch.full((3,), mean), torch.tensor(std), SCHEDULE)
    x_t = torch.randn(5, 3)
    for i in range(3):
        oracle = GaussianReverseChain.exact(ALPHA, mean, std[i])
        for t in (1, 2, 3, 4):
            kernel = denoiser(x_t, t)
            expected = oracle.slope[t - 1] * x_t[:, i].numpy() + oracle.intercept[t - 1]
            np.testing.assert_allclose(kernel.mean[:, i], expected, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(kernel.variance[:, i], oracle.variance[t - 1], rtol=1e-11)


def test_full_covariance_agrees_with_diagonal_and_with_conditioning(double):
    std = torch.tensor([0.5, 1.0, 2.0])
    mean = torch.tensor([1.0, -1.0, 0.0])
    diagonal = GaussianDenoiser(mean, std, SCHEDULE)
    full = GaussianDenoiser.from_covariance(mean, torch.diag(std**2), SCHEDULE)
    x_t = torch.randn(4, 3)
    for t in (1, 3):
        torch.testing.assert_close(full(x_t, t).mean, diagonal(x_t, t).mean)
        torch.testing.assert_close(full(x_t, t).variance, diagonal(x_t, t).variance)

    # p(x_1 | x_2) by block conditioning of the joint of (x_1, x_2), an arbitrary covariance
    factor = torch.randn(3, 3)
    covariance = factor @ factor.mT + torch.eye(3)
    full = GaussianDenoiser.from_covariance(mean, covariance, SCHEDULE)
    bar = alpha_bar(ALPHA)
    c_11 = bar[1] * covariance + (1 - bar[1]) * torch.eye(3)
    c_22 = bar[2] * covariance + (1 - bar[2]) * torch.eye(3)
    c_12 = np.sqrt(ALPHA[1]) * c_11
    gain = c_12 @ torch.linalg.inv(c_22)
    kernel = full(x_t, 2)
    expected = np.sqrt(bar[1]) * mean + (x_t - np.sqrt(bar[2]) * mean) @ gain.mT
    torch.testing.assert_close(kernel.mean, expected)
    torch.testing.assert_close(kernel.covariance_matrix[0], c_11 - gain @ c_12.mT)


@pytest.mark.parametrize("full", [False, True])
def test_score_is_the_gradient_of_the_marginal(full, double):
    mean = torch.tensor([1.0, -0.5])
    covariance = (
        torch.tensor([[2.0, 0.8], [0.8, 0.5]]) if full else torch.diag(torch.tensor([2.0, 0.5]))
    )
    denoiser = (
        GaussianDenoiser.from_covariance(mean, covariance, SCHEDULE)
        if full
        else GaussianDenoiser(mean, covariance.diagonal().sqrt(), SCHEDULE)
    )
    bar = alpha_bar(ALPHA)
    for t in (1, 4):
        x_t = torch.randn(6, 2, requires_grad=True)
        marginal = torch.distributions.MultivariateNormal(
            np.sqrt(bar[t]) * mean, bar[t] * covariance + (1 - bar[t]) * torch.eye(2)
        )
        (expected,) = torch.autograd.grad(marginal.log_prob(x_t).sum(), x_t)
        score = denoiser.score(x_t.detach(), SCHEDULE.log_snr(t))
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10)


def test_exact_estimate_is_the_regression_of_x_0(double):
    """E[x_0 | x_t] minimises the squared error: no affine correction improves on it."""
    mean, std = torch.tensor([0.5]), torch.tensor([2.0])
    denoiser = GaussianDenoiser(mean, std, SCHEDULE)
    x_0 = mean + std * torch.randn(200_000, 1)
    x_t = forward_marginal(x_0, 3, SCHEDULE, event_dim=1).sample()
    residual = x_0 - denoiser.x_0_hat(x_t, SCHEDULE.log_snr(3))
    for feature in (torch.ones_like(x_t), x_t):
        product = residual * feature
        assert abs(product.mean() / (product.std() / 200_000**0.5)) < 5


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
def test_a_vector_of_timesteps_is_each_timestep_alone(event_shape, device):
    schedule = CosineSchedule(10).to(device)
    network = MLP(event_shape, hidden_size=16, num_blocks=1).to(device)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    denoiser = NeuralDenoiser(network, schedule, event_shape)
    x_t = torch.randn(4, 5, *event_shape, device=device)
    t = torch.randint(1, 11, (4, 5), device=device)
    kernel = denoiser(x_t, t)
    assert (kernel.batch_shape, kernel.event_shape) == ((4, 5), event_shape)
    one = denoiser(x_t[1, 2], int(t[1, 2]))
    torch.testing.assert_close(kernel.mean[1, 2], one.mean, rtol=1e-4, atol=1e-5)


def test_the_network_sees_one_flat_batch_axis():
    network = Constant(0.0)
    denoiser = NeuralDenoiser(network, SCHEDULE, (2, 3))
    denoiser(torch.zeros(4, 5, 2, 3), 3)
    assert network.calls == [((20, 2, 3), (20,))]


def test_dtype_is_that_of_the_network():
    network = MLP((2,), hidden_size=8, num_blocks=1)
    assert NeuralDenoiser(network, SCHEDULE, (2,)).dtype == torch.float32
    assert NeuralDenoiser(network.double(), SCHEDULE, (2,)).dtype == torch.float64
    assert NeuralDenoiser(Constant(0.0), SCHEDULE, (2,)).dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: NeuralDenoiser(Constant(0.0, (4, 2)), SCHEDULE, (3,))(torch.zeros(4, 3), 2),
         "'network'.*shape \\(4, 2\\).*expected \\(4, 3\\)"),
        (lambda: NeuralDenoiser(Constant(float("nan")), SCHEDULE, (3,))(torch.zeros(4, 3), 2),
         "'network'.*NaN"),
        (lambda: NeuralDenoiser(Constant(0.0), SCHEDULE, (3,))(torch.zeros(4, 2), 2),
         "'x_t'.*\\(4, 2\\).*event_shape \\(3,\\)"),
        (lambda: NeuralDenoiser(Constant(0.0), SCHEDULE, (3,))(torch.zeros(4, 3), 0), "argument 't'"),
        (lambda: NeuralDenoiser(Constant(0.0), SCHEDULE, (3,))(torch.zeros(4, 3), 5), "argument 't'"),
        (lambda: NeuralDenoiser(Constant(0.0), SCHEDULE, 3), "'event_shape'.*got 3.*\\(64,\\)"),
        (lambda: NeuralDenoiser(SCHEDULE, Constant(0.0), (3,)), "'schedule'.*got Constant"),
        (lambda: NeuralDenoiser(lambda x, s: x, SCHEDULE, (3,)), "'network'.*expected an instance"),
        (lambda: NeuralDenoiser(Constant(0.0), SCHEDULE, (3,), variance=PosteriorVariance),
         "'variance'.*got the class PosteriorVariance"),
        (lambda: NeuralDenoiser(Constant(0.0), SCHEDULE, (3,), prediction="noise"),
         "'prediction'.*got 'noise'"),
        (lambda: GaussianDenoiser(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), SCHEDULE), "'std'"),
        (lambda: GaussianDenoiser(torch.zeros(3), torch.ones(2, 3), SCHEDULE), "'std'.*\\(2, 3\\)"),
        (lambda: GaussianDenoiser.from_covariance(torch.zeros(3), torch.eye(2), SCHEDULE),
         "'covariance'.*\\(2, 2\\)"),
        (lambda: GaussianDenoiser.from_covariance(torch.zeros(2), torch.ones(2, 2), SCHEDULE),
         "'covariance'.*eigenvalue"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(call, says):
    with pytest.raises(ValueError, match="(?s)" + says):
        call()


def test_published_bounds_of_gaussian_data():
    """N(0.5, 0.25) at T = 1000, exact mean: what the three variances cost, for two schedules."""
    for schedule, expected in (
        (LinearSchedule(1000), (0.72579640, 0.72688865, 1.182145)),
        (CosineSchedule(1000), (0.72579135, 0.72640333, 1.12802404)),
    ):
        alpha = schedule.alpha(torch.arange(1, 1001)).numpy()
        step = chain_step(torch.arange(1, 1001), schedule)
        for variance, value in zip(
            (None, ForwardVariance()(step).numpy(), PosteriorVariance()(step).numpy()),
            expected,
            strict=True,
        ):
            oracle = GaussianReverseChain.exact(alpha, 0.5, 0.5, variance)
            # E over x_0 of a quadratic in x_0: its value at mean ± std, averaged
            bound = np.mean([oracle.elbo(0.5 + s * 0.5) for s in (-1, 1)])
            assert -bound == pytest.approx(value, abs=2e-6)
