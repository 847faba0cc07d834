r"""Denoisers: modules whose forward *returns* :math:`p_\theta(x_{t-1} \mid x_t)` (E6).

A denoiser estimates the datum, :math:`\hat x_0(x_t, \lambda_t)`; everything else follows. The mean of
the reverse kernel is the forward posterior's at that estimate, :math:`\tilde\mu_t(x_t, \hat x_0)`
(exactly so for the true :math:`E[x_0 \mid x_t]`, since :math:`\tilde\mu_t` is linear in
:math:`x_0`), and Tweedie's formula gives the score,

.. math::
    \nabla \log q(x_t) = \frac{a_t\, \hat x_0 - x_t}{\sigma_t^2} .

Kernels differ in their variance. The exact one is
:math:`\tilde\beta_t + (a_{t-1}(1 - e^{\lambda_t - \lambda_{t-1}}))^2 \operatorname{Var}[x_0 \mid x_t]`;
:class:`PosteriorVariance` and :class:`ForwardVariance` are its two ends, for data that are a point
and for data that are white noise. The choice shows in the bound, also for many steps:
``examples/gaussian_oracle.py`` prints what each costs.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2.
    https://arxiv.org/abs/2006.11239
"""

from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_diffusion.kernels import (
    ChainStep,
    chain_step,
    check_timestep,
    pad,
    posterior_mean,
    posterior_variance,
)
from pyro_diffusion.parameterizations import NoisePrediction, Parameterization
from pyro_diffusion.schedules import NoiseSchedule

__all__ = [
    "Denoiser",
    "ForwardVariance",
    "GaussianDenoiser",
    "NeuralDenoiser",
    "PosteriorVariance",
    "ReverseVariance",
]


