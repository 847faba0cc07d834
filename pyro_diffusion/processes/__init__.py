r"""Forward processes: the fixed encoder :math:`q` of a diffusion model, for each kind of state.

:class:`GaussianProcess` adds noise to real numbers, :class:`BernoulliProcess` to bits and
:class:`CategoricalProcess` to categories. A new kind of noise is one more file here, with one subclass of
:class:`ForwardProcess`. Nothing else in the package depends on the kind.
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
