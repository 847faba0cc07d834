r"""Estimates of :math:`\log p(x_0)` above the bound.

The bound's expectation is over trajectories of the guide, :math:`E_q \log w` with the weight of a path

.. math::
    w = \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)}, \qquad
    \log p_\theta(x_0) = \log E_q\, w = \mathrm{ELBO}
        + \mathrm{KL}\big(q(x_{1:T} \mid x_0) \,\|\, p_\theta(x_{1:T} \mid x_0)\big) \quad \text{(E9)},

so that averaging the weights themselves closes the gap, as far as they can be averaged:
:math:`\hat p` is unbiased, :math:`\log \hat p` is below :math:`\log p` in expectation, and how far is a
matter of the weights' tail. Effective sample size and Pareto :math:`\hat k` grade it, datum by datum. They
grade the *guide*: a :math:`\hat k` above 0.7 says that the estimate cannot be trusted, not that the
model is bad, and it rises with the length of the chain.

References:
    Importance Weighted Autoencoders (Burda et al., 2016), section 3. https://arxiv.org/abs/1509.00519
    Pareto Smoothed Importance Sampling (Vehtari et al., 2024). https://arxiv.org/abs/1507.02646
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_diffusion.arviz_bridge import MIN_DRAWS, constant, good_k, pareto_k
from pyro_diffusion.bounds import (
    Estimate,
    join_chunks,
    log_density,
    measure_of,
    trajectory_terms,
)
from pyro_diffusion.chains import BottomUpGuide, GenerativeChain
from pyro_diffusion.checks import check_data

__all__ = ["Evidence", "average", "fingerprint", "importance_evidence", "tail"]


class Evidence(NamedTuple):
    r"""An estimate of :math:`\log p(x_0)` for every datum; nats per datum, float64."""

    log_evidence: Tensor  #: :math:`\log \hat p(x_0)`, shape ``(N,)``
    standard_error: Tensor  #: Monte Carlo error of it, ``(N,)``; NaN for one particle
    ess: Tensor  #: effective sample size, between 1 and the number of particles, ``(N,)``
    #: :math:`\hat k` of the weights, ``(N,)``; −∞ for constant ones, NaN for too few (below 25)
    pareto_k: Tensor
    ess_by_timestep: Tensor | None = None  #: ``(T, N)`` where an estimator has one
    elbo: Tensor | None = None  #: the bound from the same draws, ``(N,)``
    elbo_standard_error: Tensor | None = None  #: Monte Carlo error of it, ``(N,)``
    estimator: str = ""  #: how it was estimated; models are compared by one and the same
    num_particles: int = 0  #: trajectories for each datum
    data: str = ""  #: a word for the data; models are compared on the same
    measure: str = ""  #: "density" or "mass", of the data; the two are not compared

    def __repr__(self) -> str:
        return (
            f"Evidence({len(self.ess)} data, log_evidence={self.mean()} nats per datum, "
            f"reliable for {int(self.reliable.sum())})"
        )

    @property
    def reliable(self) -> Tensor:
        r"""Whether a datum's estimate can be trusted, boolean, ``(N,)``.

        Importance weights need a small Pareto :math:`\hat k`. Sequential Monte Carlo needs ten effective
        particles at every timestep, runs that agree to a standard error below a half, and no tail above 0.9
        (:math:`\hat k` is the largest of as many as there were averages, and the largest of many is large);
        an estimate without weights needs the standard error alone.
        """
        if self.num_particles == 0:  # no weights at all
            return self.standard_error < 0.5
        if self.ess_by_timestep is None:
            return self.pareto_k < good_k(self.num_particles)
        return (self.ess > 9.99) & (self.standard_error < 0.5) & (self.pareto_k < 0.9)

    def mean(self) -> Estimate:
        """Mean over data, with its errors as for the bound."""
        return Estimate.of(self.log_evidence, self.standard_error)


def importance_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x_0: Tensor,
    *,
    num_particles: int,
    state: int = 0,
    mask: Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Evidence:
    r"""Importance weights over the whole chain: :math:`\log \hat p(x_0) = \log \frac1K \sum_k w_k`.

    Log-ratios are taken site by site and added in float64, unscaled whatever plates or handlers scale.

    Args:
        model: Program for :math:`p`, called as ``model(x_0)``; any that
            :func:`~pyro_diffusion.bounds.elbo_terms` takes.
        guide: Program for :math:`q`, called as ``guide(x_0)``.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_particles: Trajectories :math:`K` for each datum.
        state: Timestep ``t`` of which ``x_0`` are states, for :math:`\log p(x_t)`, the probability of an
            individual state; needs the two chains ``diffusion.model`` and ``diffusion.guide``. 0 for data;
            at T it is the prior's, exactly.
        mask: Observed entries, boolean, of the data's shape.
        batch_size: Trajectories in a chunk; by default as many as 256 MiB hold.
        progress: Show a progress bar if it takes more than five seconds.

    Returns:
        :class:`Evidence`. Its standard error is that of the logarithm, to first order; it means
        something where :math:`\hat k` is below 0.7 (of few particles, below
        :math:`1 - 1 / \log_{10} K`). The logarithm of an average is low in expectation, by half of the
        squared standard error to first order. Of discrete latents, whose weights are few numbers,
        :math:`\hat k` says little.

    Raises:
        ValueError: As :func:`~pyro_diffusion.bounds.elbo_terms`; a state outside ``0 … T``, or of other
            programs than the two chains.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> diffusion = DiffusionModel(denoiser)
        >>> importance_evidence(
        ...     diffusion.model, diffusion.guide, torch.zeros(3, 2), num_particles=10
        ... ).log_evidence
        tensor([-1.8379, -1.8379, -1.8379], dtype=torch.float64)
    """
    if state != 0:
        model, guide = check_chains(model, guide, state, mask)
        if state == model.num_timesteps:
            return at_the_end(model.prior(), x_0, num_particles)
        model, guide = model.of_state(state), guide.of_state(state)
    chunks: dict[int, list[Tensor]] = defaultdict(list)
    for start, sites in trajectory_terms(
        model, guide, x_0, num_particles=num_particles, mask=mask, analytic_kl=False,
        batch_size=batch_size, progress=progress, description="evidence",
    ):  # fmt: skip
        chunks[start].append(sites.log_weight)
    return average(join_chunks(chunks))._replace(data=fingerprint(x_0, mask), measure=sites.measure)


def at_the_end(prior: TorchDistribution, x_T: Tensor, num_particles: int) -> Evidence:
    """Evidence of states at T, which is the prior's: there is nothing to average."""
    log_p = log_density(prior, check_data(x_T)).expand(num_particles, len(x_T))
    return average(log_p)._replace(
        standard_error=torch.zeros_like(log_p[0]),
        pareto_k=torch.full_like(log_p[0], -math.inf),
        data=fingerprint(x_T),
        measure=measure_of(prior),
    )


