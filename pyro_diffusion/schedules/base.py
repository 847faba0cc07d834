r"""The abstract noise schedule: every coefficient of a chain from a log-SNR curve.

A subclass gives the curve :math:`\lambda(u)` and the device on which its numbers are. The base class
puts the curve on the grid of :math:`T` timesteps,

.. math::
    \lambda_t = \lambda\big((t - 1) / (T - 1)\big), \qquad t = 1 … T,

and derives :math:`\alpha_t`, :math:`\bar\alpha_t`, :math:`\beta_t`, the signal :math:`a_t` and the noise
:math:`\sigma_t` from it. It also holds the checks that several schedules share.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_diffusion.checks import check_count, holds, looking, require
from pyro_diffusion.display import as_table
from pyro_diffusion.params import shared_copy

_LARGEST_TABLE = 100_000  # steps: a few megabytes for each function


class _Table(NamedTuple):
    """Values of a function at all timesteps, and the numbers of the schedule that they belong to."""

    values: Tensor  #: ``(T + 1, number of values)``
    num_timesteps: int
    numbers: list[Tensor]

    def holds_for(self, num_timesteps: int, numbers: list[Tensor]) -> bool:
        """Whether the schedule still has this length and these numbers."""
        # Version counters would not do: they stay the same when an optimiser writes to tensor.data.
        same = num_timesteps == self.num_timesteps and len(numbers) == len(self.numbers)
        return same and all(
            x.device == y.device and torch.equal(x, y)
            for x, y in zip(numbers, self.numbers, strict=True)
        )


class NoiseSchedule(nn.Module, ABC):
    r"""A log-SNR curve on a grid of ``num_timesteps`` steps.

    The chain is variance preserving unless the subclass says otherwise. Methods take a timestep ``t`` in
    :math:`\{0, …, T\}`, a whole number or a LongTensor, and return a float64 tensor on the schedule's
    device. Its shape is ``t``'s shape; if every entry of a datum has a curve of its own, it is ``t``'s
    shape + ``event_shape``.

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

        The base class differentiates a single curve by autograd. A schedule with a curve for each entry
        must override this method.
        """
        if self.event_dim:
            raise NotImplementedError(
                f"{type(self).__name__} has a curve for each entry, but no slope_at"
            )
        learned = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.inference_mode(False), torch.enable_grad():
            u = u.detach().clone().double().requires_grad_()
            # λ(u) depends on its own u alone: the gradient of the sum is the slope at each of them.
            (slope,) = torch.autograd.grad(self.log_snr_at(u).sum(), u, create_graph=learned)
        return slope

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the schedule's numbers, which is also the chain's."""

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a datum whose entries have curves of their own; empty for a single curve."""
        return torch.Size()

    @property
    def event_dim(self) -> int:
        """Number of dimensions of :attr:`event_shape`, which coefficients have to the right of ``t``'s."""
        return len(self.event_shape)

    def with_num_timesteps(self, num_timesteps: int) -> Self:
        """The same curve on another grid; the two schedules share learned parameters."""
        schedule = shared_copy(self)
        # Buffers are copied, so that moving or loading one grid leaves the other as it is.
        schedule._buffers = {
            name: None if buffer is None else buffer.clone()
            for name, buffer in self._buffers.items()
        }
        schedule._tables = {}
        schedule.num_timesteps = _check_num_timesteps(num_timesteps)
        return schedule

    def log_snr(self, t: int | Tensor) -> Tensor:
        r""":math:`\lambda_t = \log \bar\alpha_t - \log(1 - \bar\alpha_t)`; infinite at ``t = 0``."""
        return self.tabulated(NoiseSchedule._log_snr, self.check_timestep(t))[0]

    def tabulated(
        self,
        function: Callable[["NoiseSchedule", Tensor], tuple[Tensor, ...]],
        t: Tensor,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, ...]:
        r"""``function(self, t)`` in a dtype, looked up in a table over :math:`0 … T` where possible.

        A chain needs the same coefficients many times. The table is computed again when a number of the
        schedule has changed. There is no table if a number is learned, if every entry has a curve of its own,
        or if the class is a user's, whose values may depend on anything.

        Args:
            function: Coefficients as functions of the schedule and of timesteps, in float64; also the
                table's key.
            t: Timesteps that :meth:`check_timestep` returned.
            dtype: Dtype of the results.
        """
        if not looking() or not self._is_own() or self.num_timesteps > _LARGEST_TABLE:
            return tuple(value.to(dtype) for value in function(self, t))
        numbers = self._numbers()
        if self.event_dim or any(x.requires_grad for x in numbers):
            return tuple(value.to(dtype) for value in function(self, t))
        table = self._tables.get((function, dtype))
        if table is None or not table.holds_for(self.num_timesteps, numbers):
            # It may be made in validation and used in training, so it must hold no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                every = torch.arange(self.num_timesteps + 1, device=self.device)
                values = torch.stack(function(self, every), -1).to(dtype)
                numbers = [x.clone() for x in numbers]
            table = self._tables[function, dtype] = _Table(values, self.num_timesteps, numbers)
        # A single row would be a view of the table, through which the caller could write.
        return (table.values[t] if t.dim() else table.values[t].clone()).unbind(-1)

    def _is_own(self) -> bool:
        """Whether the class is one of this package's, whose values depend on :meth:`_numbers` alone."""
        return type(self).__module__.startswith(f"{__package__}.")

    def _numbers(self) -> list[Tensor]:
        """Everything that the schedule's values depend on."""
        if self._modules:
            return [*self.parameters(), *self.buffers()]
        own = (*self._parameters.values(), *self._buffers.values())
        return [x for x in own if x is not None]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}

    def _log_snr(self, t: Tensor) -> tuple[Tensor, ...]:
        last = self.num_timesteps - 1
        u = (t - 1).clamp(min=0).double() / last if last else torch.ones_like(t).double()
        is_datum = (t == 0).reshape(t.shape + (1,) * self.event_dim)
        return (torch.where(is_datum, math.inf, self.log_snr_at(u)),)

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
        r""":math:`\alpha_t = \bar\alpha_t / \bar\alpha_{t-1}`; one at ``t = 0``, to which no step leads."""
        return self._log_alpha(t).exp()

    def beta(self, t: int | Tensor) -> Tensor:
        r""":math:`\beta_t = 1 - \alpha_t`, without cancellation; zero at ``t = 0``."""
        return -torch.expm1(self._log_alpha(t))

    def _log_alpha(self, t: int | Tensor) -> Tensor:
        t = self.check_timestep(t)
        previous, current = logsigmoid(self.log_snr(torch.stack(((t - 1).clamp(min=0), t))))
        return current - previous

    def tail(self, t: int) -> "NoiseSchedule":
        r"""The schedule of :math:`q(x_{t+1:T} \mid x_t)`, a chain of :math:`T - t` steps from a state.

        Args:
            t: Timestep of the state, in :math:`\{0, …, T - 1\}`.

        Raises:
            ValueError: The schedule has a curve for each entry.
        """
        from pyro_diffusion.schedules.curves import AlphaSchedule  # a subclass, in a later file

        require(
            not self.event_dim,
            "argument 'schedule'",
            f"a curve for each of {self.event_shape.numel()} entries",
            "a single one",
            "Compute the evidence of data instead of states, or use importance_evidence.",
        )
        steps = torch.arange(t + 1, self.num_timesteps + 1, device=self.device)
        return AlphaSchedule(self.alpha(steps)).to(self.device)

    def check_timestep(self, t: int | Tensor, at_least: int = 0) -> Tensor:
        """``t`` as a LongTensor on the schedule's device, if all of it is in ``at_least … T``."""
        if isinstance(t, Tensor):
            got = f"a tensor of {t.dtype}"
            inside = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
            if inside and not _within(t, at_least, self.num_timesteps):
                inside, got = False, "values from {} to {}".format(*map(int, t.aminmax()))
        else:
            got, whole = repr(t), isinstance(t, Integral) and not isinstance(t, bool)
            inside = whole and at_least <= t <= self.num_timesteps
        if not inside:
            raise ValueError(
                f"argument 't': got {got}; expected whole timesteps in {at_least} … "
                f"{self.num_timesteps} (an int or a LongTensor). Timestep 0 is the datum: no step leads to "
                "it, and q(x_0 | x_1, x_0) is a point mass without a density."
            )
        return torch.as_tensor(t, dtype=torch.long, device=self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The curve keeps float64 when the model around it is cast; only the device changes.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def extra_repr(self) -> str:
        return f"num_timesteps={self.num_timesteps}"

    def _rows(self) -> dict[str, str]:
        """The curve, and how much of the data is left at its end."""
        with torch.no_grad():
            left = self.alpha_bar(self.num_timesteps).mean().item()
        learned = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {
            "timesteps": f"T = {self.num_timesteps:,}",
            "log-SNR": f"{_ends(self)}, from t = 1 to t = T",
            "signal left at T": f"{left:.3g} of the variance",
            "numbers": f"{learned} of them learned" if learned else "fixed",
        }

    def _repr_html_(self) -> str:
        return as_table(type(self).__name__, self._rows())


def schedule_in_words(schedule: NoiseSchedule) -> str:
    """Class, number of timesteps and ends of the log-SNR, in a line."""
    by_entry = f", a curve for each of {schedule.event_shape.numel()} entries" * bool(
        schedule.event_dim
    )
    name = type(schedule).__name__
    return f"{name}, T = {schedule.num_timesteps:,}, log-SNR {_ends(schedule)}{by_entry}"


@torch.no_grad()
def _ends(schedule: NoiseSchedule) -> str:
    """Log-SNR at the first and at the last timestep, averaged over curves."""
    ends = schedule.log_snr(torch.tensor([1, schedule.num_timesteps])).reshape(2, -1).mean(1)
    return " … ".join(f"{end:.3g}" for end in ends.tolist())


def _within(t: Tensor, least: int, most: int) -> bool:
    """Whether all timesteps are in ``least … most``. On a CPU it is quicker to check the two extremes."""
    if t.is_cuda or not t.numel() or not looking():
        return holds((t >= least) & (t <= most))
    low, high = t.aminmax()
    return bool(least <= low.item() and high.item() <= most)


def _check_num_timesteps(num_timesteps: int) -> int:
    return check_count(
        "num_timesteps", num_timesteps, 1, "1000 is usual, and 1 the shortest chain."
    )


def check_decreasing(log_snr: Tensor, argument: str) -> None:
    """Raise a ``ValueError`` if a curve, given by its values from data to noise, does not decrease."""
    require(
        bool(log_snr.isfinite().all() and (log_snr.diff(dim=0) < 0).all()),
        f"argument {argument!r}",
        f"a log-SNR curve {brief(log_snr)} that is not finite and strictly decreasing",
        "less signal at every step",
        "Check the order of the values: they run from data to noise.",
    )


def brief(values: Tensor) -> str:
    """The first four values of a tensor and its shape, for a message."""
    shown = ", ".join(f"{value:.4g}" for value in values.flatten()[:4].tolist())
    return f"[{shown}{', …' if values.numel() > 4 else ''}] of shape {tuple(values.shape)}"
