r"""Evidence: estimates of :math:`\log p(x_0)` above the bound.

There are three: importance weights over whole paths, sequential Monte Carlo along the reverse chain, and the
density of the probability flow, which is another model. :func:`summary` compares the estimates of one model
with each other and with the bounds.
"""

from pyro_diffusion.evidence.evidence import Evidence, average, fingerprint, tail
from pyro_diffusion.evidence.flow import ode_log_likelihood
from pyro_diffusion.evidence.global_latents import GlobalEvidence, global_evidence
from pyro_diffusion.evidence.importance import importance_evidence
from pyro_diffusion.evidence.sequential import smc_evidence
from pyro_diffusion.evidence.summary import Summary, SummaryRow, summary

__all__ = [
    "GlobalEvidence",
    "global_evidence",
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
