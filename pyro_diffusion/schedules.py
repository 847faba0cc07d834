r"""Noise schedules: the log signal-to-noise ratio as a curve, and what follows from it.

A schedule is a strictly decreasing curve :math:`\lambda(u)`, :math:`u \in [0, 1]`, put on a grid of
:math:`T` timesteps with :math:`\lambda_1 = \lambda(0)` and :math:`\lambda_T = \lambda(1)`. Every
grid asks a network about the same range of noise, and :math:`T \to \infty` has a limit. A chain of
one step stands at :math:`\lambda(1)`, where the standard normal is. With

.. math::
    \bar\alpha_t = \operatorname{sigmoid}(\lambda_t), \qquad
    \alpha_t = \bar\alpha_t / \bar\alpha_{t-1}, \qquad
    \mathrm{SNR}(t) = e^{\lambda_t} = \bar\alpha_t / (1 - \bar\alpha_t),

the state at :math:`t` is :math:`x_t = a_t x_0 + \sigma_t \epsilon` with ``signal`` :math:`a_t =
\sqrt{\bar\alpha_t}` and ``noise`` :math:`\sigma_t = \sqrt{1 - \bar\alpha_t}`. The datum itself is
:math:`t = 0`: :math:`\lambda_0 = \infty`, :math:`\bar\alpha_0 = 1`.

:class:`VarianceExploding` keeps the curve and changes the scale, :math:`a_t = 1`; then
:math:`\alpha_t` and :math:`\beta_t` are those of the variance-preserving chain with that curve.

Everything is computed in float64, whatever dtype the model has: :math:`1 - \alpha_t` is a difference
of nearly equal numbers. The kernels cast the finished coefficients.

References:
    Variational Diffusion Models (Kingma et al., 2021), section 3.2. https://arxiv.org/abs/2107.00630
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_diffusion.checks import holds, looking

__all__ = [
    "AlphaSchedule",
    "CosineSchedule",
    "LinearDecaySchedule",
    "LinearSchedule",
    "LogSNRSchedule",
    "MonotoneSchedule",
    "NoiseSchedule",
    "StridedSchedule",
    "VarianceExploding",
]


class NoiseSchedule(nn.Module, ABC):
    r"""A log-SNR curve on a grid of ``num_timesteps`` steps; variance preserving unless it says so.

    Methods take a timestep ``t`` in :math:`\{0, …, T\}`, an integer or a LongTensor, and return a
    float64 tensor of ``t``'s shape, and of ``t``'s shape + ``event_shape`` where every entry of a datum
    has a curve of its own, on the schedule's device.

    Args:
        num_timesteps: Number of steps :math:`T \ge 1`.
    """

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.num_timesteps = _check_num_timesteps(num_timesteps)
        self._tables: dict[Any, _Table] = {}

    @abstractmethod
    def log_snr_at(self, u: Tensor) -> Tensor:
        r"""The curve :math:`\lambda(u)`, :math:`u \in [0, 1]`; float64, ``u``'s shape + ``event_shape``."""

    def slope_at(self, u: Tensor) -> Tensor:
        r"""The curve's slope :math:`\lambda'(u) < 0`, float64, of the shape of :meth:`log_snr_at`.

        A schedule with a curve for each entry brings its own; of one curve the gradient is it.
        """
        if self.event_dim:
            raise NotImplementedError(f"{type(self).__name__} has curves by entry, and no slope_at")
        learned = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.enable_grad():
            u = u.detach().double().requires_grad_()
            # The curve is one for every entry of u, so that the gradient of a sum has all slopes.
            (slope,) = torch.autograd.grad(self.log_snr_at(u).sum(), u, create_graph=learned)
        return slope

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the schedule, and with it the chain, lives."""

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a datum for which every entry has a curve of its own; empty for a single curve."""
        return torch.Size()

    @property
    def event_dim(self) -> int:
        """Dimensions of :attr:`event_shape`, which all coefficients have on the right of ``t``'s."""
        return len(self.event_shape)

    def with_num_timesteps(self, num_timesteps: int) -> Self:
        """The same curve, learned parameters included, on another grid."""
        schedule = copy.copy(self)
        # Moving or loading one grid leaves the other as it is; learned parameters they share.
        schedule._buffers = {
            name: None if buffer is None else buffer.clone()
            for name, buffer in self._buffers.items()
        }
        schedule.num_timesteps = _check_num_timesteps(num_timesteps)
        return schedule

    def log_snr(self, t: int | Tensor) -> Tensor:
        r""":math:`\lambda_t = \log \bar\alpha_t - \log(1 - \bar\alpha_t)`; infinite at ``t = 0``."""
        return self.tabulated(_log_snr, self.check_timestep(t))[0]

    def tabulated(
        self, function: Callable[["NoiseSchedule", Tensor], tuple[Tensor, ...]], t: Tensor
    ) -> tuple[Tensor, ...]:
        r"""``function(self, t)`` of checked timesteps, from a table over :math:`0 … T` if nothing is learned.

        The table is made anew when a number of the schedule has changed. A schedule with a curve for each
        entry has none.
        """
        numbers = self._numbers()
        learned = self.event_dim or any(x.requires_grad for x in numbers)
        if learned or not looking() or not self._is_own() or self.num_timesteps > _LARGEST_TABLE:
            return function(self, t)
        table = self._tables.get(function)
        if table is None or not table.holds_for(self.num_timesteps, numbers):
            # Also good for training, if validation comes first.
            with torch.inference_mode(False), torch.no_grad():
                values = function(self, torch.arange(self.num_timesteps + 1, device=self.device))
                numbers = [x.clone() for x in numbers]
            table = self._tables[function] = _Table(values, self.num_timesteps, numbers)
        # An entry alone would be a view of the table.
        return tuple(value[t] if t.dim() else value[t].clone() for value in table.values)

    def _is_own(self) -> bool:
        """Whether the schedule, and one inside it, is of this module: all its numbers are tensors of it."""
        inner = getattr(self, "schedule", None)
        return type(self).__module__ == __name__ and (inner is None or inner._is_own())

    def _numbers(self) -> list[Tensor]:
        """Everything that the schedule's values depend on."""
        if self._modules:
            return [*self.parameters(), *self.buffers()]
        own = (*self._parameters.values(), *self._buffers.values())
        return [x for x in own if x is not None]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}

    def _log_snr(self, t: Tensor) -> Tensor:
        u = (t - 1).clamp(min=0).double() / max(self.num_timesteps - 1, 1)
        if self.num_timesteps == 1:
            u = torch.ones_like(u)
        is_datum = (t == 0).reshape(t.shape + (1,) * self.event_dim)
        return torch.where(is_datum, math.inf, self.log_snr_at(u))

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`(a, \sigma)` at a log-SNR, with :math:`a^2 + \sigma^2 = 1`."""
        return (0.5 * logsigmoid(log_snr)).exp(), (0.5 * logsigmoid(-log_snr)).exp()

    def signal(self, t: int | Tensor) -> Tensor:
        r""":math:`a_t = \sqrt{\bar\alpha_t}`."""
        return self.scales(self.log_snr(t))[0]

    def noise(self, t: int | Tensor) -> Tensor:
        r""":math:`\sigma_t = \sqrt{1 - \bar\alpha_t}`."""
        return self.scales(self.log_snr(t))[1]

    def snr(self, t: int | Tensor) -> Tensor:
        r""":math:`\mathrm{SNR}(t) = \bar\alpha_t / (1 - \bar\alpha_t)`; infinite at ``t = 0``."""
        return self.log_snr(t).exp()

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        r""":math:`\bar\alpha_t = \prod_{s \le t} \alpha_s`; one at ``t = 0``."""
        return self.log_snr(t).sigmoid()

    def alpha(self, t: int | Tensor) -> Tensor:
        r""":math:`\alpha_t = \bar\alpha_t / \bar\alpha_{t-1}`; one at ``t = 0``, where no step leads."""
        return self._log_alpha(t).exp()

    def beta(self, t: int | Tensor) -> Tensor:
        r""":math:`\beta_t = 1 - \alpha_t`, without cancellation; zero at ``t = 0``."""
        return -torch.expm1(self._log_alpha(t))

    def _log_alpha(self, t: int | Tensor) -> Tensor:
        t = self.check_timestep(t)
        previous, current = logsigmoid(self.log_snr(torch.stack(((t - 1).clamp(min=0), t))))
        return current - previous

    def tail(self, t: int) -> "NoiseSchedule":
        r"""The schedule of :math:`q(x_{t+1:T} \mid x_t)`: a chain of :math:`T - t` steps from a state.

        Args:
            t: Timestep of the state, in :math:`\{0, …, T - 1\}`.

        Raises:
            ValueError: A curve for each entry.
        """
        if self.event_dim:
            raise ValueError(
                f"argument 'schedule': got a curve for each of {self.event_shape.numel()} entries; expected "
                "a single one. Ask for the data's own evidence, or use importance_evidence."
            )
        steps = torch.arange(t + 1, self.num_timesteps + 1, device=self.device)
        return AlphaSchedule(self.alpha(steps)).to(self.device)

    def check_timestep(self, t: int | Tensor, at_least: int = 0) -> Tensor:
        """``t`` as a tensor on the schedule's device, if all of it is in ``at_least … T``."""
        if not isinstance(t, Tensor):
            inside = (
                isinstance(t, int)
                and not isinstance(t, bool)
                and at_least <= t <= self.num_timesteps
            )
            got = repr(t)
            t = torch.tensor(t if inside else 0, device=self.device)
        elif t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            inside, got = False, f"a tensor of {t.dtype}"
        else:
            inside = holds((t >= at_least) & (t <= self.num_timesteps))
            got = "" if inside else "values from {} to {}".format(*map(int, t.aminmax()))
        t = t.to(self.device)
        if not inside:
            raise ValueError(
                f"argument 't': got {got}; expected whole timesteps in {at_least} … "
                f"{self.num_timesteps} (an int or a LongTensor). Timestep 0 is the datum, into which no step "
                "leads, and q(x_0 | x_1, x_0) is a point mass without a density."
            )
        return t

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The curve keeps float64 when the model around it is cast; only the device changes.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def extra_repr(self) -> str:
        return f"num_timesteps={self.num_timesteps}"


