r"""Exact denoisers: the reverse chains of Gaussian data and of Gaussian mixtures, in closed form.

Both have a conditional form: :math:`p(x_0 \mid c) = N(W c + b, \operatorname{diag} s^2)`, and the component
:math:`k` of a mixture as the context.

Under an exact denoiser :math:`\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)` is :math:`\log p(x_0)` on every
path, up to the part of the datum that is left at the end of the chain. These denoisers are the package's
oracles.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.checks import (
    as_numbers,
    check_argument,
    check_finite,
    check_values,
    described,
    require,
)
from pyro_diffusion.denoisers.base import Denoiser
from pyro_diffusion.denoisers.variances import PosteriorVariance, exact_variance
from pyro_diffusion.distributions import gaussian
from pyro_diffusion.processes import ChainStep, Denoised, chain_step, pad, posterior_mean
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class GaussianDenoiser(Denoiser):
    r"""The exact reverse chain of Gaussian data :math:`x_0 \sim N(m, \operatorname{diag}(s^2))`.

    .. math::
        \hat x_0 = m + \frac{a_t s^2}{a_t^2 s^2 + \sigma_t^2} (x_t - a_t m), \qquad
        \operatorname{Var}[x_0 \mid x_t] = \frac{s^2 \sigma_t^2}{a_t^2 s^2 + \sigma_t^2},

    so that :math:`\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)` is :math:`\log p(x_0)` on every path, up to
    :math:`\sqrt{\bar\alpha_T}` times the mean. For a full covariance use :meth:`from_covariance`, for a mean
    that depends on a context :meth:`from_regression`.

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

    is_exact = True
    mean: Tensor
    variance: Tensor
    rotation: Tensor | None
    weight: Tensor | None

    def __init__(self, mean: Tensor, std: Tensor, schedule: NoiseSchedule) -> None:
        mean = as_numbers("mean", mean).clone()  # the buffer is not the caller's tensor
        mean = mean if mean.is_floating_point() else mean.to(torch.get_default_dtype())
        std = as_numbers("std", std, like=mean)
        check_finite("argument 'mean'", mean, "Check what the mean was estimated from.")
        std = _check_std("std", std, mean)
        super().__init__(schedule, mean.shape)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", std**2)
        self.register_buffer("rotation", None)
        self.register_buffer("weight", None)

    @classmethod
    def from_regression(
        cls, weight: Tensor, bias: Tensor, std: Tensor, schedule: NoiseSchedule
    ) -> "GaussianDenoiser":
        r"""Exact for conditional data, :math:`x_0 \mid c \sim N(W c + b, \operatorname{diag}(s^2))`.

        Args:
            weight: :math:`W`, shape ``event_shape + (P,)``; a context has the shape ``(N, P)``.
            bias: :math:`b`, shape ``event_shape``.
            std: Standard deviations :math:`s > 0`, broadcastable to ``event_shape``.
            schedule: Noise schedule of the chain.

        Raises:
            ValueError: A weight of another shape. From a call: a context of another shape, or none.

        Example:
            >>> denoiser = GaussianDenoiser.from_regression(
            ...     torch.ones(2, 1), torch.zeros(2), torch.ones(2), LogSNRSchedule(5)
            ... )
            >>> denoiser.conditional_distribution(torch.tensor([[3.0]])).mean
            tensor([[3., 3.]])
        """
        denoiser = cls(bias, std, schedule)
        weight = as_numbers("weight", weight, like=denoiser.mean)
        check_finite("argument 'weight'", weight, "Check what the weight was estimated from.")
        require(
            weight.dim() > 0 and weight.shape[:-1] == denoiser.event_shape,
            "argument 'weight'",
            f"shape {tuple(weight.shape)} with a bias of shape {tuple(denoiser.event_shape)}",
            "the bias's shape and one more axis, that of the context",
            "Pass weight[..., None] for a context of one number.",
        )
        denoiser.register_buffer("weight", weight.clone())
        return denoiser

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
            ValueError: A covariance of another shape, or one that is not positive definite; a schedule with a
                curve for each entry, whose noise has other axes than the data.
        """
        check_argument("schedule", schedule, NoiseSchedule, "LinearSchedule(1000)")
        require(
            not schedule.event_dim,
            "argument 'schedule'",
            f"a curve for each of {schedule.event_shape.numel()} entries",
            "a single curve, because a rotation of the data mixes entries",
            "Rotate the data to their principal axes, and use GaussianDenoiser(mean, std, schedule) there.",
        )
        mean = as_numbers("mean", mean)
        mean = mean if mean.is_floating_point() else mean.to(torch.get_default_dtype())
        covariance = as_numbers("covariance", covariance, like=mean)
        require(
            mean.dim() == 1 and covariance.shape == (len(mean), len(mean)),
            "argument 'covariance'",
            f"shape {tuple(covariance.shape)} with a mean of shape {tuple(mean.shape)}",
            "(D, D) and (D,)",
            "Flatten the event to a vector.",
        )
        variance, rotation = torch.linalg.eigh(covariance)
        require(
            torch.allclose(covariance, covariance.mT) and bool((variance > 0).all()),
            "argument 'covariance'",
            f"a smallest eigenvalue of {variance.min().item():g} (or an asymmetric matrix)",
            "a symmetric positive definite matrix",
            "Add a small multiple of the identity if it is singular.",
        )
        denoiser = cls(mean, variance.sqrt(), schedule)
        denoiser.register_buffer("rotation", rotation)
        return denoiser

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the mean."""
        return self.mean.dtype

    @property
    def is_conditional(self) -> bool:
        """Whether the mean depends on a context."""
        return self.weight is not None

    @property
    def data_distribution(self) -> TorchDistribution:
        """The law of the data for which the denoiser is exact, event shape ``event_shape``."""
        return self._gaussian(self._mean(None), self.variance)

    def conditional_distribution(self, context: Tensor) -> TorchDistribution:
        r""":math:`p(x_0 \mid c)` for a context ``(N, P)``, batch shape ``(N,)``."""
        return self._gaussian(self._mean(context), self.variance)

    def _mean(self, context: Any, null: Tensor | None = None) -> Tensor:
        r""":math:`W c + b`."""
        if self.weight is None and context is None:
            return self.mean
        size = None if self.weight is None else self.weight.shape[-1]
        fit = isinstance(context, Tensor) and context.dim() == 2 and context.shape[-1] == size
        require(
            fit and null is None,
            "argument 'context'",
            "dropped rows" if fit else "none" if context is None else described(context),
            "none" if size is None else f"a tensor of shape (N, {size})",
            "A Gaussian regression is conditional at every row; a GaussianMixtureDenoiser is with and "
            "without a context.",
        )
        assert self.weight is not None
        return self.mean + torch.tensordot(context.to(self.weight), self.weight, ([-1], [-1]))

    def denoise(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Denoised:
        self.batch_shape(x_t)
        mean = self._mean(context, null)
        signal, noise = (
            pad(s, self.missing_dim, torch.float64) for s in self.schedule.scales(log_snr)
        )
        gain, _ = _wiener(self.variance.double(), signal, noise)
        error = x_t - signal.to(x_t.dtype) * mean
        return Denoised(mean + self._scale_axes(gain.to(x_t.dtype), error))

    def reverse_kernel(self, x_t: Tensor, t: int | Tensor, denoised: Denoised) -> TorchDistribution:
        step = chain_step(t, self.schedule)
        mean = posterior_mean(x_t, denoised.x_0_hat, step, missing_dim=self.missing_dim)
        step = step.padded(self.missing_dim)
        _, x_0_variance = _wiener(self.variance.double(), step.signal, step.noise)
        return self._gaussian(mean, exact_variance(step, x_0_variance).to(x_t.dtype))

    def _gaussian(self, mean: Tensor, variance: Tensor) -> TorchDistribution:
        """A Gaussian with the given variances along the data's principal axes."""
        if self.rotation is None:
            return gaussian(mean, variance.sqrt(), self.event_dim)
        factor = self.rotation * variance.sqrt().unsqueeze(-2)
        with torch.autocast(mean.device.type, enabled=False):
            return dist.MultivariateNormal(mean, factor @ factor.mT)

    def _scale_axes(self, gain: Tensor, x: Tensor) -> Tensor:
        if self.rotation is None:
            return gain * x
        with torch.autocast(x.device.type, enabled=False):  # it computes products in half precision
            return (gain * (x @ self.rotation)) @ self.rotation.mT


class GaussianMixtureDenoiser(Denoiser):
    r"""The exact reverse chain of a mixture, :math:`x_0 \sim \sum_k w_k N(m_k, \operatorname{diag}(s_k^2))`.

    A state belongs to component :math:`k` with probability :math:`r_k(x_t) \propto w_k\,
    N(x_t; a_t m_k, a_t^2 s_k^2 + \sigma_t^2)`. Given its component everything is Gaussian:

    .. math::
        \hat x_0 = \sum_k r_k\, \hat x_{0,k}, \qquad
        p(x_{t-1} \mid x_t) = \sum_k r_k\, N\big(\tilde\mu_t(x_t, \hat x_{0,k}), \Sigma_{t,k}\big),

    with :math:`\hat x_{0,k}` and :math:`\Sigma_{t,k}` as in :class:`GaussianDenoiser`. The reverse kernel is
    this mixture. The bound of every path is therefore :math:`\log p(x_0)` for multimodal data as well.

    The number of the component may be given as a context :math:`c`, whole numbers ``(N,)``. Then :math:`r_k`
    is one for :math:`k = c`, the data are :math:`N(m_c, \operatorname{diag}(s_c^2))`, and the bound is
    :math:`\log p(x_0 \mid c)`. In rows whose context was dropped, as without a context, it is
    :math:`\log p(x_0)`. This makes the denoiser the oracle of conditional models and of guidance.

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

    is_exact = True
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
        means = as_numbers("means", means).clone()
        means = means if means.is_floating_point() else means.to(torch.get_default_dtype())
        weights, stds = as_numbers("weights", weights, means), as_numbers("stds", stds, means)
        fit = means.dim() > 0 and weights.shape == means.shape[:1] and len(means) > 0
        proper = ((weights > 0) & weights.isfinite()).all() and means.isfinite().all()
        require(
            fit and bool(proper),
            "arguments 'weights' and 'means'",
            f"shapes {tuple(weights.shape)} and {tuple(means.shape)}",
            "K positive weights and finite means of shape (K,) + event_shape",
            "Leave out components of weight zero.",
        )
        require(
            stds.shape != weights.shape or means.dim() == 1,
            "argument 'stds'",
            f"shape {tuple(stds.shape)}, one for each component or for each entry",
            f"a shape that broadcasts to {tuple(means.shape)} in only one way",
            "For one per component, pass stds[:, None]. For one per entry, expand to the means' shape.",
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
    def data_distribution(self) -> TorchDistribution:
        """The law of the data for which the denoiser is exact, event shape ``event_shape``."""
        return self._mixture(self.log_weights, self.means, self.variances)

    def conditional_distribution(self, context: Tensor) -> TorchDistribution:
        """The law of a component for each number in ``context``, whole numbers ``(N,)``."""
        k = self._labels(context)
        return gaussian(self.means[k], self.variances[k].sqrt(), self.event_dim)

    def denoise(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Denoised:
        self.batch_shape(x_t)
        log_r, x_0_hats = self._components(x_t, *self.schedule.scales(log_snr))
        if context is not None:
            k = torch.arange(len(self.means), device=x_t.device)
            possible = self._labels(context)[..., None] == k
            possible = possible if null is None else possible | null[..., None]
            log_r = log_r.masked_fill(~possible, -math.inf).log_softmax(-1)
        r = pad(log_r.exp(), self.event_dim, x_t.dtype)
        return Denoised((r * x_0_hats).sum(-self.event_dim - 1), log_r)

    def _labels(self, context: Any) -> Tensor:
        fit = isinstance(context, Tensor) and not context.is_floating_point() and context.dim() < 2
        expected = f"the number of a component, 0 … {len(self.means) - 1}, for each datum"
        remedy = "Pass labels.long(), counted from 0."
        require(fit, "argument 'context'", described(context), expected, remedy)
        context = context.long()  # bits and bytes would select rows, and not look them up
        valid = (context >= 0) & (context < len(self.means))
        return check_values("argument 'context'", context, valid, expected, remedy)

    def reverse_kernel(self, x_t: Tensor, t: int | Tensor, denoised: Denoised) -> TorchDistribution:
        if denoised.logits is None:
            raise ValueError(
                "argument 'denoised': got an estimate alone; expected the log-probabilities of the "
                "components beside it, because the kernel is a mixture. Use a DDIMSampler or an ODESampler, "
                "which take estimates."
            )
        step, log_r = chain_step(t, self.schedule), denoised.logits
        _, x_0_hats = self._components(x_t, step.signal, step.noise)
        step = ChainStep(*(self._for_components(c) for c in step))
        means = posterior_mean(
            x_t.unsqueeze(-self.event_dim - 1), x_0_hats, step, missing_dim=self.missing_dim
        )
        step = step.padded(self.missing_dim)
        _, x_0_variances = _wiener(self.variances.double(), step.signal, step.noise)
        return self._mixture(log_r, means, exact_variance(step, x_0_variances).to(x_t.dtype))

    def decode(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        if denoised.logits is None:  # a guided estimate, which has no kernel for each component
            process: Any = self.process
            return process.reverse(x_1, denoised, 1, PosteriorVariance())
        return super().decode(x_1, denoised)

    def _components(self, x_t: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log r_k`, ``batch_shape + (K,)``, and :math:`\hat x_{0,k}`, with the event at the end."""
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

    def _mixture(self, logits: Tensor, means: Tensor, variances: Tensor) -> TorchDistribution:
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
        least = f"{std.min().item():g}" if std.numel() else "none"
        raise ValueError(
            f"argument {argument!r}: got shape {tuple(std.shape)} with a smallest value of "
            f"{least}; expected positive standard deviations that broadcast to the "
            f"means' shape {tuple(mean.shape)}. A constant entry has no density: drop it."
        )
    return expanded
