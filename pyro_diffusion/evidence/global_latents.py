r"""The evidence of a model with global latents, from the weights of its guide's draws.

A Pyro model with latents that all data share, and an automatic guide of it, have one number of evidence and
not one for each datum:

.. math::
    \log \hat p(y) = \log \frac1K \sum_k w_k, \qquad w_k = \frac{p(y, z_k)}{q(z_k)}, \qquad z_k \sim q .

The mean of the :math:`\log w_k` is the bound that ``SVI`` has maximised. Pareto :math:`\hat k` says whether
the guide covers the posterior: it is a diagnostic of variational inference itself.

References:
    Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018).
    https://arxiv.org/abs/1802.02538
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pyro_diffusion.arviz_bridge import good_k
from pyro_diffusion.bounds.checks import check_program
from pyro_diffusion.checks import check_count
from pyro_diffusion.display import as_table
from pyro_diffusion.evidence.evidence import average
from pyro_diffusion.evidence.particles import global_draws

__all__ = ["GlobalEvidence", "global_evidence"]


class GlobalEvidence(NamedTuple):
    r"""Bound and evidence of a model with global latents, in nats; plain numbers."""

    log_evidence: float  #: :math:`\log \hat p(y)`
    standard_error: float  #: Monte Carlo error of the estimate, to first order
    elbo: float  #: the bound, from the same draws
    elbo_standard_error: float  #: its Monte Carlo error
    ess: float  #: effective sample size, between 1 and the number of particles
    pareto_k: float  #: :math:`\hat k` of the weights; −∞ for constant ones, NaN for fewer than 25
    log_weights: Tensor  #: :math:`\log w_k`, float64, ``(K,)``

    @property
    def num_particles(self) -> int:
        """Number of draws :math:`K`."""
        return len(self.log_weights)

    @property
    def reliable(self) -> bool:
        r"""Whether :math:`\hat k` is small enough for the number of draws."""
        return self.pareto_k < good_k(self.num_particles)

    @property
    def verdict(self) -> str:
        """A sentence that says whether to trust the estimate and the guide."""
        limit = good_k(self.num_particles)
        if math.isnan(self.pareto_k):
            return "Too few draws for Pareto k: take 25 or more, and better 1,000."
        if self.pareto_k == -math.inf:
            return "The weights are constant: the guide is the posterior."
        if self.reliable:
            return (
                f"Pareto k is {self.pareto_k:.2f}, below {limit:.2f}: the weights of these draws show "
                "no fault. A mode or a neck that no draw has reached would not show: begin elsewhere to look "
                "for one."
            )
        return (
            f"Pareto k is {self.pareto_k:.2f}, above {limit:.2f}: the guide misses a part of the posterior. "
            "Trust neither the estimate nor the guide. Use a richer guide, train longer, or use NUTS."
        )

    def __repr__(self) -> str:
        return (
            f"GlobalEvidence(log_evidence={self.log_evidence:.4f} ± {self.standard_error:.2g}, "
            f"elbo={self.elbo:.4f} ± {self.elbo_standard_error:.2g} nats, {self.num_particles:,} draws, "
            f"pareto_k={self.pareto_k:.2f}, ess={self.ess:.0f})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "log-evidence": f"{self.log_evidence:.4f} ± {self.standard_error:.2g}",
            "bound": f"{self.elbo:.4f} ± {self.elbo_standard_error:.2g}",
            "effective sample size": f"{self.ess:.0f} of {self.num_particles:,}",
            "verdict": self.verdict,
        }
        return as_table("GlobalEvidence, nats", rows)


def global_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    max_plate_nesting: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> GlobalEvidence:
    r"""Bound, evidence and :math:`\hat k` of a Pyro model and a guide of its latents.

    It is for models whose latents are shared by the data, such as those of automatic guides. Where every
    latent is in the data plate, :func:`importance_evidence` gives a number for each datum. No gradient is
    recorded. Programs that are modules run in evaluation mode.

    Args:
        model: Program for :math:`p(y, z)`, called as ``model(*args, **kwargs)``.
        guide: Program for :math:`q(z)`, called alike; any of Pyro's automatic guides. Sites of the guide
            alone count if they are marked ``infer={"is_auxiliary": True}``, and so do its factors.
        args: Arguments of both programs.
        num_particles: Draws :math:`K` of the guide.
        max_plate_nesting: Number of dimensions that plates of the programs take. With it, draws are made
            together, in a plate to the left of these, as with ``Trace_ELBO(vectorize_particles=True)``.
            ``None`` runs the programs once for each draw.
        progress: Show a progress bar if it takes more than five seconds.
        kwargs: Arguments of both programs by name.

    Returns:
        :class:`GlobalEvidence`. Its ``verdict`` is a sentence. The logarithm of an average is low in
        expectation, by half of the squared standard error to first order. Above :math:`\hat k = 0.5` the
        weights have no variance, and the standard error is too small. A guide that is too narrow, or that
        misses a mode, can have a small :math:`\hat k`, because draws show only where it is.

    Raises:
        ValueError: Latents that differ between the programs; a plate of a part of the data, with which the
            weights would be random and their average biased; a latent of the guide that is always the same,
            as of ``AutoDelta``; more plates than ``max_plate_nesting`` says; a weight that is not finite.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))
        >>> evidence = global_evidence(model, guide, torch.tensor(1.0), num_particles=50)
        >>> round(evidence.log_evidence, 4), evidence.verdict
        (-1.5155, 'The weights are constant: the guide is the posterior.')

    References:
        Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018).
        https://arxiv.org/abs/1802.02538
    """
    check_program("model", model)
    check_program("guide", guide)
    remedy = "A thousand show whether Pareto k is small."
    count = check_count("num_particles", num_particles, 1, remedy)
    drawn = global_draws(model, guide, count, max_plate_nesting, args, kwargs, progress=progress)
    log_weights = drawn.log_weights
    found = average(log_weights[:, None])
    numbers = {name: getattr(found, name).item() for name in GlobalEvidence._fields[:-1]}
    return GlobalEvidence(**numbers, log_weights=log_weights)
