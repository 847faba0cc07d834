r"""The distribution classes that several rooms use, and the KLs that are registered for them.

==================================== =================================================================
class                                is
==================================== =================================================================
``ChainNormal``                      the Gaussian of a chain's kernels (:func:`gaussian` makes them)
``Noise``, ``Changes``               bits of a chain, and how often they change in continuous time
``DiscretizedGaussian``, ``Counts``  laws of data: grey levels, and counts of large rates
``CarriedSite``, ``HandedOver`` …    wrappers of sites with rules of their own
``TimestepDistribution`` and others  laws of random timesteps, drawn jointly
==================================== =================================================================
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, constraints
from torch.distributions.kl import register_kl
from torch.nn.functional import softplus
from torch.special import log_ndtr

__all__ = [
    "BottomUpSite",
    "CarriedSite",
    "ChainNormal",
    "Changes",
    "ContinuousTimestepDistribution",
    "Counts",
    "DiscretizedGaussian",
    "HandedOver",
    "IndependentTimestepDistribution",
    "Noise",
    "Share",
    "TimestepDistribution",
    "Unscored",
    "WrappedSite",
    "gaussian",
    "unexpanded",
]

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


# Sites of a program whose KLs have rules of their own.


class WrappedSite(dist.Independent):
    """A wrapper that gives a site's distribution another class: an ``Independent`` over no dimension."""

    def __init__(self, base_dist: dist.TorchDistribution) -> None:
        super().__init__(base_dist, 0, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        expanded = self.base_dist.expand(torch.Size(batch_shape))
        return self if expanded is self.base_dist else type(self)(expanded)


class CarriedSite(WrappedSite):
    """A site that carries its draw from guide to model, and has no term in the bound."""

    def log_prob(self, value: Tensor) -> Tensor:
        shape = value.shape[: value.dim() - self.event_dim]
        return value.new_zeros(torch.broadcast_shapes(shape, self.batch_shape))


@register_kl(CarriedSite, CarriedSite)
def _no_kl(q: CarriedSite, p: CarriedSite) -> Tensor:
    return q.mean.new_zeros(q.batch_shape)


class HandedOver(WrappedSite):
    """A site of a model whose value is drawn by its guide. It has a density, but cannot be sampled."""

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Raise a ``ValueError``."""
        raise ValueError(
            "site 't': got a model of random timesteps that was run without the draws of its own guide; "
            "expected the two programs of one pair, because they estimate the bound and do not generate "
            "data. With pair = diffusion.subsampled(), pass pair.model together with pair.guide. To generate "
            "data, use diffusion.model or diffusion.sample(n)."
        )

    sample = rsample


class BottomUpSite(WrappedSite):
    """A site of a guide whose order is opposite to the model's. Its KL raises a ``ValueError``."""


@register_kl(BottomUpSite, Distribution)
@register_kl(BottomUpSite, Independent)
@register_kl(BottomUpSite, MultivariateNormal)
def _refuse_kl(q: BottomUpSite, p: Distribution) -> Tensor:
    raise ValueError(
        "sites of a bottom-up guide: got a request for their analytic KL (TraceMeanField_ELBO or "
        "kl_divergence); expected Trace_ELBO, because the parent of x_t in the model is its descendant in "
        "this guide, so that the terms are log-ratios and not KLs. Use Trace_ELBO, or posterior_guide, which "
        "has the model's order (a hierarchical VAE has one with encoder=LadderEncoder(…))."
    )


# Laws of random timesteps.


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
