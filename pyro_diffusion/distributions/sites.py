"""Wrappers of the sites of a program, whose KLs have rules of their own."""

from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal
from torch.distributions.kl import register_kl


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
            "data, use diffusion.model or diffusion.sample(n), or the model() of a DiffusionPrior."
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


class EncoderSite(WrappedSite):
    r"""A site of a guide, :math:`q(z_0 \mid x)`, whose draw is the datum of a chain.

    It has no KL with a law of the model: :math:`p(z_0 \mid z_1)` conditions on a state that the guide draws
    after :math:`z_0`.
    """


@register_kl(EncoderSite, Distribution)
@register_kl(EncoderSite, Independent)
@register_kl(EncoderSite, MultivariateNormal)
def _has_no_kl(q: EncoderSite, p: Distribution) -> Tensor:
    raise NotImplementedError
