import numpy as np
import pytest
import torch
from oracles import alpha_bar, posterior_coefficients
from torch.distributions import kl_divergence

from pyro_diffusion.processes import (
    forward_marginal,
    forward_posterior,
    forward_transition,
    terminal_prior,
)
from pyro_diffusion.processes.gaussian import chain_step
from pyro_diffusion.schedules import AlphaSchedule, LinearSchedule

ALPHA = np.array([0.95, 0.8, 0.6, 0.3])
SCHEDULE = AlphaSchedule(ALPHA.tolist())


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_E1_forward_transition(t, double):
    x_prev = torch.randn(5, 3)
    kernel = forward_transition(x_prev, t, SCHEDULE, event_dim=1)
    assert (kernel.batch_shape, kernel.event_shape) == ((5,), (3,))
    np.testing.assert_allclose(kernel.mean, np.sqrt(ALPHA[t - 1]) * x_prev.numpy(), rtol=1e-12)
    np.testing.assert_allclose(kernel.variance, np.full((5, 3), 1 - ALPHA[t - 1]), rtol=1e-12)


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_E2_forward_marginal(t, double):
    x_0, bar = torch.randn(5, 3), alpha_bar(ALPHA)
    kernel = forward_marginal(x_0, t, SCHEDULE, event_dim=1)
    np.testing.assert_allclose(kernel.mean, np.sqrt(bar[t]) * x_0.numpy(), rtol=1e-12)
    np.testing.assert_allclose(kernel.variance, np.full((5, 3), 1 - bar[t]), rtol=1e-12)


@pytest.mark.parametrize("t", [2, 3, 4])
def test_E3_forward_posterior(t, double):
    x_0, x_t = torch.randn(5, 3), torch.randn(5, 3)
    kernel = forward_posterior(x_t, x_0, t, SCHEDULE, event_dim=1)
    of_x_0, of_x_t, variance = posterior_coefficients(ALPHA, t)
    np.testing.assert_allclose(kernel.mean, of_x_0 * x_0.numpy() + of_x_t * x_t.numpy(), rtol=1e-12)
    np.testing.assert_allclose(kernel.variance, np.full((5, 3), variance), rtol=1e-12)


def test_E4_one_joint_in_two_orders(double):
    """∏ q(x_t | x_{t-1}) and q(x_T | x_0) ∏ q(x_{t-1} | x_t, x_0) are the same density."""
    x = [torch.randn(6, 3) for _ in range(5)]
    forward = sum(
        forward_transition(x[t - 1], t, SCHEDULE, event_dim=1).log_prob(x[t]) for t in (1, 2, 3, 4)
    )
    backward = forward_marginal(x[0], 4, SCHEDULE, event_dim=1).log_prob(x[4]) + sum(
        forward_posterior(x[t], x[0], t, SCHEDULE, event_dim=1).log_prob(x[t - 1])
        for t in (4, 3, 2)
    )
    torch.testing.assert_close(forward, backward, rtol=1e-13, atol=1e-13)


def test_E5_terminal_prior():
    prior = terminal_prior(SCHEDULE, torch.Size((2, 3)), dtype=torch.float32)
    assert (prior.batch_shape, prior.event_shape) == ((), (2, 3))
    x = torch.randn(4, 2, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((-2, -1))
    torch.testing.assert_close(prior.log_prob(x), expected)
    assert prior.sample().dtype == torch.float32


def test_as_many_timesteps_as_data_pad_by_event_dim(double):
    """t of shape (k, N) with k = N = D: padding by a difference of ndim would be silently wrong."""
    n = 4
    t = torch.arange(1, n + 1)[:, None].expand(n, n)  # t varies along the plate of timesteps
    x_0 = torch.randn(n, n)
    kernel = forward_marginal(x_0, t, SCHEDULE, event_dim=1)
    assert (kernel.batch_shape, kernel.event_shape) == ((n, n), (n,))
    for row in range(n):
        alone = forward_marginal(x_0, row + 1, SCHEDULE, event_dim=1)
        torch.testing.assert_close(kernel.mean[row], alone.mean)
        torch.testing.assert_close(kernel.variance[row], alone.variance)


@pytest.mark.parametrize("kernel", [forward_transition, forward_marginal])
@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
def test_two_batch_dimensions(kernel, event_shape, device):
    schedule = LinearSchedule(10).to(device)
    x = torch.randn(4, 5, *event_shape, device=device)
    t = torch.randint(1, 11, (4, 5), device=device)
    distribution = kernel(x, t, schedule, event_dim=len(event_shape))
    assert (distribution.batch_shape, distribution.event_shape) == ((4, 5), event_shape)
    assert distribution.mean.dtype == torch.float32
    one = kernel(x[1, 2], int(t[1, 2]), schedule, event_dim=len(event_shape))
    torch.testing.assert_close(distribution.mean[1, 2], one.mean)
    torch.testing.assert_close(distribution.variance[1, 2], one.variance)


def test_kernels_are_normals_with_a_kl(double):
    """The posterior and a reverse kernel of the same family have an analytic KL."""
    q = forward_posterior(torch.zeros(2, 3), torch.zeros(2, 3), 2, SCHEDULE, event_dim=1)
    p = forward_posterior(torch.zeros(2, 3), torch.ones(2, 3), 2, SCHEDULE, event_dim=1)
    of_x_0, _, variance = posterior_coefficients(ALPHA, 2)
    torch.testing.assert_close(kl_divergence(q, p), torch.full((2,), 3 * of_x_0**2 / variance / 2))


def test_step_coefficients_stay_finite_at_extreme_noise(double):
    step = chain_step(2, AlphaSchedule([0.5, 1e-24]))
    assert all(coefficient.isfinite() for coefficient in step)


@pytest.mark.parametrize("t", [0, 5, torch.tensor([0, 1])])
@pytest.mark.parametrize("kernel", [forward_transition, forward_marginal])
def test_timesteps_outside_are_refused(kernel, t):
    with pytest.raises(ValueError, match="argument 't'"):
        kernel(torch.zeros(2, 3), t, SCHEDULE, event_dim=1)


def test_the_posterior_of_the_datum_itself_is_refused():
    with pytest.raises(ValueError, match="point mass"):
        forward_posterior(torch.zeros(2, 3), torch.zeros(2, 3), 1, SCHEDULE, event_dim=1)
