r"""What a network predicts, and how its output becomes :math:`\hat x_0`.

A state is :math:`x_t = a x_0 + \sigma \epsilon` with ``signal`` :math:`a` and ``noise``
:math:`\sigma`; one of :math:`x_0` and :math:`\epsilon` gives the other when :math:`x_t` is known:

.. math::
    \hat x_0 = \frac{x_t - \sigma \hat\epsilon}{a}, \qquad
    \hat\epsilon = \frac{x_t - a \hat x_0}{\sigma}.

Every parameterization converts both ways (``x_0_hat`` and its inverse ``output``); the arguments
have shape ``batch_shape + event_shape`` or broadcast to it.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), eqs. 115 and 130.
    https://arxiv.org/abs/2208.11970
"""

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["DataPrediction", "NoisePrediction", "Parameterization"]


class Parameterization(ABC):
    """The meaning of a network's output."""

    @abstractmethod
    def x_0_hat(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        r"""The network's output as :math:`\hat x_0`."""

    @abstractmethod
    def output(self, x_0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        r"""The output that would mean ``x_0``: the target of a regression, inverse of ``x_0_hat``."""

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
