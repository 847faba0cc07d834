import copy
import pickle

import numpy as np
import pyro
import pytest
import torch
from oracles import GaussianReverseChain
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_diffusion import schedules
from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import (
    EnumeratedDenoiser,
    LevelPrediction,
    NeuralDenoiser,
    PosteriorVariance,
)
from pyro_diffusion.diffusion import BernoulliDiffusion, DiffusionModel
from pyro_diffusion.networks import MLP
from pyro_diffusion.processes import Denoised, GaussianProcess
from pyro_diffusion.schedules import (
    AlphaSchedule,
    CosineSchedule,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    NoiseSchedule,
    StridedSchedule,
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


# some of the timesteps

SCHEDULES = {
    "alpha": lambda: AlphaSchedule([0.9, 0.8, 0.7, 0.6, 0.5] * 4),
    "linear": lambda: LinearSchedule(20),
    "learned": lambda: LogSNRSchedule(20, learnable=True),
    "monotone": lambda: MonotoneSchedule(20),
    "by dimension": lambda: MonotoneSchedule(20, event_shape=(2,)),
    "exploding": lambda: VarianceExploding(CosineSchedule(20)),
    "exploding alpha": lambda: VarianceExploding(SCHEDULES["alpha"]()),
}


@pytest.mark.parametrize("build", SCHEDULES.values(), ids=SCHEDULES)
def test_a_strided_schedule_is_the_given_one_at_its_timesteps(build, device):
    schedule = build().to(device)
    strided, kept = StridedSchedule(schedule, [3, 10, 19]), torch.tensor([0, 3, 10, 19])
    t, steps = torch.arange(4, device=device), kept.to(device)
    for name in ("log_snr", "signal", "noise", "alpha_bar"):
        torch.testing.assert_close(getattr(strided, name)(t), getattr(schedule, name)(steps))
    torch.testing.assert_close(strided.alpha(t).cumprod(0), schedule.alpha_bar(steps))
    assert strided.num_timesteps == 3
    assert strided.event_shape == schedule.event_shape
    again = StridedSchedule(strided, [1, 3])
    torch.testing.assert_close(again.log_snr(t[:3]), schedule.log_snr(steps[[0, 1, 3]]))
    for twin in (copy.deepcopy(strided), pickle.loads(pickle.dumps(strided)), strided.double()):
        assert torch.equal(twin.log_snr(t), strided.log_snr(t))
    assert torch.equal(strided.with_num_timesteps(3).log_snr(t), strided.log_snr(t))


@pytest.mark.parametrize("build", SCHEDULES.values(), ids=SCHEDULES)
def test_a_strided_schedule_has_the_parameters_under_their_names(build):
    schedule = build()
    strided = StridedSchedule(schedule, [1, 20])
    assert dict(strided.named_parameters()).keys() == dict(schedule.named_parameters()).keys()
    assert all(a is b for a, b in zip(strided.parameters(), schedule.parameters(), strict=True))
    assert strided.state_dict().keys() == schedule.state_dict().keys()


def test_a_strided_schedule_is_the_given_curve_between_its_ends():
    schedule = CosineSchedule(101)
    strided, u = StridedSchedule(schedule, [11, 50, 61]), torch.linspace(0, 1, 5).double()
    torch.testing.assert_close(strided.log_snr_at(u), schedule.log_snr_at(0.1 + 0.5 * u))
    torch.testing.assert_close(strided.slope_at(u), 0.5 * schedule.slope_at(0.1 + 0.5 * u))


@pytest.mark.parametrize("build", [SCHEDULES[n] for n in ("alpha", "linear", "exploding")])
def test_the_tail_of_a_strided_schedule(build):
    """q(x_t | x_s) has the signal and the noise that the whole chain has between the two."""
    strided = StridedSchedule(build(), [3, 10, 19])
    tail, t = strided.tail(1), torch.tensor([1, 2])
    signal = strided.signal(t + 1) / strided.signal(1)
    variance = strided.noise(t + 1) ** 2 - (signal * strided.noise(1)) ** 2
    torch.testing.assert_close(tail.signal(t), signal)
    torch.testing.assert_close(tail.noise(t) ** 2, variance)


def test_training_a_strided_model_trains_the_model():
    schedule = LogSNRSchedule(20, learnable=True)
    diffusion = DiffusionModel(NeuralDenoiser(MLP((2,), hidden_size=8), schedule, (2,)))
    pair, before = diffusion.strided(5).subsampled(), schedule.log_snr_min.item()
    SVI(pair.model, pair.guide, Adam({"lr": 0.1}), TraceMeanField_ELBO()).step(torch.randn(9, 2))
    assert schedule.log_snr_min.item() != before
    names = {f"{diffusion.name}.{name}" for name, _ in diffusion.named_parameters()}
    assert set(pyro.get_param_store()) == names


def test_strided_bits():
    """Of independent fair bits the bound is log p, on any timesteps."""
    data = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    schedule = LinearDecaySchedule(100, alpha_bar_min=1e-6)
    diffusion = BernoulliDiffusion(EnumeratedDenoiser(data.double(), schedule))
    chain = diffusion.strided([10, 40, 100])
    terms = elbo_terms(chain.model, chain.guide, data.double(), num_particles=2, analytic_kl=False)
    expected = torch.full((4,), 0.25, dtype=torch.float64).log()
    torch.testing.assert_close(terms.elbo, expected, rtol=0, atol=1e-5)
    later, same = chain.process.marginal(data, 2), diffusion.process.marginal(data, 40)
    torch.testing.assert_close(later.mean, same.mean)


def test_strided_models():
    denoiser = NeuralDenoiser(MLP((2,), hidden_size=8), LinearSchedule(1000), (2,))
    diffusion, levels = DiffusionModel(denoiser), {}
    for count in (1, 2, np.int64(3), 7, 500, 999, 1000):
        chosen = diffusion.strided(count).schedule.timesteps
        assert len(set(chosen)) == count
        assert (chosen[0], chosen[-1]) == ((1000, 1000) if count == 1 else (1, 1000))
        gaps = np.diff(chosen)
        assert count < 3 or gaps.max() - gaps.min() <= 1
        levels[count] = chosen
    assert levels[7] == (1, 168, 334, 501, 667, 834, 1000)
    chain = diffusion.strided(range(1, 1001, 111))
    assert chain.name == diffusion.name
    trace = poutine.trace(chain.model).get_trace(num_samples=2)
    assert [name for name in trace.nodes if name.startswith("x_")] == [
        f"x_{t}" for t in range(10, -1, -1)
    ]
    for chosen in (0, 1001, True, [], [5, 2], "ab"):
        with pytest.raises(ValueError, match="'timesteps': got"):
            diffusion.strided(chosen)


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
        (
            lambda: VarianceExploding(10),
            "'schedule': got 10; expected an instance of NoiseSchedule",
        ),
        (
            lambda: StridedSchedule(10, [1]),
            "'schedule': got 10; expected an instance of NoiseSchedule",
        ),
        (lambda: StridedSchedule(LinearSchedule(5), [1, 6]), "'timesteps': got 6; expected.*1 … 5"),
        (lambda: StridedSchedule(LinearSchedule(5), [0, 5]), "'timesteps': got 0; expected.*1 … 5"),
        (lambda: StridedSchedule(LinearSchedule(5), [True, 5]), "'timesteps': got True; expected"),
        (lambda: StridedSchedule(LinearSchedule(5), 5), "'timesteps': got 5; expected"),
        (
            lambda: StridedSchedule(LinearSchedule(5), np.array([1.5])),
            "'timesteps': got 1.5; expected",
        ),
        (lambda: StridedSchedule(LinearSchedule(5), [1, 1]), "'timesteps'.*increasing"),
        (lambda: StridedSchedule(LinearSchedule(5), [1]).with_num_timesteps(2), "fix the grid"),
        (
            lambda: StridedSchedule(AlphaSchedule([0.5] * 4), [1, 2]).slope_at(torch.ones(1)),
            "curve",
        ),
        (lambda: LinearSchedule(0), "'num_timesteps'.*got 0"),
        (lambda: LinearSchedule(2.5), "'num_timesteps'.*got 2.5"),
        (lambda: LinearSchedule(True), "'num_timesteps'.*got True"),
        (lambda: MonotoneSchedule(5, num_pieces=0), "'num_pieces'.*got 0"),
        (lambda: MonotoneSchedule(5, event_shape=[2]), r"'event_shape'.*got \[2\].*a tuple"),
        (lambda: LinearSchedule(10, beta_end=1.5), "'beta_end'.*got 1.5"),
        (lambda: CosineSchedule(10).with_num_timesteps(-1), "'num_timesteps'.*got -1"),
        (lambda: LinearSchedule(10).beta(11), "'t'.*got 11.*0 … 10"),
        (lambda: LinearSchedule(10).beta(-1), "'t'.*got -1"),
        (lambda: LinearSchedule(10).alpha_bar(torch.tensor([3, 12])), "values from 3 to 12"),
        (lambda: LinearSchedule(10).signal(torch.tensor([0.5])), "a tensor of torch.float32"),
        (lambda: LinearSchedule(10).signal(0.5), "got 0.5"),
        (lambda: LinearSchedule(10).signal(True), "got True"),
        (lambda: LinearSchedule(10).signal(np.int64(11)), "'t'.*got .*11.*0 … 10"),
    ],
)
def test_bad_input_is_refused_in_words(build, says):
    with pytest.raises(ValueError, match="(?s)" + says):
        build()


