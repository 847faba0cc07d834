r"""The mean bound over data to a Monte Carlo error that the user chooses, with few network rows.

A full sum over a chain of :math:`T` steps costs :math:`N T` network rows. It is more exact than needed, since
most of its terms are small or have little noise. :func:`evaluate_bound` draws more rows where there is more
noise. It does so in one of two ways (:mod:`~pyro_diffusion.bounds.plan`), and chooses between them after its
first rows have shown how large the noise is:

*Single timesteps.* Each datum has a few, drawn systematically (:math:`h` evenly spaced points through the
quantile function) from a law that follows the noise of the terms. The means :math:`c` of the terms, by group
of timesteps, are estimated from earlier rows and subtracted,

.. math::
    \widehat{\mathrm{ELBO}} = -L_T - \sum_t c_t - \frac1h \sum_{i=1}^h \frac{L_{t_i} - c_{t_i}}{\pi(t_i)},
    \qquad \pi(t) \approx \tfrac34 \frac{\sqrt{\operatorname{Var} L_t}}{\sum_s \sqrt{\operatorname{Var} L_s}}
    + \tfrac14 \cdot \text{other} .

A quarter of the rows is drawn in another way: a fifth evenly over the groups and a twentieth for the
reconstruction (more than half of the first rows). This is a safeguard: where the noise of a term comes from
rare large values, or from few data, the earlier rows may contain none of them. For a single row the analytic
KL has the least noise, because it is the mean of the log-ratio given :math:`x_t`.

*Whole paths*, where the chosen error needs that many rows. Along a path log-ratios cancel: at an exact
denoiser their sum is :math:`\log p(x_0)` on every path, while the sum of KLs is noisy. In general the term is

.. math::
    L_t = \mathrm{KL}_t
        + c_t \Big( \log \frac{q(x_{t-1} \mid x_t, x_0)}{p(x_{t-1} \mid x_t)} - \mathrm{KL}_t \Big),

whose bracket has mean zero. The coefficient :math:`c_t` is zero (KL), one (path) or fitted (a control
variate), whichever had the least noise in a pilot run. The rows of the pilot run are used for nothing else.
For a model and guide of any other kind only whole trajectories are drawn, as in
:func:`~pyro_diffusion.bounds.elbo_terms`.

**Why the error is honest.** Rows come in stages (:mod:`~pyro_diffusion.bounds.pooled`). A stage's law,
coefficients and size depend on earlier stages only, so that each stage is unbiased given the earlier ones.
Its error comes from independent replicates of independent blocks of data, with 56 or more degrees of freedom.
It is a standard deviation about the truth, and includes the uncertainty of the variance estimate. To stop
when the error happens to look small would bias it, so it is checked rarely: a stage that is not enough is
followed by one at least as large as all before it, which aims at nine tenths of the chosen error. An error
that rests on few large terms (fewer than 30 degrees of freedom, by the fourth moment of the replicates) is
not accepted, however small it is.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1 (low-discrepancy timesteps).
    https://arxiv.org/abs/2107.00630
    Monte Carlo theory, methods and examples (Owen, 2013), chapters 8 and 9. https://artowen.su.domains/mc/
    A Two-Sample Test for a Linear Hypothesis Whose Power is Independent of the Variance (Stein, 1945).
    https://doi.org/10.1214/aoms/1177731088
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from pyro_diffusion.bounds.plan import Timesteps, Trajectories, Way
from pyro_diffusion.bounds.pooled import FREEDOM, Pooled
from pyro_diffusion.bounds.rows import Rows
from pyro_diffusion.bounds.terms import Estimate
from pyro_diffusion.chains.time import Time
from pyro_diffusion.checks import check_between, check_count, check_data, check_positive, require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.display import as_table
from pyro_diffusion.family import Pair, unpacked
from pyro_diffusion.given import Given
from pyro_diffusion.reading import reading, refuse_gradients

_FEWEST = 4  # draws of each datum in a stage, which has an error of its own


class BoundEvaluation(NamedTuple):
    """The bound of every datum, and its cost; nats per datum, float64."""

    elbo: Tensor  #: an estimate of each datum's bound, ``(N,)``
    standard_error: Tensor  #: Monte Carlo error of ``elbo``, ``(N,)``
    monte_carlo_error: float  #: of the mean over data, whose draws are stratified together
    rows: int  #: network rows spent, including the pilot run
    full_rows: float  #: network rows of one full sum, N T; infinite for the continuous chain
    estimator: str  #: "timesteps"; for whole paths "KL", "path" or "control variate"
    #: share of the draws of each group of timesteps, the reconstruction first; empty for paths
    shares: Tensor
    event_size: float  #: entries :math:`D` of one datum; under a mask, observed ones in the mean

    def __repr__(self) -> str:
        full = f"; one full sum: {self.full_rows:,.0f}" if self.full_rows < math.inf else ""
        return (
            f"BoundEvaluation({len(self.elbo)} data, elbo={self.mean()} nats per datum, {self.rows:,} "
            f"network rows by {self.estimator}{full})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "bound": str(self.mean()),
            "bits per dimension": str(self.bits_per_dim()),
            "network rows": f"{self.rows:,} by {self.estimator}",
        }
        if self.full_rows < math.inf:
            rows["rows of one full sum"] = f"{self.full_rows:,.0f}"
        return as_table(f"BoundEvaluation({len(self.elbo)} data), nats per datum", rows)

    def mean(self) -> Estimate:
        """Mean bound over data in nats per datum, with its errors."""
        return Estimate.of(self.elbo, self.standard_error)._replace(
            monte_carlo_error=self.monte_carlo_error
        )

    def bits_per_dim(self) -> Estimate:
        r"""Mean of :math:`-\mathrm{ELBO} / (D \ln 2)` over data (E15), with its errors."""
        return self.mean().bits_per_dim(self.event_size)


@overload
def evaluate_bound(
    family: Pair, /, x_0: Tensor, *, standard_error: float, num_timesteps: float | None = ...,
    batch_size: int | None = ..., max_rows: float = ..., **given: Any,
) -> BoundEvaluation: ...  # fmt: skip


@overload
def evaluate_bound(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, *, standard_error: float,
    num_timesteps: float | None = ..., batch_size: int | None = ..., max_rows: float = ...,
    **given: Any,
) -> BoundEvaluation: ...  # fmt: skip


def evaluate_bound(  # type: ignore[misc]
    model: Any,
    guide: Any = None,
    x_0: Any = None,
    *,
    standard_error: float,
    num_timesteps: float | None = None,
    batch_size: int | None = None,
    max_rows: float = 1e7,
    **given: Any,
) -> BoundEvaluation:
    r"""Mean bound over data, drawn until its Monte Carlo error is small enough.

    Args:
        model: A diffusion model with any kernels, or any other family; or the program for :math:`p` of any
            pair that :func:`~pyro_diffusion.bounds.elbo_terms` takes.
        guide: Program for :math:`q`, called as ``guide(x_0)``; leave it out for a family:
            ``evaluate_bound(diffusion, x_0, standard_error=0.1)``.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        standard_error: Monte Carlo error of the mean over data to reach, nats per datum.
        num_timesteps: For a diffusion model, the number of timesteps on the same curve, ``math.inf`` for the
            continuous chain; by default the model's own number.
        batch_size: Network rows at a time; for other programs, trajectories at a time. By default as many as
            fit into 256 MiB, at most 2,048.
        max_rows: Largest number of network rows. If it is reached first, a warning states the error reached.
            The pilot run and the first stage are drawn in any case. A trajectory counts as one row for each
            latent.
        given: What goes with the data: ``mask=``, true where an entry is observed, for the bound of the
            observed part; ``context=`` for conditional data, a row for each datum.

    Returns:
        :class:`BoundEvaluation`. Its ``mean()`` also has the sampling error, which more rows do not change.

    Raises:
        ValueError: A ``standard_error`` that is not positive, a schedule that has no grid of that length,
            ``num_timesteps`` for programs, a term that is not finite; data, a mask or a context that the
            programs do not take.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(1000))
        >>> result = evaluate_bound(DiffusionModel(denoiser), torch.zeros(64, 2), standard_error=0.3)
        >>> result.mean().monte_carlo_error < 0.3, result.full_rows / result.rows > 2
        (True, True)
    """
    meaning = "nats per datum, the Monte Carlo error of the mean over data"
    remedy = "For bits per dimension, multiply by D ln 2."
    error = check_positive("standard_error", standard_error, remedy, meaning)
    check_between("max_rows", max_rows, 0, math.inf, "network rows", "Leave it out.", "[]")
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, 1, "Leave it out.", "rows at a time")
    what = Given.of(**given)
    if isinstance(model, DiffusionModel) and not callable(guide):
        x_0 = guide if x_0 is None else x_0
        refuse_gradients((x_0, what))
        return _of_diffusion(model, x_0, what, num_timesteps, batch_size, error, max_rows)
    require(
        num_timesteps is None,
        "argument 'num_timesteps'",
        f"{num_timesteps!r} for programs, or a family, with a fixed number of steps",
        "None",
        "Leave it out, or pass a DiffusionModel, which can be evaluated on other grids.",
    )
    pair, guide, x_0 = unpacked(model, guide, x_0)
    _check_pair(pair, guide)
    return _of_programs(pair, guide, x_0, what, batch_size, error, max_rows)


def _of_diffusion(
    diffusion: DiffusionModel,
    x_0: Tensor,
    given: Given,
    num_timesteps: Any,
    batch_size: int | None,
    error: float,
    max_rows: float,
) -> BoundEvaluation:
    """The bound of a diffusion model, by single timesteps or whole paths."""
    time = Time.of(diffusion.schedule.num_timesteps, num_timesteps)
    diffusion = time.chain(diffusion)
    with reading(diffusion):
        rows = Rows(diffusion, x_0, given, time, batch_size)
        way, pooled = _drawn(Timesteps(rows), error, max_rows)
    size = x_0[0].numel() if given.mask is None else int(given.mask.sum()) / len(x_0)
    return _evaluation(way, pooled, rows.known, time.num_timesteps, size)


def _of_programs(
    model: Any,
    guide: Any,
    x_0: Tensor,
    given: Given,
    batch_size: int | None,
    error: float,
    max_rows: float,
) -> BoundEvaluation:
    """The bound of any model and guide, by whole trajectories."""
    way = Trajectories(model, guide, check_data(x_0, given.mask), given, batch_size)
    _, pooled = _drawn(way, error, max_rows)
    size = way.event_size if given.mask is None else int(given.mask.sum()) / len(x_0)
    return _evaluation(way, pooled, torch.zeros_like(pooled.mean), way.length, size)


def _evaluation(
    way: Way, pooled: Pooled, known: Tensor, length: float, event_size: float
) -> BoundEvaluation:
    return BoundEvaluation(
        elbo=pooled.mean + known,
        standard_error=pooled.standard_error,
        monte_carlo_error=pooled.error,
        rows=way.spent,
        full_rows=len(known) * length,
        estimator=way.name,
        shares=way.shares,
        event_size=event_size,
    )


def _drawn(way: Way, error: float, max_rows: float) -> tuple[Way, Pooled]:
    """Draw stages until the error is small enough; the last way, and its stages pooled."""
    pooled, size = Pooled(), way.least
    while True:
        pooled.add(way.draw(size))
        if pooled.settled(error) or way.spent >= max_rows:
            break
        size = pooled.next_size(error, way.gain())
        better = way.better(size, error)
        if better is not way:
            way, pooled, size = better, Pooled(), better.least
        left = (max_rows - way.spent) / way.cost
        size = max(_FEWEST, math.ceil(min(size, left)))
    if not pooled.settled(error):
        needed = way.spent * max((pooled.error / error) ** 2, FREEDOM / pooled.freedom)
        warnings.warn(
            f"argument 'max_rows': {way.spent:,} network rows leave a Monte Carlo error of "
            f"{pooled.error:.3g} nats per datum; {error:g} would need about {needed:.2g}.",
            stacklevel=4,
        )
    return way, pooled


def _check_pair(model: Any, guide: Any) -> None:
    """Raise a ``ValueError`` unless both a model and a guide can be called."""
    require(
        callable(model) and callable(guide),
        "argument 'model'",
        f"a {type(model).__name__} and a {type(guide).__name__} for a guide",
        "a DiffusionModel or another family, or a model and a guide",
        "Pass evaluate_bound(diffusion, x_0, …), or evaluate_bound(model, guide, x_0, …).",
    )
