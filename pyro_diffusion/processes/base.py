r"""What a forward process is: the fixed encoder :math:`q` of a diffusion model, and where it ends.

A process noises a datum step by step. Everything that a chain asks of it follows from one curve, the
schedule's log-SNR :math:`\lambda_t`, and from the kind of states. A kind of noise is one subclass of
:class:`ForwardProcess`, which states

.. math::
    q(x_t \mid x_{t-1}) \;\text{(E1)}, \quad q(x_t \mid x_0) \;\text{(E2)}, \quad
    q(x_{t-1} \mid x_t, x_0) \;\text{(E3)}, \quad p(x_T) \;\text{(E5)},

the reverse kernel that follows from an estimate of the datum, and the limits of E3 and of that kernel as
the steps become small. Shapes are ``batch_shape + event_shape``. A timestep is an integer, or a LongTensor
that broadcasts to ``batch_shape``; a time :math:`u \in [0, 1]` of the continuous chain is a tensor alike.
"""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_diffusion.checks import require
from pyro_diffusion.schedules import NoiseSchedule


class Denoised(NamedTuple):
    r"""What a denoiser says of :math:`x_0` when it sees a state; one call of the network."""

    x_0_hat: Tensor  #: the estimate, ``batch_shape + event_shape``
    logits: Tensor | None = (
        None  #: of each value, ``batch_shape + event_shape + (K,)``; of bits of a one
    )
    #: the output that :class:`~pyro_diffusion.denoisers.LearnedVariance` interpolates by
    variance: Tensor | None = None


class ForwardProcess(ABC):
    r"""The forward chain :math:`q` of one kind of states, on a schedule.

    A process holds no parameters of its own: it is made on demand from a schedule and a few numbers.

    Args:
        schedule: Noise schedule of the chain.
        event_shape: Shape of one state.
    """

    states: ClassVar[str]  #: what the states are, in words
    #: whether states are real numbers with a Gaussian kernel: a score, means that can be added up
    has_score: ClassVar[bool] = False
    gap: ClassVar[float | None] = (
        None  #: what a kernel sees where nothing was observed; None: nothing can
    )

    def __init__(self, schedule: NoiseSchedule, event_shape: torch.Size) -> None:
        self.schedule, self.event_shape = schedule, event_shape

    @property
    def event_dim(self) -> int:
        """Number of rightmost dimensions that form one state."""
        return len(self.event_shape)

    @property
    def missing_dim(self) -> int:
        """Event dimensions that the schedule's coefficients lack: all, but for a curve for each entry."""
        return len(self.event_shape) - self.schedule.event_dim

    @property
    def state_size(self) -> int:
        """Numbers in the largest tensor of a step, for one state."""
        return self.event_shape.numel()

    # The chain.

    @abstractmethod
    def prior(self, dtype: torch.dtype) -> TorchDistribution:
        """Where the reverse chain starts, :math:`p(x_T)` (E5): no batch shape, on the schedule's device."""

    @abstractmethod
    def transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        r"""One step of noise, :math:`q(x_t \mid x_{t-1})` (E1), ``t`` in ``{1, …, T}``."""

    @abstractmethod
    def noised(self, x_0: Tensor, log_snr: Tensor) -> TorchDistribution:
        r"""A datum with noise up to a log-SNR, between the timesteps, too."""

    def marginal(self, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r"""A datum with the noise of ``t`` steps, :math:`q(x_t \mid x_0)` (E2), ``t`` in ``{1, …, T}``."""
        return self.noised(x_0, self.schedule.log_snr(self.schedule.check_timestep(t, at_least=1)))

    @abstractmethod
    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r"""The state before, :math:`q(x_{t-1} \mid x_t, x_0)` (E3), ``t`` in ``{2, …, T}``."""

    @abstractmethod
    def reverse(self, x_t: Tensor, denoised: Denoised, t: int | Tensor) -> TorchDistribution:
        r"""What the posterior becomes at an estimate of the datum; ``t`` in ``{1, …, T}``."""

    # The chain without end.

    def marginal_at(self, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r""":math:`q(x_u \mid x_0)` at a time of the continuous chain."""
        return self.noised(x_0, self.schedule.log_snr_at(u))

    @abstractmethod
    def increment(self, x_u: Tensor, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r"""What the posterior says of the datum in a step of the continuous chain, in units of time."""

    @abstractmethod
    def reverse_increment(self, x_u: Tensor, denoised: Denoised, u: Tensor) -> TorchDistribution:
        r"""What the reverse kernel says in that step."""

    # What the rest of the house asks.

    def tail(self, t: int) -> Self:
        r"""The process of :math:`q(x_{t+1:T} \mid x_t)`, which starts from a state."""
        process = copy.copy(self)
        process.schedule = self.schedule.tail(t)
        return process

    def check_states(self, x_0: Tensor) -> Tensor:
        """Embedded data, if the process can take them."""
        return x_0

    def check_has_score(self, argument: str, remedy: str) -> None:
        """Raise a ``ValueError`` that says what the process lacks, unless it has a score."""
        require(
            self.has_score,
            f"argument {argument!r}",
            f"a chain of {self.states}, which has no score",
            "states that are real numbers with Gaussian kernels",
            remedy,
        )


def check_fixed_curve(schedule: NoiseSchedule, states: str) -> NoiseSchedule:
    """``schedule``, if it is a single curve and nothing of it is learned."""
    require(
        not schedule.event_dim and not any(p.requires_grad for p in schedule.parameters()),
        "argument 'schedule'",
        f"{schedule}, learned or with a curve for each entry",
        f"a single fixed curve, because draws of {states} have no gradient",
        "Use LinearDecaySchedule(1000) or schedule.requires_grad_(False).",
    )
    return schedule


def pad(coefficient: Tensor, missing_dim: int, dtype: torch.dtype) -> Tensor:
    """Give a coefficient the event dimensions that it lacks, in the chain's dtype.

    They are counted from ``event_dim``, never from a difference of ``ndim``: a coefficient that has as many
    entries as the batch would otherwise line up with the wrong axis in silence.
    """
    return coefficient.reshape(coefficient.shape + (1,) * missing_dim).to(dtype)
