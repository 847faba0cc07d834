r"""Every estimate of :math:`\log p(x_0)` of one model on one data set, grouped by the density it estimates.

Three densities are called the likelihood of a diffusion model. The *chain* of :math:`T` steps has one. The
*continuous* chain, :math:`T \to \infty`, has another. The *probability flow*, an ordinary differential
equation with the same score, has a third. They agree for an exact denoiser, and for no other. Each group
has bounds, which are below the density in expectation, and estimates, which agree within their errors. If
they do not, one of them is wrong, and :func:`summary` raises an error. Groups are not compared with each
other.

References:
    Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), section 4 (the
    likelihoods of the diffusion and of the flow). https://arxiv.org/abs/2101.09258
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from pyro_diffusion.bounds import Estimate, evaluate_bound
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence.evidence import Evidence
from pyro_diffusion.evidence.flow import ode_log_likelihood
from pyro_diffusion.evidence.importance import importance_evidence
from pyro_diffusion.evidence.sequential import smc_evidence
from pyro_diffusion.family import Pair, unpacked
from pyro_diffusion.schedules import AlphaSchedule
from pyro_diffusion.walk import whose_programs

_TOLERANCE = 5.0  # joint standard errors beyond which two estimates disagree


class SummaryRow(NamedTuple):
    """One estimate; nats per datum."""

    model: str  #: the density: "chain, T = …", "chain, T → ∞" or "probability flow"
    estimator: str  #: name of the estimator
    kind: str  #: "bound" or "estimate"
    value: Estimate  #: mean over data, with its errors
    reliable: int  #: data whose estimate can be trusted; all of them for a bound
    num_data: int  #: all data
    bias: float = 0.0  #: how much too low the mean of an estimate is, to first order; not corrected


class Summary(NamedTuple):
    """Estimates of one model's log-densities on one data set, in a group for each density."""

    rows: tuple[SummaryRow, ...]

    def __repr__(self) -> str:
        return f"Summary of {self.rows[0].num_data} data, nats per datum\n{self.table()}"

    def groups(self) -> dict[str, list[SummaryRow]]:
        """Rows under the name of the density that they estimate."""
        names = dict.fromkeys(row.model for row in self.rows)
        return {name: [row for row in self.rows if row.model == name] for name in names}

    def table(self) -> str:
        """A line for each estimate, under the name of its density."""
        width = max(len(row.estimator) for row in self.rows)
        lines = []
        for model, rows in self.groups().items():
            lines.append(model)
            for row in rows:
                word = f"  {row.kind:8s}  {row.estimator:{width}s}  {row.value}"
                if row.reliable < row.num_data:
                    word += f", reliable for {row.reliable} of {row.num_data}"
                lines.append(word)
        return "\n".join(lines)

    def check(self) -> None:
        """Check in each group that the estimates agree, and that no bound is above an estimate.

        Two estimates disagree if they differ by more than five joint Monte Carlo errors plus the biases from
        the logarithms of averages. An estimate that is not reliable for every datum is a lower bound in
        expectation, and is checked as a bound.

        Raises:
            ValueError: Two rows that disagree. One of the two programs, or its guide, is wrong.
        """
        for rows in self.groups().values():
            trusted = [r for r in rows if r.kind == "estimate" and r.reliable == r.num_data]
            for row in rows:
                for other in trusted:
                    error = math.hypot(row.value.monte_carlo_error, other.value.monte_carlo_error)
                    slack = _TOLERANCE * error + row.bias + other.bias + 1e-3
                    # Both orders of two estimates occur, so that a one-sided check is enough.
                    if row is not other and row.value.value - other.value.value > slack:
                        expected = "one density" if row in trusted else "a bound below"
                        raise ValueError(
                            f"{row.model}: got {row.value} nats per datum by {row.estimator} and "
                            f"{other.value} by {other.estimator}; expected {expected}, within errors. Check "
                            "that both programs belong to one model, and check its kernels."
                        )


@overload
def summary(
    family: Pair, /, x_0: Tensor, *, standard_error: float = ..., num_particles: int = ...,
    num_runs: int = ..., **given: Any,
) -> Summary: ...  # fmt: skip


@overload
def summary(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, *,
    standard_error: float = ..., num_particles: int = ..., num_runs: int = ..., **given: Any,
) -> Summary: ...  # fmt: skip