def test_whole_numbers_of_any_kind():
    """NumPy's like Python's, and tensors of small integers, in which t − 1 would wrap around."""
    schedule, expected = LinearSchedule(np.int64(10)), LinearSchedule(10).beta(torch.arange(11))
    assert type(schedule.num_timesteps) is int
    assert [schedule.beta(np.int32(t)).item() for t in range(11)] == expected.tolist()
    assert torch.equal(schedule.beta(torch.arange(11, dtype=torch.uint8)), expected)
    for timesteps in (np.array([1, 10]), torch.tensor([1, 10]), [np.int64(1), 10], range(1, 11, 9)):
        assert StridedSchedule(schedule, timesteps).timesteps == (1, 10)


def test_every_class_is_of_the_package():
    """Pickles of version 0.1 look for the classes there; a table is for the package's own classes."""
    for build in SCHEDULES.values():
        schedule = build()
        assert getattr(schedules, type(schedule).__name__) is type(schedule)
        for own in (schedule, StridedSchedule(schedule, [1, 20]), VarianceExploding(schedule)):
            assert own._is_own()
            assert copy.deepcopy(own)._is_own()


def test_a_strided_schedule_is_moved_and_loaded_with_the_given_one_inside():
    strided = StridedSchedule(LogSNRSchedule(20), [3, 20])
    strided.load_state_dict(LogSNRSchedule(20, log_snr_max=4.0, log_snr_min=-4.0).state_dict())
    assert strided.log_snr(2) == strided.schedule.log_snr(20) == -4
    moved = StridedSchedule(VarianceExploding(LinearSchedule(20)), [3, 20]).to("meta")
    tensors = [*moved.buffers(), *moved.schedule.buffers()]
    assert all(x.is_meta for x in tensors)
    assert moved.schedule.device == moved.device == torch.device("meta")
    assert moved.steps.is_meta


