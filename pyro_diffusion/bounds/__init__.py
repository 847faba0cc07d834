r"""The hierarchical bound as named terms with errors.

:func:`elbo_terms` computes every term of the bound of any Pyro model and guide.
:func:`evaluate_bound` computes the mean bound over data to a Monte Carlo error that you choose.
"""

from pyro_diffusion.bounds.elbo import elbo_terms
from pyro_diffusion.bounds.evaluation import BoundEvaluation, evaluate_bound
from pyro_diffusion.bounds.moments import TermMoments, join_chunks
from pyro_diffusion.bounds.terms import ELBOTerms, Estimate, snr_weight
from pyro_diffusion.bounds.trajectories import trajectory_terms
from pyro_diffusion.moved import keep_names

__all__ = [
    "BoundEvaluation",
    "ELBOTerms",
    "Estimate",
    "TermMoments",
    "elbo_terms",
    "evaluate_bound",
    "join_chunks",
    "snr_weight",
    "trajectory_terms",
]

keep_names(
    "pyro_diffusion.bounds", {"ROWS": "walk", "log_density": "scoring", "measure_of": "scoring"}
)
