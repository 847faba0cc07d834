"""The probability flow as a distribution: the discrete map, its inverse, its density, and its gradients.

Oracles: the closed form of the map of a Gaussian, of which every step is affine; the solver of
``ode_log_likelihood``; and quadrature over the normal base.
"""

import copy
import math
import pickle
import warnings
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import AutoReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions.transforms import ExpTransform

from pyro_diffusion import (
    MLP,
    BernoulliDiffusion,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    EnumeratedDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LevelPrediction,
    Logit,
    LogSNRSchedule,
    MonotoneSchedule,
    NeuralDenoiser,
    Standardize,
    VarianceExploding,
    VelocityPrediction,
    global_evidence,
    ode_log_likelihood,
)
from pyro_diffusion.inference import flow


def schedule(num_timesteps=10, high=8.0, low=-10.0):
    return LogSNRSchedule(num_timesteps, log_snr_max=high, log_snr_min=low)


def mixture(curve=None):
    """Two modes of different shapes in two dimensions."""
    means = torch.tensor([[-1.5, -0.5], [1.5, 0.5]], dtype=torch.float64)
    stds = torch.tensor([[0.5, 0.7], [0.6, 0.4]], dtype=torch.float64)
    return DiffusionModel(GaussianMixtureDenoiser((0.4, 0.6), means, stds, curve or schedule()))


def gaussian(*event_shape, transform=None, **curve):
    mean = torch.linspace(-0.4, 0.5, math.prod(event_shape), dtype=torch.float64)
    denoiser = GaussianDenoiser(
        mean.reshape(event_shape), 0.5 + mean.abs().reshape(event_shape), schedule(**curve)
    )
    return DiffusionModel(denoiser, transform=transform)


def regression():
    """Data of mean W c with standard deviation one half."""
    weight = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    denoiser = GaussianDenoiser.from_regression(weight, weight[0], 0.5 + 0 * weight[0], schedule())
    return DiffusionModel(denoiser)


def neural(size=2, curve=None, std=0.3, dtype=torch.float64, **options):
    """A small network with random weights, which is smooth and far from the identity."""
    torch.manual_seed(0)
    network = MLP((size,), hidden_size=12, num_blocks=1, **options)
    nn.init.normal_(network.decode.weight, std=std)
    curve = schedule(5, 6.0, -8.0) if curve is None else curve
    return DiffusionModel(
        NeuralDenoiser(network, curve, (size,), prediction=VelocityPrediction()).to(dtype)
    )


class Smooth(nn.Module):
    """A network of which derivatives of all orders are right: torch's layer_norm has wrong third ones."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(0)
        self.widen, self.narrow = nn.Linear(size + 1, 8).double(), nn.Linear(8, size).double()

    def forward(self, x, log_snr):
        return self.narrow(torch.tanh(self.widen(torch.cat([x, log_snr[:, None] / 5], 1))))


def smooth(size=2):
    return DiffusionModel(NeuralDenoiser(Smooth(size), schedule(5, 4.0, -6.0), (size,)))


def transform_of(law):
    return law.transforms[0]


def instrument(diffusion, num_steps=8, context=None, noise=None):
    """Repeated measurements of x with a noise that is known or not."""

    def model(y=torch.zeros(3, 2)):
        sigma = pyro.sample("sigma", dist.LogNormal(-0.7, 0.6)) if noise is None else noise
        x = pyro.sample("x", flow(diffusion, num_steps, context))
        with pyro.plate("repeats", len(y)):
            pyro.sample("y", dist.Normal(x, torch.as_tensor(sigma)[..., None]).to_event(1), obs=y)
        return x

    return model


def reparametrised(model):
    return poutine.reparam(model, {"x": TransformReparam()})


# the density


def discrete_map(mean, std, log_snr, num_steps):
    """Slope and intercept of Heun's map of N(mean, std²) along a log-SNR, from the formulas."""

    def velocity(x, level):
        signal, noise = np.sqrt(1 / (1 + np.exp(-level))), np.sqrt(1 / (1 + np.exp(level)))
        gain = signal * std**2 / (signal**2 * std**2 + noise**2)
        return 0.5 * signal * (mean + gain * (x - signal * mean) - signal * x)

    def whole(x):
        levels = np.linspace(*log_snr, num_steps + 1)
        for start, end in pairwise(levels):
            first, h = velocity(x, start), end - start
            x = x + h / 2 * (first + velocity(x + h * first, end))
        return x * np.sqrt(1 + np.exp(-log_snr[1]))

    intercept = whole(np.zeros_like(mean))
    return whole(np.ones_like(mean)) - intercept, intercept