def test_a_users_view_is_put_on_another_grid():
    class Louder(VarianceExploding):
        def __init__(self, gain, schedule):
            super().__init__(schedule)
            self.gain = gain

    schedule = Louder(2.0, LogSNRSchedule(10, learnable=True))
    other = schedule.with_num_timesteps(3)
    assert (type(other), other.gain, other.num_timesteps) == (Louder, 2.0, 3)
    assert (other.schedule.num_timesteps, schedule.schedule.num_timesteps) == (3, 10)
    assert other.schedule.log_snr_min is schedule.schedule.log_snr_min


def test_tables_follow_the_numbers():
    """A fixed schedule's coefficients are looked up, and never those of other numbers."""
    schedule = LogSNRSchedule(10)
    first = schedule.log_snr(5)
    first -= 3  # not a view of the table
    assert schedule.log_snr(5) == pytest.approx(8 - 16 * 4 / 9)
    schedule.log_snr_min.data.fill_(-4.0)  # as optimisers write, past autograd's count of versions
    high = -4 + schedule.log_range.exp()
    assert schedule.log_snr(10) == -4
    assert schedule.log_snr(torch.tensor([1])) == pytest.approx(high.item())
    with torch.inference_mode():
        inside = schedule.with_num_timesteps(5)
        assert inside.log_snr(5) == -4
    assert inside.beta(torch.tensor([5])).requires_grad is False


def test_a_schedule_of_ones_own_has_no_table():
    class Steep(LogSNRSchedule):
        steepness = 1.0

        def log_snr_at(self, u):
            return self.steepness * super().log_snr_at(u)

    schedule = Steep(10)
    for wrapped in (schedule, VarianceExploding(schedule), StridedSchedule(schedule, [1, 10])):
        schedule.steepness = 1.0
        assert wrapped.log_snr(1) == pytest.approx(8)
        if wrapped is schedule:
            schedule.steepness = 0.5
            assert wrapped.log_snr(1) == pytest.approx(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_follow_the_numbers(dtype):
    """The coefficients of the kernels are kept by dtype, and made anew for other numbers."""
    schedule, t = LogSNRSchedule(10), torch.tensor([2, 5, 10])
    x, denoised = torch.ones(3, 2, dtype=dtype), Denoised(torch.zeros(3, 2, dtype=dtype))

    def kernels(schedule):
        process = GaussianProcess(schedule, torch.Size([2]))
        return (
            process.prior(dtype), process.marginal(x, t), process.marginal(x, 3), process.posterior(x, -x, t),
            process.reverse(x, denoised, t), process.transition(x, t),
        )  # fmt: skip

    before = kernels(schedule)
    schedule.log_snr_min.data.fill_(-4.0)  # the curve now goes from 12 to -4
    expected = kernels(LogSNRSchedule(10, log_snr_max=12.0, log_snr_min=-4.0))
    for kernel, old, other in zip(kernels(schedule), before, expected, strict=True):
        assert kernel.mean.dtype == kernel.stddev.dtype == dtype
        torch.testing.assert_close(kernel.mean, other.mean)
        torch.testing.assert_close(kernel.stddev, other.stddev)
        assert old is before[0] or not torch.allclose(kernel.stddev, old.stddev)


def test_a_process_may_define_its_marginals_by_noised_alone():
    class Louder(GaussianProcess):
        def noised(self, x_0, log_snr):
            return super().noised(2 * x_0, log_snr)

    schedule, x_0, t = LogSNRSchedule(10), torch.ones(3, 2), torch.tensor([1, 5, 10])
    ours, plain = (
        kind(schedule, torch.Size([2])).marginal(x_0, t) for kind in (Louder, GaussianProcess)
    )
    torch.testing.assert_close(ours.mean, 2 * plain.mean)
