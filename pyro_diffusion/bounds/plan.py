r"""Ways to draw the bound of every datum: single timesteps, whole paths, trajectories of any programs.

Each way draws stages (:mod:`~pyro_diffusion.bounds.pooled`) of a given size. The first stage is large enough
for an estimate of the error. From the noise in it a way may find that another way would need fewer rows.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.bounds.pooled import Stage
from pyro_diffusion.bounds.rows import Rows
from pyro_diffusion.bounds.trajectories import trajectory_terms
from pyro_diffusion.given import Given

_LEAST_ROWS, _MOST_ROWS = 2**12, 2**18  # of a first stage; of replicates that are drawn together
_BLOCKS, _BLOCK = 32, 32  # blocks of data: the largest number of blocks, the smallest size of one
_FREEDOM = 64  # of the error of a first stage: replicates times blocks
_PILOT = 1024  # rows of a pilot run, at least 32 of each group
_OF_FIRST = 256  # additional rows of the reconstruction in the pilot run
_PILOT_PATHS = 16  # paths of each of eight data, in a pilot run of paths
#: Shares of the rows that do not follow the estimated noise. The first two are spread evenly over the groups,
#: in the first stage and later. In the first stage the noise is known from a pilot run only, so that every
#: datum should have rows in every group of a short chain. The third is the share of the reconstruction, whose
#: noise may come from a few flipped bits in a thousand rows.
_EVEN_AT_FIRST, _EVEN, _FIRST = 0.5, 0.2, 0.05


class Way(ABC):
    """A way to draw the bound of every datum."""

    name: str  #: what is summed
    shares: Tensor = torch.zeros(0, dtype=torch.float64)  #: share of each group in the rows
    least: int  #: draws of each datum in the first stage
    cost: int  #: network rows of one draw of every datum

    @property
    @abstractmethod
    def spent(self) -> int:
        """Network rows so far."""

    @abstractmethod
    def draw(self, size: int) -> Stage:
        """A stage with about ``size`` draws of each datum, and at least one draw a replicate."""

    def gain(self) -> float:
        """Variance of the next draws divided by that of the draws so far."""
        return 1.0

    def better(self, size: int, error: float) -> "Way":
        """The way to draw the next stage, if this one would need ``size`` draws; by default itself."""
        return self


class Timesteps(Way):
    r"""Single timesteps, drawn systematically over all data of a block.

    Timesteps are in groups :math:`g` of :math:`n_g` timesteps. With shares :math:`\pi_g` of the rows, and
    :math:`h` rows a datum, evenly spaced through the quantile function,

    .. math::
        \widehat{\mathrm{ELBO}} = \sum_g n_g c_g
            + \frac1h \sum_{i=1}^h \frac{n_{g(i)}}{\pi_{g(i)}} \big(\ell_{t_i} - c_{g(i)}\big),

    where :math:`\ell_t` is the term with its sign. The means :math:`c_g` and the shares come from rows that
    were drawn *before* the stage. The stage is therefore unbiased for any values of them.
    """

    name = "timesteps"

    def __init__(self, rows: Rows) -> None:
        self.rows, self.moments = rows, GroupMoments(rows.sizes)
        num_blocks = max(1, min(_BLOCKS, rows.count // _BLOCK))
        self.block = torch.arange(rows.count, device=rows.device) % num_blocks
        self.num_blocks = num_blocks
        self.num_replicates = max(8, math.ceil(_FREEDOM / num_blocks))
        self.cost = rows.count
        points = math.ceil(_LEAST_ROWS / rows.count / self.num_replicates)
        self.least = points * self.num_replicates
        self.draws, self.inverse = 0, torch.zeros_like(rows.sizes)  # so far, and Σ draws / share
        self._pilot()

    @property
    def spent(self) -> int:
        """Network rows so far."""
        return self.rows.spent

    def _pilot(self) -> None:
        """Draw as many rows of every group, and more of the first, for data chosen at random."""
        device, num_groups = self.rows.device, len(self.rows.sizes)
        count = num_groups * max(32, _PILOT // num_groups) + _OF_FIRST
        group = torch.arange(count, device=device) % num_groups
        group[-_OF_FIRST:] = 0
        data = torch.randperm(max(count, self.rows.count), device=device)[:count] % self.rows.count
        position = torch.rand(count, dtype=torch.float64, device=device)
        self.moments.update(group, self.rows.terms(data, self.rows.timesteps(group, position)))

    def draw(self, size: int) -> Stage:
        """Replicates whose points of a datum are about ``size`` in total."""
        num_points = math.ceil(size / self.num_replicates)
        centre = self.moments.mean
        self.shares = self.moments.shares(_EVEN if self.draws else _EVEN_AT_FIRST)
        at_once = max(1, _MOST_ROWS // (num_points * self.rows.count))
        values = [
            self._replicates(min(at_once, self.num_replicates - start), num_points, centre)
            for start in range(0, self.num_replicates, at_once)
        ]
        size = num_points * self.num_replicates
        self.draws, self.inverse = self.draws + size, self.inverse + size / self.shares
        return Stage(torch.cat(values), self.block, size)

    def _replicates(self, times: int, num_points: int, centre: Tensor) -> Tensor:
        """Replicates of every datum's bound without ``known``, ``(times, N)``."""
        rows, shares = self.rows, self.shares
        offset = self._offsets(times)[:, None]
        first = torch.arange(num_points, device=rows.device, dtype=torch.float64)
        points = (first[:, None] + offset) / num_points
        edges = torch.cat((torch.zeros_like(shares[:1]), shares.cumsum(0)))
        group = torch.searchsorted(edges[1:-1].contiguous(), points, right=True)
        position = ((points - edges[group]) / shares[group]).clamp(min=0, max=1 - 1e-9)
        data = torch.arange(rows.count, device=rows.device).expand_as(group)
        terms = rows.terms(data.flatten(), rows.timesteps(group, position).flatten())
        self.moments.update(group.flatten(), terms)
        excess = terms.reshape(group.shape) - centre[group]
        known = (rows.sizes * centre).sum()
        return (excess * (rows.sizes / shares)[group]).mean(1) + known

    def _offsets(self, times: int) -> Tensor:
        """Points in [0, 1) of every datum, evenly spread over each block; ``(times, N)``."""
        count, num_blocks = self.rows.count, self.num_blocks
        depth = math.ceil(count / num_blocks)  # the last data of some blocks are missing
        key = torch.rand(times, depth * num_blocks, dtype=torch.float64, device=self.rows.device)
        key[:, count:] = 2.0
        rank = key.reshape(times, depth, num_blocks).argsort(1).argsort(1)
        rank = rank.reshape(times, -1)[:, :count]
        size = torch.bincount(self.block)[self.block]
        return (rank + torch.rand(rank.shape, dtype=torch.float64, device=rank.device)) / size

    def gain(self) -> float:
        """Variance with the present shares divided by that with the earlier ones, from the groups' noise."""
        square = self.moments.spread()
        before = (square * self.inverse).sum().item() / self.draws
        return (square / self.moments.shares(_EVEN)).sum().item() / before if before > 0 else 1.0

    def better(self, size: int, error: float) -> Way:
        """Whole paths, if they need fewer rows; tried only where their pilot run is comparatively cheap."""
        length, count = self.rows.time.num_timesteps, self.rows.count
        pilot = length * _PILOT_PATHS * min(count, 8)
        if self.draws > self.least or size * count < 2 * pilot:
            return self
        paths = Paths(self.rows, error)
        return paths if paths.least * length < size else self


