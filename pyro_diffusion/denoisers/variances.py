r"""Variances of the reverse kernels.

The exact one follows from the variance of the datum given the state,

.. math::
    \operatorname{Var}[x_{t-1} \mid x_t] = \tilde\beta_t
        + \big(a_{t-1} (1 - e^{\lambda_t - \lambda_{t-1}})\big)^2 \operatorname{Var}[x_0 \mid x_t] .

:class:`PosteriorVariance` is exact for data that are known given :math:`x_t`, and :class:`ForwardVariance`
for data that are white noise. :class:`LearnedVariance` is between the two. The choice changes the bound, even
for many steps: ``examples/gaussian_oracle.py`` prints by how much.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2.
    https://arxiv.org/abs/2006.11239
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import as_numbers, check_argument, check_count, check_data, require
from pyro_diffusion.denoisers.base import Denoiser
from pyro_diffusion.given import Given, chunks
from pyro_diffusion.processes import ChainStep, posterior_variance
from pyro_diffusion.reading import reading


class Embedding(Protocol):
    """The part of a model that :class:`OptimalVariance` needs: its denoiser and its embedding of data."""

    denoiser: Denoiser

    def embed(self, x_0: Tensor) -> Tensor:
        """Data as states of the chain."""


def exact_variance(step: ChainStep, x_0_variance: Tensor) -> Tensor:
    r""":math:`\operatorname{Var}[x_{t-1} \mid x_t]` from :math:`\operatorname{Var}[x_0 \mid x_t]`."""
    return posterior_variance(step) + (step.signal_prev * step.share) ** 2 * x_0_variance


class ReverseVariance(ABC):
    """Variance of a reverse kernel, from the timestep and, if it is learned, a network's output."""

    num_outputs: int = 0  #: numbers that the network returns for the variance of each entry

    @abstractmethod
    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        """Variance of :math:`x_{t-1}` given :math:`x_t`.

        Args:
            step: Coefficients of the step, float64, broadcastable to ``output``.
            output: The network's numbers, ``batch_shape + event_shape``; ``None`` if ``num_outputs`` is 0.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PosteriorVariance(ReverseVariance):
    r""":math:`\tilde\beta_t`, the forward posterior's ("fixed small"); :math:`\beta_1` at ``t = 1``.

    :math:`\tilde\beta_1` is zero, and :math:`p(x_0 \mid x_1)` would have no density. Published code takes
    :math:`\beta_1` or :math:`\tilde\beta_2` there. With this variance a term of the bound is a weighted
    squared error (E12, :func:`~pyro_diffusion.bounds.snr_weight`).
    """

    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        is_first = step.noise_prev == 0
        return torch.where(is_first, ForwardVariance()(step), posterior_variance(step))


class ForwardVariance(ReverseVariance):
    r""":math:`\beta_t = 1 - \alpha_t`, the forward transition's ("fixed large").

    It is the exact variance for data of unit variance, and is computed by this formula,

    .. math::
        \tilde\beta_t + \big(a_{t-1} (1 - e^{\lambda_t - \lambda_{t-1}})\big)^2
        \frac{\sigma_t^2}{a_t^2 + \sigma_t^2},

    which also holds for a variance-exploding chain. There the variance of the transition is larger, by
    :math:`1 / \alpha_t` in units of :math:`x_{t-1}`.
    """

    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        return exact_variance(step, step.noise**2 / (step.signal**2 + step.noise**2))


class LearnedVariance(ReverseVariance):
    r"""Between :math:`\tilde\beta_t` and :math:`\beta_t` in the logarithm, for each dimension.

    .. math::
        \log \Sigma_t = \tfrac{1 + v}{2} \log \beta_t + \tfrac{1 - v}{2} \log \tilde\beta_t,

    where :math:`v` is a second output of the network, the last on its last axis: ``MLP((64,),
    num_outputs=2)``. It may leave [-1, 1], because data of more than unit variance have a larger exact
    variance. At ``t = 1``, where :math:`\tilde\beta_1 = 0`, the lower end is :math:`\beta_1^2`.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), eq. 15.
        https://arxiv.org/abs/2102.09672
    """

    num_outputs = 1

    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        assert output is not None  # NeuralDenoiser passes what the network returned
        upper = ForwardVariance()(step)
        lower = torch.where(step.noise_prev == 0, upper.square(), posterior_variance(step))
        weight = (1 + output) / 2
        log_upper, log_lower = (end.log().to(output.dtype) for end in (upper, lower))
        log_variance = torch.lerp(log_lower, log_upper, weight)
        # No useful variance is outside these limits, and float32 can hold the squares of the limits.
        return log_variance.clamp(math.log(1e-20), math.log(1e20)).exp()


class OptimalVariance(nn.Module, ReverseVariance):
    r"""The variance with the largest bound for given means, estimated from data; one for all entries.

    .. math::
        \Sigma_t = \tilde\beta_t + \big(a_{t-1} (1 - e^{\lambda_t - \lambda_{t-1}})\big)^2\,
            m(\lambda_t), \qquad
        m(\lambda) = \tfrac1D\, E\, \lVert x_0 - \hat x_0(x_\lambda) \rVert^2,

    which minimises the mean KL of a step. :meth:`from_data` estimates the squared errors :math:`m` of a
    trained network. Estimate them again after more training. They are interpolated between log-SNRs, so that
    they can be used on any grid::

        variance = OptimalVariance.from_data(diffusion, train)
        denoiser = NeuralDenoiser(network, schedule, (64,), prediction=…, variance=variance)

    Args:
        log_snr: Log-SNRs, increasing, shape ``(G,)``.
        mean_square: :math:`m` there, positive, ``(G,)``.

    Raises:
        ValueError: Log-SNRs that do not increase, or squared errors that are not positive, or not as many.

    References:
        Analytic-DPM (Bao et al., 2022), theorem 1. https://arxiv.org/abs/2201.06503
    """

    log_snr: Tensor
    log_mean_square: Tensor

    def __init__(self, log_snr: Tensor, mean_square: Tensor) -> None:
        super().__init__()
        log_snr = as_numbers("log_snr", log_snr, dtype=torch.float64)
        mean_square = as_numbers("mean_square", mean_square, dtype=torch.float64)
        increasing = log_snr.dim() == 1 and len(log_snr) > 1 and (log_snr.diff() > 0).all()
        fit = mean_square.shape == log_snr.shape and (mean_square > 0).all()
        require(
            bool(increasing and fit),
            "arguments 'log_snr' and 'mean_square'",
            f"shapes {tuple(log_snr.shape)} and {tuple(mean_square.shape)}",
            "two or more increasing log-SNRs, and as many positive squared errors",
            "Take OptimalVariance.from_data(diffusion, x_0).",
        )
        self.register_buffer("log_snr", log_snr)
        self.register_buffer("log_mean_square", mean_square.log())

    @classmethod
    def from_data(
        cls,
        diffusion: Embedding,
        x_0: Tensor,
        *,
        num_levels: int = 64,
        batch_size: int = 2048,
        **given: Any,
    ) -> "OptimalVariance":
        """Squared errors of a model's estimates, over data and noise, at evenly spaced log-SNRs.

        Args:
            diffusion: The trained model.
            x_0: Data that it was trained on, shape ``(N,)`` + the shape of one datum.
            num_levels: Number of log-SNRs ``G``. The network computes ``G`` times ``N`` rows.
            batch_size: Number of rows that the network computes at a time.
            given: ``context=`` of conditional data, a row for each datum, and ``null=``, true where it was
                dropped. The errors are then those of the estimates given the context.

        Raises:
            ValueError: An object that is not a model of real numbers, a schedule with a curve for each entry
                or with one step, a mask, or data or a context for which the programs raise an error.
        """
        num_levels = check_count("num_levels", num_levels, 2, "64 are enough.", "of the log-SNR")
        batch_size = check_count("batch_size", batch_size, 1, "Leave it out.")
        denoiser = getattr(diffusion, "denoiser", None)
        denoiser = check_argument(
            "diffusion", denoiser, Denoiser, "the DiffusionModel itself, trained"
        )
        denoiser.process.check_has_score("diffusion", "Pass the model itself, trained.")
        schedule = denoiser.schedule
        require(
            not schedule.event_dim and schedule.num_timesteps > 1,
            "argument 'diffusion'",
            f"{schedule}",
            "a single curve and two timesteps or more, because the squared errors are a function of one "
            "log-SNR",
            "Use LearnedVariance().",
        )
        what = _without_mask(Given.of(**given))
        ends = schedule.log_snr(torch.tensor([schedule.num_timesteps, 1], device=schedule.device))
        levels = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, num_levels).to(ends))
        with reading(diffusion, data=(x_0, what)):  # type: ignore[arg-type]
            x_0, squares = diffusion.embed(check_data(x_0)), []
            what = what.with_rows(len(x_0))
            denoiser.check_given(what.of_kernels())
            for level in levels:
                total = 0.0
                for _, part, own in chunks(x_0, what, batch_size):
                    x_t = denoiser.process.noised(part, level).sample()
                    error = part - denoiser.x_0_hat(x_t, level, **own.of_kernels())
                    total += error.double().square().sum().item()
                squares.append(total / x_0.numel())
        return cls(levels, torch.tensor(squares).to(levels).clamp(min=1e-12))

    def forward(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        """Variance of :math:`x_{t-1}` given :math:`x_t`; see :class:`ReverseVariance`."""
        log_snr = 2 * (step.signal.log() - step.noise.log())
        index = torch.searchsorted(self.log_snr, log_snr.contiguous()).clamp(
            1, len(self.log_snr) - 1
        )
        left, right = self.log_snr[index - 1], self.log_snr[index]
        share = ((log_snr - left) / (right - left)).clamp(0, 1)
        log_square = torch.lerp(self.log_mean_square[index - 1], self.log_mean_square[index], share)
        return exact_variance(step, log_square.exp())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OptimalVariance":
        # As in a schedule, the numbers keep float64, and only the device changes.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.log_snr)} levels)"


def _without_mask(given: Given) -> Given:
    """What goes with data, if all entries are observed."""
    require(
        given.mask is None,
        "argument 'mask'",
        "one",
        "data without gaps, because one variance stands for all entries",
        "Pass the complete data, or use LearnedVariance().",
    )
    return given
