r"""The time of a chain: its steps, or the limit of infinitely many.

A chain of :math:`T` steps has a term of the bound at each timestep, the reconstruction at ``t = 1`` and the
KL at site :math:`x_{t-1}` for ``t ≥ 2``. As :math:`T \to \infty` the sum becomes an integral over a time
:math:`u \in [0, 1]`, with the reconstruction at ``u = 0``. :class:`Steps` and :class:`Continuum` define what
a timestep is, which log-SNR it has, how timesteps are drawn, and which pair of kernels makes a term there.
Code that draws single terms of the bound takes a time of either kind.
"""

import math
from abc import ABC, abstractmethod
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_diffusion.chains.timesteps import Timesteps
from pyro_diffusion.checks import check_count
from pyro_diffusion.denoisers import Denoised, Denoiser
from pyro_diffusion.distributions import TimestepDistribution
from pyro_diffusion.processes import ForwardProcess
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class Time(ABC):
    """The timesteps of a chain, and the kernels of the bound's term at each."""

    num_timesteps: float  #: :math:`T`
    first: ClassVar[float]  #: the timestep that stands for the reconstruction
    step_site: ClassVar[str]  #: name of the site with the term of a random timestep

    @staticmethod
    def of(own: int, num_timesteps: Any = None) -> "Time":
        """The time of a chain.

        Args:
            own: Number of timesteps of the model.
            num_timesteps: Number of timesteps to use; ``None`` for the model's own, ``math.inf`` for the
                continuous chain.

        Raises:
            ValueError: Another value.
        """
        if isinstance(num_timesteps, Real) and num_timesteps == math.inf:
            return Continuum()
        remedy = "Leave it out for the model's own, or pass math.inf for the continuous chain."
        count = own if num_timesteps is None else num_timesteps
        return Steps(check_count("num_timesteps", count, 1, remedy))

    @abstractmethod
    def chain(self, diffusion: Any) -> Any:
        """The model on the grid of this time."""

    @property
    @abstractmethod
    def last(self) -> float:
        """The timestep of the noisiest state."""

    @abstractmethod
    def law(self, timesteps: Timesteps, device: torch.device) -> TimestepDistribution:
        """The law that a rule gives for the random timesteps."""

    @abstractmethod
    def edges(self, num_groups: int) -> Tensor:
        """Edges of at most ``num_groups`` groups of the timesteps that have a KL, float64.

        There is a single edge if no timestep has one.
        """

    @abstractmethod
    def whole(self, t: Tensor) -> Tensor:
        """Timesteps from real numbers between the edges."""

    @abstractmethod
    def log_snr(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        """The log-SNR at timesteps."""

    @abstractmethod
    def marginal(self, process: ForwardProcess, x_0: Tensor, t: Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_0)`."""

    @abstractmethod
    def posterior(
        self, process: ForwardProcess, x_t: Tensor, x_0: Tensor, t: Tensor
    ) -> TorchDistribution:
        """The kernel of :math:`q` in the term at timesteps that have a KL."""

    @abstractmethod
    def reverse(
        self, denoiser: Denoiser, x_t: Tensor, denoised: Denoised, t: Tensor
    ) -> TorchDistribution:
        """The kernel of :math:`p` in that term."""

    def pair(self, diffusion: Any, x_t: Tensor, t: Tensor, **given: Any) -> Any:
        r"""The kernel of :math:`p`, and :math:`p(x_0 \mid x_1)`, from one call of the network.

        Args:
            diffusion: The model, with ``denoiser`` and ``decode``.
            x_t: States, ``batch_shape + event_shape``.
            t: Their timesteps, broadcastable to ``batch_shape``.
            given: ``context=`` of conditional data.
        """
        denoiser = diffusion.denoiser
        given = denoiser.check_given(given)
        denoised = denoiser.denoise(x_t, self.log_snr(denoiser.schedule, t), **given)
        return self.reverse(denoiser, x_t, denoised, t), diffusion.decode(x_t, denoised)


class Steps(Time):
    r"""The timesteps :math:`1 … T` of a chain.

    Args:
        num_timesteps: Number of latent states :math:`T`.
    """

    num_timesteps: int
    first = 1
    step_site = "x_{t-1}"

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def chain(self, diffusion: Any) -> Any:
        same = diffusion.schedule.num_timesteps == self.num_timesteps
        return diffusion if same else diffusion.with_num_timesteps(self.num_timesteps)

    @property
    def last(self) -> float:
        return self.num_timesteps

    def law(self, timesteps: Timesteps, device: torch.device) -> TimestepDistribution:
        return timesteps(self.num_timesteps, device)

    def edges(self, num_groups: int) -> Tensor:
        steps = self.num_timesteps - 1
        num_groups = min(num_groups, steps)
        return 2 + torch.linspace(0, steps, num_groups + 1, dtype=torch.float64).floor()

    def whole(self, t: Tensor) -> Tensor:
        return t.long()

    def log_snr(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        return schedule.log_snr(t)

    def marginal(self, process: ForwardProcess, x_0: Tensor, t: Tensor) -> TorchDistribution:
        return process.marginal(x_0, t)

    def posterior(
        self, process: ForwardProcess, x_t: Tensor, x_0: Tensor, t: Tensor
    ) -> TorchDistribution:
        return process.posterior(x_t, x_0, t)

    def reverse(
        self, denoiser: Denoiser, x_t: Tensor, denoised: Denoised, t: Tensor
    ) -> TorchDistribution:
        return denoiser.reverse_kernel(x_t, t, denoised)


class Continuum(Time):
    r"""The times :math:`u \in [0, 1]` of the continuous chain, :math:`T \to \infty`.

    A term is a rate: the KL of the two kernels is a KL per unit of time.

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 4.2. https://arxiv.org/abs/2107.00630
    """

    num_timesteps = math.inf
    first = 0.0
    step_site = "dx_t"

    def chain(self, diffusion: Any) -> Any:
        return diffusion.with_both_ends()

    @property
    def last(self) -> float:
        return 1.0

    def law(self, timesteps: Timesteps, device: torch.device) -> TimestepDistribution:
        return timesteps.continuous(device)

    def edges(self, num_groups: int) -> Tensor:
        return torch.linspace(0, 1, num_groups + 1, dtype=torch.float64)

    def whole(self, t: Tensor) -> Tensor:
        return t

    def log_snr(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        return schedule.log_snr_at(t)

    def marginal(self, process: ForwardProcess, x_0: Tensor, t: Tensor) -> TorchDistribution:
        return process.marginal_at(x_0, t)

    def posterior(
        self, process: ForwardProcess, x_t: Tensor, x_0: Tensor, t: Tensor
    ) -> TorchDistribution:
        return process.increment(x_t, x_0, t)

    def reverse(
        self, denoiser: Denoiser, x_t: Tensor, denoised: Denoised, t: Tensor
    ) -> TorchDistribution:
        return denoiser.process.reverse_increment(x_t, denoised, t)