@pytest.mark.parametrize("exploding", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_the_map_of_a_gaussian_has_a_closed_form(double, num_steps, exploding):
    """Every step is affine: the law of the draws is N(b, diag a²), for any number of steps."""
    mean, std = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.5, 1.0, 1.6])
    curve = schedule(10, 3.0, -2.0)
    curve = VarianceExploding(curve) if exploding else curve
    law = flow(DiffusionModel(GaussianDenoiser(mean, std, curve)), num_steps)
    slope, intercept = map(
        torch.as_tensor, discrete_map(mean.numpy(), std.numpy(), (-2.0, 3.0), num_steps)
    )
    z, x = torch.randn(4, 3), 3 * torch.randn(5, 4, 3)
    torch.testing.assert_close(transform_of(law)(z), slope * z + intercept, rtol=0, atol=1e-12)
    expected = dist.Normal(intercept, slope.abs()).log_prob(x).sum(-1)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=1e-10, atol=1e-10)


def test_a_full_covariance_is_the_same_map_along_its_axes(double):
    root = torch.randn(3, 3)
    covariance = root @ root.mT + 0.3 * torch.eye(3)
    denoiser = GaussianDenoiser.from_covariance(torch.ones(3), covariance, schedule())
    law = flow(DiffusionModel(denoiser), 6)
    values, axes = torch.linalg.eigh(covariance)
    ends = (-10.0, 8.0)
    slope, intercept = map(
        torch.as_tensor,
        discrete_map((axes.mT @ torch.ones(3)).numpy(), values.sqrt().numpy(), ends, 6),
    )
    x = torch.randn(5, 3)
    expected = dist.Normal(intercept, slope.abs()).log_prob(x @ axes).sum(-1)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=1e-9, atol=1e-9)


def test_log_prob_converges_to_the_flow_of_the_model_with_order_two(double):
    diffusion = mixture()
    x = diffusion.sample(6)
    exact = ode_log_likelihood(diffusion, x, rtol=1e-9, atol=1e-9).log_evidence
    errors = [
        (flow(diffusion, k).log_prob(x) - exact).square().mean().sqrt() for k in (40, 80, 160)
    ]
    orders = [torch.log2(a / b).item() for a, b in pairwise(errors)]
    assert all(1.75 < order < 2.3 for order in orders), orders
    assert errors[-1] < 2e-3


def test_the_order_for_a_network(double):
    diffusion, x = neural(), torch.randn(4, 2)
    exact = ode_log_likelihood(diffusion, x, rtol=1e-9, atol=1e-9).log_evidence
    errors = [(flow(diffusion, k).log_prob(x) - exact).abs().mean() for k in (20, 40)]
    assert 1.8 < torch.log2(errors[0] / errors[1]) < 2.3


@pytest.mark.parametrize("num_steps", [5, 20])
def test_the_density_of_few_steps_is_a_density(double, num_steps):
    """It is that of the draws: it integrates to one, also where it is far from the model's."""
    means, stds = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.2], [0.5]])
    denoiser = GaussianMixtureDenoiser((0.3, 0.7), means, stds, schedule(10, 12.0, -16.0))
    law, x = flow(DiffusionModel(denoiser), num_steps), torch.linspace(-6.0, 8.0, 2001)
    density = law.log_prob(x[:, None]).exp()
    assert abs(torch.trapezoid(density, x) - 1) < 1e-4
    draws = law.sample((20_000,))[:, 0]
    for edge in (-1.0, 0.0, 1.0):
        mass = torch.trapezoid(density * (x <= edge), x)
        error = (mass * (1 - mass) / len(draws)).sqrt()
        assert abs((draws <= edge).double().mean() - mass) < 5 * error + 2e-3


def test_the_law_is_that_of_the_data_with_the_noise_of_the_first_state(double):
    """For an exact score: variance s² + exp(−λ_1), from which the docstring says it starts."""
    law = flow(gaussian(2, high=1.0, low=-14.0), 200)
    mean, std = torch.tensor([-0.4, 0.5]), torch.tensor([0.9, 1.0])
    expected = dist.Normal(mean, (std**2 + math.exp(-1.0)).sqrt())
    x = torch.randn(6, 2)
    torch.testing.assert_close(law.log_prob(x), expected.log_prob(x).sum(-1), rtol=0, atol=2e-3)


