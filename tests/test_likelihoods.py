import numpy as np
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from scipy.stats import norm, poisson

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import GaussianDenoiser, LevelPrediction, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.distributions import DiscretizedGaussian
from pyro_diffusion.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedGaussianLikelihood,
    GaussianLikelihood,
    LevelLikelihood,
    Likelihood,
    PoissonLikelihood,
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


def test_bits_are_the_posterior_of_a_measured_bit(double):
    """Even odds before; x̂_0 a measurement of ±1 with standard deviation s."""
    x_0_hat, scale = torch.tensor([-3.0, -0.5, 0.0, 0.9]), 0.7
    up, down = (norm.pdf(x_0_hat.numpy(), e, scale) for e in (1, -1))
    distribution = BernoulliLikelihood(scale)(x_0_hat)
    np.testing.assert_allclose(distribution.probs, up / (up + down), rtol=1e-12)
    bits = torch.tensor([0, 1, 1, 0])
    for dtype in (torch.bool, torch.uint8, torch.float32):
        embedded = BernoulliLikelihood().embed(bits.to(dtype))
        torch.testing.assert_close(embedded.double(), torch.tensor([-1.0, 1.0, 1.0, -1.0]))


def test_categories_are_the_posterior_of_a_measured_corner(double):
    likelihood = CategoricalLikelihood(4, 0.6)
    corners = likelihood.embed(torch.arange(4))
    np.testing.assert_array_equal(corners, 2 * np.eye(4) - 1)
    x_0_hat = torch.randn(5, 4)
    weights = norm.pdf(x_0_hat.numpy()[:, None], corners.numpy(), 0.6).prod(-1)
    expected = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(likelihood(x_0_hat).probs, expected, rtol=1e-10)


