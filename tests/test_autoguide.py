"""A diffusion chain as a guide, against its base path by path, exact drifts and quadrature."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from copies import torch_saved, unpickled
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)  # fmt: skip
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import nn

from pyro_diffusion import MLP, CosineSchedule, LogSNRSchedule, compile_elbo, global_evidence
from pyro_diffusion.inference import AutoDiffusion
from pyro_diffusion.inference.drift import CLIP

Y = torch.tensor([0.4, 1.9, 0.7, 1.1], dtype=torch.float64)
#: torch 2.13 says so of its own function, which Pyro calls
JIT = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
QUIET = {"ignore_jit_warnings": True}
BASES = {
    "diagonal": partial(AutoDiagonalNormal, init_scale=0.7),
    "multivariate": AutoMultivariateNormal,
    "flow": partial(AutoIAFNormal, hidden_dim=[8]),
    "flows": partial(AutoIAFNormal, hidden_dim=[8], num_transforms=2),
}


def model(y, part=None):
    """Latents on the line, the half-line, a simplex, and in a plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 2):
        group = pyro.sample("group", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("shrunk", -group.square().sum((-1, -2), keepdim=True)[..., 0])
    with pyro.plate("data", len(y), subsample_size=part) as rows:
        pyro.sample("y", dist.Normal(mean + share[..., 0], scale), obs=y[rows])


def pair(y):
    """A mean and a scale, of data."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def log_p_of_pair(y):
    """By the trapezoidal rule."""
    mean, log_scale = torch.linspace(-12, 12, 1201), torch.linspace(-6, 6, 1201)
    m, s = torch.meshgrid(mean, log_scale, indexing="ij")
    log_p = dist.Normal(0.0, 2.0).log_prob(m) + dist.Normal(0.0, 1.0).log_prob(s)
    log_p = log_p + dist.Normal(m[..., None], s.exp()[..., None]).log_prob(y).sum(-1)
    return (log_p.logsumexp((0, 1)) + math.log((24 / 1200) * (12 / 1200))).item()


def gaussian(loc, scale):
    """A model whose posterior is a Gaussian in the latent's own coordinates."""

    def program(*args):
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return program


def log_weight(program, guide, *args):
    """The log-weight of a path, with the trace of the guide."""
    drawn = poutine.trace(guide).get_trace(*args)
    scored = poutine.trace(poutine.replay(program, trace=drawn)).get_trace(*args)
    return (scored.log_prob_sum() - drawn.log_prob_sum()).item(), drawn, scored


def end_of(trace):
    return next(site["value"] for name, site in trace.nodes.items() if name.endswith(".x_0"))


def disturbed(guide, *args):
    """A guide whose base is not at its start."""
    guide(*args)
    with torch.no_grad():
        for parameter in guide.base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("schedule", [None, CosineSchedule(5)])
@pytest.mark.parametrize("base", BASES)
def test_a_path_weighs_at_the_start_what_the_base_draw_weighs(double, base, schedule):
    guide = disturbed(AutoDiffusion(model, 7, BASES[base], schedule=schedule), Y)
    weight, drawn, scored = log_weight(model, guide, Y)
    x_0, transform = end_of(drawn), guide.base.get_transform(Y)
    log_det = transform.log_abs_det_jacobian(x_0, transform(x_0)).sum()
    log_q = dist.Normal(torch.zeros(8), 1.0).log_prob(x_0).sum() - log_det
    points = sum(drawn.nodes[name]["log_prob_sum"] for name in ("mean", "scale", "share", "group"))
    assert weight == pytest.approx((scored.log_prob_sum() - log_q - points).item(), abs=1e-10)


def test_a_path_in_a_chain_that_explodes_weighs_the_same(double, exploding):
    guide = disturbed(AutoDiffusion(pair, base=BASES["multivariate"], schedule=exploding), Y)
    weight, drawn, scored = log_weight(pair, guide, Y)
    x_0 = end_of(drawn)
    log_q = guide.base.get_posterior(Y).log_prob(guide.base.get_transform(Y)(x_0))
    points = drawn.nodes["mean"]["log_prob_sum"] + drawn.nodes["scale"]["log_prob_sum"]
    assert weight == pytest.approx((scored.log_prob_sum() - log_q - points).item(), abs=1e-10)


@pytest.fixture
def exploding():
    class Exploding(LogSNRSchedule):
        def scales(self, log_snr):
            return torch.ones_like(log_snr), (-0.5 * log_snr).exp()

    return Exploding(6, log_snr_max=4.0, log_snr_min=-6.0)


class ExactDrift(nn.Module):
    """u for which the estimate is E[x_0 | x_t] of data N(0, variance)."""

    def __init__(self, variance):
        super().__init__()
        self.variance = variance

    def forward(self, x_t, log_snr):
        a, noise = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid().sqrt()[:, None]
        exact = a * self.variance / (a**2 * self.variance + noise**2) * x_t
        return (exact - a * x_t) / noise


@pytest.mark.parametrize("num_timesteps", [1, 4])
def test_the_exact_reversal_has_constant_weights(double, num_timesteps):
    """Its mean and variance are those of q(x_{t-1} | x_t) for the posterior; x_T is white noise."""
    variance = torch.tensor([0.3, 2.5])
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=1.0, log_snr_min=-40.0)
    if num_timesteps == 1:
        schedule = LogSNRSchedule(1, log_snr_max=-40.0, log_snr_min=-41.0)
    program = gaussian(torch.tensor([1.0, -2.0]), variance.sqrt())
    base = partial(
        AutoDiagonalNormal,
        init_scale=1.0,
        init_loc_fn=init_to_value(values={"z": torch.tensor([1.0, -2.0])}),
    )
    guide = AutoDiffusion(
        program, base=base, network=ExactDrift(variance), schedule=schedule, score=False
    )
    guide()
    t = torch.arange(1, num_timesteps + 1)
    a, noise = schedule.signal(t)[:, None], schedule.noise(t)[:, None]
    before, noise_before = schedule.signal(t - 1)[:, None], schedule.noise(t - 1)[:, None]
    alpha = (a / before) ** 2
    share = (1 - alpha) / noise**2
    posterior = noise_before**2 * share
    of_datum = variance * noise**2 / (a**2 * variance + noise**2)
    exact = posterior + (before * share) ** 2 * of_datum
    with torch.no_grad():
        guide.drift.log_scale.copy_(0.5 * (exact / (1 - alpha)).log())
    found = global_evidence(program, guide, num_particles=50, progress=False)
    assert found.log_weights.abs().max() < 1e-7