class GroupMoments:
    """Mean and spread of the terms of each group of timesteps, over all rows so far.

    Args:
        sizes: How many timesteps a group has.
    """

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = sizes
        self.count, self.mean, self.squares = (torch.zeros_like(sizes) for _ in range(3))

    def update(self, group: Tensor, terms: Tensor) -> None:
        """Add terms, each with its group (Chan et al., 1979)."""
        zero = torch.zeros_like(self.mean)
        count = zero.index_add(0, group, torch.ones_like(terms))
        mean = zero.index_add(0, group, terms) / count.clamp(min=1)
        squares = zero.index_add(0, group, (terms - mean[group]).square())
        total, shift = (self.count + count).clamp(min=1), mean - self.mean
        self.squares = self.squares + squares + shift.square() * self.count * count / total
        self.mean, self.count = self.mean + shift * count / total, self.count + count

    def spread(self) -> Tensor:
        """Variance that each group contributes to the bound, averaged over neighbouring groups.

        Neighbouring groups have similar noise, but rare large terms may have been drawn in only some of them.
        """
        square = self.sizes.square() * self.squares / (self.count - 1).clamp(min=1)
        wide = torch.cat((square[:1], square, square[-1:]))
        return (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4

    def shares(self, so_many: float) -> Tensor:
        r"""The best shares, :math:`\pi_g \propto n_g s_g`, mixed with even ones, and more of the first."""
        noise, even = self.spread().sqrt(), torch.ones_like(self.mean) / len(self.mean)
        best = noise / noise.sum() if noise.sum() > 0 else even
        shares = (1 - so_many - _FIRST) * best + so_many * even
        shares[0] += _FIRST
        return shares


class Paths(Way):
    """Whole paths; a pilot run gives the coefficients of their log-ratios. Every path is a replicate."""

    def __init__(self, rows: Rows, error: float) -> None:
        self.rows, self.cost = rows, rows.count * int(rows.time.num_timesteps)
        self.strength, variance, self.name = _path_pilot(rows)
        needed = 1.3 * variance / rows.count / error**2
        self.least = max(_least_paths(rows.count), math.ceil(needed))

    @property
    def spent(self) -> int:
        """Network rows so far, including those of an earlier way."""
        return self.rows.spent

    def draw(self, size: int) -> Stage:
        """Paths of every datum, each a replicate; data are independent of one another."""
        data = torch.arange(self.rows.count, device=self.rows.device)
        bound, excess = self.rows.paths(data.repeat(size))
        return Stage((bound - excess @ self.strength).reshape(size, -1), data, size)


class Trajectories(Way):
    """Trajectories of any model and guide, with KLs where those are legal. Each is a replicate."""

    name = "KL"

    def __init__(
        self, model: Any, guide: Any, x_0: Tensor, given: Given, batch_size: int | None
    ) -> None:
        self.programs, self.x_0, self.given = (model, guide), x_0, given
        self.batch_size = batch_size
        self.least, self.length, self.draws = _least_paths(len(x_0)), 1, 0
        self.event_size: float = 0

    @property
    def spent(self) -> int:
        """Rows so far: one for each latent of a trajectory."""
        return self.draws * self.cost

    def draw(self, size: int) -> Stage:
        """Trajectories of every datum, each a replicate."""
        chunks: dict[int, list[Tensor]] = {}
        for start, sites in trajectory_terms(
            *self.programs, self.x_0, self.given, num_particles=size, batch_size=self.batch_size,
            progress=False,
        ):  # fmt: skip
            chunks.setdefault(start, []).append(sites.log_weight)
        self.length, self.event_size = len(sites.names) - 1, sites.event_size
        self.name = "KL" if set(sites.kinds[1:]) == {"KL"} else "path"
        self.draws, self.cost = self.draws + size, len(self.x_0) * self.length
        values = torch.cat([torch.cat(parts) for parts in chunks.values()], dim=1)
        return Stage(values, torch.arange(len(self.x_0), device=values.device), size)


def _least_paths(count: int) -> int:
    """Paths of each datum that give the error of the mean enough degrees of freedom."""
    return max(4, 1 + math.ceil(_FREEDOM / count))


def _path_pilot(rows: Rows) -> tuple[Tensor, float, str]:
    """Coefficients of the log-ratios by group, a path's variance with them, and the estimator's name."""
    count = min(rows.count, 8)
    chosen = torch.randperm(rows.count, device=rows.device)[:count]
    bound, excess = rows.paths(chosen.repeat(_PILOT_PATHS))
    bound, excess = bound.reshape(_PILOT_PATHS, count), excess.reshape(_PILOT_PATHS, count, -1)
    bound, excess = (x - x.mean(0) for x in (bound, excess))
    freedom = count * (_PILOT_PATHS - 1)
    flat = excess.flatten(0, 1)
    ridge = 1e-9 * flat.square().sum().clamp(min=1e-200) * torch.eye(flat.shape[1]).to(flat)
    fitted = torch.linalg.solve(flat.mT @ flat + ridge, flat.mT @ bound.flatten())
    choices = {"KL": torch.zeros_like(fitted), "path": torch.ones_like(fitted)}
    choices["control variate"] = fitted
    # A fit uses up one degree of freedom a coefficient, and fits the noise of the pilot run: 1.5 is a margin.
    handicap = {"control variate": 1.5 * freedom / (freedom - len(fitted))}
    variances = {
        name: (bound - excess @ c).square().sum().item() / freedom * handicap.get(name, 1.0)
        for name, c in choices.items()
    }
    name = min(variances, key=lambda choice: variances[choice])
    return choices[name], variances[name], name
