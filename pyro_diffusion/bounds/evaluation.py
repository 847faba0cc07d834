r"""The mean bound over data to a Monte Carlo error that is asked for, with few network rows.

A full sum over a chain of :math:`T` steps costs :math:`N T` network rows. It is more exact than needed, since
most of its terms are small or have little noise. :func:`evaluate_bound` spends rows where the noise is, in
one of two ways, and chooses between them after a pilot run:

*Single timesteps.* Each datum has a few, drawn systematically (:math:`h` evenly spaced points through the
quantile function) from a law that follows the noise of the terms,

.. math::
    \widehat{\mathrm{ELBO}} = -L_T - \frac1h \sum_{i=1}^h \frac{L_{t_i}}{\pi(t_i)}, \qquad
    \pi(t) \propto \sqrt{\operatorname{Var} L_t} .

For a single row the analytic KL has the least noise, because it is the mean of the log-ratio given
:math:`x_t`.

*Whole paths*, where the error asked for needs that many rows. Along a path log-ratios cancel: at an exact
denoiser their sum is :math:`\log p(x_0)` on every path, while the sum of KLs is noisy. In between it is

.. math::
    L_t = \mathrm{KL}_t
        + c_t \Big( \log \frac{q(x_{t-1} \mid x_t, x_0)}{p(x_{t-1} \mid x_t)} - \mathrm{KL}_t \Big),

whose bracket has mean zero. The coefficient :math:`c_t` is zero (KL), one (path) or fitted (a control
variate), whichever had the least noise in the pilot run.

All data together cover the timesteps evenly. Independent replicates give the error of either way. The error
is looked at rarely, because stopping where it happens to be small biases the mean: each time that it is too
large, the rows are at least doubled.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1 (low-discrepancy timesteps).
    https://arxiv.org/abs/2107.00630
    Monte Carlo theory, methods and examples (Owen, 2013), chapters 8 and 9. https://artowen.su.domains/mc/
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.bounds.plan import Plan, Rows, planned
from pyro_diffusion.bounds.terms import Estimate
from pyro_diffusion.chains.time import Time
from pyro_diffusion.checks import check_argument, check_count, check_data, check_positive
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.networks import evaluating
from pyro_diffusion.walk import ROWS

_LEAST_ROWS, _MOST_ROWS = 2**12, 2**18  # of all replicates to begin with; of one replicate


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
        return Estimate.of(self.elbo, self.standard_error)._replace(
            monte_carlo_error=self.monte_carlo_error
        )

    def bits_per_dim(self) -> Estimate:
        r"""Mean of :math:`-\mathrm{ELBO} / (D \ln 2)` over data (E15), with its errors."""
        return self.mean().bits_per_dim(self.event_size)


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
    meaning = "nats per datum, the Monte Carlo error of the mean over data"
    remedy = "For bits per dimension, multiply by D ln 2."
    standard_error = check_positive("standard_error", standard_error, remedy, meaning)
    batch_size = check_count("batch_size", batch_size, 1, "Leave it out.", "network rows at a time")
    check_argument("max_rows", max_rows, int | float, "1e7")
    time = Time.of(check_diffusion(diffusion).schedule.num_timesteps, num_timesteps)
    diffusion = time.chain(diffusion)
    with torch.no_grad(), evaluating(diffusion):
        rows = Rows(diffusion, check_data(x_0), time, batch_size)
        plan = planned(rows, standard_error)
        values, error = _replicated(plan, rows, standard_error, max_rows)
    return BoundEvaluation(
        elbo=values.mean(0) + rows.known,
        standard_error=(values.var(0) / len(values)).sqrt(),
        monte_carlo_error=error,
        rows=rows.spent,
        full_rows=len(x_0) * time.num_timesteps,
        estimator=plan.name,
        shares=plan.shares,
        event_size=x_0[0].numel(),
    )


def _replicated(
    plan: Plan, rows: Rows, standard_error: float, max_rows: float
) -> tuple[Tensor, float]:
    """Replicates of every datum's bound, ``(R, N)``, until the error of their mean is small enough."""
    # Of few data some rows more: a small sample of rare terms has a small spread.
    largest = min(_MOST_ROWS, max_rows / plan.num_replicates) / plan.rows_of_one
    largest = max(1, math.floor(largest))
    size = max(plan.size, math.ceil(_LEAST_ROWS / (plan.num_replicates * plan.rows_of_one)))
    size = total = min(size, largest)
    values = plan.replicates(size)
    while (error := _error_of_mean(values)) > standard_error and rows.spent < max_rows:
        size = min(math.ceil(total * max(1, 1.2 * (error / standard_error) ** 2 - 1)), largest)
        values = (total * values + size * plan.replicates(size)) / (total + size)
        total += size
    if error > standard_error:
        needed = rows.spent * (error / standard_error) ** 2
        warnings.warn(
            f"argument 'max_rows': {rows.spent:,} network rows leave a Monte Carlo error of {error:.3g} nats "
            f"per datum; {standard_error:g} would need about {needed:.2g}.",
            stacklevel=3,
        )
    return values, error


def _error_of_mean(values: Tensor) -> float:
    """Standard error of the mean over data and replicates, ``(R, N)``, from the spread of the latter."""
    return (values.mean(1).std() / math.sqrt(len(values))).item()