CASES = {
    "mixture": (mixture, None),
    "variance exploding": (lambda: mixture(VarianceExploding(schedule())), None),
    "a chain of one step": (lambda: mixture(schedule(1)), None),
    "a learned curve": (
        lambda: mixture(MonotoneSchedule(5, log_snr_max=8.0, log_snr_min=-10.0)),
        None,
    ),
    "network": (neural, None),
    "numbers": (gaussian, None),
    "images": (lambda: gaussian(2, 1, 2), None),
    "standardised": (
        lambda: gaussian(2, transform=Standardize([1e3, -2.0], [50.0, 0.1]), high=10.0),
        None,
    ),
    "of an interval": (lambda: gaussian(2, transform=Logit(-1.0, 5.0), high=10.0), None),
    "positive": (lambda: gaussian(2, transform=ExpTransform().inv, high=10.0), None),
    "context of rows": (regression, torch.randn(4, 2, generator=torch.Generator().manual_seed(1))),
    "labels": (mixture, torch.tensor([0, 1, 1])),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_densities_and_inverses_agree(double, case):
    """Shapes, the inverse to 1e-6 in the base, the solver's density, and both routes to a draw's density."""
    make, context = CASES[case]
    context = context.double() if context is not None and context.is_floating_point() else context
    diffusion = make()
    law = flow(diffusion, 40, context)
    rows = () if context is None else (len(context),)
    assert law.batch_shape == rows
    assert law.event_shape == diffusion.event_shape
    x = law.sample((2, *(() if rows else (3,))))
    assert x.shape == (2, rows[0] if rows else 3, *diffusion.event_shape)
    assert diffusion.transform is None or bool(law.support.check(x).all())
    remembered = law.log_prob(x)
    z = x
    for part in reversed(law.transforms):
        z = part.inv(z.clone())
    back = z
    for part in law.transforms:
        back = part(back)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    z_again = transform_of(law).inv(transform_of(law)(z).clone())
    assert (z_again - z).abs().max() < 1e-6
    scored = law.log_prob(x.clone())
    assert scored.shape == x.shape[:2]
    torch.testing.assert_close(scored, remembered, rtol=1e-7, atol=1e-7)
    if diffusion.event_shape == ():
        return  # the solver takes none
    given = {} if context is None else {"context": context}
    solved = ode_log_likelihood(diffusion, x[0], rtol=1e-8, atol=1e-8, **given).log_evidence
    assert (scored[0] - solved).abs().max() < 0.1


# Jacobians and gradients


@pytest.mark.parametrize("make", [neural, mixture, lambda: gaussian(2, 1, 2), lambda: neural(5)])
def test_the_determinant_is_that_of_the_whole_jacobian(double, make):
    diffusion = make()
    transform = transform_of(flow(diffusion, 7))
    z = torch.randn(2, 3, *diffusion.event_shape)
    found, size = transform.log_abs_det_jacobian(z, None), diffusion.event_shape.numel()
    for i in range(2):
        for j in range(3):
            whole = torch.autograd.functional.jacobian(transform, z[i, j]).reshape(size, size)
            assert abs(found[i, j] - torch.linalg.slogdet(whole)[1]) < 1e-10


def test_gradients_by_the_datum_and_by_the_base(double):
    law = flow(neural(), 5)
    transform, x = transform_of(law), torch.randn(2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(law.log_prob, (x,))
    assert torch.autograd.gradcheck(transform, (x,))
    assert torch.autograd.gradcheck(transform._inverse, (x,))
    assert torch.autograd.gradcheck(lambda z: transform.log_abs_det_jacobian(z, None), (x,))


@pytest.mark.parametrize("diffusion", [mixture(), smooth()], ids=["mixture", "network"])
def test_second_derivatives_by_the_datum(double, diffusion):
    law = flow(diffusion, 4)
    x = torch.tensor([[0.3, -0.2]], requires_grad=True)
    assert torch.autograd.gradgradcheck(law.log_prob, (x,))
    assert torch.autograd.gradgradcheck(transform_of(law), (x,))


@pytest.mark.xfail(
    strict=True, reason="third derivatives of torch's layer_norm are wrong (its issue 175754)"
)
def test_second_derivatives_through_a_perceptron(double):
    x = torch.tensor([[0.3, -0.2]], requires_grad=True)
    assert torch.autograd.gradgradcheck(flow(neural(), 4).log_prob, (x,))


def assert_gradients(value, parameters, step=1e-5):
    """Gradients by parameters along a random direction, against central differences."""
    gradients = torch.autograd.grad(value(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, found = torch.randn_like(parameter), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                found.append(value())
                parameter -= sign * step * direction
        slope = (found[0] - found[1]) / (2 * step)
        along = (gradient * direction).sum()
        assert abs(slope - along) < 1e-4 * (1 + abs(along)), (slope, along)


@pytest.mark.parametrize("what", ["log_prob", "draw"])
def test_gradients_by_parameters_of_a_network_and_of_its_curve(double, what):
    diffusion = neural(curve=MonotoneSchedule(5, log_snr_max=5.0, log_snr_min=-7.0, num_pieces=2))
    law, x = flow(diffusion, 5), torch.randn(3, 2)
    network = diffusion.denoiser.network
    curve = diffusion.denoiser.schedule
    parameters = [network.encode.weight, network.decode.bias, curve.log_snr_min, curve.log_range]
    weights = torch.randn(3, 2)
    function = law.log_prob if what == "log_prob" else transform_of(law)
    weights = weights[:, 0] if what == "log_prob" else weights
    assert_gradients(lambda: (function(x) * weights).sum(), parameters)


def test_gradients_by_a_context(double):
    diffusion = neural(context_shape=(3,))
    context = torch.randn(2, 3, requires_grad=True)
    x = torch.randn(2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: flow(diffusion, 4, c).log_prob(x), (x, context))
    assert torch.autograd.gradcheck(
        lambda x, c: transform_of(flow(diffusion, 4, c))(x), (x, context)
    )


def test_a_reparametrised_draw_has_the_whole_gradient_of_its_density(double):
    """d log q(x(θ)) / dθ at a fixed base, by the memory of the draw and by the inverse alike."""
    diffusion = neural()
    law, z = flow(diffusion, 5), torch.randn(2, 2)
    parameter = diffusion.denoiser.network.decode.bias
    x = transform_of(law)(z)
    (by_memory,) = torch.autograd.grad(law.log_prob(x).sum(), parameter)
    x = transform_of(law)(z)
    (by_inverse,) = torch.autograd.grad(law.log_prob(x * 1.0).sum(), parameter)
    torch.testing.assert_close(by_memory, by_inverse, rtol=1e-6, atol=1e-6)


# precision


@pytest.mark.parametrize("num_steps", [5, 20])
def test_wide_points_and_their_neighbours(double, num_steps):
    law = flow(mixture(), num_steps)
    transform = transform_of(law)
    z = torch.randn(50, 2)
    x = torch.cat([transform(z), torch.tensor([[1e3, -1e3], [-1e6, 1e6], [1e9, 1.0]])])
    found = transform.inv(x)
    assert (found[:50] - z).abs().max() < 1e-6
    torch.testing.assert_close(transform(found), x, rtol=1e-9, atol=1e-7)
    assert law.log_prob(x).isfinite().all()


@pytest.mark.parametrize("high", [6.0, 14.0])
def test_float32(high):
    """Round trips to 1e-5 in the base, beside a row that is far away; data of float64 are taken as well."""
    diffusion = neural(3, schedule(5, high, -10.0), dtype=torch.float32)
    law = flow(diffusion, 20)
    transform, z = transform_of(law), torch.randn(100, 3)
    x = transform(z).detach()
    assert x.dtype == law.log_prob(x).dtype == torch.float32
    far = torch.cat([x, torch.full((1, 3), 1e5)])
    with torch.no_grad():
        for value in (x.clone(), far, x.double()):
            assert (transform.inv(value)[:100] - z).abs().max() < 1e-5
        wide = flow(copy.deepcopy(diffusion).double(), 20)
        torch.testing.assert_close(
            law.log_prob(x.clone()).double(), wide.log_prob(x.double()), rtol=0, atol=2e-3
        )
        torch.testing.assert_close(
            law.log_prob(x.double()).float(), law.log_prob(x.clone()), rtol=0, atol=1e-3
        )


def test_a_far_row_does_not_loosen_the_inverse_of_others():
    """In float32 with long steps, where Newton's method takes several corrections."""
    means, stds = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.2], [0.5]])
    curve = schedule(10, 12.0, -16.0)
    law = flow(DiffusionModel(GaussianMixtureDenoiser((0.3, 0.7), means, stds, curve)), 5)
    z = torch.linspace(-3, 3, 101)[:, None]
    x = torch.cat([transform_of(law)(z), torch.tensor([[1e5]])])
    assert (transform_of(law).inv(x)[:101] - z).abs().max() < 5e-5


def test_a_fold_of_the_map_has_no_density(double):
    law = flow(folded(), 3)
    with pytest.raises(ValueError, match=r"got row \d+ .*num_steps=6"):
        transform_of(law).log_abs_det_jacobian(torch.linspace(-6, 6, 2001)[:, None], None)


def test_data_at_infinity(double):
    law = flow(mixture(), 6)
    assert law.log_prob(torch.tensor([1e100, 0.0])) < -1e190
    with pytest.raises((ValueError, IndexError)):
        law.log_prob(torch.tensor([math.inf, 0.0]))


def test_an_infinite_datum_is_named(double):
    with pytest.raises(ValueError, match="argument 'value'"):
        flow(mixture(), 6).log_prob(torch.tensor([[0.0, 0.0], [math.inf, 0.0]]))


def test_inference_mode(double):
    law = flow(neural(), 5)
    with torch.inference_mode():
        x = law.sample((2,))
    assert law.log_prob(x).isfinite().all()


@pytest.mark.xfail(
    strict=True, raises=RuntimeError, reason="Jacobians need tensors that are no inference ones"
)
def test_a_density_in_inference_mode(double):
    with torch.inference_mode():
        x = flow(neural(), 5).sample((2,))
        assert flow(neural(), 5).log_prob(x).isfinite().all()


# the memory of a draw


def test_the_memory_of_a_draw_is_never_stale(double):
    diffusion = neural()
    law = flow(diffusion, 4)
    transform = transform_of(law)

    def fresh(x):
        return flow(diffusion, 4).log_prob(x.detach().clone())

    z = torch.randn(2)
    changes = (lambda x: z.add_(1.0), lambda x: x.add_(0.1), lambda x: x.data.add_(0.1))
    for change in changes:
        with torch.no_grad():
            x = transform(z)
            change(x)
            torch.testing.assert_close(law.log_prob(x), fresh(x), rtol=1e-7, atol=1e-7)
    for draw in (law.sample, law.rsample):
        x = draw((2,))
        before = law.log_prob(x)
        with torch.no_grad():
            for parameter in diffusion.parameters():
                parameter.data.mul_(1.2)  # to which version counters are blind
        assert (law.log_prob(x) - before).abs().max() > 1e-3
        torch.testing.assert_close(law.log_prob(x), fresh(x), rtol=1e-7, atol=1e-7)
    first, _ = law.sample(), law.sample()
    torch.testing.assert_close(law.log_prob(first), fresh(first), rtol=1e-7, atol=1e-7)


def test_the_memory_of_a_draw_never_cuts_a_gradient(double):
    diffusion = neural()
    law, parameter = flow(diffusion, 4), diffusion.denoiser.network.decode.bias
    x = law.sample()  # without gradients
    (found,) = torch.autograd.grad(law.log_prob(x), parameter)
    (expected,) = torch.autograd.grad(flow(diffusion, 4).log_prob(x.clone()), parameter)
    torch.testing.assert_close(found, expected)
    x = law.sample().requires_grad_()
    (found,) = torch.autograd.grad(law.log_prob(x), x)
    y = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(flow(diffusion, 4).log_prob(y), y)
    torch.testing.assert_close(found, expected)
    x = law.sample()
    y = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(
        law.log_prob(y * 1.0), y
    )  # another tensor with the draw's values
    (expected,) = torch.autograd.grad(flow(diffusion, 4).log_prob(y), y)
    torch.testing.assert_close(found, expected)
    exact = flow(mixture(), 4)
    x = transform_of(exact)(torch.randn(2)).requires_grad_()  # of a model without parameters
    (found,) = torch.autograd.grad(exact.log_prob(x), x)
    (expected,) = torch.autograd.grad(exact.log_prob(x * 1.0), x)
    torch.testing.assert_close(found, expected)
    z = torch.randn(2, requires_grad=True)
    (found,) = torch.autograd.grad(law.log_prob(transform_of(law)(z)), z)
    (expected,) = torch.autograd.grad(law.log_prob(transform_of(law)(z) * 1.0), z)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_remembered_draw_needs_no_inverse(double, monkeypatch):
    law = flow(mixture(), 4)
    x = law.rsample((3,))
    expected = law.log_prob(x.clone())
    monkeypatch.setattr(type(transform_of(law)), "_inverse", None)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=1e-9, atol=1e-9)


