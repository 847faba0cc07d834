r"""How the terms of a bound are drawn to an asked-for error: rows, a pilot, and a plan.

:class:`Rows` has the terms of single network rows and of whole paths, for a model and its data.
:func:`planned` looks at a few of them and says what to draw: timesteps by group, or paths with the
coefficients of their log-ratios. The estimators are those of :mod:`~pyro_diffusion.bounds.evaluation`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.chains.time import Time
from pyro_diffusion.checks import check_finite
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.given import as_real
from pyro_diffusion.scoring import log_density, score
from pyro_diffusion.walk import ReverseWalk

_REPLICATES, _PATH_REPLICATES = 16, 10  # whose spread is the error
_GROUPS = 32  # of timesteps, each with a noise and a coefficient of its own
_PATH_GROUPS = 4  # of sites, with a coefficient each, where whole paths are summed
_PILOT = 512  # pairs of rows, at least 16 of each group
_PILOT_PATHS = 16  # of each of eight data, where paths are tried


class Rows:
    """Terms of single network rows, and of whole paths, for a model and its data.

    Args:
        diffusion: The model.
        x_0: Data that were checked.
        time: The chain's time.
        batch_size: Network rows at a time.
    """

    def __init__(self, diffusion: DiffusionModel, x_0: Tensor, time: Time, batch_size: int) -> None:
        self.diffusion, self.x_0, self.time, self.batch_size = diffusion, x_0, time, batch_size
        self.walk = ReverseWalk(diffusion, rows=batch_size)
        self.embedded = diffusion.embed(x_0)
        self.data: Any = as_real(x_0)
        self.spent = 0
        self.edges = time.edges(_GROUPS).to(x_0.device)
        self.sizes = torch.cat((torch.ones_like(self.edges[:1]), self.edges.diff()))
        # Two parts of the bound cost no row: the term at x_T, and a transform's share of the likelihood.
        marginal = time.marginal(
            diffusion.process, self.embedded, torch.as_tensor(time.last, device=x_0.device)
        )
        self.log_volume = (
            torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
            if diffusion.transform is None
            else diffusion.log_volume(x_0).double()
        )
        prior_kl = score(marginal, diffusion.prior()).kl
        if prior_kl is None:
            raise ValueError(
                f"site x_T: got no formula for the KL of {type(marginal).__name__} and the prior; expected "
                "one, because this term is not drawn. Register it with torch.distributions.register_kl, or "
                "use elbo_terms."
            )
        self.known = self.log_volume - prior_kl

    def timesteps(self, group: Tensor, position: Tensor) -> Tensor:
        """Timesteps at a position in [0, 1) of a group; group 0 is the reconstruction."""
        if len(self.edges) == 1:  # a chain of one step
            return torch.ones_like(position)
        inner = (group - 1).clamp(min=0)
        start, end = self.edges[inner], self.edges[inner + 1]
        t = self.time.whole(start + position * (end - start))
        return torch.where(group == 0, self.time.first, t)

    def terms(self, data: Tensor, t: Tensor) -> Tensor:
        """Terms of the bound at timesteps ``t`` of rows ``data``, with their signs; float64, ``(rows,)``."""
        parts = zip(data.split(self.batch_size), t.split(self.batch_size), strict=True)
        self.spent += len(data)
        terms = torch.cat([self._terms(*part) for part in parts])
        where = "" if terms.isfinite().all() else f" at timestep {t[~terms.isfinite()][0].item():g}"
        remedy = "Check the parameters for NaN, and the data for values outside the support."
        return check_finite(f"terms of the bound{where}", terms, remedy)

    def _terms(self, data: Tensor, t: Tensor) -> Tensor:
        time, x_0, t = self.time, self.embedded[data], self.time.whole(t)
        first = t == time.first
        x_t = time.marginal(self.diffusion.process, x_0, t).sample()
        p, likelihood = time.pair(self.diffusion, x_t, t)
        reconstruction = log_density(likelihood, self.data[data]) - self.log_volume[data]
        if first.all():
            return reconstruction
        # Rows of the reconstruction have no posterior; any kernel will do there.
        there = torch.where(first, torch.as_tensor(time.last, device=t.device), t)
        site = score(time.posterior(self.diffusion.process, x_t, x_0, there), p)
        return torch.where(first, reconstruction, -site.term)

    def systematic(self, num_points: int, shares: Tensor) -> Tensor:
        """One replicate of every datum's bound, without ``known``: ``num_points`` rows of each."""
        count, device = len(self.x_0), self.x_0.device
        offset = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
        points = (torch.arange(num_points, device=device)[:, None] + offset.double()) / num_points
        edges = torch.cat((torch.zeros_like(shares[:1]), shares.cumsum(0)))
        group = torch.searchsorted(edges[1:-1].contiguous(), points.contiguous(), right=True)
        position = ((points - edges[group]) / shares[group]).clamp(min=0, max=1 - 1e-9)
        data = torch.arange(count, device=device).expand_as(group)
        terms = self.terms(data.flatten(), self.timesteps(group, position).flatten())
        return (terms.reshape(group.shape) * (self.sizes / shares)[group]).mean(0)

    def paths(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """The bound of whole paths by KLs, without ``known``, and what log-ratios add by group of sites."""
        self.spent += len(data) * len(self.walk.timesteps)
        parts = [self._paths(part) for part in data.split(self.batch_size)]
        bounds, excess = zip(*parts, strict=True)
        return torch.cat(bounds), torch.cat(excess)

    def _paths(self, data: Tensor) -> tuple[Tensor, Tensor]:
        walk, x_0 = self.walk, self.embedded[data]
        *timesteps, _ = walk.timesteps
        site = score(walk.start(x_0), walk.start())
        excess = torch.zeros(_PATH_GROUPS, len(data), dtype=torch.float64, device=x_0.device)
        excess[-1] += site.log_ratio - site.term
        bound = torch.zeros_like(excess[0])
        for t in timesteps:
            site = walk.step(site.x, x_0, t)
            excess[(t - 1) * _PATH_GROUPS // len(walk.timesteps)] += site.log_ratio - site.term
            bound -= site.term
        bound += log_density(walk.end(site.x), self.data[data])
        return bound - self.log_volume[data], excess.T


class Plan(NamedTuple):
    """A way to draw the bound of every datum."""

    replicate: Callable[[int], Tensor]  # of every datum's bound without Rows.known, for a size
    size: int  # to begin with: timesteps, or paths, of each datum
    num_replicates: int
    rows_of_one: int  # network rows of a replicate of size one
    name: str
    shares: Tensor

    def replicates(self, size: int) -> Tensor:
        """Independent replicates, ``(R, N)``."""
        return torch.stack([self.replicate(size) for _ in range(self.num_replicates)])


def planned(rows: Rows, standard_error: float) -> Plan:
    """What to draw, from a pilot."""
    count = len(rows.x_0)
    shares, noise = _pilot(rows)
    rows_needed = noise / (count * standard_error**2)  # of each datum
    if rows.time.num_timesteps < rows_needed:
        strength, variance, name = _path_pilot(rows)
        paths_needed = max(_PATH_REPLICATES, variance / (count * standard_error**2))
        if rows.time.num_timesteps * paths_needed < rows_needed:

            def sum_of_paths(size: int) -> Tensor:
                """Whole paths of every datum, with the coefficients of the pilot."""
                bound, excess = rows.paths(torch.arange(count, device=rows.x_0.device).repeat(size))
                return (bound - excess @ strength).reshape(size, count).mean(0)

            size = math.ceil(1.2 * paths_needed / _PATH_REPLICATES)
            rows_of_one = count * int(rows.time.num_timesteps)
            return Plan(sum_of_paths, size, _PATH_REPLICATES, rows_of_one, name, shares[:0])
    size = math.ceil(1.2 * rows_needed / _REPLICATES)

    return Plan(
        lambda size: rows.systematic(size, shares), size, _REPLICATES, count, "timesteps", shares
    )


def _pilot(rows: Rows) -> tuple[Tensor, float]:
    r"""How often to draw each group of timesteps, and the noise of a datum's single row by that."""
    num_pairs = max(16, _PILOT // len(rows.sizes))
    groups = torch.arange(len(rows.sizes), device=rows.x_0.device).repeat_interleave(num_pairs)
    data = (
        torch.randint(len(rows.x_0), groups.shape, device=groups.device)
        if len(rows.x_0) > len(groups)
        else torch.randperm(len(groups), device=groups.device) % len(rows.x_0)  # each is seen
    )
    t = rows.timesteps(groups, torch.rand(groups.shape, dtype=torch.float64, device=groups.device))
    pairs = torch.stack([rows.terms(data, t) for _ in range(2)]).reshape(2, -1, num_pairs)
    variance = (
        pairs.transpose(0, 1).flatten(1).var(1)
    )  # over data as well: few rows see few of them
    noise = (pairs[0] - pairs[1]).square().mean(1) / 2
    # A tenth of the rows goes by the terms' size: of a large one the pilot may have seen too little noise.
    root, size = (rows.sizes * x for x in (variance.sqrt(), pairs.square().mean((0, 2)).sqrt()))
    shares = 0.9 * root / root.sum().clamp(min=1e-300) + 0.1 * size / size.sum().clamp(min=1e-300)
    shares = shares.clamp(min=1e-6)
    shares = shares / shares.sum()
    return shares, (rows.sizes.square() * noise / shares).sum().item()


def _path_pilot(rows: Rows) -> tuple[Tensor, float, str]:
    """Coefficients of the log-ratios by group, a path's variance with them, and what the sum is called."""
    count = min(len(rows.x_0), 8)
    chosen = torch.randperm(len(rows.x_0), device=rows.x_0.device)[:count]
    bound, excess = rows.paths(chosen.repeat(_PILOT_PATHS))
    bound, excess = bound.reshape(_PILOT_PATHS, count), excess.reshape(_PILOT_PATHS, count, -1)
    bound, excess = (x - x.mean(0) for x in (bound, excess))
    freedom = count * (_PILOT_PATHS - 1)
    flat = excess.flatten(0, 1)
    ridge = 1e-9 * flat.square().sum().clamp(min=1e-200) * torch.eye(flat.shape[1]).to(flat)
    fitted = torch.linalg.solve(flat.mT @ flat + ridge, flat.mT @ bound.flatten())
    choices = {"KL": torch.zeros_like(fitted), "path": torch.ones_like(fitted)}
    choices["control variate"] = fitted
    # A fit takes as many degrees of freedom as it has coefficients, and misses what the pilot did not see.
    handicap = {"control variate": 1.5 * freedom / (freedom - len(fitted))}
    variances = {
        name: (bound - excess @ c).square().sum().item() / freedom * handicap.get(name, 1.0)
        for name, c in choices.items()
    }
    name = min(variances, key=lambda choice: variances[choice])
    return choices[name], variances[name], name