class _Table(NamedTuple):
    """Values over all timesteps, and the numbers that they were computed from."""

    values: tuple[Tensor, ...]
    num_timesteps: int
    numbers: list[Tensor]

    def holds_for(self, num_timesteps: int, numbers: list[Tensor]) -> bool:
        """Whether these are the numbers."""
        if num_timesteps != self.num_timesteps or len(numbers) != len(self.numbers):
            return False
        pairs = zip(numbers, self.numbers, strict=True)
        return all(x.device == y.device and torch.equal(x, y) for x, y in pairs)


def _log_snr(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    return (schedule._log_snr(t),)


class _TabulatedSchedule(NoiseSchedule):
    """A curve through equally spaced values of the log-SNR, linear between them."""

    log_snr_curve: Tensor

    def __init__(self, alpha: Tensor, num_timesteps: int) -> None:
        super().__init__(num_timesteps)
        log_alpha_bar = alpha.double().log().cumsum(0)
        curve = log_alpha_bar - (-torch.expm1(log_alpha_bar)).log()
        _check_decreasing(curve, "alpha")
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


class AlphaSchedule(_TabulatedSchedule):
    r"""The schedule with given :math:`\alpha_1, …, \alpha_T`; it has this grid and no other.

    Args:
        alpha: :math:`\alpha_1 … \alpha_T`, each in (0, 1), shape ``(T,)``; a sequence or a tensor.

    Raises:
        ValueError: A value outside (0, 1), or an empty sequence.

    Example:
        >>> AlphaSchedule([0.9, 0.5]).alpha_bar(torch.tensor([0, 1, 2]))
        tensor([1.0000, 0.9000, 0.4500], dtype=torch.float64)
    """

    def __init__(self, alpha: Tensor | list[float]) -> None:
        alpha = torch.as_tensor(alpha, dtype=torch.float64).detach()
        if alpha.dim() != 1 or len(alpha) == 0 or not ((alpha > 0) & (alpha < 1)).all():
            raise ValueError(
                f"argument 'alpha': got {_brief(alpha)}; expected α_1 … α_T, one number in (0, 1) "
                "for each step. α is the share of the variance kept: pass 1 − β if you hold β."
            )
        super().__init__(alpha, len(alpha))

    def with_num_timesteps(self, num_timesteps: int) -> Self:
        """Refused, unless it asks for the grid that is there.

        Raises:
            ValueError: ``num_timesteps`` is not :math:`T`.
        """
        if num_timesteps != self.num_timesteps:
            raise ValueError(
                f"argument 'num_timesteps': got {num_timesteps} for an AlphaSchedule of "
                f"{self.num_timesteps} steps; expected {self.num_timesteps}, because α_1 … α_T fix "
                "the grid. Use LinearSchedule, CosineSchedule or LogSNRSchedule for a curve."
            )
        return super().with_num_timesteps(num_timesteps)

    def slope_at(self, u: Tensor) -> Tensor:
        """Refused: there is nothing between the timesteps.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"argument 'schedule': got an AlphaSchedule of {self.num_timesteps} steps for a continuous "
            "chain; expected a curve, because α_1 … α_T fix the grid. Use LinearSchedule, CosineSchedule, "
            "LogSNRSchedule or MonotoneSchedule."
        )


class LinearSchedule(_TabulatedSchedule):
    r""":math:`\beta_t` linear in :math:`t` at :math:`T = 1000`; its log-SNR curve at any other T.

    Args:
        num_timesteps: Number of steps :math:`T`.
        beta_start: :math:`\beta_1` of the 1,000-step grid.
        beta_end: :math:`\beta_{1000}` of the 1,000-step grid.

    Raises:
        ValueError: ``num_timesteps`` below one, or a β outside (0, 1).

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 4.
        https://arxiv.org/abs/2006.11239
    """

    def __init__(
        self, num_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 < beta < 1:
                raise ValueError(
                    f"argument {name!r}: got {beta}; expected a number in (0, 1), β = 1 − α being "
                    "the share of the variance that one of 1,000 steps replaces by noise."
                )
        betas = torch.linspace(beta_start, beta_end, _REFERENCE_STEPS, dtype=torch.float64)
        super().__init__(1 - betas, num_timesteps)


class CosineSchedule(_TabulatedSchedule):
    r""":math:`\bar\alpha_t \propto \cos^2\!\big(\tfrac{t/T + s}{1 + s} \tfrac\pi2\big)`, s = 0.008.

    The curve is that of 1,000 steps with :math:`\beta_t` clipped at 0.999, and is put on other
    grids as a curve.

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


class LogSNRSchedule(NoiseSchedule):
    r"""Log-SNR linear in :math:`u`: :math:`\lambda(u) = \lambda_{\min} + (1 - u)\,e^r`.

    Learned ends are two numbers, :math:`\lambda_{\min}` and :math:`r = \log(\lambda_{\max} -
    \lambda_{\min})`, so that the curve decreases whatever they become. Guides state them, and the
    same ``SVI`` lines train them: where the likelihood takes over, and how little is left at the end.

    Args:
        num_timesteps: Number of steps :math:`T`.
        log_snr_max: :math:`\lambda(0)`, the log-SNR of :math:`x_1`.
        log_snr_min: :math:`\lambda(1)`, the log-SNR of :math:`x_T`; :math:`-8` leaves a prior term
            of about :math:`10^{-4}` nats a dimension for data of unit scale.
        learnable: Whether the ends are parameters, which then start at these values.

    Raises:
        ValueError: ``num_timesteps`` below one, or a curve that does not decrease.

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 3.2 and appendix I.
        https://arxiv.org/abs/2107.00630
    """

    log_snr_min: Tensor  #: :math:`\lambda(1)`, a float64 scalar
    log_range: Tensor  #: :math:`\log(\lambda(0) - \lambda(1))`, a float64 scalar

    def __init__(
        self,
        num_timesteps: int = 1000,
        *,
        log_snr_max: float = 8.0,
        log_snr_min: float = -8.0,
        learnable: bool = False,
    ) -> None:
        super().__init__(num_timesteps)
        ends = torch.tensor([log_snr_max, log_snr_min], dtype=torch.float64)
        _check_decreasing(ends, "log_snr_max, log_snr_min")
        for name, value in (("log_snr_min", ends[1]), ("log_range", (ends[0] - ends[1]).log())):
            if learnable:
                self.register_parameter(name, nn.Parameter(value.clone()))
            else:
                self.register_buffer(name, value.clone())

    @property
    def log_snr_max(self) -> Tensor:
        r""":math:`\lambda(0)`, a float64 scalar."""
        return self.log_snr_min + self.log_range.exp()

    @property
    def device(self) -> torch.device:
        return self.log_snr_min.device

    def log_snr_at(self, u: Tensor) -> Tensor:
        return torch.lerp(self.log_snr_max, self.log_snr_min, u.double())

    def __repr__(self) -> str:
        high, low = (end.item() for end in (self.log_snr_max, self.log_snr_min))
        return f"{type(self).__name__}({self.extra_repr()}, log_snr_max={high:.4g}, log_snr_min={low:.4g})"


class LinearDecaySchedule(NoiseSchedule):
    r""":math:`\bar\alpha` linear in :math:`u`: every step of a chain of bits erases an equal share of them.

    .. math::
        \bar\alpha(u) = (1 - u)\, \bar\alpha_{\max} + u\, \bar\alpha_{\min},

    a curve close to :math:`\bar\alpha_t = 1 - t / T`, which :math:`\beta_t = 1 / (T - t + 1)` makes.

    Args:
        num_timesteps: Number of steps :math:`T`.
        alpha_bar_max: :math:`\bar\alpha(0)`, of :math:`x_1`.
        alpha_bar_min: :math:`\bar\alpha(1)`, of :math:`x_T`.

    Raises:
        ValueError: ``num_timesteps`` below one, or ends out of order or outside (0, 1).

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section
        2.4.1. https://arxiv.org/abs/1503.03585
    """

    ends: Tensor

    def __init__(
        self,
        num_timesteps: int = 1000,
        *,
        alpha_bar_max: float = 0.999,
        alpha_bar_min: float = 1e-3,
    ) -> None:
        super().__init__(num_timesteps)
        if not 0 < alpha_bar_min < alpha_bar_max < 1:
            raise ValueError(
                f"arguments 'alpha_bar_max' and 'alpha_bar_min': got {alpha_bar_max} and {alpha_bar_min}; "
                "expected 0 < alpha_bar_min < alpha_bar_max < 1, from data to noise. The defaults leave a "
                "thousandth at either end."
            )
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


class MonotoneSchedule(NoiseSchedule):
    r"""A learned curve, ends included: how much time each log-SNR has.

    .. math::
        \lambda(u) = \lambda_{\min} + e^r \big(1 - s(u)\big), \qquad
        u = \int_0^{s(u)} f(s')\, ds' \Big/ \int_0^1 f(s')\, ds',

    with a density :math:`f > 0` of time that is linear between :math:`f(k/K) = e^{\eta_k}`. The curve is
    smooth, and decreases whatever :math:`\lambda_{\min}`, :math:`r` and :math:`\eta` become. With
    ``event_shape`` every entry of a datum has a curve of its own, under the same interface.

    The bound of the continuous chain depends on the ends alone, and the same ``SVI`` lines train them. The
    interior :math:`\eta` decides how noisy an estimate of it is:
    :class:`~pyro_diffusion.objectives.MinimumVarianceELBO` trains it for that::

        elbo = MinimumVarianceELBO(schedule.interior)
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), elbo)

    Args:
        num_timesteps: Number of steps :math:`T`.
        log_snr_max: :math:`\lambda(0)` to start from.
        log_snr_min: :math:`\lambda(1)` to start from.
        num_pieces: Number of pieces :math:`K`.
        event_shape: Shape of a datum whose entries have curves of their own; empty for a single curve.

    Raises:
        ValueError: ``num_timesteps`` or ``num_pieces`` below one, or ends that do not decrease.

    Example:
        >>> schedule = MonotoneSchedule(1000, log_snr_max=10.0)
        >>> schedule.log_snr(torch.tensor([1, 1000]))
        tensor([10.0000, -8.0000], dtype=torch.float64, grad_fn=<WhereBackward0>)

    References:
        Variational Diffusion Models (Kingma et al., 2021), appendix H. https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        *,
        log_snr_max: float | Tensor = 8.0,
        log_snr_min: float | Tensor = -8.0,
        num_pieces: int = 24,
        event_shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__(num_timesteps)
        if not isinstance(event_shape, tuple):
            raise ValueError(
                f"argument 'event_shape': got {event_shape!r}; expected a tuple, the shape of a datum whose "
                "entries have curves of their own. Pass (2,) for pairs of numbers."
            )
        if not isinstance(num_pieces, int) or num_pieces < 1:
            raise ValueError(
                f"argument 'num_pieces': got {num_pieces!r}; expected a whole number of at least 1, the "
                "pieces that the range of the log-SNR is cut into. 24 come close to the best curve."
            )
        high, low = (
            torch.as_tensor(end, dtype=torch.float64).expand(event_shape)
            for end in (log_snr_max, log_snr_min)
        )
        _check_decreasing(torch.stack((high, low)), "log_snr_max, log_snr_min")
        self.log_snr_min = nn.Parameter(low.clone())  #: :math:`\lambda(1)`, of ``event_shape``
        self.log_range = nn.Parameter((high - low).log())  #: :math:`r`, of ``event_shape``
        #: :math:`\eta`, ``event_shape + (K + 1,)``: what :class:`MinimumVarianceELBO` trains
        self.interior = nn.Parameter(torch.zeros(*event_shape, num_pieces + 1, dtype=torch.float64))

    @property
    def event_shape(self) -> torch.Size:
        return self.log_snr_min.shape

    @property
    def device(self) -> torch.device:
        return self.log_snr_min.device

    def _invert(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`s(u)` and the normalised :math:`f(s(u))`, ``u``'s shape + ``event_shape``."""
        f, pieces = (self.interior - self.interior.amax(-1, keepdim=True)).exp(), self.num_pieces
        shares = (f[..., 1:] + f[..., :-1]) / (2 * pieces)
        total = shares.sum(-1, keepdim=True)
        f, shares = f / total, shares / total
        edges = torch.cat((torch.zeros_like(shares[..., :1]), shares.cumsum(-1)), -1)
        flat = u.double().flatten().expand(*self.event_shape, -1).contiguous()
        piece = torch.searchsorted(edges.detach()[..., 1:-1].contiguous(), flat, right=True)
        start, left, right = (
            x.gather(-1, piece) for x in (edges[..., :-1], f[..., :-1], f[..., 1:])
        )
        # u − u_k = (f_k τ + (f_{k+1} − f_k) τ²/2) / K, solved for τ in [0, 1]
        ahead = ((flat - start) * pieces).clamp(min=0)
        here = (left.square() + 2 * (right - left) * ahead).clamp(min=0).sqrt()
        tau = (2 * ahead / (left + here)).clamp(max=1)
        shape = u.shape + self.event_shape
        return (
            ((piece + tau) / pieces).movedim(-1, 0).reshape(shape),
            here.movedim(-1, 0).reshape(shape),
        )

    @property
    def log_snr_max(self) -> Tensor:
        r""":math:`\lambda(0)`, of ``event_shape``."""
        return self.log_snr_min + self.log_range.exp()

    @property
    def num_pieces(self) -> int:
        """Pieces :math:`K` of the range."""
        return self.interior.shape[-1] - 1

    def log_snr_at(self, u: Tensor) -> Tensor:
        return self.log_snr_min + self.log_range.exp() * (1 - self._invert(u)[0])

    def slope_at(self, u: Tensor) -> Tensor:
        return -self.log_range.exp() / self._invert(u)[1]

    def extra_repr(self) -> str:
        shape = f", event_shape={tuple(self.event_shape)}" if self.event_dim else ""
        return f"{super().extra_repr()}, num_pieces={self.num_pieces}{shape}"

    def __repr__(self) -> str:
        high, low = (
            ", ".join(f"{end:.4g}" for end in ends.flatten()[:4].tolist())
            + ("…" if ends.numel() > 4 else "")
            for ends in (self.log_snr_max.detach(), self.log_snr_min.detach())
        )
        return f"{type(self).__name__}({self.extra_repr()}, log_snr_max={high}, log_snr_min={low})"


class VarianceExploding(NoiseSchedule):
    r"""A schedule's curve with the signal kept as it is: :math:`a = 1`, :math:`\sigma = e^{-\lambda/2}`.

    State by state it is the variance-preserving chain divided by its :math:`a_t`, and the bound is
    the same number.

    Args:
        schedule: The curve, learned parameters included.

    Example:
        >>> schedule = VarianceExploding(LogSNRSchedule(1000, log_snr_max=0.0))
        >>> schedule.signal(1), schedule.noise(1)
        (tensor(1., dtype=torch.float64), tensor(1.0000, dtype=torch.float64))

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
        section 3.4. https://arxiv.org/abs/2011.13456
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(
                f"argument 'schedule': got {schedule!r}; expected a NoiseSchedule. Pass the curve to "
                "put on another scale, such as VarianceExploding(LogSNRSchedule(1000))."
            )
        super().__init__(schedule.num_timesteps)
        self.schedule = schedule

    @property
    def device(self) -> torch.device:
        return self.schedule.device

    def with_num_timesteps(self, num_timesteps: int) -> "VarianceExploding":
        return VarianceExploding(self.schedule.with_num_timesteps(num_timesteps))

    @property
    def event_shape(self) -> torch.Size:
        return self.schedule.event_shape

    def log_snr_at(self, u: Tensor) -> Tensor:
        return self.schedule.log_snr_at(u)

    def slope_at(self, u: Tensor) -> Tensor:
        return self.schedule.slope_at(u)

    def tail(self, t: int) -> NoiseSchedule:
        # σ_s² − σ_t² of noise on top of a state, as the signal-to-noise ratio of a chain of its own
        noise = self.noise(torch.arange(t, self.num_timesteps + 1, device=self.device)).square()
        alpha_bar = 1 / (1 + noise - noise[0])
        return VarianceExploding(AlphaSchedule(alpha_bar[1:] / alpha_bar[:-1]).to(self.device))

    def extra_repr(self) -> str:
        return f"{type(self.schedule).__name__}({self.schedule.extra_repr()})"

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`(1, e^{-\lambda/2})`."""
        return torch.ones_like(log_snr), (-0.5 * log_snr).exp()


class StridedSchedule(NoiseSchedule):
    r"""A chain of some of a schedule's timesteps: :math:`\lambda'_i = \lambda_{\tau_i}`, :math:`\tau_0 = 0`.

    A state at step :math:`i` is the given chain's state at :math:`\tau_i`, as noisy and on the same scale, so
    that a network is asked about noise that it was trained on and about no other. Parameters are the given
    schedule's, and have its names. As a curve it is the given one from :math:`\tau_1` to
    :math:`\tau_{T'}`.

    Args:
        schedule: Noise schedule of :math:`T` steps: any, also learned, or with a curve for each entry.
        timesteps: :math:`\tau_1 < … < \tau_{T'}`, whole numbers in ``1 … T``.

    Raises:
        ValueError: Timesteps that are not of that kind.

    Example:
        >>> schedule = StridedSchedule(LinearSchedule(1000), [1, 500, 1000])
        >>> schedule.num_timesteps, schedule.log_snr(2) == LinearSchedule(1000).log_snr(500)
        (3, tensor(True))

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), section 4.2.
        https://arxiv.org/abs/2010.02502
    """

    schedule: NoiseSchedule
    timesteps: tuple[int, ...]  #: :math:`\tau_1 … \tau_{T'}`
    steps: Tensor

    def __init__(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(
                f"argument 'schedule': got {schedule!r}; expected a NoiseSchedule. Pass the schedule to take "
                "timesteps of, such as StridedSchedule(LinearSchedule(1000), [1, 500, 1000])."
            )
        timesteps = _check_timesteps(timesteps, schedule.num_timesteps)
        if isinstance(schedule, StridedSchedule):
            timesteps = tuple(schedule.timesteps[t - 1] for t in timesteps)
            schedule = schedule.schedule
        super().__init__(len(timesteps))
        self.timesteps = timesteps
        # A grid of its own and no submodule: its tensors are listed here, under the names they have there.
        schedule = schedule.with_num_timesteps(schedule.num_timesteps)
        self.__dict__["schedule"] = schedule
        for kind in ("_parameters", "_buffers", "_modules"):
            self.__dict__[kind] = getattr(schedule, kind)
        steps = torch.tensor([0, *timesteps], device=schedule.device)
        self.register_buffer("steps", steps, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.schedule.device

    @property
    def event_shape(self) -> torch.Size:
        return self.schedule.event_shape

    def log_snr(self, t: int | Tensor) -> Tensor:
        r""":math:`\lambda_{\tau_t}` of the given schedule; infinite at ``t = 0``."""
        return self.schedule.log_snr(self.steps[self.check_timestep(t)])

    def log_snr_at(self, u: Tensor) -> Tensor:
        first, length = self._span()
        return self.schedule.log_snr_at(first + length * u.double())

    def slope_at(self, u: Tensor) -> Tensor:
        first, length = self._span()
        return length * self.schedule.slope_at(first + length * u.double())

    def _span(self) -> tuple[float, float]:
        """Where the given curve's time starts here, and how much of it there is."""
        last = self.schedule.num_timesteps - 1
        if not last:  # a chain of one step stands at the noisy end of its curve
            return 0.0, 1.0
        return (self.timesteps[0] - 1) / last, (self.timesteps[-1] - self.timesteps[0]) / last

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.scales(log_snr)

    def with_num_timesteps(self, num_timesteps: int) -> "StridedSchedule":
        """Refused, unless it asks for the grid that is there.

        Raises:
            ValueError: ``num_timesteps`` is not the number of its timesteps.
        """
        if num_timesteps != self.num_timesteps:
            raise ValueError(
                f"argument 'num_timesteps': got {num_timesteps} for a StridedSchedule of "
                f"{self.num_timesteps} steps; expected {self.num_timesteps}, because its timesteps fix the "
                "grid. Take another grid, or other timesteps, of the schedule that it was made from."
            )
        return StridedSchedule(self.schedule, self.timesteps)

    def tail(self, t: int) -> "StridedSchedule":
        start = int(self.steps[t])
        later = [step - start for step in self.timesteps if step > start]
        return StridedSchedule(self.schedule.tail(start), later)

    def extra_repr(self) -> str:
        steps = ", ".join(map(str, self.timesteps[:4])) + (", …" if self.num_timesteps > 4 else "")
        given = f"{type(self.schedule).__name__}({self.schedule.extra_repr()})"
        return f"{given}, {self.num_timesteps} timesteps {steps}"


_LARGEST_TABLE = 100_000  # steps
_REFERENCE_STEPS = 1000  # the grid on which the published β's are stated


def _check_num_timesteps(num_timesteps: int) -> int:
    if not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise ValueError(
            f"argument 'num_timesteps': got {num_timesteps!r}; expected a whole number of at least "
            "1. A chain needs one step to be a chain; 1000 is usual."
        )
    return num_timesteps


def _check_timesteps(timesteps: Sequence[int], last: int) -> tuple[int, ...]:
    steps = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps  # NumPy's too
    steps = tuple(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else ()
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    inside = whole and bool(steps) and steps[0] >= 1 and steps[-1] <= last
    if not inside or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(
            f"argument 'timesteps': got {timesteps!r:.80}; expected increasing whole numbers in 1 … {last}, "
            f"the timesteps to keep. Pass [1, {last}], say; the last one is where the chain starts."
        )
    return steps


def _check_decreasing(log_snr: Tensor, argument: str) -> None:
    if not log_snr.isfinite().all() or not (log_snr.diff(dim=0) < 0).all():
        raise ValueError(
            f"argument {argument!r}: got a log-SNR curve {_brief(log_snr)} that is not finite and "
            "strictly decreasing; expected less signal at every step. Check the order of the values: "
            "they run from data to noise."
        )


def _brief(values: Tensor) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values.flatten()[:4].tolist())
    return f"[{shown}{', …' if values.numel() > 4 else ''}] of shape {tuple(values.shape)}"