# in programs


def test_shapes_of_batches_and_contexts(double):
    law = flow(mixture(), 4)
    assert law.has_rsample
    assert law.expand((4, 1)).sample((2,)).shape == (2, 4, 1, 2)
    assert law.expand((3,)).log_prob(torch.zeros(2)).shape == (3,)
    assert law.expand((3,)).to_event(1).log_prob(torch.zeros(3, 2)).shape == ()
    context = torch.randn(4, 2)
    law = flow(regression(), 30, context)
    assert law.expand((2, 4)).sample().shape == (2, 4, 2)
    assert law.expand((2, 4)).log_prob(torch.zeros(2)).shape == (2, 4)
    x = torch.randn(5, 4, 2)
    each = [flow(regression(), 30, row[None]).log_prob(x[:, i]) for i, row in enumerate(context)]
    torch.testing.assert_close(law.log_prob(x), torch.stack(each, 1), rtol=1e-9, atol=1e-9)
    expected = regression().denoiser.conditional_distribution(context).log_prob(x)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=0.02, atol=0.05)
    label, both = flow(mixture(), 4, 1), flow(mixture(), 4, torch.tensor([0, 1]))
    assert (label.batch_shape, both.batch_shape) == ((), (2,))
    assert label.sample((3,)).shape == (3, 2)
    x = torch.randn(3, 2)
    torch.testing.assert_close(both.log_prob(x[:, None])[:, 1], label.log_prob(x))


