r"""Gaussian noise: the closed-form conditionals of the forward chain.

With ``signal`` :math:`a_t`, ``noise`` :math:`\sigma_t` and :math:`\lambda_t = \log a_t^2/\sigma_t^2`,
and with :math:`s = t - 1`, all of them follow from :math:`x_t = a_t x_0 + \sigma_t \epsilon`:

.. math::
    q(x_t \mid x_s) &= N\!\big(\tfrac{a_t}{a_s} x_s,\; \sigma_t^2\,(1 - e^{\lambda_t - \lambda_s}) I\big)
        && \text{(E1)} \\
    q(x_t \mid x_0) &= N(a_t x_0,\; \sigma_t^2 I) && \text{(E2)} \\
    q(x_s \mid x_t, x_0) &= N\!\big(\tfrac{a_s}{a_t} e^{\lambda_t - \lambda_s} x_t
        + a_s (1 - e^{\lambda_t - \lambda_s}) x_0,\; \sigma_s^2 (1 - e^{\lambda_t - \lambda_s}) I\big)
        && \text{(E3)} \\
    p(x_T) &= N(0, (a_T^2 + \sigma_T^2) I) && \text{(E5)}

For :math:`a_t = \sqrt{\bar\alpha_t}, \sigma_t = \sqrt{1 - \bar\alpha_t}` these are the usual
:math:`N(\sqrt{\alpha_t} x_s, (1 - \alpha_t) I)` and so on. The form above holds for a
variance-exploding chain as well, and :math:`1 - e^{\lambda_t - \lambda_s}` is computed by ``expm1``,
without cancellation. Coefficients are float64 until they are multiplied by a state.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eqs. 2, 4, 6 and 7.
    https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), appendix A. https://arxiv.org/abs/2107.00630
"""

import warnings
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.checks import holds
from pyro_diffusion.distributions import gaussian
from pyro_diffusion.processes.base import Denoised, ForwardProcess, pad
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class ChainStep(NamedTuple):
    r"""The coefficients of the step between :math:`x_{t-1}` and :math:`x_t`; float64, of ``t``'s shape."""

    signal_prev: Tensor  #: :math:`a_{t-1}`
    noise_prev: Tensor  #: :math:`\sigma_{t-1}`, zero at ``t = 1``
    signal: Tensor  #: :math:`a_t`
    noise: Tensor  #: :math:`\sigma_t`
    #: :math:`1 - e^{\lambda_t - \lambda_{t-1}}`, the step's share of :math:`\sigma_t^2`
    share: Tensor

    @property
    def tweedie(self) -> Tensor:
        r""":math:`\sigma_t^2 / a_t`; the Jacobian of :math:`E[x_0 \mid x_t]` times it is a covariance."""
        return self.noise**2 / self.signal

    @property
    def rise(self) -> Tensor:
        r""":math:`\mathrm{SNR}_{t-1} - \mathrm{SNR}_t`, for ``t ≥ 2``."""
        return self.signal_prev**2 / self.noise_prev**2 * self.share

    @classmethod
    def between(cls, schedule: NoiseSchedule, earlier: Tensor, later: Tensor) -> "ChainStep":
        """The coefficients of a step from one log-SNR to a smaller one."""
        signals, noises = schedule.scales(torch.stack((earlier, later)))
        return cls(signals[0], noises[0], signals[1], noises[1], -torch.expm1(later - earlier))

    def padded(self, missing_dim: int) -> "ChainStep":
        """The coefficients with the event dimensions of a state, still in float64."""
        return ChainStep(*(pad(c, missing_dim, c.dtype) for c in self))


def chain_step(t: int | Tensor, schedule: NoiseSchedule, at_least: int = 1) -> ChainStep:
    """The coefficients of step ``t`` in ``{at_least, …, T}``; see :class:`ChainStep`."""
    t = schedule.check_timestep(t, at_least)
    return ChainStep(*schedule.tabulated(_coefficients, t))


