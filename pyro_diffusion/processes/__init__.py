r"""Forward processes: the fixed encoder :math:`q` of a diffusion model, for each kind of state.

:class:`GaussianProcess` noises real numbers, :class:`BernoulliProcess` bits and :class:`CategoricalProcess`
categories. A new kind of noise is one more file here and one subclass of :class:`ForwardProcess`; nothing
else in the package asks what it is.
"""

from pyro_diffusion.processes.base import Denoised, ForwardProcess
from pyro_diffusion.processes.bernoulli import BernoulliProcess
from pyro_diffusion.processes.categorical import CategoricalProcess
from pyro_diffusion.processes.gaussian import (
    GaussianProcess,
    forward_increment,
    forward_marginal,
    forward_posterior,
    forward_transition,
    terminal_prior,
)

__all__ = [
    "BernoulliProcess",
    "CategoricalProcess",
    "Denoised",
    "ForwardProcess",
    "GaussianProcess",
    "forward_increment",
    "forward_marginal",
    "forward_posterior",
    "forward_transition",
    "terminal_prior",
]
