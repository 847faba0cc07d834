r"""Chains: the Pyro programs. Every sample site of the package is in this folder.

The programs of a whole chain are in :mod:`~pyro_diffusion.chains.programs`, and the pair for random timesteps
is in :mod:`~pyro_diffusion.chains.subsampled`. :mod:`~pyro_diffusion.chains.latent` has both for a latent
variable, inside a user's own programs. The laws of random timesteps are in
:mod:`~pyro_diffusion.chains.timesteps`. :mod:`~pyro_diffusion.chains.time` has two kinds of time: the
:math:`T` steps of a chain, and the limit :math:`T \to \infty`.
"""

from pyro_diffusion.chains.base import Program, ProgramPair
from pyro_diffusion.chains.latent import (
    CarriedLatentChain,
    LatentChain,
    LatentGuide,
    LatentPair,
)
from pyro_diffusion.chains.programs import BottomUpGuide, GenerativeChain, TopDownGuide
from pyro_diffusion.chains.subsampled import SubsampledProgram, TimestepPlate
from pyro_diffusion.chains.time import Continuum, Steps, Time
from pyro_diffusion.chains.timesteps import (
    ImportanceTimesteps,
    JointStrata,
    StratifiedTimesteps,
    Timesteps,
    UniformTimesteps,
)
from pyro_diffusion.moved import keep_names

__all__ = [
    "BottomUpGuide",
    "CarriedLatentChain",
    "Continuum",
    "GenerativeChain",
    "ImportanceTimesteps",
    "JointStrata",
    "LatentChain",
    "LatentGuide",
    "LatentPair",
    "Program",
    "ProgramPair",
    "Steps",
    "StratifiedTimesteps",
    "SubsampledProgram",
    "Time",
    "TimestepPlate",
    "Timesteps",
    "TopDownGuide",
    "UniformTimesteps",
]

keep_names(
    "pyro_diffusion.chains",
    {
        "WrappedSite": "distributions",
        "CarriedSite": "distributions",
        "BottomUpSite": "distributions",
    },
)
