import copy

import numpy as np
import pyro
import pytest
import torch
from oracles import GaussianReverseChain
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_diffusion.denoisers import NeuralDenoiser, PosteriorVariance
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.networks import MLP
from pyro_diffusion.parameterizations import LevelPrediction
from pyro_diffusion.schedules import (
    AlphaSchedule,
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    NoiseSchedule,
    VarianceExploding,
)

CURVES = [LinearSchedule, CosineSchedule, LogSNRSchedule]


def test_alpha_schedule_against_products(device):
    alpha = np.array([0.9, 0.5, 0.99, 0.2])
    schedule = AlphaSchedule(alpha.tolist()).to(device)
    t = torch.arange(5, device=device)
    bar = np.concatenate([[1], np.cumprod(alpha)])
    expected = {
        "alpha_bar": bar,
        "alpha": np.concatenate([[1], alpha]),
        "beta": np.concatenate([[0], 1 - alpha]),
        "signal": np.sqrt(bar),
        "noise": np.sqrt(1 - bar),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(schedule, name)(t).cpu(), values, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(schedule.snr(t)[1:].cpu(), bar[1:] / (1 - bar[1:]), rtol=1e-12)
    np.testing.assert_allclose(schedule.log_snr(t).exp().cpu(), schedule.snr(t).cpu())
    assert torch.isinf(schedule.snr(0))


def test_linear_schedule_is_the_published_one(device):
    schedule = LinearSchedule(1000).to(device)
    beta = np.linspace(1e-4, 0.02, 1000)
    t = torch.arange(1, 1001, device=device)
    np.testing.assert_allclose(schedule.beta(t).cpu(), beta, rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha_bar(t).cpu(), np.cumprod(1 - beta), rtol=1e-10)


def test_cosine_schedule_is_the_published_one():
    time = np.arange(1001) / 1000
    f = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    schedule = CosineSchedule(1000)
    t = torch.arange(1, 1001)
    np.testing.assert_allclose(schedule.beta(t), beta, rtol=1e-8)
    assert schedule.beta(1000).item() == pytest.approx(0.999, abs=1e-12)


def test_log_snr_schedule_is_linear_between_its_ends():
    schedule = LogSNRSchedule(5, log_snr_max=4.0, log_snr_min=-6.0)
    np.testing.assert_allclose(schedule.log_snr(torch.arange(1, 6)), [4, 1.5, -1, -3.5, -6])


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("num_timesteps", [2, 10, 1000, 4001])
def test_another_grid_is_the_same_curve(curve, num_timesteps):
    schedule = curve(1000)
    other = schedule.with_num_timesteps(num_timesteps)
    assert (schedule.num_timesteps, other.num_timesteps) == (1000, num_timesteps)
    t = torch.arange(1, num_timesteps + 1)
    expected = schedule.log_snr_at((t - 1) / torch.tensor(num_timesteps - 1).double())
    torch.testing.assert_close(other.log_snr(t), expected)
    torch.testing.assert_close(curve(num_timesteps).log_snr(t), expected)
    for ours, theirs in ((1, 1), (1000, num_timesteps)):
        torch.testing.assert_close(schedule.log_snr(ours), other.log_snr(theirs))


@pytest.mark.parametrize("curve", CURVES)
def test_a_chain_of_one_step_ends_in_noise(curve):
    torch.testing.assert_close(curve(1).log_snr(1), curve(1000).log_snr(1000))


@pytest.mark.parametrize("curve", CURVES)
def test_monotone_and_consistent(curve):
    schedule, t = curve(50), torch.arange(1, 51)
    assert (schedule.log_snr(t).diff() < 0).all()
    torch.testing.assert_close(
        schedule.signal(t) ** 2 + schedule.noise(t) ** 2, torch.ones(50).double()
    )
    torch.testing.assert_close(schedule.alpha(t).cumprod(0), schedule.alpha_bar(t))
    torch.testing.assert_close(schedule.alpha(t) + schedule.beta(t), torch.ones(50).double())


def test_beta_does_not_cancel():
    """At T = 100,000 a β of 1e-6 is right to nine digits; 1 − α in float32 would have none."""
    schedule = LogSNRSchedule(100_000, log_snr_max=8, log_snr_min=-8)
    step = 16 / 99_999
    # β_t = 1 − ᾱ_t/ᾱ_{t−1} with λ_{t−1} = λ_t + step and ᾱ = 1/(1 + e^{−λ})
    t = 50_000
    log_snr = 8 - step * (t - 1)
    expected = np.exp(-log_snr) * -np.expm1(-step) / (1 + np.exp(-log_snr))
    assert schedule.beta(t).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("curve", CURVES)
def test_shapes_follow_t(curve):
    schedule = curve(10)
    for name in ("alpha", "alpha_bar", "beta", "snr", "log_snr", "signal", "noise"):
        assert getattr(schedule, name)(3).shape == ()
        assert getattr(schedule, name)(torch.tensor([[1, 2, 3], [4, 5, 10]])).shape == (2, 3)


def test_the_curve_keeps_double_precision_and_moves(device):
    schedule = LinearSchedule(10).to(device)
    assert schedule.float().log_snr(3).dtype == torch.float64
    assert schedule.half().log_snr(3).dtype == torch.float64
    assert schedule.device.type == device.type
    assert copy.deepcopy(schedule).log_snr(3) == schedule.log_snr(3)


def test_state_dict_round_trip():
    source, target = LogSNRSchedule(10, log_snr_max=5, log_snr_min=-5), LogSNRSchedule(10)
    target.load_state_dict(source.state_dict())
    assert target.log_snr(1).item() == pytest.approx(5, rel=1e-14)
    torch.testing.assert_close(target.noise(10), source.noise(10))


def test_base_class_is_abstract():
    with pytest.raises(TypeError):
        NoiseSchedule(10)


# learned ends


def elbo_of_ends(ends, x_0, num_timesteps=5):
    """The bound of a chain with the exact mean for N(0.3, 0.5²) and the variances β."""
    log_snr = np.linspace(*ends, num_timesteps)
    bar = 1 / (1 + np.exp(-log_snr))
    alpha = bar / np.concatenate([[1.0], bar[:-1]])
    return GaussianReverseChain.exact(alpha, 0.3, 0.5, 1 - alpha).elbo(x_0).mean()


class ExactNoise(nn.Module):
    """E[ε | x_t] for N(0.3, 0.5²) data."""

    def forward(self, x_t, log_snr):
        a, s = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid().sqrt()[:, None]
        return s * (x_t - 0.3 * a) / (0.25 * a**2 + s**2)


@pytest.mark.parametrize("pair", ["guide", "posterior_guide", "subsampled"])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_gradients_of_learned_ends(elbo, pair, double):
    """Through guide and model together: the closed form's, by finite differences."""
    if (elbo, pair) == (TraceMeanField_ELBO, "guide"):
        pytest.skip("refused")
    schedule = LogSNRSchedule(5, log_snr_max=1.0, log_snr_min=-1.5, learnable=True)
    diffusion = DiffusionModel(NeuralDenoiser(ExactNoise(), schedule, (1,)))
    x_0 = torch.tensor([[-1.0], [0.2], [2.5]]).repeat(100, 1)
    model, guide = diffusion.model, diffusion.guide
    if pair == "subsampled":
        model, guide = (getattr(diffusion.subsampled(3), name) for name in ("model", "guide"))
    elif pair == "posterior_guide":
        guide = diffusion.posterior_guide
    loss = elbo()(model, guide)
    gradients = []
    for _ in range(60):
        loss.zero_grad()
        loss(x_0).backward()
        gradients.append([p.grad.item() for p in schedule.parameters()])
    gradients = -np.array(gradients) / len(x_0)

    low, log_range, h = -1.5, np.log(2.5), 1e-5
    data = x_0[:3].numpy()
    f = lambda low, r: elbo_of_ends((low + np.exp(r), low), data)  # noqa: E731
    expected = [
        (f(low + h, log_range) - f(low - h, log_range)) / (2 * h),
        (f(low, log_range + h) - f(low, log_range - h)) / (2 * h),
    ]
    error = gradients.std(0) / np.sqrt(59)
    assert (np.abs(gradients.mean(0) - expected) < 5 * error + 1e-9).all()
    assert (np.abs(expected) > 0.01).all()


def test_svi_moves_the_ends_and_improves_the_bound():
    """A chain that ends while its states still say much of the data learns to go on."""
    x_0 = torch.randint(0, 9, (256, 2))
    schedule = LogSNRSchedule(50, log_snr_max=3.0, log_snr_min=0.0, learnable=True)
    denoiser = NeuralDenoiser(
        MLP((2,), hidden_size=16, num_blocks=1, num_outputs=9), schedule, (2,),
        prediction=LevelPrediction(9), variance=PosteriorVariance(),
    )  # fmt: skip
    diffusion = DiffusionModel(denoiser)
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 0.05}), TraceMeanField_ELBO())
    losses = [svi.step(x_0, num_data=256) for _ in range(150)]
    assert schedule.log_snr_min < -1
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    assert set(diffusion.state_dict()) >= {"denoiser.schedule.log_snr_min"}
    assert f"{diffusion.name}.denoiser.schedule.log_range" in pyro.get_param_store()
    other = schedule.with_num_timesteps(7)
    assert other.log_snr_min is schedule.log_snr_min
    fixed = LogSNRSchedule(7, log_snr_max=3.0)
    fixed.with_num_timesteps(8).load_state_dict(LogSNRSchedule(8, log_snr_max=9.0).state_dict())
    assert fixed.log_snr_max.item() == pytest.approx(3.0)


