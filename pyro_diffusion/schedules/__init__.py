r"""Noise schedules: the log signal-to-noise ratio as a curve, and what follows from it.

A schedule is a strictly decreasing curve :math:`\lambda(u)`, :math:`u \in [0, 1]`, on a grid of
:math:`T` timesteps with :math:`\lambda_1 = \lambda(0)` and :math:`\lambda_T = \lambda(1)`. A network
therefore sees the same range of noise on every grid, and the chain has a limit for
:math:`T \to \infty`. A chain of one step has :math:`\lambda_1 = \lambda(1)`, because its only state must
be close to the standard normal. With

.. math::
    \bar\alpha_t = \operatorname{sigmoid}(\lambda_t), \qquad
    \alpha_t = \bar\alpha_t / \bar\alpha_{t-1}, \qquad
    \mathrm{SNR}(t) = e^{\lambda_t} = \bar\alpha_t / (1 - \bar\alpha_t),

the state at :math:`t` is :math:`x_t = a_t x_0 + \sigma_t \epsilon`, where ``signal`` is :math:`a_t =
\sqrt{\bar\alpha_t}` and ``noise`` is :math:`\sigma_t = \sqrt{1 - \bar\alpha_t}`. The datum itself is
:math:`t = 0`, with :math:`\lambda_0 = \infty` and :math:`\bar\alpha_0 = 1`.

:class:`VarianceExploding` keeps the curve and changes the scale to :math:`a_t = 1`. Its
:math:`\alpha_t` and :math:`\beta_t` are those of the variance-preserving chain with the same curve.

Every coefficient is computed in float64, whatever dtype the model has, because :math:`1 - \alpha_t` is a
difference of nearly equal numbers. The kernels cast the finished coefficients.

References:
    Variational Diffusion Models (Kingma et al., 2021), section 3.2. https://arxiv.org/abs/2107.00630
"""

from pyro_diffusion.schedules.base import NoiseSchedule
from pyro_diffusion.schedules.curves import (
    AlphaSchedule,
    CosineSchedule,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
)
from pyro_diffusion.schedules.monotone import MonotoneSchedule
from pyro_diffusion.schedules.views import StridedSchedule, VarianceExploding

__all__ = [
    "NoiseSchedule",
    "AlphaSchedule",
    "LinearSchedule",
    "CosineSchedule",
    "LogSNRSchedule",
    "LinearDecaySchedule",
    "MonotoneSchedule",
    "VarianceExploding",
    "StridedSchedule",
]
