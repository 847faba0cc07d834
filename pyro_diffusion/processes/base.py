r"""The abstract forward process: the fixed encoder :math:`q` of a diffusion model, and its end.

A process adds noise to a datum step by step. Its kernels follow from one curve, the schedule's log-SNR
:math:`\lambda_t`, and from the kind of states. Each kind of noise is one subclass of :class:`ForwardProcess`,
which defines

.. math::
    q(x_t \mid x_{t-1}) \;\text{(E1)}, \quad q(x_t \mid x_0) \;\text{(E2)}, \quad
    q(x_{t-1} \mid x_t, x_0) \;\text{(E3)}, \quad p(x_T) \;\text{(E5)},

the reverse kernel that follows from an estimate of the datum, and the limits of E3 and of that kernel for
small steps. Shapes are ``batch_shape + event_shape``. A timestep is an integer, or a LongTensor that
broadcasts to ``batch_shape``. A time :math:`u \in [0, 1]` of the continuous chain is such a tensor.
"""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from pyro_diffusion.checks import require
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class Denoised(NamedTuple):
    r"""The output of a denoiser at a state, from one call of the network."""

    x_0_hat: Tensor  #: the estimate of :math:`x_0`, ``batch_shape + event_shape``
    #: logits of each value, ``batch_shape + event_shape + (K,)``; for bits the logit of a one; for a mixture
    #: those of its components, ``batch_shape + (K,)``
    logits: Tensor | None = None
    #: the weight by which :class:`~pyro_diffusion.denoisers.LearnedVariance` interpolates
    variance: Tensor | None = None


class ForwardProcess(ABC):
    r"""The forward chain :math:`q` of one kind of states, on a schedule.

    A process has no parameters of its own. It is made on demand from a schedule and a few numbers.

    Args:
        schedule: Noise schedule of the chain.
        event_shape: Shape of one state.
    """

    states: ClassVar[str]  #: what the states are, in words
    #: whether the states have a score, which real numbers with Gaussian kernels have
    has_score: ClassVar[bool] = False
    #: the value that a kernel gets in an unobserved entry; ``None`` if the states have no such value
    gap: ClassVar[float | None] = None

    def __init__(self, schedule: NoiseSchedule, event_shape: torch.Size) -> None:
        self.schedule, self.event_shape = schedule, event_shape

    @property
    def event_dim(self) -> int:
        """Number of rightmost dimensions that form one state."""
        return len(self.event_shape)

    @property
    def missing_dim(self) -> int:
        """Event dimensions that coefficients lack: all of them, or none if each entry has its own curve."""
        return len(self.event_shape) - self.schedule.event_dim

    @property
    def state_size(self) -> int:
        """Number of elements that one state has in the largest tensor of a step."""
        return self.event_shape.numel()

    # The chain.

    @abstractmethod
    def prior(self, dtype: torch.dtype) -> TorchDistribution:
        """The start of the reverse chain, :math:`p(x_T)` (E5): no batch shape, on the schedule's device."""

    @abstractmethod
    def transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        r"""One step of noise, :math:`q(x_t \mid x_{t-1})` (E1), ``t`` in ``{1, …, T}``."""

    @abstractmethod
    def noised(self, x_0: Tensor, log_snr: Tensor) -> TorchDistribution:
        r"""A datum with the noise of any log-SNR, also of one between two timesteps."""

    def marginal(self, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r"""A datum with the noise of ``t`` steps, :math:`q(x_t \mid x_0)` (E2), ``t`` in ``{1, …, T}``."""
        return self.noised(x_0, self.schedule.log_snr(self.schedule.check_timestep(t, at_least=1)))

    @abstractmethod
    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r"""The state before, :math:`q(x_{t-1} \mid x_t, x_0)` (E3), ``t`` in ``{2, …, T}``."""

    @abstractmethod
    def reverse(self, x_t: Tensor, denoised: Denoised, t: int | Tensor) -> TorchDistribution:
        r"""The posterior at the estimate, or its mean over possible data; ``t`` in ``{1, …, T}``."""

    # The continuous chain.

    def marginal_at(self, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r""":math:`q(x_u \mid x_0)` at a time of the continuous chain."""
        return self.noised(x_0, self.schedule.log_snr_at(u))

    @abstractmethod
    def increment(self, x_u: Tensor, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r"""The kernel of :math:`q` in the term of the continuous chain at ``u``, per unit of time."""

    @abstractmethod
    def reverse_increment(self, x_u: Tensor, denoised: Denoised, u: Tensor) -> TorchDistribution:
        r"""The kernel of :math:`p` in that term."""

    # For readers and models.

    def tail(self, t: int) -> Self:
        r"""The process of :math:`q(x_{t+1:T} \mid x_t)`, which starts from a state."""
        process = copy.copy(self)
        process.schedule = self.schedule.tail(t)
        return process

    def check_states(self, x_0: Tensor) -> Tensor:
        """``x_0``, embedded data, if the process can add noise to them."""
        return x_0

    def warn_of_scale(self, x_0: Tensor) -> None:  # noqa: B027  # bits and categories have one scale
        """Warn if embedded data are much larger or smaller than the chain's noise."""

    def check_has_score(self, argument: str, remedy: str) -> None:
        """Raise a ``ValueError`` unless the states have a score."""
        require(
            self.has_score,
            f"argument {argument!r}",
            f"a chain of {self.states}, which has no score",
            "states that are real numbers with Gaussian kernels",
            remedy,
        )


def check_fixed_curve(schedule: NoiseSchedule, states: str) -> NoiseSchedule:
    """``schedule``, if it is a single curve without learned parameters."""
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

    Their number follows from ``event_dim`` and never from a difference of ``ndim``. Otherwise a coefficient
    with as many entries as the batch could line up with the wrong axis, without an error.
    """
    return coefficient.reshape(coefficient.shape + (1,) * missing_dim).to(dtype)
