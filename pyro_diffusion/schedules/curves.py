r"""Curves that are given: by the α's of a chain, by their two ends, or by a formula.

Three kinds of curve are here. :class:`AlphaSchedule`, :class:`LinearSchedule` and :class:`CosineSchedule`
interpolate the log-SNR of given :math:`\alpha_1 … \alpha_N`,

.. math::
    \lambda_i = \log \bar\alpha_i - \log(1 - \bar\alpha_i), \qquad \bar\alpha_i = \prod_{s \le i} \alpha_s .

:class:`LogSNRSchedule` is a straight line between two log-SNRs, which may be learned, and
:class:`LinearDecaySchedule` a formula for :math:`\bar\alpha(u)`.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import as_numbers, check_between, require
from pyro_diffusion.schedules.base import NoiseSchedule, brief, check_decreasing

_REFERENCE_STEPS = 1000  # the grid on which the published β's are stated


class InterpolatedSchedule(NoiseSchedule):
    """A curve through equally spaced values of the log-SNR, linear between them.

    Args:
        alpha: The α's that the values follow from, each in (0, 1), shape ``(N,)``.
        num_timesteps: Number of steps :math:`T`.
    """

    log_snr_curve: Tensor  #: the values, float64, shape ``(N,)``

    def __init__(self, alpha: Tensor, num_timesteps: int) -> None:
        super().__init__(num_timesteps)
        log_alpha_bar = alpha.double().log().cumsum(0)
        curve = log_alpha_bar - (-torch.expm1(log_alpha_bar)).log()
        check_decreasing(curve, "alpha")
        self.register_buffer("log_snr_curve", curve)

    @property
    def device(self) -> torch.device:
        return self.log_snr_curve.device

    def log_snr_at(self, u: Tensor) -> Tensor:
        last = len(self.log_snr_curve) - 1
        if last == 0:
            return self.log_snr_curve[0].expand(u.shape)
        position = u.double() * last
        index = position.floor().long().clamp(0, last - 1)
        return torch.lerp(
            self.log_snr_curve[index], self.log_snr_curve[index + 1], position - index
        )


class AlphaSchedule(InterpolatedSchedule):
    r"""The schedule with given :math:`\alpha_1, …, \alpha_T`; it has this grid and no other.

    Args:
        alpha: :math:`\alpha_1 … \alpha_T`, each in (0, 1), shape ``(T,)``; a sequence or a tensor.

    Raises:
        ValueError: A value is outside (0, 1), or there is none.

    Example:
        >>> AlphaSchedule([0.9, 0.5]).alpha_bar(torch.tensor([0, 1, 2]))
        tensor([1.0000, 0.9000, 0.4500], dtype=torch.float64)
    """

    def __init__(self, alpha: Tensor | list[float]) -> None:
        alpha = as_numbers("alpha", alpha, dtype=torch.float64).detach()
        require(
            alpha.dim() == 1 and len(alpha) > 0 and bool(((alpha > 0) & (alpha < 1)).all()),
            "argument 'alpha'",
            brief(alpha),
            "α_1 … α_T, one number in (0, 1) for each step",
            "α is the share of the variance kept: pass 1 − β if you have β.",
        )
        super().__init__(alpha, len(alpha))

    def with_num_timesteps(self, num_timesteps: int) -> Self:
        r"""A copy on the same grid, which is the only one.

        Raises:
            ValueError: ``num_timesteps`` is not :math:`T`.
        """
        require(
            num_timesteps == self.num_timesteps,
            "argument 'num_timesteps'",
            f"{num_timesteps} for an AlphaSchedule of {self.num_timesteps} steps",
            f"{self.num_timesteps}, because α_1 … α_T fix the grid",
            "Use LinearSchedule, CosineSchedule or LogSNRSchedule for a curve.",
        )
        return super().with_num_timesteps(num_timesteps)

    def slope_at(self, u: Tensor) -> Tensor:
        """Raise a ``ValueError``, because the α's do not define a curve between two timesteps.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"argument 'schedule': got an AlphaSchedule of {self.num_timesteps} steps for a continuous "
            "chain; expected a curve, because α_1 … α_T fix the grid. Use LinearSchedule, CosineSchedule, "
            "LogSNRSchedule or MonotoneSchedule."
        )


