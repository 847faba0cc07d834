r"""What to ask of models and guides, once they are fitted.

:func:`~pyro_diffusion.draws.to_arviz` hands draws to ArviZ, :func:`compare` ranks models by what their
weights average to, and :func:`simulation_based_calibration` asks whether a guide *is* the posterior:

.. math::
    x_{0:T} \sim p, \quad x_{1:T}^{(s)} \sim q(\cdot \mid x_0) \;\Rightarrow\;
    \operatorname{rank}\big(f(x_{0:T})\big) \text{ among } f(x_0, x_{1:T}^{(s)}) \text{ is uniform if } q
    = p(\cdot \mid x_0).

References:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018).
    https://arxiv.org/abs/1804.06788
    Importance Weighted Autoencoders (Burda et al., 2016), section 5.2 (active units).
    https://arxiv.org/abs/1509.00519
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_diffusion import arviz_bridge
from pyro_diffusion.checks import check_data
from pyro_diffusion.draws import Pair, Record, as_numpy, programs, to_arviz
from pyro_diffusion.evidence import Evidence
from pyro_diffusion.networks import evaluating
from pyro_diffusion.walk import ROWS

if TYPE_CHECKING:
    import pandas

__all__ = [
    "active_units",
    "compare",
    "randomized_pit",
    "simulation_based_calibration",
    "to_arviz",
]


def compare(evidence: Mapping[str, Evidence]) -> "pandas.DataFrame":
    r"""Rank models by what they say of the same held-out data, through ``arviz.compare``.

    A datum is scored by its evidence if Pareto :math:`\hat k` is below 0.7 (of few particles, below
    :math:`1 - 1 / \log_{10} K`) for every model, and otherwise by the bound of every model, from the same
    draws: an estimate that cannot be trusted ranks nothing, and a model is never compared by its evidence
    with another by its bound. The column ``score`` says which it was, ``mc_error`` is the Monte Carlo error
    of a model's sum over data (``se`` is its sampling error), and ``mc_bias`` is by how much the sum is low
    in expectation, to first order, the logarithm of an average being concave: it grows with the number of
    data faster than the errors do, and where it is not far below a difference only more particles help.
    ``evidence`` and ``bound`` are the sums that were and were not used, ``bad_k`` the data of each model
    whose k is too large. Where bounds were used the order is of models *with their guides*: a model with a
    loose guide can be better than it looks, and a warning says so if the evidence has another order. The
    other columns are ArviZ's own (before 1.0 it names the sum ``elpd_loo``; nothing here is leave-one-out).
    ``arviz.plot_compare`` and :func:`~pyro_diffusion.plots.plot_compare` draw it.

    Args:
        evidence: :class:`~pyro_diffusion.evidence.Evidence` by the name of its model.

    Returns:
        A ``pandas.DataFrame``, the best model first; sums over data, nats.

    Raises:
        ValueError: Fewer than two models; models scored on other data, as densities and as masses, by
            another estimator or with another number of particles; fewer than 25 particles; no bound where
            one is needed.
    """
    if not isinstance(evidence, Mapping) or len(evidence) < 2:
        raise ValueError(
            f"argument 'evidence': got {type(evidence).__name__} of {len(evidence)}; expected two models or "
            "more by name. Pass {'diffusion': importance_evidence(…), 'hvae': importance_evidence(…)}."
        )
    for name, e in evidence.items():
        if not isinstance(e, Evidence):
            raise ValueError(
                f"argument 'evidence': got a {type(e).__name__} for {name!r}; expected Evidence. Pass "
                "importance_evidence(model, guide, x_0, num_particles=1000)."
            )
    (first, reference), *others = evidence.items()
    for name, other in others:
        for what in ("data", "measure", "estimator", "num_particles"):
            ours, theirs = getattr(reference, what), getattr(other, what)
            if ours != theirs or len(reference.ess) != len(other.ess):
                values = "" if what == "data" else f" ({theirs!r} and {ours!r})"
                raise ValueError(
                    f"argument 'evidence': got {name!r} and {first!r} with other {what}{values}; expected "
                    "one and the same for all, data in one order, or the scores differ for reasons that are "
                    "not the models'. Estimate all of them alike."
                )
    if any(bool(e.pareto_k.isnan().any()) for e in evidence.values()):
        raise ValueError(
            f"argument 'evidence': got estimates from {reference.num_particles} draws, too few for Pareto k; "
            f"expected at least {arviz_bridge.MIN_DRAWS} for each datum. Pass num_particles=1000, say."
        )
    ks = torch.stack([e.pareto_k for e in evidence.values()])
    good_k = arviz_bridge.good_k(reference.num_particles)
    reliable = (ks < good_k).all(0)
    if not reliable.all() and any(e.elbo is None for e in evidence.values()):
        raise ValueError(
            f"argument 'evidence': got k ≥ {good_k:.2g} for {int((~reliable).sum())} data and no "
            "bound to rank them by; expected one. Use importance_evidence, whose draws give both."
        )
    scores, errors = {}, {}
    for name, e in evidence.items():
        score, error = e.log_evidence, e.standard_error
        if e.elbo is not None and e.elbo_standard_error is not None:
            score = torch.where(reliable, score, e.elbo)
            error = torch.where(reliable, error, e.elbo_standard_error)
        scores[name], errors[name] = as_numpy(score), as_numpy(error)
    k = {
        name: np.where(as_numpy(reliable), as_numpy(e.pareto_k), -math.inf)
        for name, e in evidence.items()
    }
    table = arviz_bridge.compare_scores(scores, errors, k, reference.num_particles)
    ranked = [evidence[name] for name in table.index]
    table["mc_bias"] = [0.5 * e.standard_error[reliable].square().sum().item() for e in ranked]
    table["evidence"] = [e.log_evidence.sum().item() for e in ranked]
    table["bound"] = [math.nan if e.elbo is None else e.elbo.sum().item() for e in ranked]
    table["bad_k"] = [int((e.pareto_k >= good_k).sum()) for e in ranked]
    if not table["evidence"].is_monotonic_decreasing:
        warnings.warn(
            "compare: the order by evidence, which cannot be trusted for all data, is another than the one "
            "by the scores; the bounds among these depend on the guides as well. See the columns score, "
            "evidence, bound and bad_k, and draw more particles.",
            stacklevel=2,
        )
    table["score"] = _score_in_words(int(reliable.sum()), len(reliable))
    return table


def simulation_based_calibration(
    family: Pair,
    statistic: Callable[[dict[str, Tensor]], Tensor],
    *,
    num_simulations: int = 1000,
    num_draws: int = 99,
    batch_size: int = ROWS,
) -> Tensor:
    r"""Is the guide the posterior? Ranks of what the model drew among what the guide draws of it.

    Args:
        family: A model with its guide, or a (model, guide) pair whose model can be run as
            ``model(num_samples=n)``.
        statistic: One number for each row of a trajectory, ``statistic(states)`` of shape ``(n,)``:
            ``states["x_t"]`` has shape ``(n,)`` + the shape of a state, ``states["x_0"]`` is the datum.
            Name it before you look.
        num_simulations: Data to draw from the model, ``n``.
        num_draws: Draws of the guide for each of them.
        batch_size: Trajectories at a time.

    Returns:
        Randomised ranks in (0, 1), shape ``(n,)``, float64: uniform and independent if
        :math:`q(x_{1:T} \mid x_0) = p(x_{1:T} \mid x_0)`, as far as the statistic can tell.
        :func:`~pyro_diffusion.plots.plot_pit` draws them.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(1), torch.ones(1), LogSNRSchedule(5))
        >>> pit = simulation_based_calibration(
        ...     DiffusionModel(denoiser), lambda states: states["x_3"][:, 0], num_simulations=50
        ... )
        >>> pit.shape
        torch.Size([50])
    """
    model, guide = programs(family)
    if not callable(statistic):
        raise ValueError(
            f"argument 'statistic': got {statistic!r}; expected a function of the states. Pass "
            "lambda states: states['x_1'].mean(-1), say."
        )
    with torch.no_grad(), evaluating(model, guide):
        with Record() as simulated:
            model(num_samples=num_simulations)
        if "x_0" not in simulated.values:
            raise ValueError(
                f"argument 'family': got a model with the sites {', '.join(simulated.values)}; expected the "
                "datum at site 'x_0'. Rename the site."
            )
        truth, x_0 = statistic(simulated.values), simulated.values["x_0"]
        draws = []
        for rows in x_0.repeat(num_draws, *(1,) * (x_0.dim() - 1)).split(batch_size):
            with Record() as drawn:
                guide(rows)
            draws.append(statistic(drawn.values | {"x_0": rows}))
    if truth.shape != (num_simulations,):
        raise ValueError(
            f"argument 'statistic': got values of shape {tuple(truth.shape)} for {num_simulations} "
            "trajectories; expected one number for each. Reduce event dimensions, "
            "as in lambda states: states['x_1'].mean(-1)."
        )
    ranked = torch.cat(draws).reshape(num_draws, num_simulations)
    if (ranked == truth).all():
        raise ValueError(
            "argument 'statistic': got one that is the same for every draw of the guide, which fits any "
            "guide; expected one of the latent states. Use states['x_1'], say, and not the datum alone."
        )
    return randomized_pit(truth, ranked)


def randomized_pit(observed: Tensor, draws: Tensor) -> Tensor:
    r"""Rank of each observation among draws of a model, randomised: uniform if the model is right.

    .. math::
        u_n = \frac{\#\{s : y_{sn} < y_n\} + U_n\,(1 + \#\{s : y_{sn} = y_n\})}{S + 1}.

    Args:
        observed: :math:`y_n`, shape ``(N,)``; counts and other discrete numbers as well.
        draws: :math:`y_{sn}`, draws of their own for each observation, shape ``(S, N)``: shared ones
            would make the ranks depend on one another. ``model.sample(S * N)[:, 0].reshape(S, N)`` for the
            first entry of the data; reconstructions will not do, for they have seen the datum.

    Returns:
        :math:`u_n`, float64, shape ``(N,)``.

    Raises:
        ValueError: Shapes that do not fit, or NaN.
    """
    uniform = torch.rand(len(observed), dtype=torch.float64) if observed.dim() else torch.rand(1)
    return torch.as_tensor(
        arviz_bridge.randomized_pit(as_numpy(observed), as_numpy(draws), as_numpy(uniform))
    )


@torch.no_grad()
def active_units(
    guide: Callable[..., Any], x_0: Tensor, *, num_particles: int = 16, threshold: float = 0.01
) -> dict[str, Tensor]:
    r"""Which latent numbers say anything of the datum: where :math:`E_q[x_{t,i} \mid x_0]` varies over data.

    The variance over data is that of means over ``num_particles`` draws, less their own noise; to be active
    a number must exceed the threshold, and three standard errors of the noise as well.

    Args:
        guide: Program for :math:`q`, called as ``guide(x_0)``.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_particles: Draws for each datum, at least 2.
        threshold: Variance above which a number is active.

    Returns:
        For each latent site a boolean tensor of the latent's shape; its ``sum()`` is the count.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), section 5.2.
        https://arxiv.org/abs/1509.00519
    """
    check_data(x_0)
    if num_particles < 2 or len(x_0) < 2:
        raise ValueError(
            f"argument 'num_particles': got {num_particles} for {len(x_0)} data; expected at least 2 of "
            "both, for it is a variance over data, less the noise of its means. Pass more."
        )
    chunks = []
    with evaluating(guide):
        for data in x_0.split(max(ROWS // num_particles, 1)):
            with Record(mean=True) as record:
                guide(data.repeat(num_particles, *(1,) * (data.dim() - 1)))
            if record.observed:
                raise ValueError(
                    f"argument 'guide': got a program that observes {record.observed[0]!r}; expected a "
                    "guide, whose latents follow the data. Pass family.guide."
                )
            chunks.append(
                {name: x.unflatten(0, (num_particles, -1)) for name, x in record.values.items()}
            )
    means = {name: torch.cat([chunk[name] for chunk in chunks], dim=1) for name in chunks[0]}
    active = {}
    for name, x in means.items():
        noise = x.var(0).mean(0) / num_particles
        excess = x.mean(0).var(0) - noise
        active[name] = excess > (3 * noise * math.sqrt(2 / (len(x_0) - 1))).clamp(min=threshold)
    return active


def _score_in_words(reliable: int, total: int) -> str:
    if reliable == total:
        return "evidence"
    return f"evidence of {reliable} data, bound of {total - reliable}" if reliable else "bound"
