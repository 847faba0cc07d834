import numpy as np
import pytest
import torch
from oracles import GaussianReverseChain, alpha_bar, posterior_coefficients
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import (
    DataPrediction,
    Denoiser,
    ForwardVariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LearnedVariance,
    LevelPrediction,
    NeuralDenoiser,
    NoisePrediction,
    OptimalVariance,
    Parameterization,
    PosteriorVariance,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import GaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.processes import forward_marginal
from pyro_diffusion.processes.gaussian import chain_step
from pyro_diffusion.schedules import (
    AlphaSchedule,
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    VarianceExploding,
)

PREDICTIONS = [
    NoisePrediction(),
    DataPrediction(),
    VelocityPrediction(),
    ScorePrediction(),
    LevelPrediction(4),
]
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


# the mixture oracle

WEIGHTS, MEANS, STDS = [0.3, 0.5, 0.2], [[-1.0, 0.5], [1.0, 1.0], [0.0, -2.0]], [0.2, 0.5, 1.5]


def mixture(schedule=SCHEDULE):
    means, stds = torch.tensor(MEANS), torch.tensor(STDS)[:, None]
    return GaussianMixtureDenoiser(WEIGHTS, means, stds, schedule)


def mixture_density(x, bar=1.0):
    """q(x_t) for that mixture, in numpy."""
    density = 0.0
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        variance = bar * std**2 + 1 - bar
        square = ((x - np.sqrt(bar) * np.array(mean)) ** 2).sum(-1)
        density = density + weight * np.exp(-0.5 * square / variance) / (2 * np.pi * variance)
    return density


@pytest.mark.parametrize("t", [1, 2, 4])
def test_mixture_kernels_are_bayes_rule(t, double):
    """p(x_{t-1} | x_t) = q(x_t | x_{t-1}) q(x_{t-1}) / q(x_t), for any x_{t-1}."""
    x_t, x_prev, bar = torch.randn(6, 2), torch.randn(6, 2), alpha_bar(ALPHA)
    alpha = ALPHA[t - 1]
    error = x_t.numpy() - np.sqrt(alpha) * x_prev.numpy()
    forward = np.exp(-0.5 * (error**2).sum(-1) / (1 - alpha)) / (2 * np.pi * (1 - alpha))
    joint = forward * mixture_density(x_prev.numpy(), bar[t - 1])
    expected = np.log(joint / mixture_density(x_t.numpy(), bar[t]))
    kernel = mixture()(x_t, t)
    assert (kernel.batch_shape, kernel.event_shape) == ((6,), (2,))
    np.testing.assert_allclose(kernel.log_prob(x_prev), expected, rtol=1e-10, atol=1e-10)


def test_mixture_data_law_and_batches(double):
    denoiser = mixture()
    x = torch.randn(5, 2)
    expected = np.log(mixture_density(x.numpy()))
    np.testing.assert_allclose(denoiser.data_distribution.log_prob(x), expected, rtol=1e-12)
    x_t, t = torch.randn(7, 4, 2), torch.randint(1, 5, (7, 4))
    kernel = denoiser(x_t, t)
    assert kernel.batch_shape == (7, 4)
    for i in (0, 3):
        alone = denoiser(x_t[i, 1], int(t[i, 1]))
        torch.testing.assert_close(alone.mean, kernel.mean[i, 1])


def test_the_mixture_regenerates_itself(double):
    """Samples of the exact chain: frequencies and moments of the modes, within five errors."""
    diffusion = DiffusionModel(mixture(LogSNRSchedule(40, log_snr_max=9.0, log_snr_min=-14.0)))
    drawn = diffusion.sample(20_000)
    expected = diffusion.denoiser.data_distribution.sample((20_000,))
    for f in (
        lambda x: x,
        lambda x: x**2,
        lambda x: (x[:, :1] > 0.6).double(),
        lambda x: (x[:, 1:] < -1.0).double(),
        lambda x: x.prod(1, keepdim=True),
    ):
        ours, theirs = f(drawn), f(expected)
        error = (ours.var(0) / 20_000 + theirs.var(0) / 20_000).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("explode", [False, True])
@pytest.mark.parametrize("kind", ["Gaussian", "full", "mixture"])
def test_the_score_is_autograds_of_the_marginal(kind, explode, double):
    """∇ log ∫ q(x_t | x_0) p(x_0) dx_0 with E2 for q."""
    schedule = VarianceExploding(SCHEDULE) if explode else SCHEDULE
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    denoiser = {
        "Gaussian": GaussianDenoiser(torch.tensor([1.0, -2.0]), torch.tensor([0.3, 2.0]), schedule),
        "full": GaussianDenoiser.from_covariance(torch.ones(2), covariance, schedule),
        "mixture": mixture(schedule),
    }[kind]
    law = denoiser.data_distribution
    for t in (1, 3, 4):
        a, s = schedule.signal(t), schedule.noise(t)
        x_t = torch.randn(5, 2, requires_grad=True)
        if kind == "mixture":
            components = law.component_distribution
            marginal = GaussianMixtureDenoiser(
                WEIGHTS,
                a * components.mean,
                (a**2 * components.variance + s**2).sqrt(),
                SCHEDULE,
            ).data_distribution
        else:
            spread = law.covariance_matrix if kind == "full" else torch.diag(law.variance)
            marginal = torch.distributions.MultivariateNormal(
                a * law.mean, a**2 * spread + s**2 * torch.eye(2)
            )
        (expected,) = torch.autograd.grad(marginal.log_prob(x_t).sum(), x_t)
        score = denoiser.score(x_t.detach(), schedule.log_snr(t))
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10)


