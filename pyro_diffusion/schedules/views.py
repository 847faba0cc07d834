r"""Schedules that take their curve from another one: on another scale, or at some of its timesteps.

:class:`VarianceExploding` keeps the log-SNR of every timestep and changes the scale of the states.
:class:`StridedSchedule` keeps the states and leaves out timesteps. Both read the given schedule's
parameters, so that training one trains the other.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from pyro_diffusion.checks import check_argument, check_timesteps, require
from pyro_diffusion.schedules.base import NoiseSchedule
from pyro_diffusion.schedules.curves import AlphaSchedule


class ScheduleView(NoiseSchedule):
    """A schedule that takes its curve from another one, ``schedule``."""

    schedule: NoiseSchedule

    @property
    def device(self) -> torch.device:
        return self.schedule.device

    @property
    def event_shape(self) -> torch.Size:
        return self.schedule.event_shape

    def _is_own(self) -> bool:
        return super()._is_own() and self.schedule._is_own()

    def extra_repr(self) -> str:
        return f"{type(self.schedule).__name__}({self.schedule.extra_repr()})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class VarianceExploding(ScheduleView):
    r"""A schedule's curve with the signal kept as it is: :math:`a = 1`, :math:`\sigma = e^{-\lambda/2}`.

    Each state is the variance-preserving chain's, divided by :math:`a_t`. The bound is the same number.

    Args:
        schedule: The curve, whose parameters are shared.

    Example:
        >>> schedule = VarianceExploding(LogSNRSchedule(1000, log_snr_max=0.0))
        >>> schedule.signal(1), schedule.noise(1)
        (tensor(1., dtype=torch.float64), tensor(1.0000, dtype=torch.float64))

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
        section 3.4. https://arxiv.org/abs/2011.13456
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        check_argument("schedule", schedule, NoiseSchedule, "LogSNRSchedule(1000)")
        super().__init__(schedule.num_timesteps)
        self.schedule = schedule

    def with_num_timesteps(self, num_timesteps: int) -> Self:
        schedule = super().with_num_timesteps(num_timesteps)
        schedule.schedule = self.schedule.with_num_timesteps(num_timesteps)
        return schedule

    def log_snr_at(self, u: Tensor) -> Tensor:
        return self.schedule.log_snr_at(u)

    def slope_at(self, u: Tensor) -> Tensor:
        return self.schedule.slope_at(u)

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`(1, e^{-\lambda/2})`."""
        return torch.ones_like(log_snr), (-0.5 * log_snr).exp()

    def tail(self, t: int) -> NoiseSchedule:
        # The noise added to the state has variance σ_s² − σ_t², so that the tail has an SNR of its own.
        noise = self.noise(torch.arange(t, self.num_timesteps + 1, device=self.device)).square()
        alpha_bar = 1 / (1 + noise - noise[0])
        return VarianceExploding(AlphaSchedule(alpha_bar[1:] / alpha_bar[:-1]).to(self.device))


class StridedSchedule(ScheduleView):
    r"""A chain of some of a schedule's timesteps: :math:`\lambda'_i = \lambda_{\tau_i}`, :math:`\tau_0 = 0`.

    The state at step :math:`i` is the given chain's state at :math:`\tau_i`, with the same noise and on the
    same scale. A network therefore gets only states with noise that it was trained on. The parameters are
    those of the given schedule, under the same names. The curve is the given one from :math:`\tau_1` to
    :math:`\tau_{T'}`.

    Args:
        schedule: Noise schedule of :math:`T` steps, of any kind.
        timesteps: :math:`\tau_1 < … < \tau_{T'}`, whole numbers in ``1 … T``.

    Raises:
        ValueError: The timesteps do not increase, or one is outside ``1 … T``.

    Example:
        >>> schedule = StridedSchedule(LinearSchedule(1000), [1, 500, 1000])
        >>> schedule.num_timesteps, schedule.log_snr(2) == LinearSchedule(1000).log_snr(500)
        (3, tensor(True))

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), section 4.2.
        https://arxiv.org/abs/2010.02502
    """

    timesteps: tuple[int, ...]  #: :math:`\tau_1 … \tau_{T'}`
    steps: Tensor  #: :math:`\tau_0 … \tau_{T'}`, a LongTensor

    def __init__(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
        check_argument("schedule", schedule, NoiseSchedule, "LinearSchedule(1000)")
        timesteps = _check_increasing(timesteps, schedule.num_timesteps)
        if isinstance(schedule, StridedSchedule):
            timesteps = tuple(schedule.timesteps[t - 1] for t in timesteps)
            schedule = schedule.schedule
        super().__init__(len(timesteps))
        self.timesteps = timesteps
        given = schedule.with_num_timesteps(schedule.num_timesteps)
        # A submodule would have its tensors' names start with "schedule.". The given schedule is a plain
        # attribute instead, and both modules keep their tensors in the same dictionaries: the names stay, and
        # what moves or loads the tensors of one moves or loads those of the other.
        object.__setattr__(self, "schedule", given)
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(self, registry, getattr(given, registry))
        self.register_buffer(
            "steps", torch.tensor([0, *timesteps], device=given.device), persistent=False
        )

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
        """Where this curve starts on the given one, and what share of the given one's time it covers."""
        last = self.schedule.num_timesteps - 1
        if not last:  # the only state of a chain of one step is at the noisy end of its curve
            return 0.0, 1.0
        return (self.timesteps[0] - 1) / last, (self.timesteps[-1] - self.timesteps[0]) / last

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.scales(log_snr)

    def with_num_timesteps(self, num_timesteps: int) -> "StridedSchedule":
        """A copy with the same timesteps. Their number cannot change.

        Raises:
            ValueError: ``num_timesteps`` is not the number of its timesteps.
        """
        require(
            num_timesteps == self.num_timesteps,
            "argument 'num_timesteps'",
            f"{num_timesteps} for a StridedSchedule of {self.num_timesteps} steps",
            f"{self.num_timesteps}, because its timesteps fix the grid",
            "Take another grid, or other timesteps, of the schedule that it was made from.",
        )
        return StridedSchedule(self.schedule, self.timesteps)

    def tail(self, t: int) -> "StridedSchedule":
        start = int(self.steps[t])
        later = [step - start for step in self.timesteps if step > start]
        return StridedSchedule(self.schedule.tail(start), later)

    def extra_repr(self) -> str:
        steps = ", ".join(map(str, self.timesteps[:4])) + (", …" if self.num_timesteps > 4 else "")
        return f"{super().extra_repr()}, {self.num_timesteps} timesteps {steps}"


def _check_increasing(timesteps: Sequence[int], last: int) -> tuple[int, ...]:
    remedy = f"Pass [1, {last}], for example; the chain starts at the last of them."
    steps = check_timesteps(timesteps, 1, last, remedy)
    got, expected = f"{timesteps!r:.80}", f"increasing whole numbers in 1 … {last}"
    require(all(a < b for a, b in pairwise(steps)), "argument 'timesteps'", got, expected, remedy)
    return tuple(steps)


def evenly_spaced(count: Any, last: int) -> list[int]:
    """``count`` timesteps of ``1 … last``, both ends included. A single timestep is the last."""
    require(
        not isinstance(count, bool) and 1 <= count <= last,
        "argument 'timesteps'",
        str(count),
        f"1 … {last}, how many of the model's timesteps to keep",
        "Take with_num_timesteps(…) for a finer grid of the same curve.",
    )
    count = int(count)
    if count == 1:
        return [last]
    gaps = count - 1
    return [1 + (2 * i * (last - 1) + gaps) // (2 * gaps) for i in range(count)]