@pytest.mark.parametrize("pair", ["guide", "posterior_guide", "subsampled"])
def test_guides_state_the_schedules_parameters_and_no_others(pair):
    """So that the forward chain trains its ends and, blocked or alone, leaves the network be."""
    schedule = LogSNRSchedule(5, learnable=True)
    diffusion = DiffusionModel(NeuralDenoiser(MLP((2,), hidden_size=8), schedule, (2,)))
    guide = diffusion.subsampled().guide if pair == "subsampled" else getattr(diffusion, pair)
    trace = poutine.trace(guide, param_only=True).get_trace(torch.randn(3, 2))
    prefix = f"{diffusion.name}.denoiser.schedule."
    assert set(trace.nodes) - {"_INPUT", "_RETURN"} == {
        prefix + "log_snr_min",
        prefix + "log_range",
    }


def test_exploding_schedules():
    curve = CosineSchedule(10)
    schedule, t = VarianceExploding(curve), torch.arange(11)
    torch.testing.assert_close(schedule.log_snr(t), curve.log_snr(t))
    torch.testing.assert_close(schedule.signal(t), torch.ones(11, dtype=torch.float64))
    torch.testing.assert_close(schedule.noise(t), (-0.5 * curve.log_snr(t)).exp())
    assert schedule.with_num_timesteps(3).num_timesteps == 3
    torch.testing.assert_close(schedule.with_num_timesteps(3).log_snr(3), curve.log_snr(10))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: AlphaSchedule([0.5, 1.0]), "'alpha'.*in \\(0, 1\\).*1 − β"),
        (lambda: AlphaSchedule([0.5, 0.0]), "'alpha'"),
        (lambda: AlphaSchedule([0.5, float("nan")]), "'alpha'"),
        (lambda: AlphaSchedule([]), "'alpha'"),
        (lambda: AlphaSchedule([[0.5]]), "'alpha'"),
        (lambda: AlphaSchedule([0.5]).with_num_timesteps(2), "fix the grid"),
        (lambda: LogSNRSchedule(10, log_snr_max=-8, log_snr_min=8), "strictly decreasing"),
        (lambda: LogSNRSchedule(10, log_snr_max=1, log_snr_min=1), "strictly decreasing"),
        (lambda: LogSNRSchedule(10, log_snr_max=float("inf")), "not finite"),
        (lambda: VarianceExploding(10), "'schedule': got 10; expected a NoiseSchedule"),
        (lambda: LinearSchedule(0), "'num_timesteps'.*got 0"),
        (lambda: LinearSchedule(2.5), "'num_timesteps'.*got 2.5"),
        (lambda: LinearSchedule(10, beta_end=1.5), "'beta_end'.*got 1.5"),
        (lambda: CosineSchedule(10).with_num_timesteps(-1), "'num_timesteps'.*got -1"),
        (lambda: LinearSchedule(10).beta(11), "'t'.*got 11.*0 … 10"),
        (lambda: LinearSchedule(10).beta(-1), "'t'.*got -1"),
        (lambda: LinearSchedule(10).alpha_bar(torch.tensor([3, 12])), "values from 3 to 12"),
        (lambda: LinearSchedule(10).signal(torch.tensor([0.5])), "a tensor of torch.float32"),
        (lambda: LinearSchedule(10).signal(0.5), "got 0.5"),
        (lambda: LinearSchedule(10).signal(True), "got True"),
    ],
)
def test_bad_input_is_refused_in_words(build, says):
    with pytest.raises(ValueError, match="(?s)" + says):
        build()