@pytest.mark.parametrize("case", ["row", "label"])
def test_a_single_context_is_for_a_single_datum(double, case):
    law = flow(regression(), 4, torch.zeros(1, 2)) if case == "row" else flow(mixture(), 4, 1)
    assert law.batch_shape == ()
    assert law.sample().shape == law.event_shape
    assert law.log_prob(torch.zeros(2)).shape == ()


def test_reparametrisation_scores_the_base_of_the_same_density(double):
    """log p(x, y) = log p(z, y) − log |det ∂x/∂z|, by Pyro's TransformReparam and AutoReparam."""
    diffusion, y = mixture(), torch.randn(3, 2)
    model = instrument(diffusion)
    for handler in (reparametrised, AutoReparam(centered=0.0)):
        sites = poutine.trace(handler(model)).get_trace(y)
        bases = [name for name in sites.nodes if name.startswith("x_base")]
        assert bases
        assert sites.nodes["x"]["is_observed"]
        z, x = sites.nodes["x_base"]["value"], sites.nodes["x"]["value"]
        sites.compute_log_prob()
        data = {"x": x.detach().clone(), "sigma": sites.nodes["sigma"]["value"]}
        plain = poutine.trace(poutine.condition(model, data)).get_trace(y)
        plain.compute_log_prob()
        volume = transform_of(flow(diffusion, 8)).log_abs_det_jacobian(z, x)
        base = dist.Normal(0.0, 1.0).log_prob(z).sum()
        torch.testing.assert_close(
            plain.nodes["x"]["log_prob"], base - volume, rtol=1e-7, atol=1e-7
        )
        torch.testing.assert_close(sites.nodes["y"]["log_prob"], plain.nodes["y"]["log_prob"])
        assert sites.nodes["x"]["log_prob_sum"] == 0


