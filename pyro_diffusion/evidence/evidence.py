r"""An estimate of :math:`\log p(x_0)` for every datum, with diagnostics of whether it can be trusted.

References:
    Pareto Smoothed Importance Sampling (Vehtari et al., 2024). https://arxiv.org/abs/1507.02646
"""

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_diffusion.arviz_bridge import MIN_DRAWS, constant, good_k, pareto_k
from pyro_diffusion.bounds import Estimate
from pyro_diffusion.checks import as_numbers, check_data, described, require
from pyro_diffusion.display import as_table
from pyro_diffusion.given import Given
from pyro_diffusion.scoring import log_density, measure_of
from pyro_diffusion.typed import TorchDistribution

EXACT = "exact"  #: name of the estimator where the density is known


class Evidence(NamedTuple):
    r"""An estimate of :math:`\log p(x_0)` for every datum; nats per datum, float64."""

    log_evidence: Tensor  #: :math:`\log \hat p(x_0)`, shape ``(N,)``
    standard_error: Tensor  #: Monte Carlo error of the estimate, ``(N,)``; NaN for one particle
    ess: Tensor  #: effective sample size, between 1 and the number of particles, ``(N,)``
    #: :math:`\hat k` of the weights, ``(N,)``; −∞ for constant ones, NaN for too few (below 25)
    pareto_k: Tensor
    ess_by_timestep: Tensor | None = None  #: ``(T, N)`` where an estimator has one
    elbo: Tensor | None = None  #: the bound from the same draws, ``(N,)``
    elbo_standard_error: Tensor | None = None  #: Monte Carlo error of the bound, ``(N,)``
    estimator: str = ""  #: name of the estimator; only models with the same one are compared
    num_particles: int = 0  #: trajectories for each datum
    data: str = ""  #: a fingerprint of the data; only models with the same one are compared
    measure: str = ""  #: "density" or "mass", of the data; the two are not compared

    def __repr__(self) -> str:
        return (
            f"Evidence({len(self.ess)} data, log_evidence={self.mean()} nats per datum, "
            f"reliable for {int(self.reliable.sum())})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "log-evidence": str(self.mean()),
            "estimator": self.estimator
            + (f", {self.num_particles:,} particles a datum" if self.num_particles else ""),
            "reliable for": f"{int(self.reliable.sum())} of {len(self.ess)} data",
        }
        if self.num_particles:
            rows["largest Pareto k"] = self._largest_k()
        if self.elbo is not None and self.elbo_standard_error is not None:
            rows["bound"] = str(Estimate.of(self.elbo, self.elbo_standard_error))
        return as_table(f"Evidence({len(self.ess)} data), nats per datum", rows)

    def _largest_k(self) -> str:
        """The largest Pareto k of a datum; a short text where it is not a finite number."""
        largest = self.pareto_k.max().item()
        if math.isnan(largest):
            return "unknown"
        return f"{largest:.2f}" if math.isfinite(largest) else "none: the weights are constant"

    @classmethod
    def exact(
        cls, log_p: Any, x_0: Tensor | None = None, *, measure: str = "density", mask: Any = None
    ) -> "Evidence":
        r"""The log-density of data under a model that has one, such as a scikit-learn mixture.

        Args:
            log_p: :math:`\log p(x_0)` of every datum in nats, an array or a tensor of shape ``(N,)``.
            x_0: The data, so that :func:`~pyro_diffusion.diagnostics.compare` can check that all models were
                scored on the same data. If left out, only the number of data is checked.
            measure: "density", or "mass" for the probability of whole numbers; the two are not compared.
            mask: True where an entry of the data is observed.

        Returns:
            Evidence whose errors are zero.

        Raises:
            ValueError: Numbers that are not finite or have another shape, or a measure of another name.

        Example:
            >>> log_p = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(3))
            >>> Evidence.exact(log_p).mean().value
            -0.9189385175704956
        """
        log_p = as_numbers("log_p", log_p).detach().double()
        mask = None if mask is None else as_numbers("mask", mask)
        if x_0 is not None:
            check_data(x_0, mask)
        data = "" if x_0 is None else fingerprint(x_0, mask)
        count = len(log_p) if x_0 is None and log_p.dim() else 0 if x_0 is None else len(x_0)
        require(
            log_p.shape == (count,) and bool(log_p.isfinite().all()),
            "argument 'log_p'",
            f"{described(log_p)}" + ("" if log_p.isfinite().all() else ", some of it not finite"),
            f"a finite number for each of {count} data"
            if x_0 is not None
            else "a finite number a datum",
            "Sum over the entries of a datum, as score_samples of scikit-learn does.",
        )
        require(
            measure in ("density", "mass"), "argument 'measure'", repr(measure), "'density' or 'mass'",
            "A mass is the probability of whole numbers.",
        )  # fmt: skip
        zero, none = torch.zeros_like(log_p), torch.full_like(log_p, -math.inf)
        return cls(
            log_p, zero, torch.full_like(log_p, math.nan), none, elbo=log_p, elbo_standard_error=zero,
            estimator=EXACT, data=data, measure=measure,
        )  # fmt: skip

    @property
    def reliable(self) -> Tensor:
        r"""Whether a datum's estimate can be trusted, boolean, ``(N,)``.

        Importance weights need a small Pareto :math:`\hat k`. Sequential Monte Carlo needs ten effective
        particles at every timestep, a standard error over runs below a half, and :math:`\hat k` below 0.9.
        (That limit is higher because its :math:`\hat k` is the largest of several, one for each average.)
        An estimate without weights needs only a standard error below a half.
        """
        if self.num_particles == 0:  # no weights at all
            return self.standard_error < 0.5
        if self.ess_by_timestep is None:
            return self.pareto_k < good_k(self.num_particles)
        return (self.ess > 9.99) & (self.standard_error < 0.5) & (self.pareto_k < 0.9)

    def mean(self) -> Estimate:
        """Mean over data, with the same two errors as the bound."""
        return Estimate.of(self.log_evidence, self.standard_error)


