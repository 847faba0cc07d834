r"""Variances of the reverse kernels.

The exact one follows from what is not known of the datum,

.. math::
    \operatorname{Var}[x_{t-1} \mid x_t] = \tilde\beta_t
        + \big(a_{t-1} (1 - e^{\lambda_t - \lambda_{t-1}})\big)^2 \operatorname{Var}[x_0 \mid x_t] .

:class:`PosteriorVariance` is its end for data that are a point given :math:`x_t`,
:class:`ForwardVariance` the one for data that are white noise, and :class:`LearnedVariance` is between
them. The choice shows in the bound, also for many steps: ``examples/gaussian_oracle.py`` prints what
each costs.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2.
    https://arxiv.org/abs/2006.11239
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_diffusion.kernels import ChainStep, posterior_variance

__all__ = [
    "ForwardVariance",
    "LearnedVariance",
    "PosteriorVariance",
    "ReverseVariance",
    "exact_variance",
]


def exact_variance(step: ChainStep, x_0_variance: Tensor) -> Tensor:
    r""":math:`\operatorname{Var}[x_{t-1} \mid x_t]` from :math:`\operatorname{Var}[x_0 \mid x_t]`."""
    return posterior_variance(step) + (step.signal_prev * step.share) ** 2 * x_0_variance


class ReverseVariance(ABC):
    """Variance of a reverse kernel, from the timestep and, if it is learned, a network's output."""

    num_outputs: int = 0  #: numbers that the network returns for it, for each entry of a datum

    @abstractmethod
    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        """Variance of :math:`x_{t-1}` given :math:`x_t`.

        Args:
            step: Coefficients of the step, float64, broadcastable to ``output``.
            output: The network's numbers, ``batch_shape + event_shape``; ``None`` if it has none.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PosteriorVariance(ReverseVariance):
    r""":math:`\tilde\beta_t`, the forward posterior's ("fixed small"); :math:`\beta_1` at ``t = 1``.

    :math:`\tilde\beta_1` is zero, which leaves :math:`p(x_0 \mid x_1)` without a density; published
    code puts :math:`\beta_1` or :math:`\tilde\beta_2` there. With this variance a term of the bound
    is a weighted squared error (E12, :func:`~pyro_diffusion.bounds.snr_weight`).
    """

    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        is_first = step.noise_prev == 0
        return torch.where(is_first, ForwardVariance()(step), posterior_variance(step))


class ForwardVariance(ReverseVariance):
    r""":math:`\beta_t = 1 - \alpha_t`, the forward transition's ("fixed large").

    It is the exact variance for data of unit variance, and is computed as that,

    .. math::
        \tilde\beta_t + \big(a_{t-1} (1 - e^{\lambda_t - \lambda_{t-1}})\big)^2
        \frac{\sigma_t^2}{a_t^2 + \sigma_t^2},

    so that it means the same in a variance-exploding chain, whose transition's own variance is
    larger by :math:`1 / \alpha_t` in units of :math:`x_{t-1}`.
    """

    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        return exact_variance(step, step.noise**2 / (step.signal**2 + step.noise**2))


class LearnedVariance(ReverseVariance):
    r"""Between :math:`\tilde\beta_t` and :math:`\beta_t` in the logarithm, for each dimension.

    .. math::
        \log \Sigma_t = \tfrac{1 + v}{2} \log \beta_t + \tfrac{1 - v}{2} \log \tilde\beta_t,

    with :math:`v` a second output of the network, the last on its last axis: ``MLP((64,),
    num_outputs=2)``. It is not confined to [-1, 1], so that data broader than unit variance have
    their exact variance too. At ``t = 1``, where :math:`\tilde\beta_1 = 0`, the lower end is
    :math:`\beta_1^2`.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), eq. 15.
        https://arxiv.org/abs/2102.09672
    """

    num_outputs = 1

    def __call__(self, step: ChainStep, output: Tensor | None = None) -> Tensor:
        assert output is not None  # NeuralDenoiser asks the network for it
        upper = ForwardVariance()(step)
        lower = torch.where(step.noise_prev == 0, upper.square(), posterior_variance(step))
        weight = (1 + output) / 2
        log_upper, log_lower = (end.log().to(output.dtype) for end in (upper, lower))
        log_variance = torch.lerp(log_lower, log_upper, weight)
        # Beyond any variance of use, and within what float32 can square.
        return log_variance.clamp(math.log(1e-20), math.log(1e20)).exp()
