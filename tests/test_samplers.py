"""Samplers against the program, closed-form flows and the literature's own solvers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import (
    DataPrediction,
    EnumeratedDenoiser,
    ForwardVariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LearnedVariance,
    LevelPrediction,
    NeuralDenoiser,
    NoisePrediction,
    OptimalVariance,
    PosteriorVariance,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_diffusion.diffusion import BernoulliDiffusion, DiffusionModel
from pyro_diffusion.likelihoods import DiscretizedGaussianLikelihood, GaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import AncestralSampler, DDIMSampler, ODESampler
from pyro_diffusion.samplers.steps import linear_map
from pyro_diffusion.schedules import (
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    VarianceExploding,
)
from pyro_diffusion.transforms import Standardize

PREDICTIONS = [
    NoisePrediction(), DataPrediction(), VelocityPrediction(), ScorePrediction(), LevelPrediction(5)
]  # fmt: skip
VARIANCES = [
    ForwardVariance(),
    PosteriorVariance(),
    LearnedVariance(),
    OptimalVariance(torch.linspace(-12, 12, 9), torch.linspace(1, 0.1, 9)),
]
SAMPLERS = {
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "ode": ODESampler,
    "sde": lambda *args: ODESampler(*args, eta=1.0),
}


def neural(schedule, *, prediction=None, variance=None, event_shape=(3,), device="cpu", **model):
    """A model whose network is anything but zero; float64."""
    prediction = NoisePrediction() if prediction is None else prediction
    variance = PosteriorVariance() if variance is None else variance
    count = prediction.num_outputs + variance.num_outputs
    network = MLP(event_shape, hidden_size=8, num_blocks=1, num_outputs=count, dropout=0.5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    denoiser = NeuralDenoiser(
        network.double(), schedule, event_shape, prediction=prediction, variance=variance
    )
    return DiffusionModel(denoiser, **model).to(device)


def gaussian(std, schedule, mean=0.4):
    std = torch.as_tensor(std, dtype=torch.float64)
    return DiffusionModel(GaussianDenoiser(torch.full_like(std, mean), std, schedule))


def same_seed(*draws, seed=7):
    """What each callable returns from the same generator state."""
    results = []
    for draw in draws:
        pyro.set_rng_seed(seed)
        results.append(draw())
    return results


# the chain itself


@pytest.mark.parametrize("timesteps", [None, 4, [2, 3, 9]])
@pytest.mark.parametrize("variance", VARIANCES, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
@pytest.mark.parametrize("scale", [lambda schedule: schedule, VarianceExploding])
def test_ancestral_draws_are_the_programs(prediction, variance, scale, timesteps, device):
    schedule = scale(LogSNRSchedule(10, log_snr_max=4.0, log_snr_min=-3.0))
    diffusion = neural(schedule, prediction=prediction, variance=variance, device=device)
    sampler = AncestralSampler(diffusion, timesteps)
    chain = diffusion if timesteps is None else diffusion.strided(timesteps)
    ours, theirs = same_seed(lambda: sampler(20), lambda: chain.sample(20))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert diffusion.training


def mixture(schedule):
    means = torch.tensor([[-2.0, 0.0], [1.0, 1.5]], dtype=torch.float64)
    return DiffusionModel(GaussianMixtureDenoiser([0.3, 0.7], means, 0.3, schedule))


def bits(schedule):
    return BernoulliDiffusion(EnumeratedDenoiser(torch.eye(4), schedule))


@pytest.mark.parametrize("build", [mixture, bits, lambda s: gaussian([0.5, 1.0], s)])
@pytest.mark.parametrize("timesteps", [None, 5])
def test_other_kernels_are_the_denoisers_own(build, timesteps):
    sampler = AncestralSampler(build(CosineSchedule(20)), timesteps)
    ours, theirs = same_seed(lambda: sampler(50), lambda: sampler.model.sample(50))
    torch.testing.assert_close(ours, theirs)


class Cold(GaussianProcess):
    """A process whose reverse kernels have next to no variance."""

    def reverse(self, x_t, denoised, t, variance):
        return super().reverse(x_t, denoised, t, lambda step: 1e-9 * variance(step))


class ColdDenoiser(NeuralDenoiser):
    """A denoiser of a user's own process."""

    @property
    def process(self):
        return Cold(self.schedule, self.event_shape)