def test_the_score_is_the_gradient_over_that_of_the_base(double):
    loc, scale = torch.tensor([0.5, -0.3]), torch.tensor([0.2, 1.5])
    guide = AutoDiffusion(gaussian(loc, scale), 3, partial(AutoDiagonalNormal, init_scale=0.5))
    guide()
    x = torch.randn(2)
    z = guide.base.loc + 0.5 * x
    expected = -0.5 * (z - loc) / scale**2 + x
    found = guide._score(guide._map(), (), {}, x)
    torch.testing.assert_close(found, expected.detach())
    with torch.no_grad():
        guide.drift.gate.fill_(0.3)
    x_t, signal, noise = (
        torch.randn(2),
        guide.drift.schedule.signal(2),
        guide.drift.schedule.noise(2),
    )
    one = guide.drift.transition(x_t, 2, None).mean
    two = guide.drift.transition(x_t, 2, lambda x: torch.tensor([3.0, -4.0])).mean
    clipped = torch.tensor([3.0, -4.0]) / (1 + 12.5**0.5 / CLIP)
    step = guide.drift.process.posterior(torch.zeros(2), torch.ones(2), 2).mean
    torch.testing.assert_close(two - one, step * noise * 0.3 * clipped / (signal**2 + noise**2))


@pytest.mark.parametrize("base", ["diagonal", "flows"])
def test_the_score_has_the_volumes_of_constraint_and_base(double, base):
    """The gradient of log N(m; 0, 2) + log N(log s; 0, 1) + log p(y) + log |det| by the state, plus x."""
    guide = disturbed(AutoDiffusion(pair, 2, BASES[base]), Y)
    transform = guide.base.get_transform(Y)

    def log_p(x):
        z = transform(x)
        of_y = dist.Normal(z[0], z[1].exp()).log_prob(Y).sum()
        prior = dist.Normal(0.0, 2.0).log_prob(z[0]) + dist.Normal(0.0, 1.0).log_prob(z[1])
        jacobian = torch.autograd.functional.jacobian(transform, x, create_graph=True)
        return prior + of_y + jacobian.det().abs().log()

    x = torch.randn(2, requires_grad=True)
    (expected,) = torch.autograd.grad(log_p(x), x)
    found = guide._score(guide._map(Y), (Y,), {}, x)
    torch.testing.assert_close(found, expected + x.detach())
    assert not found.requires_grad  # no derivative of its own


