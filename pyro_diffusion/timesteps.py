r"""How random timesteps are drawn: laws over :math:`\{1, …, T\}` that a program samples ``t`` from.

The bound is a sum over timesteps; a subsampled program draws ``k`` of them for each datum and weights
a term by :math:`1 / (k\, \pi(t))`, which leaves its expectation as it is for any :math:`\pi > 0`.
``t = 1`` stands for the reconstruction term and ``t ≥ 2`` for the KL at site :math:`x_{t-1}`.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1 (low-discrepancy timesteps).
    https://arxiv.org/abs/2107.00630
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["StratifiedTimesteps", "TimestepDistribution", "Timesteps"]


class TimestepDistribution(TorchDistribution):
    r"""A law :math:`\pi` over timesteps whose joint draw is stratified.

    A draw of batch shape ``B`` cuts [0, 1] into as many equal strata as ``B`` has entries, puts one
    point into each, hands the points to the entries in random order and maps them through the
    quantile function: each entry alone has law :math:`\pi`, all together cover it evenly.

    It has no parameters to differentiate, hence no score-function term: for Pyro it is
    reparameterised.

    Args:
        log_pi: :math:`\log \pi(1), …, \log \pi(T)`, shape ``(T,)``.
        batch_shape: Shape of a joint draw.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, log_pi: Tensor, batch_shape: torch.Size = torch.Size()) -> None:
        self.log_pi = log_pi
        super().__init__(batch_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(1, len(self.log_pi))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TimestepDistribution":
        return TimestepDistribution(self.log_pi, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        count, device = shape.numel(), self.log_pi.device
        strata = torch.randperm(count, device=device)
        points = (strata + torch.rand(count, dtype=torch.float64, device=device)) / count
        edges = self.log_pi.double().exp().cumsum(0)
        t = 1 + torch.searchsorted(edges[:-1].contiguous(), points, right=True)
        return t.reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_pi[value - 1]


class Timesteps(ABC):
    """A rule that gives the law of the timesteps, for a chain of any length."""

    @abstractmethod
    def __call__(self, num_timesteps: int, device: torch.device) -> TimestepDistribution:
        r"""The law :math:`\pi` over :math:`\{1, …, T\}`."""


class StratifiedTimesteps(Timesteps):
    r"""Uniform over the KL terms, with a share of the draws for the reconstruction term.

    .. math::
        \pi(1) = \max(\rho, 1/T), \qquad \pi(t) = \frac{1 - \pi(1)}{T - 1} \quad (t \ge 2).

    Drawn once in :math:`T` and weighted by :math:`T`, the reconstruction term would dominate the
    variance of the bound.

    Args:
        reconstruction_share: :math:`\rho`, in (0, 1).

    Raises:
        ValueError: A share outside (0, 1).
    """

    def __init__(self, reconstruction_share: float = 0.1) -> None:
        if not 0 < reconstruction_share < 1:
            raise ValueError(
                f"argument 'reconstruction_share': got {reconstruction_share}; expected a number in "
                "(0, 1), the share of the draws that go to t = 1. 0.1 suits most likelihoods."
            )
        self.reconstruction_share = reconstruction_share

    def __call__(self, num_timesteps: int, device: torch.device) -> TimestepDistribution:
        first = max(self.reconstruction_share, 1 / num_timesteps)
        rest = (1 - first) / max(num_timesteps - 1, 1)
        pi = torch.full((num_timesteps,), rest, dtype=torch.float64, device=device)
        pi[0] = first
        return TimestepDistribution(pi.log())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(reconstruction_share={self.reconstruction_share})"