def check_chains(
    model: Callable[..., Any], guide: Callable[..., Any], state: int, mask: Tensor | None
) -> tuple[GenerativeChain, BottomUpGuide]:
    """The two programs, if a state's evidence can be told from them."""
    if (
        not isinstance(model, GenerativeChain)
        or not isinstance(guide, BottomUpGuide)
        or mask is not None
    ):
        raise ValueError(
            f"argument 'state': got {state!r} for a {type(model).__name__} and a {type(guide).__name__}"
            f"{'' if mask is None else ' with a mask'}; expected the chain and its forward guide, whole. "
            "Pass diffusion.model and diffusion.guide."
        )
    check_state(state, model.num_timesteps)
    return model, guide


def check_state(state: int, num_timesteps: int) -> None:
    """Raise a ``ValueError`` if a timestep is outside ``0 … T``."""
    if not isinstance(state, int) or not 0 <= state <= num_timesteps:
        raise ValueError(
            f"argument 'state': got {state!r}; expected a timestep in 0 … {num_timesteps}. Pass 0 for data."
        )


def average(log_weights: Tensor) -> Evidence:
    """Evidence from log-weights of shape ``(K, N)``."""
    count = len(log_weights)
    log_evidence = log_weights.logsumexp(0) - math.log(count)
    relative = (log_weights - log_evidence).exp()  # weights over their mean
    error, elbo_error = torch.full((2, *log_evidence.shape), math.nan, dtype=log_evidence.dtype)
    if count > 1:
        error = (relative.var(0) / count).sqrt()
        elbo_error = (log_weights.var(0) / count).sqrt()
    return Evidence(
        log_evidence=log_evidence,
        standard_error=error,
        ess=relative.sum(0).square() / relative.square().sum(0),
        pareto_k=tail(log_weights),
        elbo=log_weights.mean(0),
        elbo_standard_error=elbo_error,
        estimator="importance weights",
        num_particles=count,
    )


def tail(log_weights: Tensor) -> Tensor:
    r"""Pareto :math:`\hat k` of log-weights ``(K, N)``; NaN for too few particles, −∞ for constant ones.

    A single weight is no constant: nothing is known of the others.
    """
    values = log_weights.cpu().numpy().T
    too_few = len(log_weights) < MIN_DRAWS
    alike = constant(values) & (len(log_weights) > 1)
    k = np.where(alike, -math.inf, math.nan) if too_few else pareto_k(values)
    return torch.as_tensor(k, device=log_weights.device)


def fingerprint(x_0: Tensor, mask: Tensor | None = None) -> str:
    """A short word for data: the same for the same numbers, to float32, in the same rows."""
    numbers = x_0.detach().float()
    if mask is not None:
        numbers = torch.where(mask, numbers, math.nan)
    content = np.ascontiguousarray(numbers.cpu().numpy()).tobytes()
    return hashlib.sha256(f"{len(x_0)} ".encode() + content).hexdigest()[:16]
