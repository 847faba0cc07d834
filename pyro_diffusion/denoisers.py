r"""Denoisers: modules whose forward *returns* :math:`p_\theta(x_{t-1} \mid x_t)` (E6).

A denoiser estimates the datum, :math:`\hat x_0(x_t, \lambda_t)`; everything else follows. The mean of
the reverse kernel is the forward posterior's at that estimate, :math:`\tilde\mu_t(x_t, \hat x_0)`
(exactly so for the true :math:`E[x_0 \mid x_t]`, since :math:`\tilde\mu_t` is linear in
:math:`x_0`), and Tweedie's formula gives the score,

.. math::
    \nabla \log q(x_t) = \frac{a_t\, \hat x_0 - x_t}{\sigma_t^2} .

Kernels differ in their variance (:mod:`~pyro_diffusion.variances`).

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2.
    https://arxiv.org/abs/2006.11239
"""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_argument, holds
from pyro_diffusion.distributions import gaussian
from pyro_diffusion.kernels import ChainStep, chain_step, pad, posterior_mean
from pyro_diffusion.networks import network_dtype
from pyro_diffusion.parameterizations import NoisePrediction, Parameterization
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.variances import (
    ForwardVariance,
    LearnedVariance,
    PosteriorVariance,
    ReverseVariance,
    exact_variance,
)

__all__ = [
    "Denoised",
    "Denoiser",
    "ForwardVariance",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "LearnedVariance",
    "NeuralDenoiser",
    "PosteriorVariance",
    "ReverseVariance",
]


class Denoised(NamedTuple):
    r"""What a denoiser says of :math:`x_0` when it sees a state; one call of the network."""

    x_0_hat: Tensor  #: the estimate, ``batch_shape + event_shape``
    logits: Tensor | None = None  #: of each level, ``batch_shape + event_shape + (K,)``
    variance: Tensor | None = None  #: the output that :class:`LearnedVariance` interpolates by


