r"""The closed-form Gaussian conditionals of the forward chain, as Pyro distributions.

With ``signal`` :math:`a_t`, ``noise`` :math:`\sigma_t` and :math:`\lambda_t = \log a_t^2/\sigma_t^2`,
and with :math:`s = t - 1`, all of them follow from :math:`x_t = a_t x_0 + \sigma_t \epsilon`:

.. math::
    q(x_t \mid x_s) &= N\!\big(\tfrac{a_t}{a_s} x_s,\; \sigma_t^2\,(1 - e^{\lambda_t - \lambda_s}) I\big)
        && \text{(E1)} \\
    q(x_t \mid x_0) &= N(a_t x_0,\; \sigma_t^2 I) && \text{(E2)} \\
    q(x_s \mid x_t, x_0) &= N\!\big(\tfrac{a_s}{a_t} e^{\lambda_t - \lambda_s} x_t
        + a_s (1 - e^{\lambda_t - \lambda_s}) x_0,\; \sigma_s^2 (1 - e^{\lambda_t - \lambda_s}) I\big)
        && \text{(E3)} \\
    p(x_T) &= N(0, I) && \text{(E5)}

For :math:`a_t = \sqrt{\bar\alpha_t}, \sigma_t = \sqrt{1 - \bar\alpha_t}` these are the usual
:math:`N(\sqrt{\alpha_t} x_s, (1 - \alpha_t) I)` and so on; the form above holds for a
variance-exploding chain as well, and :math:`1 - e^{\lambda_t - \lambda_s}` is ``expm1``, which
cancels nothing. Shapes are ``batch_shape + event_shape``; a timestep is an integer, or a
LongTensor that broadcasts to ``batch_shape``, and a coefficient grows by ``event_dim`` dimensions.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eqs. 2, 4, 6 and 7.
    https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), appendix A. https://arxiv.org/abs/2107.00630
"""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.distributions import gaussian
from pyro_diffusion.schedules import NoiseSchedule

__all__ = [
    "forward_increment",
    "forward_marginal",
    "forward_posterior",
    "forward_transition",
    "terminal_prior",
]


