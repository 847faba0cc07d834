r"""The distribution classes that several rooms use, and the KLs that are registered for them.

==================================== =================================================================
class                                is
==================================== =================================================================
``ChainNormal``                      the Gaussian of a chain's kernels (:func:`gaussian` makes them)
``Noise``, ``Changes``               bits of a chain, and how often they change in continuous time
``DiscretizedGaussian``, ``Counts``  laws of data: grey levels, and counts of large rates
``CarriedSite``, ``HandedOver`` …    wrappers of sites with rules of their own
``TimestepDistribution`` and others  laws of random timesteps, drawn jointly
==================================== =================================================================
"""

from pyro_diffusion.distributions.laws import (
    ChainNormal,
    Changes,
    Counts,
    DiscretizedGaussian,
    Noise,
    Unscored,
    gaussian,
    unexpanded,
)
from pyro_diffusion.distributions.sites import (
    BottomUpSite,
    CarriedSite,
    EncoderSite,
    HandedOver,
    WrappedSite,
)
from pyro_diffusion.distributions.timesteps import (
    ContinuousTimestepDistribution,
    IndependentTimestepDistribution,
    Share,
    TimestepDistribution,
)

__all__ = [
    "BottomUpSite",
    "CarriedSite",
    "ChainNormal",
    "Changes",
    "ContinuousTimestepDistribution",
    "Counts",
    "DiscretizedGaussian",
    "EncoderSite",
    "HandedOver",
    "IndependentTimestepDistribution",
    "Noise",
    "Share",
    "TimestepDistribution",
    "Unscored",
    "WrappedSite",
    "gaussian",
    "unexpanded",
]
