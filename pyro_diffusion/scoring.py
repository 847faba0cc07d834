r"""A term of the bound: the densities of a draw of :math:`q` under :math:`q` and :math:`p`, and the KL.

A site of a guide has a distribution :math:`q`, the model's site of the same name a distribution :math:`p`.
For a draw :math:`x \sim q` the bound uses one of two numbers with the same mean,

.. math::
    \log q(x) - \log p(x) \qquad \text{or} \qquad \mathrm{KL}(q \,\|\, p) .

Densities are summed in float64, whatever dtype the site has. The difference of two sums of a thousand float32
numbers would have rounding errors as large as the Monte Carlo error of the bound.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence

from pyro_diffusion.distributions import BottomUpSite, ChainNormal, unexpanded

__all__ = ["Score", "log_density", "measure_of", "replayed", "score"]


class Score:
    """A draw at a site with its densities and its KL. Each is computed when it is first read."""

    def __init__(self, q: Any, p: Any, x: Tensor | None = None) -> None:
        self.q, self.p = q, p
        if x is not None:
            self.x = x

    @cached_property
    def x(self) -> Tensor:
        """The draw of ``q``."""
        return self.q.sample()

    @cached_property
    def log_q(self) -> Tensor:
        r""":math:`\log q(x)`, float64, of the site's batch shape."""
        return log_density(self.q, self.x)

    @cached_property
    def log_p(self) -> Tensor:
        r""":math:`\log p(x)`, float64, of the site's batch shape."""
        return log_density(self.p, self.x)

    @property
    def log_ratio(self) -> Tensor:
        r""":math:`\log q(x) - \log p(x)`."""
        return self.log_q - self.log_p

    @cached_property
    def kl(self) -> Tensor | None:
        """The KL in float64; ``None`` where no formula is known."""
        try:
            return kl_divergence(self.q, self.p).double()
        except NotImplementedError:
            return None

    @property
    def term(self) -> Tensor:
        """The KL; the log-ratio of the draw where no formula is known."""
        return self.log_ratio if self.kl is None else self.kl


def score(q: Any, p: Any, x: Tensor | None = None) -> Score:
    r"""Score a draw of :math:`q` under :math:`q` and :math:`p`.

    Args:
        q: Distribution of the guide's site.
        p: Distribution of the model's site.
        x: The draw; ``None`` draws one when it is needed.

    Returns:
        :class:`Score`. Its ``kl`` raises a ``ValueError`` for a site of a bottom-up guide.
    """
    return Score(q, p, x)


def replayed(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[poutine.Trace, poutine.Trace]:
    """A trace of the guide, and one of the model with its draws. Outer handlers do not see the sites."""
    # As ``with`` blocks: a function that a Pyro handler wraps cannot be called with context=.
    with poutine.block(hide_types=["sample", "observe"]):
        with poutine.trace() as drawn:
            guide(*args, **kwargs)
        with poutine.trace() as scored, poutine.replay(trace=drawn.trace):
            model(*args, **kwargs)
    return drawn.trace, scored.trace


def measure_of(distribution: Any) -> str:
    """Whether a distribution has a "density" or a "mass"; empty if its support is not known."""
    try:
        return "mass" if distribution.support.is_discrete else "density"
    except NotImplementedError:
        return ""


def log_density(distribution: Any, value: Tensor) -> Tensor:
    """The log-density as float64. The terms of a Gaussian are converted to float64 before they are summed."""
    base = distribution.base_dist if type(distribution) is BottomUpSite else distribution
    if isinstance(base, Independent) and type(base.base_dist) in (Normal, dist.Normal, ChainNormal):
        return _normal_log_density(base.base_dist, value, base.reinterpreted_batch_ndims)
    while hasattr(base, "base_dist") and not isinstance(base, TransformedDistribution):
        base = base.base_dist  # a transform may have parameters, whose dtype it needs
    if isinstance(base, Normal):
        value = value.double()
    return distribution.log_prob(value).double()


def _normal_log_density(normal: Normal, value: Tensor, event_dim: int) -> Tensor:
    r""":math:`\sum_i -\tfrac12 z_i^2 - \log s_i - \tfrac12 \log 2\pi`, with one logarithm for each scale.

    A scale that a kernel expanded over batch and event counts as one number.
    """
    error = value.double() - normal.loc
    event_shape = error.shape[error.dim() - event_dim :]
    dims = tuple(range(-event_dim, 0))
    if torch.is_grad_enabled():
        square = (error / normal.scale).square()
    else:
        square = error.div_(normal.scale).square_()  # in place: a third of the time of large states
    few = unexpanded(normal.scale).double().log()
    log_scale = few.expand(*few.shape[: few.dim() - event_dim], *event_shape)
    if event_dim:
        square, log_scale = square.sum(dims), log_scale.sum(dims)
    return -0.5 * square - log_scale - 0.5 * event_shape.numel() * math.log(2 * math.pi)