def test_a_process_of_ones_own_has_its_own_kernels():
    diffusion = DiffusionModel(ColdDenoiser(MLP((2,)).double(), CosineSchedule(20), (2,)))
    ours, theirs = same_seed(lambda: AncestralSampler(diffusion)(50), lambda: diffusion.sample(50))
    torch.testing.assert_close(ours, theirs)


def test_a_curve_for_each_entry():
    schedule = MonotoneSchedule(12, event_shape=(3,))
    schedule.log_snr_min.data += torch.tensor([0.0, 1.0, 2.0])
    diffusion = neural(schedule)
    sampler = AncestralSampler(diffusion, 5)
    ancestral, implicit, program = same_seed(
        lambda: sampler(20),
        lambda: DDIMSampler(diffusion, 5, eta=1.0)(20),
        lambda: sampler.model.sample(20),
    )
    torch.testing.assert_close(ancestral, program)
    torch.testing.assert_close(implicit, program)
    assert ODESampler(diffusion, 5)(4).shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chains_of_float32_under_networks_of_less(dtype):
    diffusion = neural(LinearSchedule(50)).to(dtype)
    sampler = AncestralSampler(diffusion, 10)
    ours, theirs = same_seed(lambda: sampler(8), lambda: sampler.model.sample(8))
    assert ours.dtype == torch.float32
    # the network's input is rounded alike, but for what is one rounding away
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sampler", ["ancestral", "sde"])
def test_moments_of_exact_chains(sampler):
    """The exact chain has the data's law at any number of steps, the SDE's as they become many."""
    std, n = [0.3, 1.0, 2.0], 20_000
    diffusion = gaussian(std, LogSNRSchedule(400, log_snr_max=12.0, log_snr_min=-12.0))
    timesteps = 6 if sampler == "ancestral" else 100
    x_0 = SAMPLERS[sampler](diffusion, timesteps)(n)
    std = torch.tensor(std).double()
    assert ((x_0.mean(0) - 0.4).abs() < 5 * std / n**0.5).all()
    assert ((x_0.var(0) / std**2 - 1).abs() < 5 * (2 / n) ** 0.5 + 0.01 * (sampler == "sde")).all()


def test_the_bound_of_a_strided_exact_chain_is_log_p():
    schedule = LogSNRSchedule(1000, log_snr_max=8.0, log_snr_min=-40.0)
    diffusion = gaussian([0.3, 2.0], schedule)
    x_0 = diffusion.sample(5)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    for timesteps in (1, 3, [5, 300, 301, 1000]):
        chain = diffusion.strided(timesteps)
        for guide in (chain.guide, chain.posterior_guide):
            terms = elbo_terms(chain.model, guide, x_0, num_particles=2, analytic_kl=False)
            torch.testing.assert_close(terms.elbo, expected, rtol=1e-6, atol=1e-6)


# DDIM and the solvers


@pytest.mark.parametrize("schedule", [LinearSchedule(30), VarianceExploding(CosineSchedule(30))])
@pytest.mark.parametrize("timesteps", [None, 6])
def test_ddim_with_all_the_noise_is_the_chain(schedule, timesteps, device):
    diffusion = neural(schedule, variance=PosteriorVariance(), device=device)
    ours, theirs = same_seed(
        lambda: DDIMSampler(diffusion, timesteps, eta=1.0)(9),
        lambda: AncestralSampler(diffusion, timesteps)(9),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS[:4], ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", [DDIMSampler, ODESampler])
@pytest.mark.parametrize("scale", [lambda schedule: schedule, VarianceExploding])
def test_fused_steps_are_the_general_ones(kind, eta, prediction, scale, monkeypatch):
    schedule = scale(LogSNRSchedule(8, log_snr_max=4.0, log_snr_min=-3.0))
    sampler = kind(neural(schedule, prediction=prediction), eta=eta)
    (fused,) = same_seed(lambda: sampler(5))
    monkeypatch.setattr("pyro_diffusion.samplers.samplers.linear_map", lambda denoiser: None)
    (general,) = same_seed(lambda: sampler(5))
    torch.testing.assert_close(fused, general, rtol=1e-9, atol=1e-9)


def test_random_weights_are_drawn_once_for_a_chain():
    """As in the program: a network with a prior is one network for all steps."""

    class Bayesian(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))
            self.used = set()

        def forward(self, x_t, log_snr):
            self.used.add(self.weight.item())
            return self.weight * x_t

    denoiser = NeuralDenoiser(Bayesian(), LinearSchedule(10), (3,), prediction=DataPrediction())
    AncestralSampler(DiffusionModel(denoiser), 4)(2)
    assert len(denoiser.network.used) == 1


