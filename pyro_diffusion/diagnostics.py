r"""From programs to labelled arrays: draws, terms and weights as ArviZ takes them, and what to ask of them.

Under a guide a trajectory is a draw of the approximate posterior :math:`q(x_{1:T} \mid x_0)`, with a
log-weight :math:`\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)` that says how far it is from one of the
true posterior. :func:`to_arviz` puts both into ArviZ's schema, :func:`compare` ranks models by what the
weights average to, and :func:`simulation_based_calibration` asks whether the guide *is* the posterior:

.. math::
    x_{0:T} \sim p, \quad x_{1:T}^{(s)} \sim q(\cdot \mid x_0) \;\Rightarrow\;
    \operatorname{rank}\big(f(x_{0:T})\big) \text{ among } f(x_0, x_{1:T}^{(s)}) \text{ is uniform if } q
    = p(\cdot \mid x_0).

References:
    ArviZ's schema: https://python.arviz.org/en/latest/schema/schema.html
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018).
    https://arxiv.org/abs/1804.06788
    Importance Weighted Autoencoders (Burda et al., 2016), section 5.2 (active units).
    https://arxiv.org/abs/1509.00519
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion import arviz_bridge
from pyro_diffusion.bounds import ELBOTerms, TermMoments, trajectory_terms
from pyro_diffusion.chains import evaluating
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import Evidence, average, fingerprint
from pyro_diffusion.families import Family
from pyro_diffusion.observations import check_data
from pyro_diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = [
    "active_units",
    "compare",
    "randomized_pit",
    "simulation_based_calibration",
    "to_arviz",
]

Pair = Family | tuple[Callable[..., Any], Callable[..., Any]]

_ROWS = 8192  # of the network at a time, where nothing else says how many


def to_arviz(
    family: Pair,
    x_0: Tensor,
    *,
    num_draws: int = 100,
    timesteps: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Any:
    r"""Draws, terms and weights in ArviZ's schema: an ``xarray.DataTree``, for 0.23 an ``InferenceData``.

    ===================== ============================================================ =====================
    group                 variables                                                    dimensions
    ===================== ============================================================ =====================
    posterior             ``x``: states of the guide's trajectories                    chain, draw, data,
                                                                                       timestep, *event*
    prior                 ``x``: states of the model's own                             chain, draw, timestep,
                                                                                       *event*
    prior_predictive      ``x_0``: data of the model's own                             chain, draw, *datum*
    posterior_predictive  ``x_0``: reconstructions, the model run on from each kept    chain, draw, data,
                          :math:`x_t \sim q(x_t \mid x_0)`                             timestep, *datum*
    observed_data         ``x_0``                                                      data, *datum*
    constant_data         ``alpha_bar``, ``log_snr`` of the schedule                   timestep
    sample_stats          ``lp``, ``log_q``, ``log_weight`` of whole trajectories      chain, draw, data
    bound                 ``term``, ``monte_carlo_error``, ``sampling_error``          timestep (all)
    importance            ``elbo``, ``evidence``, their errors, ``pareto_k``, ``ess``  data
    ===================== ============================================================ =====================

    There is one chain, for draws of a guide are independent. There is no ``log_likelihood``: the
    reconstruction term is none, and ``loo`` would make nonsense of it. Compare models by :func:`compare`.
    Latents of different shapes (a hierarchical VAE's, an ordinary program's) are variables of their own,
    by site, all of them kept; an ordinary program's ``prior`` and ``prior_predictive`` have a ``data``
    dimension, and its reconstructions no ``timestep``.

    Args:
        family: A :class:`~pyro_diffusion.diffusion.DiffusionModel`, a
            :class:`~pyro_diffusion.hvae.HierarchicalVAE`, or a (model, guide) pair of any Pyro programs
            that :func:`~pyro_diffusion.bounds.elbo_terms` takes.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_draws: Trajectories for each datum, at least 25.
        timesteps: Latent states to keep; by default at most five, evenly spaced from 1 to T. A
            reconstruction from :math:`x_t` takes ``t`` network rows a draw and datum.
        batch_size: Trajectories in a chunk; by default as many as 256 MiB hold.
        progress: Show a progress bar if it takes more than five seconds.

    Returns:
        What the installed ArviZ works on; ``.to_netcdf(path)`` writes it. Log-densities are nats.

    Raises:
        ValueError: Fewer than 25 draws, timesteps outside ``1 … T``, and as
            :func:`~pyro_diffusion.bounds.elbo_terms`: latents that differ between the programs, one
            outside the data plate, weights that are not finite.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> draws = to_arviz(DiffusionModel(denoiser), torch.zeros(3, 2), num_draws=30)
        >>> dict(draws["posterior"]["x"].sizes)
        {'chain': 1, 'draw': 30, 'data': 3, 'timestep': 5, 'x_dim_0': 2}
    """
    if not isinstance(num_draws, int) or num_draws < arviz_bridge.MIN_DRAWS:
        raise ValueError(
            f"argument 'num_draws': got {num_draws!r}; expected at least {arviz_bridge.MIN_DRAWS}, for "
            "Pareto k is read off the tail of the weights. Draw more, of fewer data if memory is short."
        )
    model, guide = _programs(family)
    timesteps = _kept_timesteps(family, timesteps)
    keep = None if timesteps is None else [f"x_{t}" for t in timesteps]
    drawn = _draw(model, guide, x_0, num_draws, keep, batch_size, progress)
    rows = _ROWS if batch_size is None else batch_size
    with torch.no_grad(), evaluating(model, guide):
        if isinstance(family, Family):
            predictions = _family_predictions(family, drawn, x_0, timesteps, rows, progress)
        else:
            predictions = _pair_predictions(model, drawn, x_0, rows)
    groups = {
        "posterior": _states(drawn.states, ("chain", "draw", "data"), timesteps),
        **predictions,
        "sample_stats": _dataset(
            {
                "lp": (_DRAWS, drawn.log_weight + drawn.log_q),
                "log_q": (_DRAWS, drawn.log_q),
                "log_weight": (_DRAWS, drawn.log_weight),
            }
        ),
        "bound": _bound(drawn.terms),
        "importance": _importance(average(drawn.log_weight)._replace(data=fingerprint(x_0))),
    }
    if isinstance(family, DiffusionModel):
        groups["constant_data"] = _schedule(family.schedule)
    return arviz_bridge.as_arviz(groups)


def compare(evidence: Mapping[str, Evidence]) -> "pandas.DataFrame":
    r"""Rank models by what they say of the same held-out data, through ``arviz.compare``.

    A datum is scored by its evidence if Pareto :math:`\hat k` is below 0.7 for every model, and otherwise by
    the bound of every model, from the same draws: an estimate that cannot be trusted ranks nothing, and a
    model is never compared by its evidence with another by its bound. The column ``score`` says which
    it was, ``mc_error`` is the Monte Carlo error of a model's sum over data (``se`` is its sampling
    error), and the other columns are ArviZ's own (before 1.0 it names the sum ``elpd_loo``; nothing here
    is leave-one-out). ``arviz.plot_compare`` and :func:`~pyro_diffusion.plots.plot_compare` draw it.

    Args:
        evidence: :class:`~pyro_diffusion.evidence.Evidence` by the name of its model.

    Returns:
        A ``pandas.DataFrame``, the best model first; sums over data, nats.

    Raises:
        ValueError: Fewer than two models; models scored on other data, by another estimator or with
            another number of particles; fewer than 25 particles; no bound where one is needed.
    """
    if not isinstance(evidence, Mapping) or len(evidence) < 2:
        raise ValueError(
            f"argument 'evidence': got {type(evidence).__name__} of {len(evidence)}; expected two models or "
            "more by name. Pass {'diffusion': importance_evidence(…), 'hvae': importance_evidence(…)}."
        )
    (first, reference), *others = evidence.items()
    for name, other in others:
        for what in ("data", "estimator", "num_particles"):
            ours, theirs = getattr(reference, what), getattr(other, what)
            if ours != theirs or (what == "data" and len(reference.ess) != len(other.ess)):
                words = {"data": "other data, or the same in another order"}
                raise ValueError(
                    f"argument 'evidence': got {name!r} with {words.get(what, f'{what} {theirs!r}')} and "
                    f"{first!r} with {words.get(what, repr(ours))}; expected one and the same for all, or "
                    "the scores differ for reasons that are not the models'. Estimate all of them alike."
                )
    if any(bool(e.pareto_k.isnan().any()) for e in evidence.values()):
        raise ValueError(
            f"argument 'evidence': got estimates from {reference.num_particles} draws, too few for Pareto k; "
            f"expected at least {arviz_bridge.MIN_DRAWS} for each datum. Pass num_particles=1000, say."
        )
    ks = torch.stack([e.pareto_k for e in evidence.values()])
    reliable = (ks < arviz_bridge.GOOD_K).all(0)
    if not reliable.all() and any(e.elbo is None for e in evidence.values()):
        raise ValueError(
            f"argument 'evidence': got k ≥ {arviz_bridge.GOOD_K} for {int((~reliable).sum())} data and no "
            "bound to rank them by; expected one. Use importance_evidence, whose draws give both."
        )
    scores, errors = {}, {}
    for name, e in evidence.items():
        score, error = e.log_evidence, e.standard_error
        if e.elbo is not None and e.elbo_standard_error is not None:
            score = torch.where(reliable, score, e.elbo)
            error = torch.where(reliable, error, e.elbo_standard_error)
        scores[name], errors[name] = _numpy(score), _numpy(error)
    k = {
        name: np.where(_numpy(reliable), _numpy(e.pareto_k), -math.inf)
        for name, e in evidence.items()
    }
    table = arviz_bridge.compare_scores(scores, errors, k, reference.num_particles)
    table["score"] = _score_in_words(int(reliable.sum()), len(reliable))
    return table


def simulation_based_calibration(
    family: Pair,
    statistic: Callable[[dict[str, Tensor]], Tensor],
    *,
    num_simulations: int = 1000,
    num_draws: int = 99,
    batch_size: int = _ROWS,
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
    model, guide = _programs(family)
    with torch.no_grad(), evaluating(model, guide):
        with _Record() as simulated:
            model(num_samples=num_simulations)
        truth = statistic(simulated.values)
        x_0 = simulated.values["x_0"]
        draws = []
        for rows in x_0.repeat(num_draws, *(1,) * (x_0.dim() - 1)).split(batch_size):
            with _Record() as drawn:
                guide(rows)
            draws.append(statistic(drawn.values | {"x_0": rows}))
    if truth.shape != (num_simulations,):
        raise ValueError(
            f"argument 'statistic': got values of shape {tuple(truth.shape)} for {num_simulations} "
            "trajectories; expected one number for each. Reduce event dimensions, "
            "as in lambda states: states['x_1'].mean(-1)."
        )
    return randomized_pit(truth, torch.cat(draws).reshape(num_draws, num_simulations))


def randomized_pit(observed: Tensor, draws: Tensor) -> Tensor:
    r"""Rank of each observation among draws of a model, randomised: uniform if the model is right.

    .. math::
        u_n = \frac{\#\{s : y_{sn} < y_n\} + U_n\,(1 + \#\{s : y_{sn} = y_n\})}{S + 1}.

    Args:
        observed: :math:`y_n`, shape ``(N,)``; counts and other discrete numbers as well.
        draws: :math:`y_{sn}`, draws of their own for each observation, shape ``(S, N)``: shared ones
            would make the ranks depend on one another.

    Returns:
        :math:`u_n`, float64, shape ``(N,)``.

    Raises:
        ValueError: Shapes that do not fit, or NaN.
    """
    uniform = torch.rand(len(observed), dtype=torch.float64) if observed.dim() else torch.rand(1)
    return torch.as_tensor(
        arviz_bridge.randomized_pit(_numpy(observed), _numpy(draws), _numpy(uniform))
    )


@torch.no_grad()
def active_units(
    guide: Callable[..., Any], x_0: Tensor, *, num_particles: int = 16, threshold: float = 0.01
) -> dict[str, Tensor]:
    r"""Which latent numbers say anything of the datum: where :math:`E_q[x_{t,i} \mid x_0]` varies over data.

    The variance over data is that of means over ``num_particles`` draws, less their own noise.

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
        for data in x_0.split(max(_ROWS // num_particles, 1)):
            with _Record(mean=True) as record:
                guide(data.repeat(num_particles, *(1,) * (data.dim() - 1)))
            chunks.append(
                {name: x.unflatten(0, (num_particles, -1)) for name, x in record.values.items()}
            )
    means = {name: torch.cat([chunk[name] for chunk in chunks], dim=1) for name in chunks[0]}
    return {
        name: x.mean(0).var(0) - x.var(0).mean(0) / num_particles > threshold
        for name, x in means.items()
    }


# What to_arviz is made of.

_DRAWS = ("chain", "draw", "data")


class _Drawn(NamedTuple):
    """Trajectories of the guide, particles in front: ``(K, N, …)``."""

    states: dict[str, Tensor]
    log_weight: Tensor
    log_q: Tensor
    terms: ELBOTerms


class _Record(Messenger):
    """The values of sample sites, or the means of what they were drawn from; rows in front."""

    def __init__(self, keep: Collection[str] | None = None, *, mean: bool = False) -> None:
        super().__init__()
        self.keep, self.mean = keep, mean
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        deterministic = site_is_subsample(msg) or msg["infer"].get("_deterministic")
        if not deterministic and (self.keep is None or msg["name"] in self.keep):
            value = msg["fn"].mean if self.mean else msg["value"]
            self.values[msg["name"]] = value.movedim(value.dim() - msg["fn"].event_dim - 1, 0)


def _programs(family: Pair) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide; of a family the guide in the model's order, where there is one."""
    if isinstance(family, Family):
        return family.model, getattr(family, "posterior_guide", family.guide)
    if isinstance(family, tuple | list) and len(family) == 2 and all(map(callable, family)):
        return family[0], family[1]
    raise ValueError(
        f"argument 'family': got a {type(family).__name__}; expected a DiffusionModel, a HierarchicalVAE or "
        "a pair of programs. Pass (model, guide)."
    )


def _kept_timesteps(family: Pair, timesteps: Sequence[int] | None) -> list[int] | None:
    """Timesteps to keep of a chain with states of one shape; ``None`` is all sites of another one."""
    if not isinstance(family, DiffusionModel):
        if timesteps is not None:
            raise ValueError(
                f"argument 'timesteps': got {timesteps!r} for a {type(family).__name__}; expected None, for "
                "all of its latents are kept. Select from the result."
            )
        return None
    last = family.schedule.num_timesteps
    if timesteps is None:
        return sorted({1 + round((last - 1) * k / 4) for k in range(5)})
    wrong = [t for t in timesteps if not isinstance(t, int) or not 1 <= t <= last]
    if wrong or not len(timesteps):
        raise ValueError(
            f"argument 'timesteps': got {wrong[0] if wrong else 'none'}; expected whole numbers in 1 … "
            f"{last}. Leave them out for five that are evenly spaced."
        )
    return sorted(set(timesteps))


def _draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x_0: Tensor,
    num_draws: int,
    keep: list[str] | None,
    batch_size: int | None,
    progress: bool,
) -> _Drawn:
    moments = TermMoments()
    chunks: dict[int, list[Any]] = defaultdict(list)
    for start, sites in trajectory_terms(
        model, guide, x_0, num_particles=num_draws, analytic_kl=False, batch_size=batch_size,
        progress=progress, description="draws", keep=keep,
    ):  # fmt: skip
        moments.update(start, sites)
        weight = sites.values[0] - sites.values[1:].sum(0)
        chunks[start].append(sites.states | {_WEIGHT: weight, _LOG_Q: sites.log_q})
    states = {
        name: torch.cat(
            [torch.cat([part[name] for part in parts]) for parts in chunks.values()], dim=1
        )
        for name in chunks[0][0]
    }
    return _Drawn(
        log_weight=states.pop(_WEIGHT),
        log_q=states.pop(_LOG_Q),
        states=states,
        terms=moments.terms(),
    )


_WEIGHT, _LOG_Q = (
    "log-weight of a path",
    "log q of a path",
)  # beside the sites, while they are collected


def _family_predictions(
    family: Family,
    drawn: _Drawn,
    x_0: Tensor,
    timesteps: list[int] | None,
    rows: int,
    progress: bool,
) -> "dict[str, xarray.Dataset]":
    """The model run without data, and run on from every kept state."""
    with _Record([*drawn.states, "x_0"]) as prior:
        family.model(num_samples=len(drawn.log_weight))
    data = prior.values.pop("x_0")
    levels = sorted(int(name.removeprefix("x_")) for name in drawn.states)
    reconstructions = []
    for t in tqdm(
        levels, "reconstructions", unit="state", delay=5, disable=not progress, leave=False
    ):
        x_t = drawn.states[f"x_{t}"]
        parts = x_t.flatten(0, 1).split(rows)
        again = torch.cat(
            [family.model.from_state(part, t)(num_samples=len(part)) for part in parts]
        )
        reconstructions.append(again.unflatten(0, x_t.shape[:2]))
    posterior = ((*_DRAWS, "timestep"), torch.stack(reconstructions, dim=2))
    return {
        "prior": _states(prior.values, ("chain", "draw"), timesteps),
        "prior_predictive": _dataset({"x_0": (("chain", "draw"), data)}),
        "posterior_predictive": _dataset({"x_0": posterior}, timestep=levels),
        "observed_data": _dataset({"x_0": (("data",), x_0)}),
    }


def _pair_predictions(
    model: Callable[..., Any], drawn: _Drawn, x_0: Tensor, rows: int
) -> "dict[str, xarray.Dataset]":
    """An ordinary model with its observations left open, its latents its own or the guide's."""
    free = poutine.uncondition(model)
    with _Record() as observed:
        model(x_0)
    names = [name for name in observed.values if name not in drawn.states]
    prior: list[dict[str, Tensor]] = []
    posterior: list[dict[str, Tensor]] = []
    draws = range(len(drawn.log_weight))
    for part in torch.as_tensor(draws).split(max(rows // len(x_0), 1)):
        data = x_0.repeat(len(part), *(1,) * (x_0.dim() - 1))
        states = {name: x[part].flatten(0, 1) for name, x in drawn.states.items()}
        for chunks, program in ((prior, free), (posterior, poutine.condition(free, data=states))):
            with _Record() as record:
                program(data)
            chunks.append(
                {name: x.unflatten(0, (len(part), -1)) for name, x in record.values.items()}
            )
    prior_values, posterior_values = (
        {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        for chunks in (prior, posterior)
    )
    return {
        "prior": _states({name: prior_values[name] for name in drawn.states}, _DRAWS, None),
        "prior_predictive": _dataset({name: (_DRAWS, prior_values[name]) for name in names}),
        "posterior_predictive": _dataset(
            {name: (_DRAWS, posterior_values[name]) for name in names}
        ),
        "observed_data": _dataset({name: (("data",), observed.values[name]) for name in names}),
    }


def _states(
    states: dict[str, Tensor], dims: tuple[str, ...], timesteps: list[int] | None
) -> "xarray.Dataset":
    """Latents as one variable ``x`` along its timesteps, or each under its own name."""
    if timesteps is None:
        return _dataset({name: (dims, x) for name, x in states.items()})
    x = torch.stack([states[f"x_{t}"] for t in timesteps], dim=len(dims) - 1)
    return _dataset({"x": ((*dims, "timestep"), x)}, timestep=timesteps)


def _dataset(
    variables: Mapping[str, tuple[tuple[str, ...], Tensor]], **coords: Any
) -> "xarray.Dataset":
    """Tensors with named dimensions; further ones are the event's, ``chain`` is added in front."""
    import xarray

    arrays = {}
    for name, (dims, x) in variables.items():
        values = _numpy(x)[None] if "chain" in dims else _numpy(x)
        event = tuple(f"{name}_dim_{i}" for i in range(values.ndim - len(dims)))
        arrays[name] = xarray.DataArray(values, dims=(*dims, *event))
    dataset = xarray.Dataset(arrays)
    index = {dim: np.arange(size) for dim, size in dataset.sizes.items()}
    return dataset.assign_coords(index | coords)


def _bound(terms: ELBOTerms) -> "xarray.Dataset":
    """Means over data of the bound's terms, by timestep."""
    means = torch.tensor(terms.term_means(), dtype=torch.float64)
    fields = zip(("term", "monte_carlo_error", "sampling_error"), means.T, strict=True)
    dataset = _dataset({name: (("timestep",), x) for name, x in fields})
    dataset = dataset.assign_coords(
        kind=("timestep", list(terms.kinds)), site=("timestep", list(terms.site_names))
    )
    return dataset.assign_attrs(units="nats per datum", event_size=terms.event_size)


def _importance(evidence: Evidence) -> "xarray.Dataset":
    assert evidence.elbo is not None
    assert evidence.elbo_standard_error is not None
    fields = {
        "elbo": evidence.elbo,
        "elbo_standard_error": evidence.elbo_standard_error,
        "evidence": evidence.log_evidence,
        "evidence_standard_error": evidence.standard_error,
        "pareto_k": evidence.pareto_k,
        "ess": evidence.ess,
    }
    dataset = _dataset({name: (("data",), x) for name, x in fields.items()})
    return dataset.assign_attrs(
        units="nats per datum", estimator=evidence.estimator, data=evidence.data,
        num_particles=evidence.num_particles,
    )  # fmt: skip


def _schedule(schedule: NoiseSchedule) -> "xarray.Dataset":
    t = torch.arange(1, schedule.num_timesteps + 1, device=schedule.device)
    curves = {"alpha_bar": schedule.alpha_bar(t), "log_snr": schedule.log_snr(t)}
    return _dataset({name: (("timestep",), x) for name, x in curves.items()}, timestep=_numpy(t))


def _score_in_words(reliable: int, total: int) -> str:
    if reliable == total:
        return "evidence"
    return f"evidence of {reliable} data, bound of {total - reliable}" if reliable else "bound"


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
