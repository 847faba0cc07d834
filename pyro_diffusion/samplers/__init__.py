"""Samplers: draws from a trained model in fewer or cheaper steps than the model's program takes."""

from pyro_diffusion.samplers.guidance import Guidance
from pyro_diffusion.samplers.samplers import AncestralSampler, DDIMSampler, ODESampler, Sampler
from pyro_diffusion.samplers.steps import Update

__all__ = ["AncestralSampler", "DDIMSampler", "Guidance", "ODESampler", "Sampler", "Update"]