def test_the_noise_of_a_step_has_limits(double):
    guide = AutoDiffusion(gaussian(torch.zeros(2), 1.0), 3)
    guide()
    scales = []
    for log_scale in (-9.0, -3.0, 1.0, 9.0):
        with torch.no_grad():
            guide.drift.log_scale.fill_(log_scale)
        scales.append(guide.drift.transition(torch.randn(2), 2, None).stddev)
    torch.testing.assert_close(scales[0], scales[1])
    torch.testing.assert_close(scales[2], scales[3])
    torch.testing.assert_close(scales[2], scales[1] * math.exp(4.0))


@pytest.mark.parametrize("t", [1, 2, 3])
def test_each_step_has_a_gate_of_its_own(double, t):
    guide = AutoDiffusion(gaussian(torch.zeros(2), 1.0), 3)
    guide()
    drift = guide.drift
    with torch.no_grad():
        drift.gate.copy_(torch.tensor([[0.1], [0.2], [0.3]]))
    x_t, score = torch.randn(2), torch.tensor([3.0, -4.0])
    signal, noise = drift.schedule.signal(t), drift.schedule.noise(t)
    before = drift.schedule.signal(t - 1)
    share = 1 - (signal / before) ** 2
    of_datum = before * share / noise**2  # the coefficient of x_0 in E3
    moved = drift.transition(x_t, t, lambda x: score).mean - drift.transition(x_t, t, None).mean
    clipped = score / (1 + 12.5**0.5 / CLIP)
    torch.testing.assert_close(moved, of_datum * noise * 0.1 * t * clipped)


def test_the_bound_is_below_the_evidence_and_the_weights_reach_it(double):
    guide = AutoDiffusion(pair, 8, partial(AutoDiagonalNormal, init_scale=0.5))
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(pair, guide, pyro.optim.ClippedAdam({"lr": 0.01}), elbo)
    start = global_evidence(pair, guide, Y, num_particles=400, max_plate_nesting=1, progress=False)
    for _ in range(120):
        svi.step(Y)
    found = global_evidence(pair, guide, Y, num_particles=2000, max_plate_nesting=1, progress=False)
    log_p = log_p_of_pair(Y)
    assert found.elbo < log_p
    assert found.elbo - start.elbo > 1.0
    assert log_p - found.elbo < 0.5
    assert abs(found.log_evidence - log_p) < 4 * found.standard_error < 0.1


@pytest.mark.parametrize("base", ["multivariate", "flow"])
def test_a_trained_chain_reads_alike_with_and_without_a_plate(double, base):
    guide = disturbed(AutoDiffusion(pair, 4, BASES[base]), Y)
    with torch.no_grad():
        guide.drift.gate.fill_(0.2)
        guide.drift.log_scale.fill_(-0.2)
    evidence = partial(global_evidence, pair, guide, Y, num_particles=300, progress=False)
    one, other = evidence(), evidence(max_plate_nesting=1)
    error = math.hypot(one.elbo_standard_error, other.elbo_standard_error)
    assert abs(one.elbo - other.elbo) < 4 * error


def losses():
    together = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    return [
        Trace_ELBO(), Trace_ELBO(**together), RenyiELBO(num_particles=3), RenyiELBO(**together),
        JitTrace_ELBO(**together, **QUIET),
    ]  # fmt: skip


@JIT
@pytest.mark.parametrize("base", ["diagonal", "flow"])
def test_pyro_steps_with_every_loss(double, base):
    guide = AutoDiffusion(model, 3, BASES[base])
    guide(Y)
    for elbo in losses():
        before = [parameter.clone() for parameter in guide.parameters()]
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        assert math.isfinite(svi.step(Y))
        changed = [not torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True)]
        assert any(changed)


