r"""The bound to an asked-for Monte Carlo error, for the least network rows.

A full sum over a chain of :math:`T` steps costs :math:`N T` network rows and is far more exact than anybody
asks. Most of its terms are small or quiet. :func:`evaluate_bound` spends rows where the noise is, in one of
two ways, and a pilot run says which:

*Single timesteps.* Each datum has a few, drawn systematically (:math:`h` evenly spaced points through the
quantile function) from a law that follows the noise of the terms,

.. math::
    \widehat{\mathrm{ELBO}} = -L_T - \frac1h \sum_{i=1}^h \frac{L_{t_i}}{\pi(t_i)}, \qquad
    \pi(t) \propto \sqrt{\operatorname{Var} L_t} .

Of a row alone the analytic KL is the quietest estimate, being the mean of the log-ratio given :math:`x_t`.

*Whole paths*, where the error asked for needs that many rows. Along a path log-ratios cancel: at an exact
denoiser their sum is :math:`\log p(x_0)` on every path, while the sum of KLs is noisy. In between it is

.. math::
    L_t = \mathrm{KL}_t
        + c_t \Big( \log \frac{q(x_{t-1} \mid x_t, x_0)}{p(x_{t-1} \mid x_t)} - \mathrm{KL}_t \Big),

whose bracket has mean zero, with :math:`c_t` zero (KL), one (path) or fitted (a control variate), whichever
was the quietest in the pilot.

All data together cover the timesteps evenly. Independent replicates of the whole give the error, whatever the
way of drawing. It is looked at rarely: each time that it is too large the rows are doubled at least, so that
stopping where it happens to be small biases the mean little.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1 (low-discrepancy timesteps).
    https://arxiv.org/abs/2107.00630
    Monte Carlo theory, methods and examples (Owen, 2013), chapters 8 and 9. https://artowen.su.domains/mc/
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_diffusion.bounds import ROWS, Estimate, log_density
from pyro_diffusion.checks import check_data
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.networks import evaluating
from pyro_diffusion.observations import as_real

__all__ = ["BoundEvaluation", "evaluate_bound"]

_REPLICATES, _PATH_REPLICATES = 16, 10  # whose spread is the error
_LEAST_ROWS, _MOST_ROWS = 2**12, 2**18  # of all replicates to begin with; of one replicate
_GROUPS = 32  # of timesteps, each with a noise and a coefficient of its own
_PATH_GROUPS = 4  # of sites, with a coefficient each, where whole paths are summed
_PILOT = 512  # pairs of rows, at least 16 of each group
_PILOT_PATHS = 16  # of each of eight data, where paths are tried


class BoundEvaluation(NamedTuple):
    """The bound of every datum, with what it cost; nats per datum, float64."""

    elbo: Tensor  #: an estimate of each datum's bound, ``(N,)``
    standard_error: Tensor  #: Monte Carlo error of it, ``(N,)``
    monte_carlo_error: (
        float  #: of the mean over data, whose draws are spread over the timesteps together
    )
    rows: int  #: network rows spent, the pilot's included
    full_rows: float  #: those of one full sum, N T; infinite for the continuous chain
    estimator: str  #: "timesteps", or what paths were summed: "KL", "path" or "control variate"
    #: by group of timesteps: how often it is drawn, the reconstruction first; empty for paths
    shares: Tensor
    event_size: int  #: entries :math:`D` of one datum

    def __repr__(self) -> str:
        full = f"; one full sum: {self.full_rows:,.0f}" if self.full_rows < math.inf else ""
        return (
            f"BoundEvaluation({len(self.elbo)} data, elbo={self.mean()} nats per datum, {self.rows:,} "
            f"network rows by {self.estimator}{full})"
        )

    def mean(self) -> Estimate:
        """Mean bound over data in nats per datum, with its errors."""
        estimate = Estimate.of(self.elbo, self.standard_error)
        return estimate._replace(monte_carlo_error=self.monte_carlo_error)

    def bits_per_dim(self) -> Estimate:
        r"""Mean of :math:`-\mathrm{ELBO} / (D \ln 2)` over data (E15), with its errors."""
        nats, *errors = self.mean()
        unit = self.event_size * math.log(2)
        return Estimate(-nats / unit, *(error / unit for error in errors))


@torch.no_grad()
def evaluate_bound(
    diffusion: DiffusionModel,
    x_0: Tensor,
    *,
    standard_error: float,
    num_timesteps: float | None = None,
    batch_size: int = ROWS,
    max_rows: float = 1e7,
) -> BoundEvaluation:
    r"""Mean bound over data, until its Monte Carlo error is small enough.

    Args:
        diffusion: The model, of any kernels.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        standard_error: Monte Carlo error of the mean over data to reach, nats per datum.
        num_timesteps: Another grid for the same curve, ``math.inf`` for the continuous chain; by default the
            model's own.
        batch_size: Network rows at a time.
        max_rows: Network rows after which no more are begun; a warning then says what was reached. The pilot
            run and the first replicates are spent in any case.

    Returns:
        :class:`BoundEvaluation`. Beside the Monte Carlo error, ``mean()`` has the sampling error, which more
        rows do not change. The error is estimated, from 16 replicates (10 where paths are summed); where few
        data or rare terms dominate it may be low, and the bound with it a little high.

    Raises:
        ValueError: An error that is not positive, a schedule without the grid asked for, a term that is not
            finite; data as for the programs.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(1000))
        >>> result = evaluate_bound(DiffusionModel(denoiser), torch.zeros(64, 2), standard_error=0.3)
        >>> result.mean().monte_carlo_error < 0.3, result.full_rows / result.rows > 2
        (True, True)
    """
    if not isinstance(standard_error, int | float) or not 0 < standard_error < math.inf:
        raise ValueError(
            f"argument 'standard_error': got {standard_error!r}; expected a positive number of nats per "
            "datum, the Monte Carlo error of the mean over data. For bits per dimension, multiply by D ln 2."
        )
    check_diffusion(diffusion)
    if not isinstance(batch_size, int) or batch_size < 1 or not isinstance(max_rows, int | float):
        raise ValueError(
            f"arguments 'batch_size' and 'max_rows': got {batch_size!r} and {max_rows!r}; expected a whole "
            "number of network rows at a time, and a number of rows in all. Leave them out."
        )
    if (isinstance(num_timesteps, float) and num_timesteps != math.inf) or isinstance(
        num_timesteps, str
    ):
        raise ValueError(
            f"argument 'num_timesteps': got {num_timesteps!r}; expected a whole number of at least 1, or "
            "math.inf for the chain without end. Leave it out for the model's own."
        )
    continuous = num_timesteps == math.inf
    if num_timesteps is not None and not continuous:
        diffusion = diffusion.with_num_timesteps(num_timesteps)  # type: ignore[arg-type]
    elif continuous:
        diffusion = diffusion.with_both_ends()
    with evaluating(diffusion):
        rows = _Rows(diffusion, check_data(x_0), continuous, batch_size)
        plan = _plan(rows, standard_error)
        # Of few data some rows more: a small sample of rare terms has a small spread.
        largest = min(_MOST_ROWS, max_rows / plan.num_replicates) / plan.rows_of_one
        largest = max(1, math.floor(largest))
        size = max(plan.size, math.ceil(_LEAST_ROWS / (plan.num_replicates * plan.rows_of_one)))
        size = total = min(size, largest)
        values = torch.stack([plan.replicate(size) for _ in range(plan.num_replicates)])
        while (error := _error_of_mean(values)) > standard_error and rows.spent < max_rows:
            times = max(1, 1.2 * (error / standard_error) ** 2 - 1)
            size = min(math.ceil(total * times), largest)
            more = torch.stack([plan.replicate(size) for _ in range(plan.num_replicates)])
            values = (total * values + size * more) / (total + size)
            total += size
    if error > standard_error:
        needed = rows.spent * (error / standard_error) ** 2
        warnings.warn(
            f"argument 'max_rows': {rows.spent:,} network rows leave a Monte Carlo error of {error:.3g} nats "
            f"per datum; {standard_error:g} would need about {needed:.2g}.",
            stacklevel=2,
        )
    return BoundEvaluation(
        elbo=values.mean(0) + rows.known,
        standard_error=(values.var(0) / len(values)).sqrt(),
        monte_carlo_error=error,
        rows=rows.spent,
        full_rows=len(x_0) * rows.length,
        estimator=plan.name,
        shares=plan.shares,
        event_size=x_0[0].numel(),
    )


class _Rows:
    """Terms of single network rows, and of whole paths, for a model and its data."""

    def __init__(
        self, diffusion: DiffusionModel, x_0: Tensor, continuous: bool, batch_size: int
    ) -> None:
        self.diffusion, self.x_0, self.continuous = diffusion, x_0, continuous
        self.batch_size, self.embedded = batch_size, diffusion.embed(x_0)
        self.data: Any = as_real(x_0)
        self.spent = 0
        self.length = math.inf if continuous else diffusion.schedule.num_timesteps
        # Edges of the groups: of t = 2 … T, or of u in [0, 1].
        if continuous:
            self.edges = torch.linspace(0, 1, _GROUPS + 1, dtype=torch.float64)
        else:
            steps = diffusion.schedule.num_timesteps - 1
            groups = min(_GROUPS, steps)
            self.edges = 2 + torch.linspace(0, steps, groups + 1, dtype=torch.float64).floor()
        self.edges = self.edges.to(x_0.device)
        self.sizes = torch.cat((torch.ones_like(self.edges[:1]), self.edges.diff()))
        # What costs no row: the term at x_T, and the part of the likelihood that a transform makes.
        last = torch.tensor(1.0 if continuous else diffusion.schedule.num_timesteps)
        marginal = self._marginal(self.embedded, last.to(x_0.device))
        self.known = -kl_divergence(marginal, diffusion.prior()).double()
        self.log_volume = torch.zeros_like(self.known)
        if diffusion.transform is not None:
            self.log_volume = diffusion.log_volume(x_0).double()
        self.known = self.known + self.log_volume

    def _marginal(self, x_0: Tensor, t: Tensor) -> TorchDistribution:
        if self.continuous:
            return self.diffusion.marginal_at(x_0, t)
        return self.diffusion.forward_marginal(x_0, t.long())

    def timesteps(self, group: Tensor, position: Tensor) -> Tensor:
        """Timesteps at a position in [0, 1) of a group; group 0 is the reconstruction."""
        if len(self.edges) == 1:  # a chain of one step
            return torch.ones_like(position)
        inner = (group - 1).clamp(min=0)
        start, end = self.edges[inner], self.edges[inner + 1]
        t = start + position * (end - start)
        first = 0.0 if self.continuous else 1.0
        return torch.where(group == 0, first, t if self.continuous else t.floor())

    def terms(self, data: Tensor, t: Tensor) -> Tensor:
        """Terms of the bound at timesteps ``t`` of rows ``data``, with their signs; float64, ``(rows,)``."""
        parts = zip(data.split(self.batch_size), t.split(self.batch_size), strict=True)
        self.spent += len(data)
        terms = torch.cat([self._terms(*part) for part in parts])
        if not terms.isfinite().all():
            where = t[~terms.isfinite()][0].item()
            raise ValueError(
                f"timestep {where:g}: got a term of the bound that is NaN or infinite; expected finite "
                "numbers. Check the parameters for NaN, and the data for values outside the support."
            )
        return terms

    def _terms(self, data: Tensor, t: Tensor) -> Tensor:
        x_0, first = self.embedded[data], t == (0 if self.continuous else 1)
        x_t = self._marginal(x_0, t).sample()
        if self.continuous:
            q = self.diffusion.increment(x_t, x_0, t)
            p, likelihood = self.diffusion.reverse_increment(x_t, t)
        else:
            p, likelihood = self.diffusion.reverse(x_t, t.long())
            # Rows of the reconstruction have no posterior; any kernel will do there.
            there = t.long().clamp(min=2, max=self.diffusion.schedule.num_timesteps)
            q = p if first.all() else self.diffusion.forward_posterior(x_t, x_0, there)
        kl, _, _ = _terms_of_draw(q, p)
        reconstruction = log_density(likelihood, self.data[data]) - self.log_volume[data]
        return torch.where(first, reconstruction, -kl)

    def systematic(self, num_points: int, shares: Tensor) -> Tensor:
        """One replicate of every datum's bound, less what is known: ``num_points`` rows of each."""
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
        """Whole paths: the bound by KLs, less what is known, and what log-ratios add by group of sites."""
        self.spent += len(data) * self.diffusion.schedule.num_timesteps
        parts = [self._paths(part) for part in data.split(self.batch_size)]
        bounds, excess = (torch.cat(x) for x in zip(*parts, strict=True))
        return bounds, excess

    def _paths(self, data: Tensor) -> tuple[Tensor, Tensor]:
        diffusion, x_0 = self.diffusion, self.embedded[data]
        last = diffusion.schedule.num_timesteps
        kl, x_t, ratio = _terms_of_draw(diffusion.terminal_marginal(x_0), diffusion.prior())
        excess = torch.zeros(_PATH_GROUPS, len(data), dtype=torch.float64, device=x_0.device)
        excess[-1] += ratio - kl
        bound = torch.zeros_like(kl)
        for t in range(last, 1, -1):
            q, p = diffusion.forward_posterior(x_t, x_0, t), diffusion.denoiser(x_t, t)
            kl, x_t, ratio = _terms_of_draw(q, p)
            excess[(t - 1) * _PATH_GROUPS // last] += ratio - kl
            bound -= kl
        bound += log_density(diffusion.decode(x_t), self.data[data])
        return bound - self.log_volume[data], excess.T


def _terms_of_draw(q: TorchDistribution, p: TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
    """The KL, a draw, and its log-ratio, which stands for the KL where that has no formula."""
    x = q.sample()
    ratio = log_density(q, x) - log_density(p, x)
    try:
        return kl_divergence(q, p).double(), x, ratio
    except NotImplementedError:
        return ratio, x, ratio


def _error_of_mean(values: Tensor) -> float:
    """Standard error of the mean over data and replicates, ``(R, N)``, from the spread of the latter."""
    return (values.mean(1).std() / math.sqrt(len(values))).item()


class _Plan(NamedTuple):
    replicate: Callable[[int], Tensor]  # of every datum's bound less what is known, for a size
    size: int  # to begin with: timesteps, or paths, of each datum
    num_replicates: int
    rows_of_one: int  # network rows of a replicate of size one
    name: str
    shares: Tensor


def _plan(rows: _Rows, standard_error: float) -> _Plan:
    """What to draw, from a pilot."""
    count = len(rows.x_0)
    shares, noise = _pilot(rows)
    rows_needed = noise / (count * standard_error**2)  # of each datum
    if rows.length < rows_needed:
        strength, variance, name = _path_pilot(rows)
        paths_needed = max(_PATH_REPLICATES, variance / (count * standard_error**2))
        if rows.length * paths_needed < rows_needed:

            def sum_of_paths(size: int) -> Tensor:
                """Whole paths of every datum, with the coefficients of the pilot."""
                data = torch.arange(count, device=rows.x_0.device).repeat(size)
                bound, excess = rows.paths(data)
                return (bound - excess @ strength).reshape(size, count).mean(0)

            size = math.ceil(1.2 * paths_needed / _PATH_REPLICATES)
            one = count * int(rows.length)
            return _Plan(sum_of_paths, size, _PATH_REPLICATES, one, name, shares[:0])
    size = math.ceil(1.2 * rows_needed / _REPLICATES)

    return _Plan(
        lambda size: rows.systematic(size, shares), size, _REPLICATES, count, "timesteps", shares
    )


def _pilot(rows: _Rows) -> tuple[Tensor, float]:
    r"""How often to draw each group of timesteps, and the noise of a datum's single row by that."""
    num_pairs = max(16, _PILOT // len(rows.sizes))
    groups = torch.arange(len(rows.sizes), device=rows.x_0.device).repeat_interleave(num_pairs)
    # Every datum is seen, if there are few.
    data = torch.randperm(len(groups), device=groups.device) % len(rows.x_0)
    if len(rows.x_0) > len(groups):
        data = torch.randint(len(rows.x_0), groups.shape, device=groups.device)
    t = rows.timesteps(groups, torch.rand(groups.shape, dtype=torch.float64, device=groups.device))
    pairs = torch.stack([rows.terms(data, t) for _ in range(2)]).reshape(2, -1, num_pairs)
    variance = (
        pairs.transpose(0, 1).flatten(1).var(1)
    )  # over data as well: few rows see few of them
    noise = (pairs[0] - pairs[1]).square().mean(1) / 2
    # A tenth of the rows by size: where a term is large, what little noise the pilot saw may be too little.
    root, size = (rows.sizes * x for x in (variance.sqrt(), pairs.square().mean((0, 2)).sqrt()))
    shares = 0.9 * root / root.sum().clamp(min=1e-300) + 0.1 * size / size.sum().clamp(min=1e-300)
    shares = shares.clamp(min=1e-6)
    shares = shares / shares.sum()
    return shares, (rows.sizes.square() * noise / shares).sum().item()


def _path_pilot(rows: _Rows) -> tuple[Tensor, float, str]:
    """Coefficients of the log-ratios by group, a path's variance with them, and what the sum is called."""
    count = min(len(rows.x_0), 8)
    data = torch.randperm(len(rows.x_0), device=rows.x_0.device)[:count]
    bound, excess = rows.paths(data.repeat(_PILOT_PATHS))
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