@pytest.mark.parametrize("reparam", [False, True])
def test_plates_contexts_and_subsampling(double, reparam):
    """A row of the context for each datum of the plate, subsampled with it, under particles."""
    diffusion, context, y = regression(), torch.randn(6, 2), torch.randn(6, 2)

    def model(size=None):
        with pyro.plate("data", 6, subsample_size=size) as rows:
            x = pyro.sample("x", flow(diffusion, 5, context[rows]))
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y[rows])

    model = reparametrised(model) if reparam else model
    name = "x_base" if reparam else "x"
    for size in (None, 2, 1):
        trace = poutine.trace(model).get_trace(size)
        trace.compute_log_prob()
        assert trace.nodes[name]["value"].shape == (size or 6, 2)
        assert trace.nodes[name]["log_prob"].shape == (size or 6,)
    guide = AutoNormal(model)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    assert math.isfinite(svi.step())
    draws = Predictive(model, guide=guide, num_samples=4, parallel=True)()
    assert draws["x"].shape == (4, 6, 2)


def test_several_flows_in_one_program(double):
    """A flow whose context is drawn from two others of one model, all reparametrised."""
    prior, child = mixture(), regression()

    def model():
        a, b = (pyro.sample(name, flow(prior, 4)) for name in "ab")
        with pyro.plate("data", 3):
            c = pyro.sample("c", flow(child, 4, (a + b).expand(3, 2)))
            pyro.sample("y", dist.Normal(c, 1.0).to_event(1), obs=torch.zeros(3, 2))

    moved = poutine.reparam(model, dict.fromkeys("abc", TransformReparam()))
    trace = poutine.trace(moved).get_trace()
    assert {"a_base", "b_base", "c_base"} <= set(trace.nodes)
    assert (trace.nodes["a"]["value"] - trace.nodes["b"]["value"]).abs().min() > 0
    run = MCMC(NUTS(moved, max_tree_depth=2), num_samples=3, warmup_steps=3, disable_progbar=True)
    run.run()
    assert run.get_samples()["c_base"].shape == (3, 3, 2)


def test_a_network_is_trained_through_its_flow(double):
    """Maximum likelihood, with the parameters stated by pyro.module."""
    diffusion, data = neural(), 1.0 + 0.3 * torch.randn(40, 2)

    def model():
        pyro.module("prior", diffusion)
        with pyro.plate("data", len(data)):
            pyro.sample("x", flow(diffusion, 4), obs=data)

    before = [p.detach().clone() for p in diffusion.parameters()]
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() / len(data) for _ in range(15)]
    assert losses[-1] < losses[0] - 1.0
    moved = [(a - b).abs().max() > 0 for a, b in zip(before, diffusion.parameters(), strict=True)]
    assert all(moved)
    torch.testing.assert_close(svi.evaluate_loss(), -flow(diffusion, 4).log_prob(data).sum().item())


def test_copies(double):
    law, x = flow(neural(), 4), torch.randn(3, 2)
    law.rsample()  # a draw with a graph is remembered, and not copied
    for other in (copy.deepcopy(law), pickle.loads(pickle.dumps(law))):
        torch.testing.assert_close(other.log_prob(x), law.log_prob(x))
    assert "num_steps=4" in repr(transform_of(law))


# inference


