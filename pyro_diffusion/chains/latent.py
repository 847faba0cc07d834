r"""The chain over a latent variable: programs that state it inside a bigger model and guide.

A latent :math:`z_0` is the datum of a diffusion model, with a decoder :math:`p(x \mid z_0)` after it and an
encoder :math:`q(z_0 \mid x)` before it:

.. math::
    p(x, z_{0:T}) = p(z_T) \prod_{t=1}^T p(z_{t-1} \mid z_t)\; p(x \mid z_0), \qquad
    q(z_{0:T} \mid x) = q(z_0 \mid x)\, q(z_{1:T} \mid z_0) .

The whole chain has :math:`z_0` as its last latent. A pair of a few random timesteps takes a draw of it as
data: :math:`z_0` is a site of the guide alone, which the model carries without a term, and the terms of the
chain, :math:`\log p(z_0 \mid z_1)` included, are weighted at their timesteps.

References:
    Score-based Generative Modeling in Latent Space (Vahdat et al., 2021). https://arxiv.org/abs/2106.05931
"""

from typing import Any

import pyro
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_diffusion.chains.base import joined
from pyro_diffusion.checks import require
from pyro_diffusion.distributions import CarriedSite, EncoderSite, HandedOver
from pyro_diffusion.typed import TorchDistribution


class LatentChain(nn.Module):
    r"""A chain inside a user's model: :math:`z_0 \sim p(z_0)`, drawn by the chain itself.

    Args:
        program: A model of the chain, whose sites it states.
        prefix: Put in front of the sites' names, with a dot.
    """

    program: Any  #: a module with an owner

    def __init__(self, program: nn.Module, prefix: str) -> None:
        super().__init__()
        self.program, self.prefix = program, prefix

    def forward(self, context: Any = None) -> Tensor:
        """State the sites in the caller's plate; returns :math:`z_0`."""
        z_0: Tensor = self.program(context=context, plate=False, prefix=self.prefix)
        return z_0


class CarriedLatentChain(LatentChain):
    r"""The same for a :math:`z_0` that the guide has drawn, as the datum of the program.

    The sites of the program are marked ``infer={"of_latent": True}``: the one that observes :math:`z_0` is a
    term of a latent too, and a warm-up scales it with the others.
    """

    site = "z_0"  #: name of the site of :math:`z_0`, after the prefix

    def forward(self, context: Any = None) -> Tensor:
        prior = self.program.owner.prior()
        z_0 = pyro.sample(joined(self.prefix, self.site), HandedOver(CarriedSite(prior)))
        with poutine.infer_config(config_fn=lambda site: {"of_latent": True}):
            self.program(z_0, context, plate=False, prefix=self.prefix)
        return z_0


class LatentGuide(nn.Module):
    r"""An encoder and a chain inside a user's guide: :math:`q(z_0 \mid x)\, q(z_{1:T} \mid z_0)`.

    Args:
        program: A guide of the chain, whose sites it states.
        prefix: Put in front of the sites' names, with a dot.
        site: Name of the site of :math:`z_0`, after the prefix: ``"x_0"`` in a whole chain.
    """

    program: Any  #: a module with an owner

    def __init__(self, program: nn.Module, prefix: str, site: str = "x_0") -> None:
        super().__init__()
        self.program, self.prefix, self.site = program, prefix, joined(prefix, site)

    def forward(self, encoder: TorchDistribution, context: Any = None) -> Tensor:
        r"""State the sites in the caller's plate; returns :math:`z_0`.

        Args:
            encoder: :math:`q(z_0 \mid x)`, with the event shape of the chain's data.
            context: Context of a conditional chain.
        """
        self._check(encoder)
        z_0: Tensor = pyro.sample(self.site, EncoderSite(encoder))
        try:
            self.program(z_0, context, plate=False, prefix=self.prefix)
        except ValueError as error:
            raise ValueError(
                f"site {self.site!r}, a latent that is the chain's datum: {error}"
            ) from error
        return z_0

    def _check(self, encoder: Any) -> None:
        is_law = isinstance(encoder, Distribution)
        got = f"{encoder.event_dim} event dimensions" if is_law else f"a {type(encoder).__name__}"
        require(
            is_law and (encoder.event_dim > 0 or not self.program.owner.event_shape),
            f"site {self.site!r}, the encoder of a latent",
            got,
            "a distribution whose event is the whole latent",
            "Pass dist.Normal(loc, scale).to_event(1), for a latent that is a vector.",
        )


class LatentPair(nn.Module):
    """A chain inside a user's model, and an encoder with the chain inside the user's guide."""

    model: LatentChain
    guide: LatentGuide

    def __init__(self, model: LatentChain, guide: LatentGuide) -> None:
        super().__init__()
        self.model, self.guide = model, guide