def test_a_compiled_loss_is_that_of_the_programs(double):
    """Also after a step: the graph uses the present parameters."""
    guide = AutoDiffusion(pair, 3, BASES["multivariate"])
    guide(Y)
    with torch.no_grad():
        guide.drift.gate.fill_(0.3)
    plain = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    compiled = compile_elbo(pair, guide, plain, backend=None)
    for _ in range(3):
        values = []
        for loss in (lambda: plain.differentiable_loss(pair, guide, Y), lambda: compiled(Y)):
            loss()
            torch.manual_seed(3)
            values.append(loss())
        torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


@JIT
@pytest.mark.parametrize("base", ["multivariate", "flow"])
def test_a_loss_of_torch_jit_is_that_of_the_programs(double, base):
    """On average, because it draws in another way; also after a step, and with other data."""

    def program(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.3).to_event(1), obs=y)

    y = torch.tensor([1.0, -1.0])
    guide = AutoDiffusion(program, 3, BASES[base])
    guide(y)
    with torch.no_grad():
        guide.drift.gate.fill_(0.5)
    many = {"num_particles": 1000, "vectorize_particles": True, "max_plate_nesting": 0}
    for elbo in (Trace_ELBO(**many), jit := JitTrace_ELBO(**many, **QUIET)):
        elbo.differentiable_loss(program, guide, y)
    for _ in range(2):
        losses = torch.tensor(
            [
                [elbo.differentiable_loss(program, guide, y).item() for _ in range(8)]
                for elbo in (Trace_ELBO(**many), jit)
            ]
        )
        error = (losses.var(1).sum() / 8).sqrt()
        assert (losses[0].mean() - losses[1].mean()).abs() < 5 * error
        assert error < 1.5
        y = y + 2
        with torch.no_grad():
            for parameter in guide.base.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def test_a_part_of_the_data_has_the_same_bound_on_average(double):
    guide = disturbed(AutoDiffusion(model, 2, BASES["multivariate"]), Y)
    elbo = Trace_ELBO()
    losses = torch.tensor(
        [[elbo.loss(model, guide, Y, part) for _ in range(150)] for part in (None, 2)]
    )
    means, errors = losses.mean(1), losses.std(1) / 150**0.5
    assert (means[0] - means[1]).abs() < 4 * errors.square().sum().sqrt()


def test_draws_are_those_of_the_base_at_the_start(double):
    guide = disturbed(AutoDiffusion(model, 4, BASES["diagonal"]), Y)
    draws = guide.sample_posterior(2000, Y, max_plate_nesting=1)
    shapes = {name: tuple(x.shape) for name, x in draws.items()}
    assert shapes == {"mean": (2000,), "scale": (2000,), "share": (2000, 3), "group": (2000, 2, 2)}
    loc, scale = guide.base._loc_scale(Y)
    error = (draws["mean"].mean() - loc[0]) / (scale[0] / 2000**0.5)
    assert error.abs() < 4
    assert (draws["scale"].log().std() / scale[1] - 1).abs() < 4 / 4000**0.5
    few = guide.sample_posterior(5, Y)
    assert {name: tuple(x.shape[1:]) for name, x in few.items()} == {
        name: shape[1:] for name, shape in shapes.items()
    }
    latents = guide(Y)
    assert {name: tuple(x.shape) for name, x in latents.items()} == {
        name: shape[1:] for name, shape in shapes.items()
    }


def test_quantiles_and_median_are_of_draws(double):
    guide = disturbed(AutoDiffusion(pair, 1, BASES["diagonal"], score=False), Y)
    loc, scale = guide.base._loc_scale(Y)
    quantiles = guide.quantiles([0.1, 0.5, 0.9], Y)
    expected = dist.Normal(loc[1], scale[1]).icdf(torch.tensor([0.1, 0.5, 0.9])).exp()
    assert quantiles["mean"].shape == (3,)
    assert (quantiles["scale"] / expected - 1).abs().max() < 0.2
    assert (guide.median(Y)["scale"] / expected[1] - 1).abs() < 0.15