def test_the_guide_that_is_the_posterior_has_constant_weights(double):
    """A Gaussian's map is affine: p(z | y) is Gaussian, and log p(y) follows from the same matrices."""
    mean, std, noise = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 1.2]), 0.4
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, schedule(10, 8.0, -10.0)))
    slope, intercept = map(
        torch.as_tensor, discrete_map(mean.numpy(), std.numpy(), (-10.0, 8.0), 6)
    )
    y = torch.tensor([[0.5, 0.2], [0.1, -0.6], [0.3, 0.4]])
    model = reparametrised(instrument(diffusion, 6, noise=noise))
    precision = 1 + len(y) * slope**2 / noise**2
    guide = AutoMultivariateNormal(model)
    guide(y)
    guide.loc = nn.Parameter((slope * (y - intercept).sum(0) / noise**2) / precision)
    guide.scale = nn.Parameter(precision**-0.5)
    guide.scale_tril = nn.Parameter(torch.eye(2))
    cov = slope[:, None, None] ** 2 + noise**2 * torch.eye(3)
    joint = torch.distributions.MultivariateNormal(intercept[:, None].expand(2, 3), cov)
    expected = joint.log_prob(y.mT).sum().item()
    for nesting in (None, 1):
        found = global_evidence(
            model, guide, y, num_particles=30, max_plate_nesting=nesting, progress=False
        )
        assert abs(found.log_evidence - expected) < 1e-8
        assert found.log_weights.std() < 1e-8
    assert abs(Trace_ELBO().loss(model, guide, y) + expected) < 1e-8


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@pytest.mark.parametrize("reparam", [False, True])
def test_automatic_guides(double, guide, reparam):
    model = instrument(mixture(), 4)
    model = reparametrised(model) if reparam else model
    y = torch.tensor([[1.5, 0.6], [1.0, 0.2], [1.3, 0.9]])
    guide = guide(model)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = [svi.step(y) for _ in range(25 if reparam else 12)]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0
    draws = Predictive(model, guide=guide, num_samples=3)(y)
    assert draws["x"].shape == (3, 1, 2)  # the axis is that of the plate of repeats
    assert draws["y"].shape == (3, 3, 2)
    assert set(guide.median(y)) == {"sigma", "x_base" if reparam else "x"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of point masses
        TraceMeanField_ELBO().loss(model, guide, y)


def base_grid(diffusion, y, num_steps, size=121, levels=121):
    """log p(y), means and sds of x and log σ for the discrete map, by a grid over its base and log σ."""
    axis = torch.linspace(-5.0, 5.0, size)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    with torch.no_grad():
        x = transform_of(flow(diffusion, num_steps))(z)
    log_sigma = torch.linspace(-0.7 - 3.0, -0.7 + 3.0, levels)
    squares = (y[:, None] - x).square().sum((0, 2))[:, None]
    log_joint = (
        dist.Normal(0.0, 1.0).log_prob(z).sum(-1)[:, None]
        + dist.Normal(-0.7, 0.6).log_prob(log_sigma)
        - 0.5 * squares * (-2 * log_sigma).exp()
        - y.numel() * (log_sigma + 0.5 * math.log(2 * math.pi))
    )
    total = log_joint.flatten().logsumexp(0)
    cell = 2 * (axis[1] - axis[0]).log() + (log_sigma[1] - log_sigma[0]).log()
    share = (log_joint - total).exp()
    mean, sd = [], []
    for weights, values in ((share.sum(1), x), (share.sum(0), log_sigma[:, None])):
        mean.append(weights @ values)
        sd.append((weights @ (values - mean[-1]).square()).sqrt())
    return (total + cell).item(), torch.cat(mean), torch.cat(sd)


def test_the_joint_posterior_of_x_and_of_the_noise(double):
    """NUTS and SVI in the base against a grid over the base: the discrete map, so few steps will do."""
    diffusion, num_steps = mixture(), 4
    y = torch.tensor([1.2, 0.8]) + 0.45 * torch.randn(
        8, 2, generator=torch.Generator().manual_seed(1)
    )
    model = reparametrised(instrument(diffusion, num_steps))
    log_p, mean, sd = base_grid(diffusion, y, num_steps)

    guide = AutoMultivariateNormal(model, init_scale=0.3)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98}), elbo)
    for _ in range(200):
        svi.step(y)
    evidence = global_evidence(
        model, guide, y, num_particles=4000, max_plate_nesting=1, progress=False
    )
    assert evidence.reliable
    assert evidence.standard_error < 0.03
    assert abs(evidence.log_evidence - log_p) < 4 * evidence.standard_error
    assert evidence.elbo < evidence.log_evidence

    kernel = NUTS(model, max_tree_depth=4)
    run = MCMC(kernel, num_samples=200, warmup_steps=60, disable_progbar=True)
    run.run(y)
    found = run.get_samples()
    with torch.no_grad():
        x = transform_of(flow(diffusion, num_steps))(found["x_base"])
    draws = torch.cat([x, found["sigma"].log()[:, None]], 1)
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.25  # a Monte Carlo error of about 0.07
    assert (draws.std(0) / sd - 1).abs().max() < 0.2  # of about 0.05
    again = Predictive(model, found)(y)
    torch.testing.assert_close(again["x"][:, 0], x)


# size, and errors


