r"""Inference with a diffusion model: :math:`p(x_0)` times another distribution.

:func:`posterior_samples` draws from the product, with its evidence. :class:`LinearGaussian` is a measurement
that it knows in closed form. :func:`impute` draws missing entries given observed ones.
"""

from pyro_diffusion.inference.draws import PosteriorSamples, Statistic
from pyro_diffusion.inference.imputation import impute
from pyro_diffusion.inference.measurements import LinearGaussian
from pyro_diffusion.inference.operators import BlockMeans, Blur, Entries, Subsampling
from pyro_diffusion.inference.posterior import posterior_samples

__all__ = [
    "BlockMeans",
    "Blur",
    "Entries",
    "LinearGaussian",
    "PosteriorSamples",
    "Statistic",
    "Subsampling",
    "impute",
    "posterior_samples",
]
