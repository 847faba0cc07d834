r"""A diffusion chain as the prior of a latent variable, inside a user's own model and guide.

The latent :math:`z_0` of a user's model has a decoder :math:`p(x \mid z_0)` and an encoder
:math:`q(z_0 \mid x)`. A diffusion model takes the place of its prior. The bound is that of a hierarchical VAE
whose upper levels are the chain (E14):

.. math::
    \log p(x) \ge E_{q(z_0 \mid x)} \Big[ \log p(x \mid z_0) - \log q(z_0 \mid x)
        + E \log p(z_0 \mid z_1) - \sum_{t=1}^T L_t \Big] .

References:
    Score-based Generative Modeling in Latent Space (Vahdat et al., 2021), section 3.
    https://arxiv.org/abs/2106.05931
"""

from typing import Any

from torch import Tensor

from pyro_diffusion.chains import (
    CarriedLatentChain,
    LatentChain,
    LatentGuide,
    LatentPair,
    Timesteps,
)
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion

__all__ = ["DiffusionPrior"]


class DiffusionPrior(LatentPair):
    r"""The chain of a diffusion model as the prior of a latent :math:`z_0`.

    Its ``model()`` and ``guide(q)`` are called inside the user's programs, in the data plate, and return
    :math:`z_0`. They state the chain's sites there, unscaled, as ``prior.x_T … prior.x_1``, and :math:`z_0`
    as ``prior.x_0``.

    .. code-block:: python

        prior = DiffusionPrior(diffusion)

        def model(x, prior):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z_0 = prior.model()
                pyro.sample("x", dist.Bernoulli(logits=decoder(z_0)).to_event(1), obs=x)

        def guide(x, prior):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, scale = encoder(x)
                prior.guide(dist.Normal(loc, scale).to_event(1))

        svi = SVI(model, guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        svi.step(x, prior.subsampled())

    ``posterior_guide(q)`` has the same joint law as ``guide(q)``, in the model's order, so that the chain's
    terms are KLs. For training, :meth:`subsampled` has the same bound for one network row a datum.

    Args:
        diffusion: The model of :math:`z_0`.
        prefix: Put in front of the names of its sites, with a dot. Two priors in one program need two.

    Raises:
        ValueError: An argument that is not a model. From a program: an encoder of another event shape than
            the model's data.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,), hidden_size=16), LogSNRSchedule(10), event_shape=(2,))
        >>> prior = DiffusionPrior(DiffusionModel(denoiser))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(prior.model(), 0.5).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         prior.posterior_guide(dist.Normal(0.8 * x, 0.4).to_event(1))
        >>> terms = elbo_terms(model, guide, torch.zeros(3, 2))
        >>> terms.kinds[:4]
        ('log-likelihood', 'negative entropy', 'cross-entropy', 'KL')

    References:
        Score-based Generative Modeling in Latent Space (Vahdat et al., 2021), section 3.
        https://arxiv.org/abs/2106.05931
    """

    def __init__(self, diffusion: DiffusionModel, *, prefix: str = "prior") -> None:
        diffusion = check_diffusion(diffusion)
        model, guide = LatentChain(diffusion.model, prefix), LatentGuide(diffusion.guide, prefix)
        super().__init__(model, guide)
        self.diffusion, self.prefix = diffusion, prefix
        self.posterior_guide = LatentGuide(diffusion.posterior_guide, prefix)

    def __repr__(self) -> str:
        return f"DiffusionPrior({self.diffusion.name!r}, prefix={self.prefix!r})"

    def subsampled(
        self, num_timesteps: int = 1, *, timesteps: Timesteps | None = None
    ) -> LatentPair:
        r"""The pair with ``k`` random timesteps for each datum, for training.

        It is used in the place of the prior and estimates the same bound without bias, under
        ``TraceMeanField_ELBO`` and ``Trace_ELBO``. The latent :math:`z_0` is the site ``prior.z_0``, of the
        guide's draw; the terms of the chain observe it as ``prior.x_0`` in the plate ``prior.timesteps``.

        Args:
            num_timesteps: Number of draws ``k`` for each datum.
            timesteps: Law of the timesteps; stratified over the batch by default.
        """
        pair = self.diffusion.subsampled(num_timesteps, timesteps=timesteps)
        carried = CarriedLatentChain(pair.model, self.prefix)
        return LatentPair(carried, LatentGuide(pair.guide, self.prefix, carried.site))

    def sample(self, num_samples: int = 1, context: Any = None) -> Tensor:
        r"""Draws of :math:`z_0`, shape ``(n,)`` + the latent's shape."""
        return self.diffusion.sample(num_samples, context)
