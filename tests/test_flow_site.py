"""The probability flow as a distribution: the discrete map, its inverse, its density, and its gradients."""

from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import TransformReparam

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LogSNRSchedule,
    NeuralDenoiser,
    flow,
    ode_log_likelihood,
)


def schedule():
    return LogSNRSchedule(50, log_snr_max=9.0, log_snr_min=-9.0)


def mixture():
    means = torch.tensor([[-2.0, 0.0, 1.0], [1.5, 1.0, -1.0]]).double()
    stds = torch.tensor([[0.3, 0.5, 1.0], [0.6, 0.2, 0.4]]).double()
    weights = torch.tensor([0.3, 0.7]).double()
    return DiffusionModel(GaussianMixtureDenoiser(weights, means, stds, schedule()))


def test_log_prob_converges_to_the_flow_of_the_model_with_order_two():
    diffusion = mixture()
    x = diffusion.sample(16)
    exact = ode_log_likelihood(diffusion, x, rtol=1e-9, atol=1e-9).log_evidence
    errors = [(flow(diffusion, k).log_prob(x) - exact).square().mean().sqrt() for k in (20, 40, 80)]
    orders = [torch.log2(a / b).item() for a, b in pairwise(errors)]
    assert all(1.7 < order < 2.4 for order in orders), orders


def test_the_map_its_inverse_and_its_determinant_agree():
    law = flow(mixture(), 8)
    transform = law.transforms[0]
    z = torch.randn(5, 3, dtype=torch.float64)
    x = transform._call(z)
    assert (transform._inverse(x) - z).abs().max() < 1e-9
    whole = torch.autograd.functional.jacobian(transform._call, z[0])
    expected = torch.linalg.slogdet(whole)[1]
    assert torch.allclose(transform.log_abs_det_jacobian(z[0], None), expected, atol=1e-10)
    wide = 4 * torch.randn(20, 3, dtype=torch.float64)
    assert (transform._call(transform._inverse(wide)) - wide).abs().max() < 1e-6


def test_gradients_by_the_datum_to_second_order():
    law = flow(mixture(), 4)
    x = mixture().sample(1).requires_grad_()
    assert torch.autograd.gradcheck(law.log_prob, (x,))
    assert torch.autograd.gradgradcheck(law.log_prob, (x,), atol=1e-3, rtol=1e-3)


def test_a_draw_is_scored_by_the_parameters_of_now():
    denoiser = NeuralDenoiser(MLP((3,), hidden_size=8), schedule(), event_shape=(3,))
    diffusion = DiffusionModel(denoiser)
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    law = flow(diffusion, 4)
    x = law.rsample((2,))
    before = law.log_prob(x)
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.mul_(1.2)
    after = law.log_prob(x)
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, flow(diffusion, 4).log_prob(x.clone()), atol=1e-3)


def test_more_than_64_dimensions_have_draws_and_no_density():
    denoiser = GaussianDenoiser(torch.zeros(65), torch.ones(65), schedule())
    law = flow(DiffusionModel(denoiser), 4)
    x = law.sample()
    with pytest.raises(
        ValueError, match="65 dimensions for log_prob of the flow.*TransformReparam"
    ):
        law.log_prob(x)

    def model():
        with pyro.plate("data", 3):
            return pyro.sample("x", law)

    trace = poutine.trace(poutine.reparam(model, {"x": TransformReparam()})).get_trace()
    assert trace.nodes["x_base"]["value"].shape == (3, 65)
    expected = dist.Normal(0.0, 1.0).log_prob(trace.nodes["x_base"]["value"]).sum()
    assert torch.allclose(trace.log_prob_sum(), expected)