def at_the_end(prior: TorchDistribution, x_T: Tensor, num_particles: int) -> Evidence:
    """Evidence of states at T. It is the density of the prior, and has no error."""
    log_p = log_density(prior, check_data(x_T)).expand(num_particles, len(x_T))
    return average(log_p)._replace(
        standard_error=torch.zeros_like(log_p[0]),
        pareto_k=torch.full_like(log_p[0], -math.inf),
        data=fingerprint(x_T),
        measure=measure_of(prior),
    )


def check_whole(state: int, given: Given) -> None:
    """Raise a ``ValueError`` for states with a mask, because states have no gaps."""
    require(
        state == 0 or given.mask is None,
        "argument 'state'",
        f"{state} with a mask",
        "0 for data with gaps, because states have none",
        "Leave out the mask, or pass the data.",
    )


def average(log_weights: Tensor) -> Evidence:
    """Evidence from log-weights of shape ``(K, N)``."""
    count = len(log_weights)
    log_evidence = log_mean(log_weights)
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


def log_mean(log_weights: Tensor) -> Tensor:
    """Logarithm of the mean of weights, over the first axis."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def effective(log_weight: Tensor) -> Tensor:
    """The effective sample size of log-weights ``(K, N)``, shape ``(N,)``."""
    return 1 / log_weight.softmax(0).square().sum(0)


def systematic(share: Tensor, count: int | None = None, start: Tensor | None = None) -> Tensor:
    """Rows to keep: the number of copies of each is proportional to its weight.

    Args:
        share: Weights that sum to one over the first axis, ``(K, N)``.
        count: Rows of the result; as many as there are weights by default.
        start: Uniform numbers, ``(1, N)``; drawn by default.
    """
    count = len(share) if count is None else count
    start = torch.rand_like(share[:1]) if start is None else start
    points = (start + torch.arange(count, device=share.device)[:, None]) / count
    edges = share.cumsum(0)
    edges = edges / edges[-1:]
    return torch.searchsorted(edges.T.contiguous(), points.T.contiguous()).T.clamp(
        max=len(share) - 1
    )


def rows_to_keep(log_weight: Tensor, uneven: Tensor, start: Tensor | None = None) -> Tensor:
    """Rows after a resampling by weight where the weights are uneven, and all rows in place elsewhere."""
    in_place = torch.arange(len(log_weight), device=log_weight.device)[:, None]
    return torch.where(uneven, systematic(log_weight.softmax(0), start=start), in_place)


def tail_of(log_weights: Tensor, where: Tensor) -> Tensor:
    r"""Pareto :math:`\hat k` of some data; −∞ for the others."""
    k = torch.full(where.shape, -math.inf, dtype=log_weights.dtype, device=log_weights.device)
    if where.any():
        k[where] = tail(log_weights[:, where])
    return k


def tail(log_weights: Tensor) -> Tensor:
    r"""Pareto :math:`\hat k` of log-weights ``(K, N)``; NaN for too few particles, −∞ for constant ones.

    For a single weight it is NaN, because one weight does not show whether weights are constant.
    """
    values = log_weights.cpu().numpy().T
    too_few = len(log_weights) < MIN_DRAWS
    alike = constant(values) & (len(log_weights) > 1)
    k = np.where(alike, -math.inf, math.nan) if too_few else pareto_k(values)
    return torch.as_tensor(k, device=log_weights.device)


def fingerprint(x_0: Tensor, mask: Tensor | None = None) -> str:
    """A short string that identifies data: equal for equal numbers, to float32, in the same rows."""
    numbers = x_0.detach().float()
    if mask is not None:
        numbers = torch.where(mask, numbers, math.nan)
    content = np.ascontiguousarray(numbers.cpu().numpy()).tobytes()
    return hashlib.sha256(f"{len(x_0)} ".encode() + content).hexdigest()[:16]
