r"""Forward processes: the fixed encoder :math:`q` of a diffusion model, for each kind of state.

:class:`GaussianProcess` noises real numbers, :class:`BernoulliProcess` bits and :class:`CategoricalProcess`
categories. A new kind of noise is one more file here and one subclass of :class:`ForwardProcess`; nothing
else in the package asks what it is.
"""

from pyro_diffusion.processes.base import Denoised, ForwardProcess, check_fixed_curve, pad
from pyro_diffusion.processes.bernoulli import BernoulliProcess
from pyro_diffusion.processes.categorical import CategoricalProcess
from pyro_diffusion.processes.gaussian import (
    ChainStep,
    GaussianProcess,
    chain_step,
    forward_increment,
    forward_marginal,
    forward_posterior,
    forward_transition,
    posterior_mean,
    posterior_variance,
    terminal_prior,
)

__all__ = [
    "BernoulliProcess",
    "CategoricalProcess",
    "ChainStep",
    "Denoised",
    "ForwardProcess",
    "GaussianProcess",
    "chain_step",
    "check_fixed_curve",
    "forward_increment",
    "forward_marginal",
    "forward_posterior",
    "forward_transition",
    "pad",
    "posterior_mean",
    "posterior_variance",
    "terminal_prior",
]
