r"""Denoisers: the reverse kernels :math:`p_\theta(x_{t-1} \mid x_t)` of a diffusion model (E6).

:class:`Denoiser` is the abstract class, and :class:`NeuralDenoiser` is the one to train.
:class:`GaussianDenoiser`, :class:`GaussianMixtureDenoiser` and :class:`EnumeratedDenoiser` are exact. What a
network's output means (E13) is in :mod:`~pyro_diffusion.denoisers.parameterizations`. The variance of a
kernel is in :mod:`~pyro_diffusion.denoisers.variances`.
"""

from pyro_diffusion.denoisers.base import Denoiser
from pyro_diffusion.denoisers.bernoulli import (
    BernoulliDenoiser,
    EnumeratedDenoiser,
    NeuralBernoulliDenoiser,
)
from pyro_diffusion.denoisers.categorical import NeuralCategoricalDenoiser
from pyro_diffusion.denoisers.exact import GaussianDenoiser, GaussianMixtureDenoiser
from pyro_diffusion.denoisers.neural import NeuralDenoiser
from pyro_diffusion.denoisers.parameterizations import (
    DataPrediction,
    LevelPrediction,
    NoisePrediction,
    Parameterization,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_diffusion.denoisers.variances import (
    ForwardVariance,
    LearnedVariance,
    OptimalVariance,
    PosteriorVariance,
    ReverseVariance,
)
from pyro_diffusion.moved import keep_names
from pyro_diffusion.processes import Denoised

__all__ = [
    "BernoulliDenoiser",
    "DataPrediction",
    "Denoised",
    "Denoiser",
    "EnumeratedDenoiser",
    "ForwardVariance",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "LearnedVariance",
    "LevelPrediction",
    "NeuralBernoulliDenoiser",
    "NeuralCategoricalDenoiser",
    "NeuralDenoiser",
    "NoisePrediction",
    "OptimalVariance",
    "Parameterization",
    "PosteriorVariance",
    "ReverseVariance",
    "ScorePrediction",
    "VelocityPrediction",
]

keep_names("pyro_diffusion.denoisers", {"check_argument": "checks", "network_dtype": "networks"})
