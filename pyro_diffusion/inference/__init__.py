r"""Inference with a diffusion model: :math:`p(x_0)` times another distribution.

:func:`posterior_samples` draws from the product, with its evidence. :class:`LinearGaussian` is a measurement
that it knows in closed form. :func:`impute` draws missing entries given observed ones.

Inside a bigger Pyro model, :func:`flow` makes the data of a diffusion model a site like any other, and
:class:`DiffusionPrior` makes its chain the prior of a latent variable.
"""

from pyro_diffusion.inference.draws import PosteriorSamples, Statistic
from pyro_diffusion.inference.imputation import impute
from pyro_diffusion.inference.measurements import LinearGaussian
from pyro_diffusion.inference.operators import BlockMeans, Blur, Entries, Subsampling
from pyro_diffusion.inference.posterior import posterior_samples
from pyro_diffusion.inference.prior import DiffusionPrior
from pyro_diffusion.inference.probability_flow import ProbabilityFlow, flow

__all__ = [
    "BlockMeans",
    "Blur",
    "DiffusionPrior",
    "Entries",
    "LinearGaussian",
    "PosteriorSamples",
    "ProbabilityFlow",
    "Statistic",
    "Subsampling",
    "flow",
    "impute",
    "posterior_samples",
]