# learned variances

COARSE = LinearSchedule(10)


class Affine(nn.Module):
    """The exact noise of N(mean, std²) data, and a second output from a table over timesteps."""

    def __init__(self, mean, std, schedule, table):
        super().__init__()
        self.mean, self.std, self.schedule = mean, std, schedule
        self.register_buffer("log_snr", schedule.log_snr(torch.arange(1, 11)))
        self.table = nn.Parameter(table)

    def forward(self, x_t, log_snr):
        a, s = (c[:, None] for c in self.schedule.scales(log_snr.double()))
        noise = s * (x_t - a * self.mean) / (a**2 * self.std**2 + s**2)
        t = (self.log_snr - log_snr[:, None]).abs().argmin(1)
        return torch.stack([noise, self.table[t].expand(noise.shape)], -1)


def interpolation(std):
    """The output v for which LearnedVariance is the exact variance, from its formula."""
    alpha = COARSE.alpha(torch.arange(1, 11)).numpy()
    bar, beta = alpha_bar(alpha), 1 - alpha
    lower = (1 - bar[:-1]) / (1 - bar[1:]) * beta
    lower[0] = beta[0] ** 2
    exact = GaussianReverseChain.exact(alpha, 0.5, std).variance
    return 2 * np.log(exact / lower) / np.log(beta / lower) - 1


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_learned_variance_can_be_exact_and_beats_both_ends(std, double):
    """By the closed-form gaps: what either fixed choice loses on average over the data."""
    alpha = COARSE.alpha(torch.arange(1, 11)).numpy()
    bar, beta = alpha_bar(alpha), 1 - alpha
    beta_tilde = (1 - bar[:-1]) / (1 - bar[1:]) * beta
    beta_tilde[0] = beta[0]
    x_0 = torch.linspace(-1.0, 2.0, 7)[:, None]
    table = torch.tensor(interpolation(std))[:, None]
    bounds = {}
    for name, variance in {
        "learned": LearnedVariance(), "β": ForwardVariance(), "β̃": PosteriorVariance()
    }.items():  # fmt: skip
        network = Affine(0.5, std, COARSE, table)
        if not variance.num_outputs:
            network = type(
                "One", (nn.Module,), {"forward": lambda _, *a, f=network: f(*a)[..., 0]}
            )()
        denoiser = NeuralDenoiser(network, COARSE, (1,), variance=variance)
        diffusion = DiffusionModel(denoiser)
        if variance.num_outputs:
            for t in range(1, 11):
                expected = GaussianReverseChain.exact(alpha, 0.5, std).variance[t - 1]
                kernel = denoiser(torch.zeros(1, 1), t)
                assert kernel.variance.item() == pytest.approx(expected, rel=1e-6)
        bounds[name] = elbo_terms(
            diffusion.model, diffusion.posterior_guide, x_0, num_particles=400
        )
    closed = {
        "learned": GaussianReverseChain.exact(alpha, 0.5, std).elbo(x_0.numpy()),
        "β": GaussianReverseChain.exact(alpha, 0.5, std, beta).elbo(x_0.numpy()),
        "β̃": GaussianReverseChain.exact(alpha, 0.5, std, beta_tilde).elbo(x_0.numpy()),
    }
    for other in ("β", "β̃"):
        gap = (bounds["learned"].elbo - bounds[other].elbo).numpy()
        expected = (closed["learned"] - closed[other])[:, 0]
        error = torch.hypot(bounds["learned"].standard_error, bounds[other].standard_error).numpy()
        assert (np.abs(gap - expected) < 5 * error + 1e-6).all()
        weight = np.exp(-0.5 * ((x_0.numpy()[:, 0] - 0.5) / std) ** 2)
        assert std == 1.0 or (expected * weight).sum() > 0