class Denoiser(nn.Module, ABC):
    r"""A family of reverse kernels :math:`p_\theta(x_{t-1} \mid x_t)`, :math:`t = 1 … T`.

    Args:
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum, in the chain's space.
    """

    def __init__(self, schedule: NoiseSchedule, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        check_argument("schedule", schedule, NoiseSchedule, "LinearSchedule(1000)")
        check_argument("event_shape", event_shape, tuple, "(64,)")
        self.schedule = schedule
        self.event_shape = torch.Size(event_shape)

    @property
    def event_dim(self) -> int:
        """Number of rightmost dimensions that form one datum."""
        return len(self.event_shape)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating dtype in which the chain runs."""

    @abstractmethod
    def x_0_hat(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        r"""Estimate of :math:`x_0` from a state, both ``batch_shape + event_shape``.

        Args:
            x_t: State, shape ``batch_shape + event_shape``.
            log_snr: Its log-SNR, shape broadcastable to ``batch_shape``.
        """

    @abstractmethod
    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, x_0_hat: Tensor
    ) -> dist.TorchDistribution:
        r""":math:`p_\theta(x_{t-1} \mid x_t)` from an estimate that is already there."""

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        r"""The reverse kernel :math:`p_\theta(x_{t-1} \mid x_t)`.

        Args:
            x_t: State at time ``t``, shape ``batch_shape + event_shape``.
            t: Timestep in ``{1, …, T}``; an integer, or a LongTensor broadcastable to
                ``batch_shape``.

        Returns:
            A distribution over :math:`x_{t-1}` with batch shape ``batch_shape`` and event shape
            ``event_shape``. At ``t = 1`` it is the denoiser's own :math:`p(x_0 \mid x_1)`.

        Raises:
            ValueError: A state of another event shape, a timestep outside ``{1, …, T}``, or an
                estimate that is not finite.
        """
        t = check_timestep(t, self.schedule, at_least=1)
        return self.reverse_kernel(x_t, t, self.x_0_hat(x_t, self.schedule.log_snr(t)))

    def score(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        r"""Tweedie's :math:`\nabla \log q(x_t) = (a\, \hat x_0 - x_t) / \sigma^2`.

        Args:
            x_t: State, shape ``batch_shape + event_shape``.
            log_snr: Its log-SNR, shape broadcastable to ``batch_shape``.

        Returns:
            The score, of ``x_t``'s shape.

        References:
            Tweedie's Formula and Selection Bias (Efron, 2011).
            https://doi.org/10.1198/jasa.2011.tm11181
        """
        signal, noise = self._scales(x_t, log_snr)
        return (signal * self.x_0_hat(x_t, log_snr) - x_t) / noise**2

    def _scales(self, x_t: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self.schedule.scales(log_snr)
        return pad(signal, self.event_dim, x_t.dtype), pad(noise, self.event_dim, x_t.dtype)

    def _batch_shape(self, x_t: Tensor) -> torch.Size:
        batch_dim = x_t.dim() - self.event_dim
        if batch_dim < 0 or x_t.shape[batch_dim:] != self.event_shape:
            raise ValueError(
                f"argument 'x_t': got shape {tuple(x_t.shape)}; expected batch_shape + event_shape "
                f"with event_shape {tuple(self.event_shape)}. Reshape the states, or build "
                f"{type(self).__name__} with the event shape of your data."
            )
        return x_t.shape[:batch_dim]


class ReverseVariance(ABC):
    """Variance of a reverse kernel as a function of the timestep alone."""

    @abstractmethod
    def __call__(self, step: ChainStep) -> Tensor:
        """Variance of :math:`x_{t-1}` given :math:`x_t`, float64, of ``t``'s shape."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PosteriorVariance(ReverseVariance):
    r""":math:`\tilde\beta_t`, the forward posterior's ("fixed small"); :math:`\beta_1` at ``t = 1``.

    :math:`\tilde\beta_1` is zero, which leaves :math:`p(x_0 \mid x_1)` without a density; published
    code puts :math:`\beta_1` or :math:`\tilde\beta_2` there. With this variance a term of the bound
    is a weighted squared error (E12, :func:`~pyro_diffusion.bounds.snr_weight`).
    """

    def __call__(self, step: ChainStep) -> Tensor:
        is_first = step.noise_prev == 0
        return torch.where(is_first, ForwardVariance()(step), posterior_variance(step))


class ForwardVariance(ReverseVariance):
    r""":math:`\beta_t = 1 - \alpha_t`, the forward transition's ("fixed large")."""

    def __call__(self, step: ChainStep) -> Tensor:
        return step.noise**2 * step.share


class NeuralDenoiser(Denoiser):
    r"""Reverse kernels from a network: :math:`N(\tilde\mu_t(x_t, \hat x_0), \Sigma_t)`.

    Args:
        network: Called as ``network(x_t, log_snr)`` with one flattened batch axis in front: ``x_t``
            of shape ``(B,) + event_shape``, ``log_snr`` of shape ``(B,)``; its output has the shape
            of ``x_t``.
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum.
        prediction: What the output means: ``NoisePrediction()``, the default, or
            ``DataPrediction()``.
        variance: Variance of the kernels: ``ForwardVariance()``, the default, or
            ``PosteriorVariance()``.

    Raises:
        ValueError: An argument of another kind. From a call: an output of another shape, or one
            that is not finite.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,)), LinearSchedule(1000), event_shape=(2,))
        >>> kernel = denoiser(torch.randn(5, 2), t=10)
        >>> kernel.batch_shape, kernel.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        event_shape: tuple[int, ...],
        *,
        prediction: Parameterization | None = None,
        variance: ReverseVariance | None = None,
    ) -> None:
        super().__init__(schedule, event_shape)
        self.network = check_argument("network", network, nn.Module, "MLP((64,))")
        self.prediction = NoisePrediction() if prediction is None else prediction
        self.variance = ForwardVariance() if variance is None else variance
        check_argument("prediction", self.prediction, Parameterization, "NoisePrediction()")
        check_argument("variance", self.variance, ReverseVariance, "PosteriorVariance()")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's first parameter."""
        for parameter in self.network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.get_default_dtype()

    def x_0_hat(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        batch_shape = self._batch_shape(x_t)
        flat_log_snr = log_snr.to(x_t.dtype).expand(batch_shape).reshape(-1)
        output = self.network(x_t.reshape(-1, *self.event_shape), flat_log_snr)
        expected = (len(flat_log_snr), *self.event_shape)
        if output.shape != expected:
            raise ValueError(
                f"argument 'network': got an output of shape {tuple(output.shape)}; expected "
                f"{expected}, the shape of the states it was given. Return one value for each entry "
                "of a datum and keep the batch axis in front."
            )
        if not output.isfinite().all():
            raise ValueError(
                "argument 'network': got an output with NaN or infinite values; expected finite "
                "numbers. Lower the learning rate or clip gradients, and check the data's scale."
            )
        signal, noise = self._scales(x_t, log_snr)
        return self.prediction.x_0_hat(output.reshape(x_t.shape), x_t, signal, noise)

    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, x_0_hat: Tensor
    ) -> dist.TorchDistribution:
        step = chain_step(t, self.schedule)
        mean = posterior_mean(x_t, x_0_hat, step, event_dim=self.event_dim)
        scale = pad(self.variance(step).sqrt(), self.event_dim, x_t.dtype)
        return dist.Normal(mean, scale).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return (
            f"event_shape={tuple(self.event_shape)}, prediction={self.prediction}, "
            f"variance={self.variance}"
        )


class GaussianDenoiser(Denoiser):
    r"""The exact reverse chain of Gaussian data :math:`x_0 \sim N(m, \operatorname{diag}(s^2))`.

    .. math::
        \hat x_0 = m + \frac{a_t s^2}{a_t^2 s^2 + \sigma_t^2} (x_t - a_t m), \qquad
        \operatorname{Var}[x_0 \mid x_t] = \frac{s^2 \sigma_t^2}{a_t^2 s^2 + \sigma_t^2},

    so that a path's :math:`\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)` is :math:`\log p(x_0)` on
    every draw, up to :math:`\sqrt{\bar\alpha_T}` times the mean: the bound's oracle. A full
    covariance is :meth:`from_covariance`.

    Args:
        mean: Mean :math:`m`, shape ``event_shape``.
        std: Standard deviations :math:`s > 0`, broadcastable to ``event_shape``.
        schedule: Noise schedule of the chain.

    Raises:
        ValueError: Standard deviations that are not positive, or a shape that does not fit.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LinearSchedule(10))
        >>> denoiser.data_distribution.log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    mean: Tensor
    variance: Tensor
    rotation: Tensor | None

    def __init__(self, mean: Tensor, std: Tensor, schedule: NoiseSchedule) -> None:
        mean = torch.as_tensor(mean).clone()  # a buffer of our own, not the caller's tensor
        mean = mean if mean.is_floating_point() else mean.to(torch.get_default_dtype())
        std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
        if torch.broadcast_shapes(mean.shape, std.shape) != mean.shape or not (std > 0).all():
            raise ValueError(
                f"argument 'std': got shape {tuple(std.shape)} with a smallest value of "
                f"{std.min().item():g}; expected positive standard deviations that broadcast to the "
                f"mean's shape {tuple(mean.shape)}. A constant entry has no density: drop it."
            )
        super().__init__(schedule, mean.shape)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", std.expand(mean.shape) ** 2)
        self.register_buffer("rotation", None)

    @classmethod
    def from_covariance(
        cls, mean: Tensor, covariance: Tensor, schedule: NoiseSchedule
    ) -> "GaussianDenoiser":
        r"""Exact for :math:`x_0 \sim N(m, C)` over a vector event; kernels are MultivariateNormal.

        Args:
            mean: Mean :math:`m`, shape ``(D,)``.
            covariance: Covariance :math:`C`, symmetric positive definite, shape ``(D, D)``.
            schedule: Noise schedule of the chain.

        Raises:
            ValueError: A covariance of another shape, or one that is not positive definite.
        """
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"argument 'covariance': got shape {tuple(covariance.shape)} with a mean of shape "
                f"{tuple(mean.shape)}; expected (D, D) and (D,). Flatten the event to a vector."
            )
        variance, rotation = torch.linalg.eigh(covariance)
        if not torch.allclose(covariance, covariance.mT) or not (variance > 0).all():
            raise ValueError(
                f"argument 'covariance': got a smallest eigenvalue of {variance.min().item():g} (or "
                "an asymmetric matrix); expected a symmetric positive definite matrix. Add a small "
                "multiple of the identity if it is singular."
            )
        denoiser = cls(mean, variance.sqrt(), schedule)
        denoiser.register_buffer("rotation", rotation)
        return denoiser

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the mean."""
        return self.mean.dtype

    @property
    def data_distribution(self) -> dist.TorchDistribution:
        """The law of the data for which the denoiser is exact, event shape ``event_shape``."""
        return self._gaussian(self.mean, self.variance)

    def x_0_hat(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        self._batch_shape(x_t)
        signal, noise = (
            pad(s, self.event_dim, torch.float64) for s in self.schedule.scales(log_snr)
        )
        variance = self.variance.double()
        gain = (signal * variance / (signal**2 * variance + noise**2)).to(x_t.dtype)
        return self.mean + self._scale_axes(gain, x_t - signal.to(x_t.dtype) * self.mean)

    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, x_0_hat: Tensor
    ) -> dist.TorchDistribution:
        step = chain_step(t, self.schedule)
        mean = posterior_mean(x_t, x_0_hat, step, event_dim=self.event_dim)
        signal_prev, _, signal, noise, share = (pad(c, self.event_dim, torch.float64) for c in step)
        variance = self.variance.double()
        x_0_variance = variance * noise**2 / (signal**2 * variance + noise**2)
        beta_tilde = pad(posterior_variance(step), self.event_dim, torch.float64)
        exact = beta_tilde + (signal_prev * share) ** 2 * x_0_variance
        return self._gaussian(mean, exact.to(x_t.dtype))

    def _gaussian(self, mean: Tensor, variance: Tensor) -> dist.TorchDistribution:
        """A Gaussian with the given variances along the data's principal axes."""
        if self.rotation is None:
            return dist.Normal(mean, variance.sqrt()).to_event(self.event_dim)
        factor = self.rotation * variance.sqrt().unsqueeze(-2)
        return dist.MultivariateNormal(mean, factor @ factor.mT)

    def _scale_axes(self, gain: Tensor, x: Tensor) -> Tensor:
        if self.rotation is None:
            return gain * x
        return (gain * (x @ self.rotation)) @ self.rotation.mT


def check_argument(name: str, value: Any, kind: type, example: str) -> Any:
    """``value``, if it is an instance of ``kind``."""
    if not isinstance(value, kind):
        got = repr(value) if isinstance(value, str | int | list) else type(value).__name__
        got = f"the class {value.__name__}" if isinstance(value, type) else got
        raise ValueError(
            f"argument {name!r}: got {got}; expected an instance of {kind.__name__}. "
            f"Pass an object, such as {example}."
        )
    return value