def summary(  # type: ignore[misc]
    model: Any,
    guide: Any = None,
    x_0: Any = None,
    *,
    standard_error: float = 0.1,
    num_particles: int = 64,
    num_runs: int = 4,
    **given: Any,
) -> Summary:
    r"""All estimates and bounds of :math:`\log p(x_0)`, in a group for each of the three densities.

    Sequential Monte Carlo costs ``(num_runs · num_particles + 128) · T`` network rows a datum and importance
    weights cost ``num_particles · T``: begin with few data. Estimates that do not exist for a model are left
    out: the continuous chain for an ``AlphaSchedule``; the flow for data with a mass, a likelihood or a
    mask, and for a schedule with a curve for each entry; sequential Monte Carlo for bits; all but the
    first density for a model that is not a diffusion.

    Args:
        model: The model: a diffusion, a hierarchical VAE, or the model of any pair of programs.
        guide: The guide of the pair, before the data; leave it out for a family.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        standard_error: Monte Carlo error of the bounds' means, nats per datum.
        num_particles: Particles for each datum.
        num_runs: Independent runs of sequential Monte Carlo.
        given: What goes with the data: ``mask=``, true where an entry is observed; ``context=``.

    Returns:
        :class:`Summary`; ``print`` it.

    Raises:
        ValueError: Estimates of one density that disagree (:meth:`Summary.check`); arguments that an
            estimator does not take.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(10, log_snr_max=14))
        >>> result = summary(DiffusionModel(denoiser), torch.zeros(30, 2))
        >>> list(result.groups())
        ['chain, T = 10', 'chain, T → ∞', 'probability flow']
    """
    pair, guide, x_0 = unpacked(model, guide, x_0)
    diffusion = whose_programs(pair, guide)
    settings = {"num_particles": num_particles, **given}
    chain = f"chain, T = {_length(pair)}"
    bound = _bound(chain, diffusion or (pair, guide), x_0, standard_error, given)
    forward = guide if diffusion is None else diffusion.guide
    by_weights = importance_evidence(pair, forward, x_0, **settings)
    rows = [bound, _estimate(chain, by_weights)]
    if diffusion is not None:
        if diffusion.process.has_score:
            rows.append(
                _estimate(chain, smc_evidence(diffusion, x_0, num_runs=num_runs, **settings))
            )
        has_curve, has_flow = _applies(diffusion, by_weights.measure, given)
        if has_curve:
            rows.append(_bound("chain, T → ∞", diffusion, x_0, standard_error, given, math.inf))
        if has_flow:
            with torch.no_grad():
                flow = ode_log_likelihood(diffusion, x_0, **given)
                rows.append(_estimate("probability flow", flow))
    result = Summary(tuple(rows))
    result.check()
    return result


def _length(model: Any) -> Any:
    """Number of latent states, or "?" if the program has no such number."""
    return getattr(model, "num_timesteps", "?")


def _applies(diffusion: DiffusionModel, measure: str, given: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the chain has a limit of infinitely many steps, and whether the flow has a density."""
    curve: Any = diffusion.schedule
    while hasattr(curve, "schedule"):  # on another scale, or some of its timesteps
        curve = curve.schedule
    has_curve = not isinstance(curve, AlphaSchedule)
    whole = given.get("mask") is None
    has_flow = diffusion.likelihood is None and not diffusion.schedule.event_dim and whole
    has_flow = has_flow and (has_curve or curve.num_timesteps > 1)
    return has_curve, has_flow and measure == "density"


def _bound(
    name: str,
    model: Any,
    x_0: Tensor,
    standard_error: float,
    given: dict[str, Any],
    num_timesteps: float | None = None,
) -> SummaryRow:
    settings = {"standard_error": standard_error, "num_timesteps": num_timesteps, **given}
    result = evaluate_bound(model, x_0, **settings)
    return SummaryRow(name, f"by {result.estimator}", "bound", result.mean(), len(x_0), len(x_0))


def _estimate(model: str, evidence: Evidence) -> SummaryRow:
    reliable, num_data = int(evidence.reliable.sum()), len(evidence.reliable)
    bias = evidence.standard_error.square().mean().item() / 2
    return SummaryRow(
        model, evidence.estimator, "estimate", evidence.mean(), reliable, num_data, bias
    )
