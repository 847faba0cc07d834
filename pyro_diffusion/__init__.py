r"""Diffusion as a generative model in Pyro: three programs, one bound."""

from pyro_diffusion.chains import BottomUpGuide, GenerativeChain, TimestepPlate, TopDownGuide
from pyro_diffusion.denoisers import (
    Denoiser,
    ForwardVariance,
    GaussianDenoiser,
    NeuralDenoiser,
    PosteriorVariance,
)
from pyro_diffusion.diffusion import DiffusionModel
