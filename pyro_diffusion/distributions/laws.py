"""Laws of states and of data: the Gaussian of a chain's kernels, bits, grey levels and counts."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl
from torch.nn.functional import softplus
from torch.special import log_ndtr

# Kernels of a chain.


def gaussian(mean: Tensor, scale: Tensor, event_dim: int) -> dist.TorchDistribution:
    """A Normal with independent entries. It is not validated, because a schedule's scales are positive."""
    normal = ChainNormal(mean, scale, validate_args=False)
    return _Event(normal, event_dim, validate_args=False) if event_dim else normal


class _Settled:
    """A law that is not copied when it is expanded to its own shape, as every plate around a site does."""

    batch_shape: torch.Size

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        same = _instance is None and torch.Size(batch_shape) == self.batch_shape
        return self if same else super().expand(batch_shape, _instance)  # type: ignore[misc]


class _Event(_Settled, dist.Independent):
    """Independent entries that form one datum."""


class ChainNormal(_Settled, dist.Normal):
    """A Normal that computes the logarithm of a scale only once if many entries share it."""

    def log_prob(self, value: Tensor) -> Tensor:
        r""":math:`-\tfrac12 z^2 - \log s - \tfrac12 \log 2\pi` for each entry."""
        z = (value - self.loc) / self.scale
        return -0.5 * z.square() - (unexpanded(self.scale).log() + 0.5 * math.log(2 * math.pi))


@register_kl(ChainNormal, ChainNormal)
def _kl_of_normals(q: ChainNormal, p: ChainNormal) -> Tensor:
    ratio = (unexpanded(q.scale) / unexpanded(p.scale)).square()
    distance = ((q.loc - p.loc) / p.scale).square()
    return 0.5 * (distance + (ratio - ratio.log() - 1))


def unexpanded(scale: Tensor) -> Tensor:
    """A scale with one entry in each dimension that it was expanded along; it broadcasts as before."""
    strides = scale.stride()
    return scale[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]


class Unscored:
    """A discrete law whose draws need no score-function term if none of its parameters is learned."""

    sample: Callable[..., Tensor]

    @property
    def has_rsample(self) -> bool:
        return not any(x.requires_grad for x in vars(self).values() if isinstance(x, Tensor))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.sample(sample_shape)


class Noise(Unscored, dist.Bernoulli):
    """Bits of a chain."""


@register_kl(Noise, Noise)
def _kl_of_bits(q: Noise, p: Noise) -> Tensor:
    """The KL of two Bernoulli laws. torch does not broadcast it, and is inexact near probability one."""
    ones = q.logits.sigmoid() * (softplus(-p.logits) - softplus(-q.logits))
    return ones + (-q.logits).sigmoid() * (softplus(p.logits) - softplus(q.logits))


class Changes(Unscored, dist.Poisson):
    """Counts of changes in a continuous chain."""


# Laws of data.


class Counts(dist.Poisson):
    """A Poisson law in float64. For large counts its log-mass is a small difference of large numbers."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        count, rate = value.double(), self.rate.double()
        return (count.xlogy(rate) - rate - (count + 1).lgamma()).to(self.rate.dtype)


class DiscretizedGaussian(dist.TorchDistribution):
    r"""A Gaussian in embedded space, rounded to :math:`K` levels in :math:`[-1, 1]` and clipped to them.

    A draw is computed in exactly this way, so that the probabilities of the levels sum to one.

    Args:
        loc: Mean in embedded space, shape ``batch_shape``.
        scale: Standard deviation in embedded space, broadcastable to ``loc``.
        num_levels: Number of levels :math:`K`; the support is the whole numbers ``0 … K − 1``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_enumerate_support = True

    def __init__(
        self, loc: Tensor, scale: Tensor, num_levels: int, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_levels - 1)

    @property
    def mean(self) -> Tensor:
        """Mean level, by summing over the support."""
        levels = self.enumerate_support()
        return (self.log_prob(levels).exp() * levels).sum(0)

    @property
    def variance(self) -> Tensor:
        """Variance of the level, by summing over the support."""
        levels = self.enumerate_support()
        return (self.log_prob(levels).exp() * (levels - self.mean) ** 2).sum(0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscretizedGaussian":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedGaussian(loc, scale, self.num_levels, validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            point = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            return ((point + 1) * (self.num_levels - 1) / 2).round().clamp(0, self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # In float64: a float32 network may be a million standard deviations off at first.
        level, loc, scale = value.double(), self.loc.double(), self.scale.double()
        centre = level * (2 / (self.num_levels - 1)) - 1
        lower = (centre - 1 / (self.num_levels - 1) - loc) / scale
        upper = (centre + 1 / (self.num_levels - 1) - loc) / scale
        inner = _log_interval(lower, upper)
        log_prob = torch.where(level <= 0, _log_cdf(upper), inner)
        log_prob = torch.where(level >= self.num_levels - 1, _log_cdf(-lower), log_prob)
        return log_prob.to(self.loc.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        levels = torch.arange(self.num_levels, device=self.loc.device, dtype=self.loc.dtype)
        levels = levels.reshape((-1,) + (1,) * len(self.batch_shape))
        return levels.expand((-1, *self.batch_shape)) if expand else levels


def _log_cdf(z: Tensor) -> Tensor:
    r""":math:`\log \Phi(z)` with a finite gradient far in the tail, where ``log_ndtr`` has the gradient NaN.

    Below :math:`z = -1000` it is :math:`-z^2/2 - \log(-z) - \tfrac12 \log 2\pi`, accurate to
    :math:`z^{-2}`.
    """
    far = z.clamp(max=-1000.0)
    tail = -0.5 * far.square() - (-far).log() - 0.5 * math.log(2 * math.pi)
    return torch.where(z < -1000.0, tail, log_ndtr(z.clamp(min=-1000.0)))


def _log_interval(lower: Tensor, upper: Tensor) -> Tensor:
    r""":math:`\log(\Phi(u) - \Phi(l))`, on the side where :math:`\Phi` is small, so that nothing cancels."""
    flip = lower + upper > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper = _log_cdf(upper)
    # The difference is zero only where it underflows; the floor keeps the logarithm finite there.
    ratio = (_log_cdf(lower) - log_upper).clamp(max=-torch.finfo(upper.dtype).tiny)
    return log_upper + (-torch.expm1(ratio)).log()