def test_a_parameterization_that_clips_is_not_fused():
    class Clipped(NoisePrediction):
        def x_0_hat(self, output, x_t, signal, noise):
            return super().x_0_hat(output, x_t, signal, noise).clamp(-1, 1)

    diffusion = neural(LinearSchedule(10), prediction=Clipped())
    assert linear_map(diffusion.denoiser) is None
    assert linear_map(neural(LinearSchedule(10)).denoiser) is not None
    assert DDIMSampler(diffusion)(50).abs().max() <= 1


def flow_map(diffusion, x_T):
    """The probability flow of Gaussian data from x_T to x_1, and the mean of x_0 there."""
    schedule, mean = diffusion.schedule, diffusion.denoiser.mean
    variance = diffusion.denoiser.variance
    (a_1, a_T), (s_1, s_T) = (
        getattr(schedule, name)(torch.tensor([1, schedule.num_timesteps]))
        for name in ("signal", "noise")
    )
    spread = lambda a, s: (a**2 * variance + s**2).sqrt()  # noqa: E731
    x_1 = a_1 * mean + spread(a_1, s_1) / spread(a_T, s_T) * (x_T - a_T * mean)
    return mean + a_1 * variance / spread(a_1, s_1) ** 2 * (x_1 - a_1 * mean)


@pytest.mark.parametrize("std", [0.3, 1.5])
@pytest.mark.parametrize("scale", [lambda schedule: schedule, VarianceExploding])
@pytest.mark.parametrize(("kind", "order"), [(DDIMSampler, 1), (ODESampler, 2)])
def test_orders_of_convergence(kind, order, scale, std):
    schedule = scale(LogSNRSchedule(1281, log_snr_max=8.0, log_snr_min=-8.0))
    diffusion = gaussian([std], schedule)
    x_T = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None] * diffusion.prior().stddev
    steps = np.array([40, 80, 160, 320])
    errors = [
        (kind(diffusion, int(n) + 1)(7, x_T) - flow_map(diffusion, x_T)).abs().max().item()
        for n in steps
    ]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.25)


def dpm_solver_plus_plus(x, noises, log_snr, x_0_hat, stochastic):
    """(SDE-)DPM-Solver++(2M), Lu et al. (2022), in numpy; log_snr from λ_T to λ_1, halved inside."""
    lam = np.asarray(log_snr) / 2
    alpha, sigma = (1 / np.sqrt(1 + np.exp(s * 2 * lam)) for s in (-1, 1))
    estimates = []
    for i in range(1, len(lam)):
        h = lam[i] - lam[i - 1]
        estimates.append(x_0_hat(x, 2 * lam[i - 1]))
        d = estimates[-1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
        if stochastic:
            x = sigma[i] / sigma[i - 1] * np.exp(-h) * x + alpha[i] * (1 - np.exp(-2 * h)) * d
            x = x + sigma[i] * np.sqrt(1 - np.exp(-2 * h)) * noises[i - 1]
        else:
            x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * d
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_second_order_sampler_is_dpm_solver_plus_plus(eta):
    diffusion, timesteps = mixture(LinearSchedule(1000)), [1, 5, 30, 200, 500, 800, 1000]
    sampler = ODESampler(diffusion, timesteps, eta=eta)
    x_T = torch.randn(6, 2, dtype=torch.float64)
    noises = torch.randn(len(timesteps) - 1, 6, 2, dtype=torch.float64)
    stream = iter(noises)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: next(stream))
        ours = sampler._chain(sampler.model, x_T, progress=False)
    theirs = dpm_solver_plus_plus(
        x_T.numpy(),
        noises.numpy(),
        diffusion.schedule.log_snr(torch.tensor(timesteps[::-1])).numpy(),
        lambda x, level: diffusion.denoiser.x_0_hat(torch.tensor(x), torch.tensor(level)).numpy(),
        stochastic=eta == 1,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside diffusers
@pytest.mark.parametrize(("kind", "order"), [(DDIMSampler, 1), (ODESampler, 2)])
def test_against_diffusers(kind, order):
    """Its multistep scheduler, whose first order is DDIM, on the same timesteps; it counts from 0."""
    diffusers = pytest.importorskip("diffusers")
    diffusion, timesteps = mixture(LinearSchedule(1000)), [1, 5, 30, 200, 500, 800, 1000]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, solver_order=order,
        prediction_type="sample", final_sigmas_type="zero", lower_order_final=True,
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=[t - 1 for t in reversed(timesteps)])
    x = x_T = torch.randn(6, 2, dtype=torch.float64)
    for t in scheduler.timesteps:
        level = diffusion.schedule.log_snr(t + 1)
        x = scheduler.step(diffusion.denoiser.x_0_hat(x, level), t, x).prev_sample
    torch.testing.assert_close(kind(diffusion, timesteps)(6, x_T), x, rtol=1e-3, atol=1e-3)