def test_predictive_draws_latents_and_data(double):
    guide = AutoDiffusion(pair, 2)
    guide(Y)
    for parallel in (False, True):
        drawn = Predictive(pair, guide=guide, num_samples=6, parallel=parallel)(Y)
        assert set(drawn) == {"mean", "scale", "y"}
        assert drawn["y"].shape == (6, 4)


def test_a_broad_start_is_broader_and_is_drawn_to_the_modes(double):
    program = gaussian(torch.zeros(2), 1.0)
    guide = AutoDiffusion(program, 8, partial(AutoDiagonalNormal, init_scale=1.0), init_scale=4.0)
    guide()
    with torch.no_grad():
        start = guide.drift.gate.clone()
        signal, noise = (
            f(torch.arange(1, 9)) for f in (guide.drift.schedule.signal, guide.drift.schedule.noise)
        )
        torch.testing.assert_close(start, (signal * noise)[:, None].expand(8, 2).to(start))
        drawn = guide.sample_posterior(1000, max_plate_nesting=0)["z"].std()
        guide.drift.gate.zero_()
        broad = guide.sample_posterior(1000, max_plate_nesting=0)["z"].std()
    assert abs(broad - 4) < 0.3
    assert drawn < 2.5


def test_a_fitted_base_is_copied_and_can_be_held(double):
    base = AutoMultivariateNormal(pair, init_scale=0.5)
    SVI(pair, base, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(Y)
    before = [parameter.clone() for parameter in base.parameters()]
    guide = AutoDiffusion(pair, 3, base)
    for held in (False, True):
        guide.base.requires_grad_(not held)
        guide(Y)
        own = [parameter.clone() for parameter in guide.base.parameters()]
        svi = SVI(pair, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(2):
            svi.step(Y)
        same = [torch.equal(a, b) for a, b in zip(own, guide.base.parameters(), strict=True)]
        assert all(same) == held
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))
    assert set(base(Y)) == {"mean", "scale"}
    assert base.model is not None
    SVI(pair, base, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(Y)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled, torch_saved])
def test_a_copy_is_trained_apart(double, copied):
    guide = disturbed(AutoDiffusion(pair, 3, BASES["multivariate"]), Y)
    other = copied(guide)
    torch.manual_seed(1)
    weight = log_weight(pair, guide, Y)[0]
    torch.manual_seed(1)
    assert log_weight(pair, other, Y)[0] == pytest.approx(weight, abs=1e-12)
    before = [parameter.clone() for parameter in guide.parameters()]
    SVI(pair, other, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(Y)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True)]
    assert any(moved)
    SVI(pair, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(Y)
    assert guide.model is not None


def test_weights_are_loaded_from_a_state_dict(double):
    guide = disturbed(AutoDiffusion(pair, 3), Y)
    other = AutoDiffusion(pair, 3)
    other(Y)
    other.load_state_dict(guide.state_dict())
    torch.manual_seed(1)
    weight = log_weight(pair, guide, Y)[0]
    torch.manual_seed(1)
    assert log_weight(pair, other, Y)[0] == pytest.approx(weight, abs=1e-12)


def test_a_thousand_latents_and_64_steps_fit_into_memory():
    program = gaussian(torch.zeros(1000), 0.5)
    guide = AutoDiffusion(program, 64)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step())


def discrete(y):
    k = pyro.sample("k", dist.Bernoulli(0.4))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean + 2 * k, 1.0), obs=y)


def local(y):
    with pyro.plate("data", 10, subsample_size=4):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def sequential(y):
    for i in pyro.plate("groups", 2):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def observed(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand((4,)).to_event(1), obs=y)


def undefined(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])
    pyro.factor("odd", (z - z).sqrt())