class Denoiser(nn.Module, ABC):
    r"""A family of reverse kernels :math:`p_\theta(x_{t-1} \mid x_t)`, :math:`t = 1 … T`.

    Args:
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum, in the chain's space.
    """

    states: ClassVar[str] = "real numbers"  #: what the chain's states are

    def __init__(self, schedule: NoiseSchedule, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        check_argument("schedule", schedule, NoiseSchedule, "LinearSchedule(1000)")
        check_argument("event_shape", event_shape, tuple, "(64,)")
        if schedule.event_shape not in (torch.Size(), torch.Size(event_shape)):
            raise ValueError(
                f"argument 'schedule': got curves for data of shape {tuple(schedule.event_shape)}; expected "
                f"{tuple(event_shape)}, one for each entry, or a single curve. Build the schedule with the "
                "event shape of your data."
            )
        self.schedule = schedule
        self.event_shape = torch.Size(event_shape)

    @property
    def event_dim(self) -> int:
        """Number of rightmost dimensions that form one datum."""
        return len(self.event_shape)

    @property
    def missing_dim(self) -> int:
        """Event dimensions that the schedule's coefficients lack: all, but for a schedule by dimension."""
        return self.event_dim - self.schedule.event_dim

    def with_schedule(self, schedule: NoiseSchedule) -> Self:
        """The same denoiser, parameters included, for a chain of another schedule."""
        denoiser = copy.copy(self)
        for kind in ("_modules", "_buffers", "_parameters"):
            setattr(denoiser, kind, getattr(self, kind).copy())
        denoiser.schedule = schedule
        return denoiser

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating dtype in which the chain runs."""

    @abstractmethod
    def denoise(self, x_t: Tensor, log_snr: Tensor) -> Denoised:
        r"""All that the denoiser says of :math:`x_0`; see :meth:`x_0_hat` for the arguments."""

    @abstractmethod
    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, denoised: Denoised
    ) -> dist.TorchDistribution:
        r""":math:`p_\theta(x_{t-1} \mid x_t)` from what the denoiser said already."""

    def x_0_hat(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        r"""Estimate of :math:`x_0` from a state, both ``batch_shape + event_shape``.

        Args:
            x_t: State, shape ``batch_shape + event_shape``.
            log_snr: Its log-SNR, shape broadcastable to ``batch_shape`` (+ the schedule's event shape).
        """
        return self.denoise(x_t, log_snr).x_0_hat

    def embed(self, x_0: Tensor) -> Tensor:
        """Data as points of the chain, where the model has no likelihood of its own: as they are."""
        return x_0

    def decode(self, x_1: Tensor, denoised: Denoised) -> dist.TorchDistribution:
        r"""The denoiser's own :math:`p(x_0 \mid x_1)`, which models without a likelihood take."""
        return self.reverse_kernel(x_1, 1, denoised)

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        r"""The reverse kernel :math:`p_\theta(x_{t-1} \mid x_t)`.

        Args:
            x_t: State at time ``t``, shape ``batch_shape + event_shape``.
            t: Timestep in ``{1, …, T}``; an integer, or a LongTensor broadcastable to
                ``batch_shape``.

        Returns:
            A distribution over :math:`x_{t-1}` with batch shape ``batch_shape`` and event shape
            ``event_shape``, in the chain's space; :meth:`decode` leads from :math:`x_1` to data.

        Raises:
            ValueError: A state of another event shape, a timestep outside ``{1, …, T}``, or an
                estimate that is not finite.
        """
        t = self.schedule.check_timestep(t, at_least=1)
        return self.reverse_kernel(x_t, t, self.denoise(x_t, self.schedule.log_snr(t)))

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
        return pad(signal, self.missing_dim, x_t.dtype), pad(noise, self.missing_dim, x_t.dtype)

    def _batch_shape(self, x_t: Tensor) -> torch.Size:
        batch_dim = x_t.dim() - self.event_dim
        if batch_dim < 0 or x_t.shape[batch_dim:] != self.event_shape:
            raise ValueError(
                f"argument 'x_t': got shape {tuple(x_t.shape)}; expected batch_shape + event_shape "
                f"with event_shape {tuple(self.event_shape)}. Reshape the states, or build "
                f"{type(self).__name__} with the event shape of your data."
            )
        return x_t.shape[:batch_dim]


class NeuralDenoiser(Denoiser):
    r"""Reverse kernels from a network: :math:`N(\tilde\mu_t(x_t, \hat x_0), \Sigma_t)`.

    Args:
        network: Called as ``network(x_t, log_snr)`` with one flattened batch axis in front: ``x_t``
            of shape ``(B,) + event_shape``, in a variance-exploding chain divided by
            :math:`\sqrt{a_t^2 + \sigma_t^2}`; ``log_snr`` of shape ``(B,)``. Its output has the
            shape of ``x_t``, or one more axis at the end where prediction and variance need several
            numbers for each entry.
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum.
        prediction: What the output means: ``NoisePrediction()``, the default, ``DataPrediction()``,
            ``VelocityPrediction()``, ``ScorePrediction()`` (all of the state as the network sees it),
            or ``LevelPrediction(num_levels)`` for data on finitely many values.
        variance: Variance of the kernels: ``ForwardVariance()``, the default,
            ``PosteriorVariance()``, ``LearnedVariance()`` or ``OptimalVariance.from_data(…)``.

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
        """Dtype of the network's first parameter; float32 for a network of half precision."""
        return torch.promote_types(network_dtype(self.network), torch.float32)

    def denoise(self, x_t: Tensor, log_snr: Tensor) -> Denoised:
        batch_shape = self._batch_shape(x_t)
        # The chain of unit variance with the same log-SNR: what the network sees, on any scale.
        signal, noise = self.schedule.scales(log_snr)
        scale = (signal**2 + noise**2).sqrt()
        signal, noise, scale = (
            pad(c, self.missing_dim, x_t.dtype) for c in (signal / scale, noise / scale, scale)
        )
        state = x_t / scale
        # One number for the network, where every entry has a level of its own.
        level = (
            log_snr.mean(tuple(range(-self.schedule.event_dim, 0)))
            if self.schedule.event_dim
            else log_snr
        )
        output = self._call_network(state, level.expand(batch_shape)).to(x_t.dtype)
        variance = None
        if self.variance.num_outputs:
            output, variance = output[..., :-1], output[..., -1]
            output = output.squeeze(-1) if self.prediction.num_outputs == 1 else output
        return Denoised(*self.prediction.estimate(output, state, signal, noise), variance)

    def _call_network(self, state: Tensor, log_snr: Tensor) -> Tensor:
        """The network's output, with batch and event dimensions as the state has them."""
        dtype = network_dtype(self.network)
        flat = state.reshape(-1, *self.event_shape).to(dtype)
        output = self.network(flat, log_snr.reshape(-1).to(dtype))
        count = self.prediction.num_outputs + self.variance.num_outputs
        per_entry = (count,) if count > 1 else ()
        expected = (len(flat), *self.event_shape, *per_entry)
        if output.shape != expected:
            raise ValueError(
                f"argument 'network': got an output of shape {tuple(output.shape)}; expected "
                f"{expected}, {count} number(s) for each entry of the states it was given, as "
                f"{self.prediction} and {self.variance} need. Keep the batch axis in front; MLP takes "
                f"num_outputs={count}."
            )
        if not holds(output.isfinite()):
            raise ValueError(
                "argument 'network': got an output with NaN or infinite values; expected finite "
                "numbers. Lower the learning rate or clip gradients, and check the data's scale."
            )
        return output.reshape(state.shape + per_entry)

    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, denoised: Denoised
    ) -> dist.TorchDistribution:
        step = chain_step(t, self.schedule)
        mean = posterior_mean(x_t, denoised.x_0_hat, step, missing_dim=self.missing_dim)
        step = step.padded(self.missing_dim)
        variance = self.variance(step, denoised.variance)
        if not holds(variance > 0):
            raise ValueError(
                f"argument 'variance': got a smallest value of {variance.min().item():g} from "
                f"{self.variance}; expected positive ones at every timestep. At t = 1, where β̃ is zero, "
                "PosteriorVariance takes β_1."
            )
        scale = variance.sqrt().to(x_t.dtype)
        return gaussian(mean, scale, self.event_dim)

    def embed(self, x_0: Tensor) -> Tensor:
        return self.prediction.embed(x_0)

    def decode(self, x_1: Tensor, denoised: Denoised) -> dist.TorchDistribution:
        if denoised.logits is None:
            return super().decode(x_1, denoised)
        return dist.Categorical(logits=denoised.logits).to_event(self.event_dim)

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
        if not mean.isfinite().all():
            raise ValueError(
                f"argument 'mean': got {int((~mean.isfinite()).sum())} NaN or infinite values; expected "
                "finite numbers. Check what the mean was estimated from."
            )
        std = _check_std("std", std, mean)
        super().__init__(schedule, mean.shape)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", std**2)
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
            ValueError: A covariance of another shape, or one that is not positive definite; a schedule by
                dimension, whose noise has other axes than the data.
        """
        if schedule.event_dim:
            raise ValueError(
                f"argument 'schedule': got a curve for each of {schedule.event_shape.numel()} entries; "
                "expected a single curve, because a rotation of the data mixes entries. Rotate the data to "
                "their principal axes, and use GaussianDenoiser(mean, std, schedule) there."
            )
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

    def denoise(self, x_t: Tensor, log_snr: Tensor) -> Denoised:
        self._batch_shape(x_t)
        signal, noise = (
            pad(s, self.missing_dim, torch.float64) for s in self.schedule.scales(log_snr)
        )
        gain, _ = _wiener(self.variance.double(), signal, noise)
        error = x_t - signal.to(x_t.dtype) * self.mean
        return Denoised(self.mean + self._scale_axes(gain.to(x_t.dtype), error))

    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, denoised: Denoised
    ) -> dist.TorchDistribution:
        step = chain_step(t, self.schedule)
        mean = posterior_mean(x_t, denoised.x_0_hat, step, missing_dim=self.missing_dim)
        step = step.padded(self.missing_dim)
        _, x_0_variance = _wiener(self.variance.double(), step.signal, step.noise)
        return self._gaussian(mean, exact_variance(step, x_0_variance).to(x_t.dtype))

    def _gaussian(self, mean: Tensor, variance: Tensor) -> dist.TorchDistribution:
        """A Gaussian with the given variances along the data's principal axes."""
        if self.rotation is None:
            return gaussian(mean, variance.sqrt(), self.event_dim)
        factor = self.rotation * variance.sqrt().unsqueeze(-2)
        return dist.MultivariateNormal(mean, factor @ factor.mT)

    def _scale_axes(self, gain: Tensor, x: Tensor) -> Tensor:
        if self.rotation is None:
            return gain * x
        return (gain * (x @ self.rotation)) @ self.rotation.mT


class GaussianMixtureDenoiser(Denoiser):
    r"""The exact reverse chain of a mixture, :math:`x_0 \sim \sum_k w_k N(m_k, \operatorname{diag}(s_k^2))`.

    A state belongs to component :math:`k` with probability :math:`r_k(x_t) \propto w_k\,
    N(x_t; a_t m_k, a_t^2 s_k^2 + \sigma_t^2)`, given which everything is Gaussian:

    .. math::
        \hat x_0 = \sum_k r_k\, \hat x_{0,k}, \qquad
        p(x_{t-1} \mid x_t) = \sum_k r_k\, N\big(\tilde\mu_t(x_t, \hat x_{0,k}), \Sigma_{t,k}\big),

    with :math:`\hat x_{0,k}` and :math:`\Sigma_{t,k}` of :class:`GaussianDenoiser`. The reverse kernel is
    that mixture, so that on multimodal data, too, every path's bound is :math:`\log p(x_0)`.

    Args:
        weights: Weights :math:`w_k`, shape ``(K,)``; they are normalised.
        means: Means :math:`m_k`, shape ``(K,) + event_shape``.
        stds: Standard deviations :math:`s_k > 0`, broadcastable to ``means``.
        schedule: Noise schedule of the chain.

    Raises:
        ValueError: Weights or standard deviations that are not positive, or shapes that do not fit.

    Example:
        >>> means = torch.tensor([[-1.0], [1.0]])
        >>> denoiser = GaussianMixtureDenoiser([0.5, 0.5], means, 0.1, LogSNRSchedule(10))
        >>> denoiser.x_0_hat(torch.tensor([0.3]), torch.tensor(6.0))
        tensor([0.4393])
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(
        self,
        weights: Tensor | list[float],
        means: Tensor,
        stds: Tensor | float,
        schedule: NoiseSchedule,
    ) -> None:
        means = torch.as_tensor(means).clone()
        means = means if means.is_floating_point() else means.to(torch.get_default_dtype())
        weights, stds = (
            torch.as_tensor(x, dtype=means.dtype, device=means.device) for x in (weights, stds)
        )
        fit = means.dim() > 0 and weights.shape == means.shape[:1] and len(means) > 0
        proper = ((weights > 0) & weights.isfinite()).all() and means.isfinite().all()
        if not fit or not proper:
            raise ValueError(
                f"arguments 'weights' and 'means': got shapes {tuple(weights.shape)} and "
                f"{tuple(means.shape)}; expected K positive weights and finite means of shape (K,) + "
                "event_shape. Leave out components of weight zero."
            )
        if stds.shape == weights.shape and means.dim() > 1:
            raise ValueError(
                f"argument 'stds': got shape {tuple(stds.shape)}, one for each component or for each entry; "
                f"expected a shape that says which, to broadcast to {tuple(means.shape)}. Give one for each "
                "component a last axis (stds[:, None]), or expand to the means' shape."
            )
        super().__init__(schedule, means.shape[1:])
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("variances", _check_std("stds", stds, means) ** 2)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the means."""
        return self.means.dtype

    @property
    def data_distribution(self) -> dist.TorchDistribution:
        """The law of the data for which the denoiser is exact, event shape ``event_shape``."""
        return self._mixture(self.log_weights, self.means, self.variances)

    def denoise(self, x_t: Tensor, log_snr: Tensor) -> Denoised:
        self._batch_shape(x_t)
        log_r, x_0_hats = self._components(x_t, *self.schedule.scales(log_snr))
        r = pad(log_r.exp(), self.event_dim, x_t.dtype)
        return Denoised((r * x_0_hats).sum(-self.event_dim - 1))

    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, denoised: Denoised
    ) -> dist.TorchDistribution:
        step = chain_step(t, self.schedule)
        log_r, x_0_hats = self._components(x_t, step.signal, step.noise)
        step = ChainStep(*(self._for_components(c) for c in step))
        means = posterior_mean(
            x_t.unsqueeze(-self.event_dim - 1), x_0_hats, step, missing_dim=self.missing_dim
        )
        step = step.padded(self.missing_dim)
        _, x_0_variances = _wiener(self.variances.double(), step.signal, step.noise)
        return self._mixture(log_r, means, exact_variance(step, x_0_variances).to(x_t.dtype))

    def _components(self, x_t: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log r_k`, ``batch_shape + (K,)``, and :math:`\hat x_{0,k}`, with the event behind."""
        signal, noise = (
            pad(self._for_components(c), self.missing_dim, c.dtype) for c in (signal, noise)
        )
        variances = self.variances.double()
        gains, _ = _wiener(variances, signal, noise)
        errors = x_t.unsqueeze(-self.event_dim - 1) - signal.to(x_t.dtype) * self.means
        spread = (signal**2 * variances + noise**2).sqrt().to(x_t.dtype)
        component = gaussian(torch.zeros_like(spread), spread, self.event_dim)
        log_r = (self.log_weights + component.log_prob(errors)).log_softmax(-1)
        return log_r, self.means + gains.to(x_t.dtype) * errors

    def _for_components(self, coefficient: Tensor) -> Tensor:
        """A coefficient with the components' axis, in front of the event."""
        return coefficient.unsqueeze(-1 - self.schedule.event_dim)

    def _mixture(self, logits: Tensor, means: Tensor, variances: Tensor) -> dist.TorchDistribution:
        components = gaussian(means, variances.sqrt(), self.event_dim)
        logits = logits.expand(components.batch_shape)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


def _wiener(variance: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""For :math:`x_0 \sim N(m, v)`: the gain of :math:`x_t - a m` in :math:`\hat x_0`, and
    :math:`\operatorname{Var}[x_0 \mid x_t]`."""
    total = signal**2 * variance + noise**2
    return signal * variance / total, variance * noise**2 / total


def _check_std(argument: str, std: Tensor, mean: Tensor) -> Tensor:
    """Standard deviations expanded to the mean's shape, if they are positive and fit."""
    try:
        expanded = std.expand(mean.shape)
    except RuntimeError:
        expanded = None
    if expanded is None or not (std > 0).all() or not std.isfinite().all():
        raise ValueError(
            f"argument {argument!r}: got shape {tuple(std.shape)} with a smallest value of "
            f"{std.min().item():g}; expected positive standard deviations that broadcast to the "
            f"means' shape {tuple(mean.shape)}. A constant entry has no density: drop it."
        )
    return expanded