@pytest.mark.parametrize("output", [-30.0, 30.0])
def test_a_learned_variance_that_drifts_stays_finite(output):
    """In float32, at small noise, on rows that are masked: a far-off output has a finite gradient."""
    schedule = LogSNRSchedule(50, log_snr_max=14.0)
    network = Affine(0.0, 1.0, schedule, torch.full((10, 1), output))
    network.log_snr = schedule.log_snr(torch.arange(1, 11))
    diffusion = DiffusionModel(
        NeuralDenoiser(network, schedule, (1,), variance=LearnedVariance()), GaussianLikelihood(0.1)
    )
    pair = diffusion.subsampled(2)
    loss = TraceMeanField_ELBO()(pair.model, pair.guide)
    loss(torch.randn(256, 1)).backward()
    assert network.table.grad.isfinite().all()


def test_svi_finds_the_exact_variance(double):
    """From the midpoint of the logarithms, on data of standard deviation 0.5."""
    network = Affine(0.5, 0.5, COARSE, torch.zeros(10, 1))
    diffusion = DiffusionModel(NeuralDenoiser(network, COARSE, (1,), variance=LearnedVariance()))
    pair = diffusion.subsampled(4)
    svi = SVI(pair.model, pair.guide, Adam({"lr": 0.03}), TraceMeanField_ELBO())
    for _ in range(400):
        svi.step(0.5 + 0.5 * torch.randn(512, 1))
    learned = diffusion.denoiser(torch.zeros(10, 1), torch.arange(1, 11)).variance[:, 0]
    exact = GaussianReverseChain.exact(COARSE.alpha(torch.arange(1, 11)).numpy(), 0.5, 0.5).variance
    np.testing.assert_allclose(learned.detach(), exact, rtol=0.15)


# another scale, another precision


@pytest.mark.parametrize("variance", [PosteriorVariance(), ForwardVariance(), LearnedVariance()])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
def test_the_bound_does_not_change_with_the_scale_of_the_chain(guide, prediction, variance, double):
    """One network, the same noise: variance preserving and variance exploding, draw by draw."""
    count = prediction.num_outputs + variance.num_outputs
    network = MLP((3,), hidden_size=16, num_blocks=1, num_outputs=count)
    nn.init.normal_(network.decode.weight)
    x_0 = torch.randint(0, 4, (5, 3)) if prediction.num_outputs > 1 else torch.randn(5, 3)
    bounds = []
    for schedule in (LogSNRSchedule(12), VarianceExploding(LogSNRSchedule(12))):
        denoiser = NeuralDenoiser(network, schedule, (3,), prediction=prediction, variance=variance)
        diffusion = DiffusionModel(denoiser)
        torch.manual_seed(0)
        bounds.append(elbo_terms(diffusion.model, getattr(diffusion, guide), x_0))
    torch.testing.assert_close(bounds[1].elbo, bounds[0].elbo, rtol=1e-10, atol=1e-10)
    if guide == "posterior_guide":
        torch.testing.assert_close(
            bounds[1].transition, bounds[0].transition, rtol=1e-10, atol=1e-10
        )


def test_samples_do_not_change_with_the_scale_either(double):
    drawn = []
    for schedule in (SCHEDULE, VarianceExploding(SCHEDULE)):
        torch.manual_seed(0)
        drawn.append(DiffusionModel(mixture(schedule)).sample(50))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-9, atol=1e-9)


def test_a_network_of_half_precision_leaves_the_chain_in_float32():
    network = MLP((3,), hidden_size=16, num_blocks=1).to(torch.bfloat16)
    denoiser = NeuralDenoiser(network, SCHEDULE, (3,))
    assert denoiser.dtype == torch.float32
    diffusion = DiffusionModel(denoiser)
    assert diffusion.sample(4).dtype == torch.float32
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, torch.randn(4, 3))
    assert terms.elbo.isfinite().all()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: GaussianMixtureDenoiser([0.5, 0.5], torch.zeros(3, 2), 1.0, SCHEDULE),
         r"shapes \(2,\) and \(3, 2\)"),
        (lambda: GaussianMixtureDenoiser([1.0, 0.0], torch.zeros(2, 2), 1.0, SCHEDULE),
         "K positive weights"),
        (lambda: GaussianMixtureDenoiser([1.0], torch.tensor([[float("nan")]]), 1.0, SCHEDULE),
         "finite means"),
        (lambda: GaussianMixtureDenoiser([1.0], torch.zeros(1, 2), 0.0, SCHEDULE),
         "'stds'.*smallest value of 0"),
        (lambda: GaussianMixtureDenoiser([1.0], torch.zeros(1, 2), torch.ones(3), SCHEDULE),
         r"'stds': got shape \(3,\)"),
        (lambda: GaussianMixtureDenoiser([0.5] * 2, torch.zeros(2, 2), torch.ones(2), SCHEDULE),
         r"'stds': got shape \(2,\), one for each component or for each entry"),
        (lambda: GaussianMixtureDenoiser([float("inf")], torch.zeros(1, 2), 1.0, SCHEDULE),
         "positive weights"),
        (lambda: GaussianDenoiser(torch.zeros(2), torch.ones(3), SCHEDULE),
         r"'std': got shape \(3,\)"),
        (lambda: GaussianDenoiser(torch.tensor([float("nan")]), 1.0, SCHEDULE), "'mean': got 1 NaN"),
    ],
)  # fmt: skip
def test_bad_oracles_are_refused_in_words(build, says):
    with pytest.raises(ValueError, match=says):
        build()