def test_the_discrete_latent_that_is_named_can_be_summed_out(double):
    hidden = poutine.block(config_enumerate(discrete), hide=["k"])
    guide = AutoDiffusion(hidden, 2)

    svi = SVI(
        config_enumerate(discrete),
        guide,
        pyro.optim.Adam({"lr": 1e-3}),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    assert math.isfinite(svi.step(Y))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (discrete, "site 'k': got a discrete latent"),
        (local, "site 'z': got a latent in the subsampled plate 'data'"),
        (sequential, "site 'z_0': got a latent in the sequential plate 'groups'"),
        (observed, "argument 'model': got a model without latents"),
        (undefined, "site 'odd'"),
    ],
)
def test_a_model_that_the_guide_cannot_serve_is_named(double, program, message):
    with pytest.raises(ValueError, match=message):
        AutoDiffusion(program)(Y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_timesteps": 0}, "argument 'num_timesteps': got 0"),
        ({"init_scale": -1.0}, "argument 'init_scale': got -1.0"),
        ({"base": AutoDelta}, "argument 'base': got a AutoDelta"),
        ({"base": AutoNormal}, "argument 'base': got a AutoNormal"),
        ({"base": 3}, "argument 'base': got a int"),
        (
            {"base": AutoDiagonalNormal(pair), "init_loc_fn": init_to_value},
            "argument 'init_loc_fn'",
        ),
        ({"network": 3}, "argument 'network'"),
        ({"schedule": 3}, "argument 'schedule'"),
    ],
)
def test_an_argument_of_another_kind_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoDiffusion(pair, **arguments)


def test_a_base_of_another_model_is_named(double):
    base = AutoDiagonalNormal(gaussian(torch.zeros(3), 1.0))
    base()
    with pytest.raises(ValueError, match="argument 'base': got a guide of 3 numbers"):
        AutoDiffusion(pair, base=base)(Y)


def test_a_flow_that_is_fitted_is_a_base_and_a_guide_on_it_is_copied(double):
    base = AutoIAFNormal(pair, hidden_dim=[8])
    SVI(pair, base, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(Y)
    guide = AutoDiffusion(pair, 2, base)
    SVI(pair, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(Y)
    other = copy.deepcopy(guide)
    torch.manual_seed(1)
    weight = log_weight(pair, guide, Y)[0]
    torch.manual_seed(1)
    assert log_weight(pair, other, Y)[0] == pytest.approx(weight, abs=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_guide_that_has_not_run_is_copied(double, copied):
    guide = AutoDiffusion(pair, 2, AutoMultivariateNormal)
    other = copied(guide)
    for each in (guide, other):
        assert set(each(Y)) == {"mean", "scale"}


def test_a_latent_that_cannot_be_drawn_begins_where_the_user_says(double):
    def improper(y):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    start = init_to_value(values={"z": torch.tensor(3.0)})
    guide = AutoDiffusion(improper, 2, init_loc_fn=start)
    assert guide(Y)["z"].shape == ()
    assert guide.base.loc.item() == 3.0
    fitted = AutoDiagonalNormal(improper, init_loc_fn=start)
    fitted(Y)
    assert AutoDiffusion(improper, 2, fitted)(Y)["z"].shape == ()


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_network_gives_the_drift_and_perhaps_the_noise(double, outputs):
    guide = AutoDiffusion(
        pair, 3, network=MLP((2,), hidden_size=8, num_blocks=1, num_outputs=outputs)
    )
    guide(Y)
    with torch.no_grad():
        guide.drift.network.decode.bias.copy_(torch.tensor([0.1, 0.2, -0.3, 0.4])[: 2 * outputs])
    x_t, step = torch.randn(2), 2
    scale = guide.drift.transition(x_t, step, None).base_dist.scale
    forward = guide.drift.process.transition(x_t, step).base_dist.scale
    expected = torch.tensor([0.2, 0.4]).exp() if outputs == 2 else torch.ones(2)
    torch.testing.assert_close(scale / forward, expected.expand(2), rtol=1e-6, atol=1e-6)


def test_an_output_of_another_shape_is_named(double):
    guide = AutoDiffusion(pair, 2, network=MLP((2,), hidden_size=8, num_outputs=3))
    with pytest.raises(ValueError, match="argument 'network': got an output of shape"):
        guide(Y)


def test_a_draw_whose_score_is_not_finite_gets_none(double):
    def halved():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("root", torch.where(z > 0, 1.0 + z, z - z).sqrt())

    guide = AutoDiffusion(halved, 3, partial(AutoDiagonalNormal, init_scale=1.0))
    guide()
    x = torch.tensor([[-1.0], [0.5]])
    found = guide._score(guide._map(), (), {}, x)
    assert found.isfinite().all()
    assert found[0] == 0
    with pytest.raises(ValueError, match="site 'root': got a log-density whose gradient"):
        guide._score(guide._map(), (), {}, x[:1])