class LinearSchedule(InterpolatedSchedule):
    r""":math:`\beta_t` linear in :math:`t` at :math:`T = 1000`; the same log-SNR curve at any other T.

    Args:
        num_timesteps: Number of steps :math:`T`.
        beta_start: :math:`\beta_1` of the 1,000-step grid.
        beta_end: :math:`\beta_{1000}` of the 1,000-step grid.

    Raises:
        ValueError: ``num_timesteps`` is below one, or a β is outside (0, 1).

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 4.
        https://arxiv.org/abs/2006.11239
    """

    def __init__(
        self, num_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            meaning = (
                "the share β = 1 − α of the variance that one of 1,000 steps replaces by noise"
            )
            check_between(name, beta, 0, 1, meaning, "0.0001 and 0.02 are usual.")
        betas = torch.linspace(beta_start, beta_end, _REFERENCE_STEPS, dtype=torch.float64)
        super().__init__(1 - betas, num_timesteps)


class CosineSchedule(InterpolatedSchedule):
    r""":math:`\bar\alpha_t \propto \cos^2\!\big(\tfrac{t/T + s}{1 + s} \tfrac\pi2\big)`, s = 0.008.

    The curve is computed for 1,000 steps, with :math:`\beta_t` clipped at 0.999. Other grids take their
    values from this curve.

    Args:
        num_timesteps: Number of steps :math:`T`.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), eq. 17.
        https://arxiv.org/abs/2102.09672
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        offset = 0.008
        time = torch.arange(_REFERENCE_STEPS + 1, dtype=torch.float64) / _REFERENCE_STEPS
        alpha_bar = ((time + offset) / (1 + offset) * math.pi / 2).cos() ** 2
        super().__init__((alpha_bar[1:] / alpha_bar[:-1]).clamp(min=1 - 0.999), num_timesteps)


class RangeSchedule(NoiseSchedule):
    r"""A curve from :math:`\lambda(0) = \lambda_{\min} + e^r` to :math:`\lambda(1) = \lambda_{\min}`.

    Args:
        num_timesteps: Number of steps :math:`T`.
        log_snr_max: :math:`\lambda(0)`.
        log_snr_min: :math:`\lambda(1)`.
        event_shape: Shape of a datum whose entries have ends of their own; empty for a single curve.
        learnable: Whether the ends are parameters.
    """

    log_snr_min: Tensor  #: :math:`\lambda(1)`, float64, of ``event_shape``
    log_range: Tensor  #: :math:`r = \log(\lambda(0) - \lambda(1))`, float64, of ``event_shape``

    def __init__(
        self,
        num_timesteps: int,
        log_snr_max: float | Tensor,
        log_snr_min: float | Tensor,
        *,
        event_shape: tuple[int, ...] = (),
        learnable: bool,
    ) -> None:
        super().__init__(num_timesteps)
        high, low = (
            _end(name, value, event_shape)
            for name, value in (("log_snr_max", log_snr_max), ("log_snr_min", log_snr_min))
        )
        check_decreasing(torch.stack((high, low)), "log_snr_max, log_snr_min")
        for name, value in (("log_snr_min", low.clone()), ("log_range", (high - low).log())):
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def log_snr_max(self) -> Tensor:
        r""":math:`\lambda(0)`, float64, of ``event_shape``."""
        return self.log_snr_min + self.log_range.exp()

    @property
    def event_shape(self) -> torch.Size:
        return self.log_snr_min.shape

    @property
    def device(self) -> torch.device:
        return self.log_snr_min.device

    def __repr__(self) -> str:
        high, low = (
            ", ".join(f"{end:.4g}" for end in ends.flatten()[:4].tolist())
            + ("…" if ends.numel() > 4 else "")
            for ends in (self.log_snr_max.detach(), self.log_snr_min.detach())
        )
        return f"{type(self).__name__}({self.extra_repr()}, log_snr_max={high}, log_snr_min={low})"


def _end(argument: str, value: Any, event_shape: tuple[int, ...]) -> Tensor:
    """An end of the curve, float64, of ``event_shape``."""
    end = as_numbers(argument, value, dtype=torch.float64)
    require(
        end.shape in (torch.Size(), torch.Size(event_shape)),
        f"argument {argument!r}",
        f"shape {tuple(end.shape)}",
        f"one number, or one for each entry of a datum of shape {tuple(event_shape)}",
        "Give the schedule the event_shape of its ends.",
    )
    return end.expand(event_shape)


class LogSNRSchedule(RangeSchedule):
    r"""Log-SNR linear in :math:`u`: :math:`\lambda(u) = \lambda_{\min} + (1 - u)\,e^r`.

    The ends may be learned. They decide how much noise the likelihood has to remove and how much of the
    data is left in :math:`x_T`. The parameters are :math:`\lambda_{\min}` and :math:`r =
    \log(\lambda_{\max} - \lambda_{\min})`, so that the curve decreases for every value of the two. Guides
    state them to Pyro, and the ``SVI`` that trains the network trains them as well.

    Args:
        num_timesteps: Number of steps :math:`T`.
        log_snr_max: :math:`\lambda(0)`, the log-SNR of :math:`x_1`.
        log_snr_min: :math:`\lambda(1)`, the log-SNR of :math:`x_T`; :math:`-8` leaves a prior term
            of about :math:`10^{-4}` nats per dimension for data of unit scale.
        learnable: Whether the ends are parameters, which then start at these values.

    Raises:
        ValueError: ``num_timesteps`` is below one, or the curve does not decrease.

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 3.2 and appendix I.
        https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        *,
        log_snr_max: float = 8.0,
        log_snr_min: float = -8.0,
        learnable: bool = False,
    ) -> None:
        super().__init__(num_timesteps, log_snr_max, log_snr_min, learnable=learnable)

    def log_snr_at(self, u: Tensor) -> Tensor:
        return torch.lerp(self.log_snr_max, self.log_snr_min, u.double())