class _ExactMean(nn.Module):
    """The exact estimate of a Gaussian datum of standard deviation one half, as a network."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x, log_snr):
        signal, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
        gain = signal * 0.25 / (signal**2 * 0.25 + noise)
        return self.gain * gain[:, None] * x


def test_optimal_variance_is_the_exact_one_for_exact_means(double):
    """Then the bound is log p on every path; β̃ and β lose nats (facts, 6). On another grid, too."""
    torch.manual_seed(0)
    x_0 = 0.5 * torch.randn(4000, 3)
    for schedule in (LogSNRSchedule(40, log_snr_min=-14.0), LogSNRSchedule(7, log_snr_min=-14.0)):
        plain = NeuralDenoiser(_ExactMean(), schedule, (3,), prediction=DataPrediction())
        variance = OptimalVariance.from_data(DiffusionModel(plain), x_0)
        exact = NeuralDenoiser(
            _ExactMean(), schedule, (3,), prediction=DataPrediction(), variance=variance
        )
        for t in (1, 2, 5, 7):
            x_t = torch.randn(4, 3)
            ours = exact(x_t, t).variance
            truth = GaussianDenoiser(torch.zeros(3), torch.full((3,), 0.5), schedule)(
                x_t, t
            ).variance
            torch.testing.assert_close(ours, truth, rtol=0.1, atol=0)
        gaps = {}
        for name, denoiser in (("optimal", exact), ("forward", plain)):
            diffusion = DiffusionModel(denoiser)
            terms = elbo_terms(diffusion.model, diffusion.guide, x_0[:500], num_particles=4)
            truth = torch.distributions.Normal(0, 0.5).log_prob(x_0[:500]).sum(1).mean().item()
            gaps[name] = truth - terms.mean().value
        assert gaps["optimal"] < 0.01
        assert gaps["forward"] > 10 * gaps["optimal"]


def test_optimal_variance_bounds_best_for_wrong_means(double):
    """A neighbouring table of variances, larger or smaller, is worse: it is a minimum."""
    torch.manual_seed(0)
    schedule, x_0 = LogSNRSchedule(20), 0.5 * torch.randn(2000, 3)
    network = _ExactMean(gain=0.9)
    plain = NeuralDenoiser(network, schedule, (3,), prediction=DataPrediction())
    best = OptimalVariance.from_data(DiffusionModel(plain), x_0)

    def bound(factor):
        variance = OptimalVariance(best.log_snr, best.log_mean_square.exp() * factor)
        denoiser = NeuralDenoiser(
            network, schedule, (3,), prediction=DataPrediction(), variance=variance
        )
        diffusion = DiffusionModel(denoiser)
        torch.manual_seed(1)
        return (
            elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, num_particles=1)
            .mean()
            .value
        )

    assert bound(1.0) > bound(1.3)
    assert bound(1.0) > bound(0.75)


def test_optimal_variance_travels_with_its_model_and_refuses_nonsense():
    schedule = LogSNRSchedule(20)
    variance = OptimalVariance(torch.tensor([-8.0, 8.0]), torch.tensor([1.0, 1e-3]))
    denoiser = NeuralDenoiser(MLP((3,)), schedule, (3,), variance=variance).double()
    assert variance.log_snr.dtype == torch.float64
    assert "variance.log_mean_square" in denoiser.state_dict()
    assert "OptimalVariance(2 levels)" in repr(denoiser)
    for log_snr, square in (([1.0, 0.0], [1.0, 1.0]), ([0.0], [1.0]), ([0.0, 1.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="arguments 'log_snr' and 'mean_square'"):
            OptimalVariance(torch.tensor(log_snr), torch.tensor(square))