def test_the_sde_needs_fewer_steps_than_the_chain():
    """Errors of the variance of Gaussian data under the exact mean and β̃."""

    class ExactMean(nn.Module):
        def forward(self, x_t, log_snr):
            a, s = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
            return (a * 0.25 / (a**2 * 0.25 + s))[:, None] * x_t

    schedule = LogSNRSchedule(1000, log_snr_max=10.0, log_snr_min=-10.0)
    denoiser = NeuralDenoiser(
        ExactMean(), schedule, (1,), prediction=DataPrediction(), variance=PosteriorVariance()
    )
    n = 100_000
    errors = [
        abs(sampler(DiffusionModel(denoiser), 40)(n).var().item() / 0.25 - 1)
        for sampler in (AncestralSampler, SAMPLERS["sde"])
    ]
    assert errors[0] > 4 * errors[1] + 5 * (2 / n) ** 0.5


# the last step, and the first


def test_real_data_end_with_the_mean_in_the_users_units():
    transform = Standardize(torch.full((3,), 5.0), torch.full((3,), 2.0)).double()
    plain = neural(LogSNRSchedule(10))
    x_T = torch.randn(4, 3, dtype=torch.float64)
    moved = DiffusionModel(plain.denoiser, transform=transform)
    blurred = DiffusionModel(plain.denoiser, GaussianLikelihood(0.5))
    for kind in (DDIMSampler, ODESampler):
        x_0 = kind(plain)(4, x_T)
        torch.testing.assert_close(kind(moved)(4, x_T), 5 + 2 * x_0)
        torch.testing.assert_close(kind(blurred)(4, x_T), x_0)
        assert not torch.equal(kind(plain, eta=0.1)(4, x_T), kind(plain, eta=0.1)(4, x_T))


@pytest.mark.parametrize(
    "model",
    [
        {"prediction": LevelPrediction(5)},
        {"prediction": DataPrediction(), "likelihood": DiscretizedGaussianLikelihood(5, 1.0)},
    ],
)
def test_levels_end_with_a_draw(model):
    diffusion = neural(LogSNRSchedule(5, log_snr_max=0.0), **model)
    x_T = torch.randn(1, 3, dtype=torch.float64).expand(400, 3)
    x_0 = ODESampler(diffusion, 3)(400, x_T)
    assert set(x_0.unique().tolist()) <= set(range(5))
    assert len(x_0.unique(dim=0)) > 1


def test_a_chain_of_one_step():
    diffusion = neural(LogSNRSchedule(10))
    for build in SAMPLERS.values():
        assert build(diffusion, 1)(3).shape == (3, 3)
    ours, theirs = same_seed(
        lambda: AncestralSampler(diffusion, 1)(3), lambda: diffusion.strided(1).sample(3)
    )
    torch.testing.assert_close(ours, theirs)