class LinearDecaySchedule(NoiseSchedule):
    r""":math:`\bar\alpha` linear in :math:`u`: each step of a chain of bits erases the same share of them.

    .. math::
        \bar\alpha(u) = (1 - u)\, \bar\alpha_{\max} + u\, \bar\alpha_{\min} .

    The curve is close to :math:`\bar\alpha_t = 1 - t / T`, which :math:`\beta_t = 1 / (T - t + 1)` gives.

    Args:
        num_timesteps: Number of steps :math:`T`.
        alpha_bar_max: :math:`\bar\alpha(0)`, of :math:`x_1`.
        alpha_bar_min: :math:`\bar\alpha(1)`, of :math:`x_T`.

    Raises:
        ValueError: ``num_timesteps`` is below one, or the ends are out of order or outside (0, 1).

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section
        2.4.1. https://arxiv.org/abs/1503.03585
    """

    ends: (
        Tensor  #: :math:`\bar\alpha_{\max}` and :math:`\bar\alpha_{\min}`, float64, shape ``(2,)``
    )

    def __init__(
        self,
        num_timesteps: int = 1000,
        *,
        alpha_bar_max: float = 0.999,
        alpha_bar_min: float = 1e-3,
    ) -> None:
        super().__init__(num_timesteps)
        meaning, remedy = (
            "the larger of the two ends",
            "The defaults leave a thousandth at either end.",
        )
        check_between("alpha_bar_max", alpha_bar_max, 0, 1, meaning, remedy)
        meaning = "the smaller of the two ends"
        check_between("alpha_bar_min", alpha_bar_min, 0, alpha_bar_max, meaning, remedy)
        self.register_buffer(
            "ends", torch.tensor([alpha_bar_max, alpha_bar_min], dtype=torch.float64)
        )

    @property
    def device(self) -> torch.device:
        return self.ends.device

    def log_snr_at(self, u: Tensor) -> Tensor:
        high, low = self.ends
        return torch.lerp(high, low, u.double()).logit()

    def extra_repr(self) -> str:
        high, low = self.ends.tolist()
        return f"{super().extra_repr()}, alpha_bar_max={high:g}, alpha_bar_min={low:g}"