@pytest.mark.parametrize("max_count", [1.0, 30.0, 4000.0])
def test_counts_are_poisson_on_the_square_root_scale(max_count, double):
    likelihood = PoissonLikelihood(max_count)
    counts = torch.arange(0, 2 * max_count + 1, max(1, max_count // 10))
    embedded = likelihood.embed(counts)
    np.testing.assert_allclose(embedded, 2 * np.sqrt(counts.numpy() / max_count) - 1, rtol=1e-12)
    rate = likelihood(embedded).rate
    assert ((rate - counts).abs()[counts > 0] < 0.01 * counts[counts > 0]).all()
    expected = poisson.logpmf(counts[:, None].numpy(), rate.numpy())
    np.testing.assert_allclose(likelihood(embedded).log_prob(counts[:, None]), expected, rtol=1e-9)
    x_0_hat = torch.tensor([-500.0, -1.5, 3.0], dtype=torch.float32, requires_grad=True)
    log_prob = likelihood(x_0_hat).log_prob(torch.tensor([[0.0], [9.0]]))
    log_prob.sum().backward()  # an untrained network, far off at small signal
    assert log_prob.isfinite().all()
    assert x_0_hat.grad.isfinite().all()


class StudentTLikelihood:
    """Heavy-tailed measurements, as a user writes them: embed and a call."""

    def __init__(self, df, scale):
        self.df, self.scale = df, scale

    def embed(self, x_0):
        return x_0

    def __call__(self, x_0_hat):
        return torch.distributions.StudentT(self.df, x_0_hat, self.scale)


#: likelihood, event shape of the chain, draws of data
CASES = {
    "Gaussian": (GaussianLikelihood(0.3, learnable=True), (4,), lambda: torch.randn(300, 4)),
    "bits": (BernoulliLikelihood(learnable=True), (4,), lambda: torch.randint(0, 2, (300, 4))),
    "levels": (DiscretizedGaussianLikelihood(5), (4,), lambda: torch.randint(0, 5, (300, 4))),
    "categories": (CategoricalLikelihood(3), (4, 3), lambda: torch.randint(0, 3, (300, 4))),
    "counts": (PoissonLikelihood(9.0), (4,), lambda: torch.poisson(torch.full((300, 4), 4.0))),
    "counts as images": (PoissonLikelihood(9), (2, 2), lambda: torch.randint(0, 9, (300, 2, 2))),
    "Student's t": (StudentTLikelihood(3.0, 0.2), (4,), lambda: torch.randn(300, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_bound_agrees_and_samples_are_data(case):
    """Forward order, posterior order and subsampled: one number within five errors."""
    likelihood, event_shape, draw = CASES[case]
    x_0 = draw()
    network = MLP(event_shape, hidden_size=16, num_blocks=1)
    torch.nn.init.normal_(network.decode.weight, std=0.1)
    schedule = LogSNRSchedule(6, log_snr_max=4.0)
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, event_shape), likelihood)
    bounds = [
        elbo_terms(diffusion.model, guide, x_0, num_particles=30).mean()
        for guide in (diffusion.guide, diffusion.posterior_guide)
    ]
    pair = diffusion.subsampled(3)
    draws = [-Trace_ELBO().loss(pair.model, pair.guide, x_0) / len(x_0) for _ in range(60)]
    values = [bound.value for bound in bounds] + [np.mean(draws)]
    errors = [bound.monte_carlo_error for bound in bounds] + [np.std(draws) / 59**0.5]
    for i in range(3):
        assert abs(values[i] - values[i - 1]) < 5 * np.hypot(errors[i], errors[i - 1])
    drawn = diffusion.sample(7)
    assert drawn.shape[1:] == x_0.shape[1:]
    diffusion.embed(drawn)  # refuses what is no datum


@pytest.mark.parametrize("case", CASES)
def test_every_likelihood_trains(case):
    likelihood, event_shape, draw = CASES[case]
    x_0, schedule = draw(), LogSNRSchedule(20, log_snr_max=4.0)
    network = MLP(event_shape, hidden_size=16, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, event_shape), likelihood)
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    losses = [svi.step(x_0) for _ in range(60)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


def test_likelihoods_that_do_not_fit_are_refused_in_words():
    """By their own names: data that embed as another shape, a wrong distribution, no call at all."""
    denoiser = NeuralDenoiser(MLP((5,), hidden_size=8, num_blocks=1), LogSNRSchedule(4), (5,))
    categories = DiffusionModel(denoiser, CategoricalLikelihood(3))
    with pytest.raises(
        ValueError, match=r"\(7, 5\), which are states of shape \(7, 5, 3\).*\(5, 3\)"
    ):
        categories.guide(torch.randint(0, 3, (7, 5)))

    class Sum(StudentTLikelihood):
        def __call__(self, x_0_hat):
            return super().__call__(x_0_hat.sum())

    with pytest.raises(ValueError, match=r"'likelihood': got a distribution of batch shape \(\)"):
        DiffusionModel(denoiser, Sum(3.0, 1.0)).model(torch.randn(7, 5))

    class Mute:
        def embed(self, x_0):
            return x_0

    with pytest.raises(ValueError, match="'likelihood': got Mute.*can be called"):
        DiffusionModel(denoiser, Mute())


def test_what_was_learned_can_be_read():
    schedule = LogSNRSchedule(5, log_snr_max=3.0, log_snr_min=-4.0, learnable=True)
    assert repr(schedule) == "LogSNRSchedule(num_timesteps=5, log_snr_max=3, log_snr_min=-4)"
    assert repr(GaussianLikelihood(0.25)) == "GaussianLikelihood(scale=0.25)"
    likelihood = DiscretizedGaussianLikelihood(17, 0.5)
    assert repr(likelihood) == "DiscretizedGaussianLikelihood(num_levels=17, scale=0.5)"


def test_levels_need_no_likelihood(double):
    """LevelPrediction's own p(x_0 | x_1) is its posterior: exact for independent entries."""
    prior = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])

    class Prior(torch.nn.Module):
        def forward(self, x_t, log_snr):
            return prior.log().expand(len(x_t), 2, 3)

    schedule = LogSNRSchedule(1, log_snr_min=-80.0)  # x_1 says nothing: p(x_0) is the prior
    diffusion = DiffusionModel(
        NeuralDenoiser(Prior(), schedule, (2,), prediction=LevelPrediction(3))
    )
    x_0 = torch.tensor([[0, 2], [2, 1], [1, 0]])
    terms = elbo_terms(diffusion.model, diffusion.guide, x_0)
    expected = prior[torch.arange(2), x_0].log().sum(1)
    torch.testing.assert_close(terms.elbo, expected, rtol=1e-10, atol=1e-10)
    drawn = diffusion.sample(20_000)
    for entry in range(2):
        frequency = torch.bincount(drawn[:, entry], minlength=3) / 20_000
        p = prior[entry]
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


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
        (lambda: CategoricalLikelihood(1), "'num_categories'.*got 1"),
        (lambda: PoissonLikelihood(0), "'max_count'.*got 0"),
        (lambda: PoissonLikelihood(None), "'max_count'.*got None"),
        (lambda: BernoulliLikelihood("a"), "'scale'.*got 'a'"),
        (
            lambda: PoissonLikelihood(9).embed(torch.tensor([3, -2])),
            "got the value -2;.*at least 0",
        ),
        (lambda: PoissonLikelihood(9).embed(torch.tensor([0.5])), "got the value 0.5;.*counts"),
        (lambda: BernoulliLikelihood().embed(torch.tensor([2])), "got the value 2;.*0 … 1"),
        (lambda: CategoricalLikelihood(3).embed(torch.tensor([3])), "got the value 3;.*0 … 2"),
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


def test_numbers_of_numpy_and_a_datas_own_maximum_are_taken():
    """And described as Python's are, because a checkpoint is compared by that."""
    for one, other in [
        (GaussianLikelihood(np.float32(0.5)), GaussianLikelihood(0.5)),
        (DiscretizedGaussianLikelihood(np.int64(5)), DiscretizedGaussianLikelihood(5)),
        (CategoricalLikelihood(np.uint8(3), np.int64(1)), CategoricalLikelihood(3, 1)),
        (LevelLikelihood(np.int64(3)), LevelLikelihood(3)),
        (PoissonLikelihood(np.float64(9)), PoissonLikelihood(9)),
        (PoissonLikelihood(torch.tensor([3, 9]).max()), PoissonLikelihood(9)),
    ]:
        assert repr(one) == repr(other)
        assert one.extra_repr() == other.extra_repr()


def test_levels_from_logits_are_a_decoders_alone():
    likelihood = LevelLikelihood(3)
    logits = torch.randn(5, 2, 3)
    levels = torch.tensor([[0, 2]] * 5)
    expected = logits.log_softmax(-1).gather(-1, levels[..., None]).squeeze(-1)
    torch.testing.assert_close(likelihood(logits).log_prob(levels), expected)
    assert likelihood.embed(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]
    assert "num_levels=3" in repr(likelihood)
    with pytest.raises(ValueError, match="a logit for each of 3 levels"):
        likelihood(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"LevelLikelihood.*LevelPrediction"):
        DiffusionModel(
            GaussianDenoiser(torch.zeros(2), torch.ones(2), LinearSchedule(5)), likelihood
        )
    with pytest.raises(ValueError, match="num_levels"):
        LevelLikelihood(1)