def test_deterministic_samplers_draw_nothing_and_leave_x_T():
    diffusion = neural(LogSNRSchedule(10))
    x_T = torch.randn(4, 3)
    kept, state = x_T.clone(), torch.get_rng_state()
    for kind in (DDIMSampler, ODESampler):
        assert torch.equal(kind(diffusion)(4, x_T), kind(diffusion)(4, x_T))
    assert torch.equal(x_T, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_goes_on_after_a_sampler_is_made():
    diffusion = neural(LogSNRSchedule(10, learnable=True))
    sampler, x_T = DDIMSampler(diffusion, 4), torch.randn(2, 3)
    before = sampler(2, x_T)
    with torch.no_grad():
        diffusion.schedule.log_snr_min += 3
    assert not torch.allclose(sampler(2, x_T), before)
    torch.testing.assert_close(sampler(2, x_T), DDIMSampler(diffusion, 4)(2, x_T))


# compiled


@pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("prediction", [VelocityPrediction(), LevelPrediction(4)], ids=repr)
def test_compiled_once_for_all_steps(build, prediction):
    """Traced, and run by torch's own kernels: what is counted is how often it is traced."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounter

    reset()
    counter, diffusion = CompileCounter(), neural(LogSNRSchedule(12), prediction=prediction)
    eager, compiled = build(diffusion, 9), build(diffusion, 9)
    compiled.compile(backend=counter)
    ours, theirs = same_seed(lambda: compiled(5), lambda: eager(5))
    torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
    compiled(5)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
def test_compiled_by_the_default_compiler(device):
    diffusion = neural(LogSNRSchedule(12), device=device)
    eager, compiled = ODESampler(diffusion, eta=1.0), ODESampler(diffusion, eta=1.0)
    assert compiled.compile() is None
    ours, theirs = same_seed(lambda: compiled(5), lambda: eager(5))
    torch.testing.assert_close(ours, theirs)


# what is refused


class Broken(nn.Module):
    def __init__(self, break_output):
        super().__init__()
        self.break_output = break_output

    def forward(self, x_t, log_snr):
        return self.break_output(x_t)


def broken(break_output):
    denoiser = NeuralDenoiser(Broken(break_output), LinearSchedule(10), (3,))
    return DiffusionModel(denoiser)


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (
            lambda d: DDIMSampler(d.denoiser),
            "'diffusion': got NeuralDenoiser; expected an instance",
        ),
        (lambda d: DDIMSampler(d, 0), "'timesteps': got 0; expected 1 … 10"),
        (lambda d: DDIMSampler(d, 11), "'timesteps': got 11"),
        (lambda d: DDIMSampler(d, True), "'timesteps': got True"),
        (lambda d: ODESampler(d, [3, 2]), r"'timesteps': got \[3, 2\].*increasing"),
        (lambda d: AncestralSampler(d, [0, 2]), "'timesteps'.*in 1 … 10"),
        (lambda d: AncestralSampler(d, [2.5]), "'timesteps'.*whole"),
        (lambda d: DDIMSampler(d, eta=1.5), r"'eta': got 1.5; expected a number in \[0, 1\]"),
        (lambda d: ODESampler(d, eta=-0.1), "'eta': got -0.1"),
        (lambda d: ODESampler(d, eta=math.nan), "'eta': got nan"),
        (
            lambda d: DDIMSampler(bits(LinearSchedule(5))),
            "a chain of bits.*AncestralSampler",
        ),
        (lambda d: DDIMSampler(d)(0), "'num_samples': got 0"),
        (lambda d: DDIMSampler(d)(2, torch.zeros(3, 3)), r"'x_T': got states of shape \(3, 3\)"),
        (lambda d: DDIMSampler(gaussian([1.0], LinearSchedule(5))).compile(), "no network"),
        (lambda d: AncestralSampler(broken(lambda x: x * math.nan))(2), "'network'.*got 6 NaN"),
        (lambda d: DDIMSampler(broken(lambda x: x * math.inf))(2), "'network'.*got 6 NaN"),
        (lambda d: DDIMSampler(broken(lambda x: x[:, :1]))(2), r"'network'.*shape \(2, 1\)"),
        (lambda d: DDIMSampler(broken(lambda x: x[:, None]))(2), r"'network'.*\(2, 1, 3\)"),
    ],
)
def test_bad_input_is_refused_in_words(draw, says):
    with pytest.raises(ValueError, match="(?s)" + says):
        draw(neural(LinearSchedule(10)))
