r"""What a network predicts, and how its output becomes :math:`\hat x_0`.

A state is :math:`x_t = a x_0 + \sigma \epsilon` with ``signal`` :math:`a` and ``noise``
:math:`\sigma`. If :math:`x_t` is known, one of :math:`x_0`, :math:`\epsilon`, the velocity :math:`v` and the
score :math:`s` gives the others:

.. math::
    \hat x_0 = \frac{x_t - \sigma \hat\epsilon}{a}
             = \frac{a x_t - \sigma \hat v}{a^2 + \sigma^2}
             = \frac{x_t + \sigma^2 \hat s}{a}, \qquad
    v = a \epsilon - \sigma x_0, \quad s = -\frac{\epsilon}{\sigma} .

Each class converts both ways, by ``x_0_hat`` and its inverse ``output``. The arguments have shape
``batch_shape + event_shape`` or broadcast to it. :class:`LevelPrediction` is for data on a known finite set
of values. Their exact posterior is a categorical distribution for each entry.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), eqs. 115, 130 and 133.
    https://arxiv.org/abs/2208.11970
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), section 4
    (velocity). https://arxiv.org/abs/2202.00512
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_diffusion.checks import check_num_levels
from pyro_diffusion.likelihoods import embed_levels


class Parameterization(ABC):
    """The meaning of a network's output."""

    num_outputs: int = 1  #: numbers that the network returns for each entry of a datum

    @abstractmethod
    def x_0_hat(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        r"""The network's output as :math:`\hat x_0`."""

    @abstractmethod
    def output(self, x_0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        r"""The output that means ``x_0``, the target of a regression. It is the inverse of ``x_0_hat``."""

    def estimate(
        self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        r""":math:`\hat x_0`, and logits over the values of each entry if the network predicts them."""
        return self.x_0_hat(output, x_t, signal, noise), None

    def embed(self, x_0: Tensor) -> Tensor:
        """Data as states of a chain without a likelihood: unchanged, unless a subclass converts them."""
        return x_0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class NoisePrediction(Parameterization):
    r"""The network predicts the noise: :math:`\hat x_0 = (x_t - \sigma \hat\epsilon) / a`."""

    def x_0_hat(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return (x_t - noise * output) / signal

    def output(self, x_0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return (x_t - signal * x_0) / noise


class DataPrediction(Parameterization):
    r"""The network predicts the datum: :math:`\hat x_0` is its output."""

    def x_0_hat(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return output

    def output(self, x_0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return x_0


class VelocityPrediction(Parameterization):
    r"""The network predicts :math:`v = a \epsilon - \sigma x_0`, which is bounded at both ends.

    :math:`\hat x_0 = (a x_t - \sigma \hat v) / (a^2 + \sigma^2)`.
    """

    def x_0_hat(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return (signal * x_t - noise * output) / (signal**2 + noise**2)

    def output(self, x_0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return (signal * x_t - (signal**2 + noise**2) * x_0) / noise


class ScorePrediction(Parameterization):
    r"""The network predicts the score of a state: :math:`\hat x_0 = (x_t + \sigma^2 \hat s) / a`."""

    def x_0_hat(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return (x_t + noise**2 * output) / signal

    def output(self, x_0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return (signal * x_0 - x_t) / noise**2


class LevelPrediction(Parameterization):
    r"""The network predicts logits over :math:`K` levels for each entry: bits, grey levels, categories.

    Level :math:`k` embeds at :math:`e_k = 2k/(K-1) - 1`. The logits :math:`\ell_k` are a prior of an entry
    given all others. The known law of :math:`x_t` turns them into a posterior,

    .. math::
        P(k \mid x_t) \propto e^{\ell_k}\, N(x_t; a e_k, \sigma^2), \qquad
        \hat x_0 = \sum_k P(k \mid x_t)\, e_k,

    so that a network whose output is zero is exact for independent uniform entries. The network returns one
    number for each level, on a last axis: ``MLP((64,), num_outputs=17)``. With ``likelihood=None`` this
    posterior is the model's :math:`p(x_0 \mid x_1)`, over levels :math:`0 … K-1`.

    Args:
        num_levels: Number of levels :math:`K \ge 2`.

    Raises:
        ValueError: Fewer than two levels, or data that are not whole numbers in ``0 … K − 1``.
    """

    def __init__(self, num_levels: int) -> None:
        self.num_outputs = check_num_levels(num_levels)

    @property
    def num_levels(self) -> int:
        """Number of levels :math:`K`."""
        return self.num_outputs

    def embed(self, x_0: Tensor) -> Tensor:
        """Levels as points of [-1, 1]."""
        return embed_levels(x_0, self.num_levels)

    def logits(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        r""":math:`\log P(k \mid x_t)` up to a constant, shape ``batch_shape + event_shape + (K,)``."""
        x_t, signal, noise = (x.unsqueeze(-1) for x in (x_t, signal, noise))
        return output - 0.5 * ((x_t - signal * self._levels(x_t)) / noise) ** 2

    def x_0_hat(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return self.mean(self.logits(output, x_t, signal, noise))

    def estimate(
        self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        r""":math:`\hat x_0`, and the logits of the posterior whose mean it is."""
        logits = self.logits(output, x_t, signal, noise)
        return self.mean(logits), logits

    def mean(self, logits: Tensor) -> Tensor:
        r""":math:`\sum_k P(k) e_k` for given logits."""
        # not as a matmul, which autocast would compute in half precision
        return (logits.softmax(-1) * self._levels(logits)).sum(-1)

    def output(self, x_0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        r"""Logits of 0 at ``x_0``'s level and :math:`-\infty` at the others."""
        nearest = (x_0.unsqueeze(-1) - self._levels(x_0)).abs().argmin(-1)
        return torch.nn.functional.one_hot(nearest, self.num_levels).to(x_0.dtype).log()

    def _levels(self, like: Tensor) -> Tensor:
        return torch.linspace(-1, 1, self.num_levels, dtype=like.dtype, device=like.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_levels={self.num_levels})"