def _coefficients(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    return ChainStep.between(schedule, *schedule.log_snr(torch.stack(((t - 1).clamp(min=0), t))))


def mean_coefficients(step: ChainStep) -> tuple[Tensor, Tensor]:
    r"""The coefficients of :math:`x_0` and of :math:`x_t` in :math:`\tilde\mu_t`, E3; float64."""
    from_x_0 = step.signal_prev * step.share
    from_x_t = step.signal_prev / step.signal * (1 - step.share)
    return from_x_0, from_x_t


def posterior_mean(x_t: Tensor, x_0: Tensor, step: ChainStep, *, missing_dim: int) -> Tensor:
    r""":math:`\tilde\mu_t(x_t, x_0)` of E3; at ``t = 1`` it is :math:`x_0`."""
    from_x_0, from_x_t = mean_coefficients(step)
    return pad(from_x_0, missing_dim, x_t.dtype) * x_0 + pad(from_x_t, missing_dim, x_t.dtype) * x_t


def posterior_variance(step: ChainStep) -> Tensor:
    r""":math:`\tilde\beta_t` of E3, float64; zero at ``t = 1``."""
    return step.noise_prev**2 * step.share


# Functions of a timestep for the schedule's tables.


def _scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    return schedule.scales(schedule.log_snr(t))


def _prior_scale(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    signal, noise = _scales(schedule, t)
    return ((signal**2 + noise**2).sqrt(),)


def _inverse_root_of_snr(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    return ((-0.5 * schedule.log_snr(t)).exp(),)


def _reverse(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    step = ChainStep(*_coefficients(schedule, t))
    return (*mean_coefficients(step), *step)


def _posterior(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    step = ChainStep(*_coefficients(schedule, t))
    return (*mean_coefficients(step), posterior_variance(step).sqrt())


class GaussianProcess(ForwardProcess):
    r"""Gaussian noise on real numbers, :math:`x_t = a_t x_0 + \sigma_t \epsilon`.

    Args:
        schedule: Noise schedule of the chain, of one curve or of a curve for each entry.
        event_shape: Shape of one state.

    Example:
        >>> process = GaussianProcess(AlphaSchedule([0.64, 0.36]), torch.Size([2]))
        >>> process.marginal(torch.ones(2), 1).mean
        tensor([0.8000, 0.8000])

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 2.
        https://arxiv.org/abs/2006.11239
    """

    states: ClassVar[str] = "real numbers"
    has_score: ClassVar[bool] = True
    gap: ClassVar[float | None] = 0.0

    def prior(self, dtype: torch.dtype) -> TorchDistribution:
        r""":math:`p(x_T) = N(0, (a_T^2 + \sigma_T^2) I)`, or :math:`N(0, I)` if variance is preserved."""
        last = self.schedule.check_timestep(self.schedule.num_timesteps)
        (scale,) = self.schedule.tabulated(_prior_scale, last, dtype)
        scale = scale.expand(self.event_shape)
        return gaussian(torch.zeros_like(scale), scale, self.event_dim)

    def transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`N(\tfrac{a_t}{a_{t-1}} x_{t-1}, \sigma_t^2 (1 - e^{\lambda_t - \lambda_{t-1}}) I)` (E1)."""
        step = chain_step(t, self.schedule)
        mean = self._pad(step.signal / step.signal_prev, x_prev) * x_prev
        return self._gaussian(mean, step.noise * step.share.sqrt())

    def marginal(self, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`N(a_t x_0, \sigma_t^2 I)` (E2), or the :meth:`noised` of a subclass that overrides it."""
        if type(self).noised is not GaussianProcess.noised:
            return super().marginal(x_0, t)
        t = self.schedule.check_timestep(t, at_least=1)
        signal, noise = self.schedule.tabulated(_scales, t, x_0.dtype)
        return self._gaussian(self._pad(signal, x_0) * x_0, noise)

    def noised(self, x_0: Tensor, log_snr: Tensor) -> TorchDistribution:
        r""":math:`N(a x_0, \sigma^2 I)`; at the log-SNR of a timestep this is E2."""
        signal, noise = self.schedule.scales(log_snr)
        return self._gaussian(self._pad(signal, x_0) * x_0, noise)

    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`N(\tilde\mu_t(x_t, x_0), \tilde\beta_t I)` (E3)."""
        t = self.schedule.check_timestep(t, at_least=2)
        from_x_0, from_x_t, scale = self.schedule.tabulated(_posterior, t, x_t.dtype)
        mean = self._pad(from_x_0, x_t) * x_0 + self._pad(from_x_t, x_t) * x_t
        return self._gaussian(mean, scale)

    def reverse(
        self,
        x_t: Tensor,
        denoised: Denoised,
        t: int | Tensor,
        variance: Callable[[ChainStep], Tensor] = posterior_variance,
    ) -> TorchDistribution:
        r""":math:`N(\tilde\mu_t(x_t, \hat x_0), \Sigma_t)`.

        Args:
            x_t: State, ``batch_shape + event_shape``.
            denoised: Output of the denoiser at this state.
            t: Timestep in ``{1, …, T}``.
            variance: :math:`\Sigma_t` from the step's coefficients, which have the state's dimensions;
                :math:`\tilde\beta_t` by default.
        """
        t = self.schedule.check_timestep(t, at_least=1)
        from_x_0, from_x_t, *step = self.schedule.tabulated(_reverse, t)
        mean = self._pad(from_x_0, x_t) * denoised.x_0_hat + self._pad(from_x_t, x_t) * x_t
        scale = variance(ChainStep(*step).padded(self.missing_dim)).sqrt().to(x_t.dtype)
        return gaussian(mean, scale, self.event_dim)

    def increment(self, x_u: Tensor, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r"""The observation of the datum in a unit of time by the channel below, at the rate of :math:`u`,

        .. math::
            N\Big(\sqrt{-\tfrac{d\,\mathrm{SNR}}{du}}\; x_0,\; I\Big), \qquad
            -\frac{d\,\mathrm{SNR}}{du} = -\lambda'(u)\, e^{\lambda(u)} .

        As :math:`T \to \infty` the reverse chain observes the datum through a Gaussian channel, :math:`dy =
        \sqrt{-d\mathrm{SNR}/du}\, x_0\, du + dW`, and a step's KL at an estimate :math:`\hat x_0` becomes
        :math:`-\tfrac12 \tfrac{d\,\mathrm{SNR}}{du} \lVert x_0 - \hat x_0 \rVert^2 du`: the limit of E12.

        References:
            Variational Diffusion Models (Kingma et al., 2021), section 4.2 and appendix B.
            https://arxiv.org/abs/2107.00630
        """
        rate = -self.schedule.slope_at(u) * self.schedule.log_snr_at(u).exp()
        mean = self._pad(rate.sqrt(), x_0) * x_0
        return gaussian(mean, torch.ones_like(mean), self.event_dim)

    def reverse_increment(self, x_u: Tensor, denoised: Denoised, u: Tensor) -> TorchDistribution:
        """The same kernel at the estimate. The variance of the reverse kernels drops out in the limit."""
        return self.increment(x_u, denoised.x_0_hat, u)

    def check_states(self, x_0: Tensor) -> Tensor:
        """``x_0``, if the noise of :math:`x_1`, the smallest of the chain, is not lost in rounding."""
        first = self.schedule.check_timestep(1)
        (noise,) = self.schedule.tabulated(_inverse_root_of_snr, first)
        eps = torch.finfo(x_0.dtype).eps
        if holds(eps * x_0.abs().amax() <= noise):  # one check for all entries usually suffices
            return x_0
        largest = x_0.abs().amax(0)
        if not holds(eps * largest <= noise):
            raise ValueError(
                f"argument 'x_0': got states of up to {largest.max().item():.3g} in {x_0.dtype} with a "
                f"noise of {noise.min().item():.3g} at x_1, which is lost in their rounding; expected a "
                f"noise of at least {eps:.1g} times the states. Pass transform=Standardize.from_data(x_0), a "
                "smaller log_snr_max, or a network in float64."
            )
        return x_0

    def warn_of_scale(self, x_0: Tensor) -> None:
        r"""Warn if data are ten times as large as a draw of :math:`p(x_T)`, or hidden at :math:`x_1`.

        Data are hidden if they are smaller than the noise of :math:`x_1` and than a tenth of such a draw.
        """
        schedule = self.schedule
        signal, noise = schedule.scales(schedule.log_snr(schedule.num_timesteps))
        unit = (signal**2 + noise**2).sqrt().mean().item()
        largest, hidden = 10 * unit, (-0.5 * schedule.log_snr(1)).exp().mean().item()
        smallest = min(hidden, 0.1 * unit)
        size = x_0.double().square().mean().sqrt().item()
        if size > largest or (
            len(x_0) > 7 and 0 < size < smallest
        ):  # a few may lie near the origin
            warnings.warn(
                f"argument 'x_0': got states of a root mean square of {size:.3g}; expected one between "
                f"{smallest:.2g}, about the noise of x_1, and {largest:.3g}, ten times a draw of p(x_T), "
                "because the bound is poor outside this range. Pass transform=Standardize.from_data(x_0), "
                "which leaves the bound in your units.",
                stacklevel=2,
            )

    def _pad(self, coefficient: Tensor, x: Tensor) -> Tensor:
        return pad(coefficient, self.missing_dim, x.dtype)

    def _gaussian(self, mean: Tensor, scale: Tensor) -> TorchDistribution:
        return gaussian(mean, self._pad(scale, mean), self.event_dim)


# The same kernels as functions of a schedule.


def forward_transition(
    x_prev: Tensor, t: int | Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> TorchDistribution:
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
    return _process(x_prev, schedule, event_dim).transition(x_prev, t)


def forward_marginal(
    x_0: Tensor, t: int | Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> TorchDistribution:
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
    return _process(x_0, schedule, event_dim).marginal(x_0, t)


def forward_posterior(
    x_t: Tensor, x_0: Tensor, t: int | Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> TorchDistribution:
    r"""Posterior of a state (E3), :math:`q(x_{t-1} \mid x_t, x_0) = N(\tilde\mu_t, \tilde\beta_t I)`.

    .. math::
        \tilde\mu_t &= \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\, x_0
                     + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\, x_t, \\
        \tilde\beta_t &= \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t .

    At ``t = 1`` this is a point mass at :math:`x_0`, which has no density; use ``t ≥ 2``.

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
    return _process(x_t, schedule, event_dim).posterior(x_t, x_0, t)


def forward_increment(
    x_0: Tensor, u: Tensor, schedule: NoiseSchedule, *, event_dim: int
) -> TorchDistribution:
    r"""The observation of the datum in a step of the continuous chain; see :meth:`GaussianProcess.increment`.

    Args:
        x_0: Datum, or an estimate of it, shape ``batch_shape + event_shape``.
        u: Time in [0, 1], shape broadcastable to ``batch_shape``.
        schedule: Noise schedule; its grid does not matter.
        event_dim: Number of rightmost dimensions that form one datum.

    Returns:
        A Normal with ``event_dim`` event dimensions and batch shape ``batch_shape``.
    """
    return _process(x_0, schedule, event_dim).increment(x_0, x_0, u)


def terminal_prior(
    schedule: NoiseSchedule, event_shape: tuple[int, ...], *, dtype: torch.dtype
) -> TorchDistribution:
    r"""The start of the reverse chain (E5), :math:`p(x_T) = N(0, (a_T^2 + \sigma_T^2) I) = N(0, I)`.

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
    return GaussianProcess(schedule, torch.Size(event_shape)).prior(dtype)


def _process(x: Tensor, schedule: NoiseSchedule, event_dim: int) -> GaussianProcess:
    return GaussianProcess(schedule, x.shape[x.dim() - event_dim :])