def forward_transition(
    x_prev: Tensor, t: int | Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> dist.TorchDistribution:
    r"""One step of noise (E1), :math:`q(x_t \mid x_{t-1}) = N(\sqrt{\alpha_t}\, x_{t-1}, (1-\alpha_t) I)`.

    Args:
        x_prev: State :math:`x_{t-1}`, shape ``batch_shape + event_shape``.
        t: Timestep in ``{1, …, T}``; an integer, or a LongTensor broadcastable to ``batch_shape``.
        schedule: Noise schedule with ``T`` steps.
        event_dim: Number of rightmost dimensions that form one datum.

    Returns:
        A Normal over :math:`x_t` with ``event_dim`` event dimensions and batch shape ``batch_shape``.

    Raises:
        ValueError: ``t`` outside ``{1, …, T}``.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 2.
        https://arxiv.org/abs/2006.11239
    """
    step = chain_step(t, schedule)
    missing = event_dim - schedule.event_dim
    mean = pad(step.signal / step.signal_prev, missing, x_prev.dtype) * x_prev
    scale = step.noise * step.share.sqrt()
    return gaussian(mean, pad(scale, missing, x_prev.dtype), event_dim)


def forward_marginal(
    x_0: Tensor, t: int | Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> dist.TorchDistribution:
    r"""Noise up to ``t`` (E2), :math:`q(x_t \mid x_0) = N(\sqrt{\bar\alpha_t}\, x_0, (1-\bar\alpha_t) I)`.

    Args:
        x_0: Datum, shape ``batch_shape + event_shape``.
        t: Timestep in ``{1, …, T}``; an integer, or a LongTensor broadcastable to ``batch_shape``.
        schedule: Noise schedule with ``T`` steps.
        event_dim: Number of rightmost dimensions that form one datum.

    Returns:
        A Normal over :math:`x_t` with ``event_dim`` event dimensions and batch shape ``batch_shape``.

    Raises:
        ValueError: ``t`` outside ``{1, …, T}``.

    Example:
        >>> schedule = AlphaSchedule([0.64, 0.36])
        >>> forward_marginal(torch.ones(2), 1, schedule, event_dim=1).mean
        tensor([0.8000, 0.8000])

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 4.
        https://arxiv.org/abs/2006.11239
    """
    t = schedule.check_timestep(t, at_least=1)
    return noised(x_0, schedule.log_snr(t), schedule, event_dim=event_dim)


def noised(
    x_0: Tensor, log_snr: Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> dist.TorchDistribution:
    r""":math:`N(a x_0, \sigma^2 I)`, a datum with noise up to a log-SNR; E2 between the timesteps, too."""
    missing = event_dim - schedule.event_dim
    signal, noise = (pad(c, missing, x_0.dtype) for c in schedule.scales(log_snr))
    return gaussian(signal * x_0, noise, event_dim)


def forward_increment(
    x_0: Tensor, u: Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> dist.TorchDistribution:
    r"""What a step of the continuous chain says of the datum, in units of :math:`\sqrt{du}`,

    .. math::
        N\Big(\sqrt{-\tfrac{d\,\mathrm{SNR}}{du}}\; x_0,\; I\Big), \qquad
        -\frac{d\,\mathrm{SNR}}{du} = -\lambda'(u)\, e^{\lambda(u)} .

    As :math:`T \to \infty` the reverse chain reads the datum through a Gaussian channel, :math:`dy =
    \sqrt{-d\mathrm{SNR}/du}\, x_0\, du + dW`, and a step's KL at an estimate :math:`\hat x_0` becomes
    :math:`-\tfrac12 \tfrac{d\,\mathrm{SNR}}{du} \lVert x_0 - \hat x_0 \rVert^2 du`: the limit of E12.

    Args:
        x_0: Datum, or the estimate of it, shape ``batch_shape + event_shape``.
        u: Time in [0, 1], shape broadcastable to ``batch_shape``.
        schedule: Noise schedule, whatever its grid.
        event_dim: Number of rightmost dimensions that form one datum.

    Returns:
        A Normal with ``event_dim`` event dimensions and batch shape ``batch_shape``.

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 4.2 and appendix B.
        https://arxiv.org/abs/2107.00630
    """
    rate = -schedule.slope_at(u) * schedule.log_snr_at(u).exp()
    scale = pad(rate.sqrt(), event_dim - schedule.event_dim, x_0.dtype)
    mean = scale * x_0
    return gaussian(mean, torch.ones_like(mean), event_dim)


def forward_posterior(
    x_t: Tensor, x_0: Tensor, t: int | Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> dist.TorchDistribution:
    r"""Posterior of a state (E3), :math:`q(x_{t-1} \mid x_t, x_0) = N(\tilde\mu_t, \tilde\beta_t I)`.

    .. math::
        \tilde\mu_t &= \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\, x_0
                     + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\, x_t, \\
        \tilde\beta_t &= \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t .

    At ``t = 1`` this is a point mass at :math:`x_0`, which has no density; ask for ``t ≥ 2``.

    Args:
        x_t: State at time ``t``, shape ``batch_shape + event_shape``.
        x_0: Datum, shape broadcastable to ``x_t``.
        t: Timestep in ``{2, …, T}``; an integer, or a LongTensor broadcastable to ``batch_shape``.
        schedule: Noise schedule with ``T`` steps.
        event_dim: Number of rightmost dimensions that form one datum.

    Returns:
        A Normal over :math:`x_{t-1}` with ``event_dim`` event dimensions and batch shape
        ``batch_shape``.

    Raises:
        ValueError: ``t`` outside ``{2, …, T}``.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), eqs. 6-7.
        https://arxiv.org/abs/2006.11239
    """
    step = chain_step(t, schedule, at_least=2)
    missing = event_dim - schedule.event_dim
    mean = posterior_mean(x_t, x_0, step, missing_dim=missing)
    scale = posterior_variance(step).sqrt()
    return gaussian(mean, pad(scale, missing, x_t.dtype), event_dim)


def terminal_prior(
    schedule: NoiseSchedule, event_shape: torch.Size, *, dtype: torch.dtype
) -> dist.TorchDistribution:
    r"""Where the reverse chain starts (E5), :math:`p(x_T) = N(0, (a_T^2 + \sigma_T^2) I) = N(0, I)`.

    Args:
        schedule: Noise schedule; :math:`a_T^2 + \sigma_T^2` is one where it preserves variance.
        event_shape: Shape of one datum.
        dtype: Floating dtype of the chain.

    Returns:
        A Normal with empty batch shape and the given event shape, on the schedule's device.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 2.
        https://arxiv.org/abs/2006.11239
    """
    signal, noise = schedule.scales(schedule.log_snr(schedule.num_timesteps))
    scale = (signal**2 + noise**2).sqrt().to(dtype).expand(event_shape)
    return gaussian(torch.zeros_like(scale), scale, len(event_shape))


class ChainStep(NamedTuple):
    r"""What the step between :math:`x_{t-1}` and :math:`x_t` is made of; float64, of ``t``'s shape."""

    signal_prev: Tensor  #: :math:`a_{t-1}`
    noise_prev: Tensor  #: :math:`\sigma_{t-1}`, zero at ``t = 1``
    signal: Tensor  #: :math:`a_t`
    noise: Tensor  #: :math:`\sigma_t`
    share: (
        Tensor  #: :math:`1 - e^{\lambda_t - \lambda_{t-1}}`, the step's share of :math:`\sigma_t^2`
    )

    def padded(self, missing_dim: int) -> "ChainStep":
        """The coefficients with the event dimensions of a state that they lack; still float64."""
        return ChainStep(*(pad(c, missing_dim, c.dtype) for c in self))


def chain_step(t: int | Tensor, schedule: NoiseSchedule, at_least: int = 1) -> ChainStep:
    """The coefficients of step ``t`` in ``{at_least, …, T}``; see :class:`ChainStep`."""
    t = schedule.check_timestep(t, at_least)
    return ChainStep(*schedule.tabulated(_coefficients, t))


def _coefficients(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    previous, current = schedule.log_snr(torch.stack(((t - 1).clamp(min=0), t)))
    signals, noises = schedule.scales(torch.stack((previous, current)))
    return signals[0], noises[0], signals[1], noises[1], -torch.expm1(current - previous)


def posterior_mean(x_t: Tensor, x_0: Tensor, step: ChainStep, *, missing_dim: int) -> Tensor:
    r""":math:`\tilde\mu_t(x_t, x_0)` of :func:`forward_posterior`; at ``t = 1`` it is :math:`x_0`."""
    from_x_0 = step.signal_prev * step.share
    from_x_t = step.signal_prev / step.signal * (1 - step.share)
    return pad(from_x_0, missing_dim, x_t.dtype) * x_0 + pad(from_x_t, missing_dim, x_t.dtype) * x_t


def posterior_variance(step: ChainStep) -> Tensor:
    r""":math:`\tilde\beta_t` of :func:`forward_posterior`, float64; zero at ``t = 1``."""
    return step.noise_prev**2 * step.share


def pad(coefficient: Tensor, missing_dim: int, dtype: torch.dtype) -> Tensor:
    """Give a coefficient the event dimensions that it lacks, in the chain's dtype.

    That is all of them, and none for a schedule by dimension. They are counted from ``event_dim``, never
    from a difference of ``ndim``: a coefficient that has as many entries as the batch would otherwise
    line up with the wrong axis in silence.
    """
    return coefficient.reshape(coefficient.shape + (1,) * missing_dim).to(dtype)
