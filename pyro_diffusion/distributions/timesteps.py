"""Laws of random timesteps, drawn jointly."""

from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class Share(NamedTuple):
    """The strata of a joint draw that one process draws: their remainder modulo ``of`` is ``rest``."""

    rest: int | Tensor = 0  #: the remainder, in {0 … of − 1}; a tensor may change between draws
    of: int = 1  #: number of processes that share the strata


class TimestepDistribution(dist.TorchDistribution):
    r"""A law :math:`\pi` over timesteps whose joint draw is stratified.

    A draw of batch shape ``B`` cuts [0, 1] into as many equal strata as ``B`` has entries, puts one
    point into each, assigns the points to the entries in random order, and maps them through the
    quantile function. Each entry alone has law :math:`\pi`, and all of them together cover it evenly.

    It has no parameters to differentiate, and therefore no score-function term. Pyro treats it as
    reparameterised.

    Args:
        log_pi: :math:`\log \pi(1), …, \log \pi(T)`, shape ``(T,)``.
        batch_shape: Shape of a joint draw.
        share: Which part of a larger joint draw this draw is; by default all of it.
        edges: The result of :meth:`edges_of`, if it is known already. ``log_pi`` must not change then.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        log_pi: Tensor,
        batch_shape: torch.Size = torch.Size(),
        share: Share = Share(),
        edges: Tensor | None = None,
    ) -> None:
        self.log_pi, self.share, self.edges = log_pi, share, edges
        self._cast: dict[torch.dtype, TimestepDistribution] = {}
        super().__init__(batch_shape, validate_args=False)

    @staticmethod
    def edges_of(log_pi: Tensor) -> Tensor:
        r""":math:`\pi(1), \pi(1) + \pi(2), …`, below the last: where the quantile function steps."""
        return log_pi.double().exp().cumsum(0)[:-1].contiguous()

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(1, len(self.log_pi))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TimestepDistribution":
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        return type(self)(self.log_pi, batch_shape, self.share, self.edges)

    def to(self, dtype: torch.dtype) -> "TimestepDistribution":
        """The same law with weights of another dtype; made only once if ``log_pi`` does not change."""
        if dtype == self.log_pi.dtype:
            return self
        if self.edges is None:
            return type(self)(self.log_pi.to(dtype), self.batch_shape, self.share)
        if dtype not in self._cast:
            # It may be made in evaluation and used in training, so it must hold no inference tensors.
            with torch.inference_mode(False):
                cast = self.log_pi.to(dtype)
                law = type(self)(cast, self.batch_shape, self.share, self.edges_of(cast))
            self._cast[dtype] = law
        return self._cast[dtype]

    def shared(self, share: Share) -> "TimestepDistribution":
        """The same law, as a share of a joint draw."""
        return type(self)(self.log_pi, self.batch_shape, share, self.edges)

    def points(self, count: int) -> Tensor:
        """Uniform numbers in [0, 1), float64, which the quantile function maps to timesteps."""
        device = self.log_pi.device
        strata = torch.randperm(count, device=device) * self.share.of + self.share.rest
        within = torch.rand(count, dtype=torch.float64, device=device)
        return (strata + within) / (count * self.share.of)

    def quantile(self, points: Tensor) -> Tensor:
        """The quantile function: timesteps from uniform numbers."""
        edges = self.edges_of(self.log_pi) if self.edges is None else self.edges
        return 1 + torch.searchsorted(edges, points, right=True)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return self.quantile(self.points(shape.numel())).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_pi[value - 1]


class IndependentTimestepDistribution(TimestepDistribution):
    r"""A law :math:`\pi` whose draws are independent."""

    def points(self, count: int) -> Tensor:
        return torch.rand(count, dtype=torch.float64, device=self.log_pi.device)


class ContinuousTimestepDistribution(TimestepDistribution):
    r"""The stratified law of the continuous chain: :math:`u = 0` with probability :math:`\rho`, else uniform.

    :math:`u = 0` selects the reconstruction term, and :math:`u \in (0, 1]` the bound's rate at :math:`u`.

    Args:
        log_pi: :math:`\log \rho` and :math:`\log (1 - \rho)`, shape ``(2,)``.
        batch_shape: Shape of a joint draw.
    """

    @property
    def support(self) -> constraints.Constraint:
        return constraints.unit_interval

    def quantile(self, points: Tensor) -> Tensor:
        first, rest = self.log_pi.double().exp()
        return ((points - first) / rest).clamp(min=0)

    def log_prob(self, value: Tensor) -> Tensor:
        first, rest = self.log_pi
        return torch.where(value == 0, first, rest)
