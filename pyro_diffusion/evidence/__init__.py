r"""Evidence: estimates of :math:`\log p(x_0)` above the bound, told apart by the model that they estimate.

Importance weights over whole paths, sequential Monte Carlo along the reverse chain, and the density of the
probability flow. :func:`summary` holds them and the bounds against each other.
"""

from pyro_diffusion.evidence.evidence import Evidence, average, fingerprint, tail
from pyro_diffusion.evidence.flow import ode_log_likelihood
from pyro_diffusion.evidence.importance import importance_evidence
from pyro_diffusion.evidence.sequential import smc_evidence
from pyro_diffusion.evidence.summary import Summary, SummaryRow, summary

__all__ = [
    "Evidence",
    "Summary",
    "SummaryRow",
    "average",
    "fingerprint",
    "importance_evidence",
    "ode_log_likelihood",
    "smc_evidence",
    "summary",
    "tail",
]