def test_more_than_64_dimensions_have_draws_and_no_density(double):
    denoiser = GaussianDenoiser(torch.zeros(65), torch.linspace(0.5, 1.5, 65), schedule())
    law = flow(DiffusionModel(denoiser), 6)
    x = law.rsample()
    for value in (x, x.clone()):
        with pytest.raises(
            ValueError, match="65 dimensions for log_prob of the flow.*at most 64.*TransformReparam"
        ):
            law.log_prob(value)
    z = torch.randn(4, 65)
    x = transform_of(law)(z).detach()
    with torch.no_grad():
        assert (transform_of(law).inv(x.clone()) - z).abs().max() < 1e-6
    with pytest.raises(ValueError, match="the inverse of the flow with a gradient.*no_grad"):
        transform_of(law).inv(x.clone().requires_grad_())
    assert torch.autograd.grad(transform_of(law)(z.requires_grad_()).sum(), z)[0].isfinite().all()

    def model():
        with pyro.plate("data", 3):
            return pyro.sample("x", law)

    trace = poutine.trace(reparametrised(model)).get_trace()
    assert trace.nodes["x_base"]["value"].shape == (3, 65)
    expected = dist.Normal(0.0, 1.0).log_prob(trace.nodes["x_base"]["value"]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    guide = AutoNormal(reparametrised(instrument(DiffusionModel(denoiser), 3)))
    svi = SVI(
        reparametrised(instrument(DiffusionModel(denoiser), 3)),
        guide,
        pyro.optim.Adam({}),
        Trace_ELBO(),
    )
    assert math.isfinite(svi.step(torch.zeros(2, 65)))


def levels():
    network = MLP((2,), num_outputs=3, hidden_size=8, num_blocks=1)
    return DiffusionModel(NeuralDenoiser(network, schedule(), (2,), prediction=LevelPrediction(3)))


def drawn_weights():
    network = PyroModule[nn.Linear](2, 2)
    network.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))

    class Network(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = network

        def forward(self, x, log_snr):
            return self.linear(x)

    return DiffusionModel(NeuralDenoiser(Network(), schedule(), (2,)))


WRONG = {
    "likelihood": (
        lambda: flow(DiffusionModel(gaussian(2).denoiser, DiscretizedGaussianLikelihood(3))),
        r"argument 'diffusion': got a model with DiscretizedGaussianLikelihood.*expected none.*Dequantise",
    ),
    "levels": (
        lambda: flow(levels()),
        r"argument 'diffusion': got a model with levels.*Dequantise",
    ),
    "bits": (
        lambda: flow(BernoulliDiffusion(EnumeratedDenoiser(torch.eye(2)[:1], LogSNRSchedule(4)))),
        r"argument 'diffusion'",
    ),
    "curves": (
        lambda: flow(neural(curve=MonotoneSchedule(5, event_shape=(2,)))),
        r"argument 'diffusion': got a schedule with a curve for each entry; expected one curve.*Use a",
    ),
    "no steps": (
        lambda: flow(mixture(), 0),
        r"argument 'num_steps': got 0; expected a whole number of at least 1\. Twenty",
    ),
    "half a step": (
        lambda: flow(mixture(), 2.5),
        r"argument 'num_steps': got 2\.5; expected a whole",
    ),
    "no model": (lambda: flow(mixture().model), r"argument 'diffusion'"),
    "context of a model without": (
        lambda: flow(neural(), 4, torch.zeros(3, 2)),
        r"argument 'context': got one.*expected data alone\. Leave it out",
    ),
    "no context": (
        lambda: flow(regression(), 4).sample(),
        r"argument 'context': got none; expected a tensor",
    ),
    "context of another width": (
        lambda: flow(regression(), 4, torch.zeros(3, 5)).sample(),
        r"argument 'context': got .*\(3, 5\); expected a tensor of shape \(N, 2\)",
    ),
    "context that is not finite": (
        lambda: flow(regression(), 4, torch.full((3, 2), math.nan)),
        r"argument 'context'.*finite",
    ),
    "drawn weights": (
        lambda: flow(drawn_weights()),
        r"argument 'diffusion': got a .*PyroSample.*expected fixed weights\. Use",
    ),
    "long steps": (
        lambda: flow(folded(), 3).log_prob(torch.linspace(-3, 3, 40)[:, None]),
        r"got row \d+ \(\d+ of 40 data\), where the inverse.*expected.*num_steps=6",
    ),
    "long steps, two axes": (
        lambda: flow(folded(), 3).log_prob(torch.linspace(-3, 3, 40).reshape(4, 10, 1)),
        r"got row \(\d, \d\) \(\d+ of 40 data\)",
    ),
    "long steps, one datum": (
        lambda: [flow(folded(), 3).log_prob(x) for x in torch.linspace(-1.6, -1.5, 11)[:, None]],
        r"got the datum \(1 of 1 data\)",
    ),
    "another width": (lambda: flow(mixture(), 4).log_prob(torch.zeros(3)), r"event_shape"),
    "a gap": (lambda: flow(mixture(), 4).log_prob(torch.tensor([0.0, math.nan])), r"support"),
}


def folded():
    """A mixture whose map with three steps is not one to one."""
    means, stds = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.2], [0.5]])
    return DiffusionModel(
        GaussianMixtureDenoiser((0.3, 0.7), means, stds, schedule(10, 12.0, -16.0))
    )


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(double, what):
    call, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        call()
