r"""Trajectories as labelled arrays, in ArviZ's schema.

Under a guide a trajectory is a draw of the approximate posterior :math:`q(x_{1:T} \mid x_0)`, with a
log-weight :math:`\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)` that says how far it is from one of the
true posterior. :func:`to_arviz` collects both, with what the model says without data and from each
state that is kept on.

References:
    ArviZ's schema: https://python.arviz.org/en/latest/schema/schema.html
"""

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
from pyro_diffusion.bounds import ELBOTerms, TermMoments, join_chunks, trajectory_terms
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import Evidence, average, fingerprint
from pyro_diffusion.family import Family
from pyro_diffusion.networks import evaluating
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.walk import ROWS

if TYPE_CHECKING:
    import xarray

__all__ = ["Pair", "Record", "as_numpy", "programs", "to_arviz"]

Pair = Family | tuple[Callable[..., Any], Callable[..., Any]]


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
    reconstruction term is none, and ``loo`` would make nonsense of it. Compare models by
    :func:`~pyro_diffusion.diagnostics.compare`. Latents of different shapes (a hierarchical VAE's, an
    ordinary program's) are variables of their own, by site, all of them kept; an ordinary program's
    ``prior`` and ``prior_predictive`` have a ``data`` dimension, and its reconstructions no ``timestep``.

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
    model, guide = programs(family)
    timesteps = _kept_timesteps(family, timesteps)
    keep = None if timesteps is None else [f"x_{t}" for t in timesteps]
    drawn = _draw(model, guide, x_0, num_draws, keep, batch_size, progress)
    rows = ROWS if batch_size is None else batch_size
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


_DRAWS = ("chain", "draw", "data")


class _Drawn(NamedTuple):
    """Trajectories of the guide, particles in front: ``(K, N, …)``."""

    states: dict[str, Tensor]
    log_weight: Tensor
    log_q: Tensor
    terms: ELBOTerms


class Record(Messenger):
    """The values of sample sites, or the means of what they were drawn from; rows in front."""

    def __init__(self, keep: Collection[str] | None = None, *, mean: bool = False) -> None:
        super().__init__()
        self.keep, self.mean = keep, mean
        self.values: dict[str, Tensor] = {}
        self.observed: list[str] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            self.observed.append(msg["name"])
        deterministic = site_is_subsample(msg) or msg["infer"].get("_deterministic")
        factor = msg["is_observed"] and msg["value"].numel() == 0
        if not (deterministic or factor) and (self.keep is None or msg["name"] in self.keep):
            value = _mean(msg) if self.mean else msg["value"]
            self.values[msg["name"]] = value.movedim(value.dim() - msg["fn"].event_dim - 1, 0)


def _mean(msg: Any) -> Tensor:
    """The mean of what a site was drawn from, or the draw itself where no formula is known."""
    try:
        mean = msg["fn"].mean
    except NotImplementedError:
        return msg["value"]
    if mean.isnan().any():
        raise ValueError(
            f"site {msg['name']!r}: got a {type(msg['fn']).__name__}, which has no mean; expected numbers. "
            "Leave out sites of categories."
        )
    return mean


class _Given(Messenger):
    """Latent sites at values that :class:`Record` has recorded."""

    def __init__(self, states: dict[str, Tensor]) -> None:
        super().__init__()
        self.states = states

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.states:
            value = self.states[msg["name"]]
            msg["value"] = value.movedim(0, value.dim() - msg["fn"].event_dim - 1)
            msg["done"] = True


def programs(family: Pair) -> tuple[Callable[..., Any], Callable[..., Any]]:
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
    weights: dict[int, list[Tensor]] = defaultdict(list)
    log_qs: dict[int, list[Tensor]] = defaultdict(list)
    states: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for start, sites in trajectory_terms(
        model, guide, x_0, num_particles=num_draws, analytic_kl=False, batch_size=batch_size,
        progress=progress, description="draws", keep=keep,
    ):  # fmt: skip
        moments.update(start, sites)
        weights[start].append(sites.log_weight)
        log_qs[start].append(sites.log_q)
        for name, x_t in sites.states.items():
            states[name][start].append(x_t)
    return _Drawn(
        states={name: join_chunks(chunks) for name, chunks in states.items()},
        log_weight=join_chunks(weights),
        log_q=join_chunks(log_qs),
        terms=moments.terms(),
    )


def _family_predictions(
    family: Family,
    drawn: _Drawn,
    x_0: Tensor,
    timesteps: list[int] | None,
    rows: int,
    progress: bool,
) -> "dict[str, xarray.Dataset]":
    """The model run without data, and run on from every kept state."""
    model = family.model
    with Record([*drawn.states, "x_0"]) as prior:
        model(num_samples=len(drawn.log_weight))
    data = prior.values.pop("x_0")
    levels = sorted(int(name.removeprefix("x_")) for name in drawn.states)
    reconstructions = []
    for t in tqdm(
        levels, "reconstructions", unit="state", delay=5, disable=not progress, leave=False
    ):
        x_t = drawn.states[f"x_{t}"]
        parts = x_t.flatten(0, 1).split(rows)
        again = torch.cat([model.from_state(part, t)(num_samples=len(part)) for part in parts])
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
    with Record() as observed:
        model(x_0)
    names = [name for name in observed.values if name not in drawn.states]
    prior: list[dict[str, Tensor]] = []
    posterior: list[dict[str, Tensor]] = []
    for part in torch.arange(len(drawn.log_weight)).split(max(rows // len(x_0), 1)):
        data = x_0.repeat(len(part), *(1,) * (x_0.dim() - 1))
        states = {name: x[part].flatten(0, 1) for name, x in drawn.states.items()}
        for chunks, program in ((prior, free), (posterior, _Given(states)(free))):
            with Record() as record:
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
        values = as_numpy(x)[None] if "chain" in dims else as_numpy(x)
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
    # of a curve for each entry, the mean
    means = {name: x.reshape(len(t), -1).mean(1) for name, x in curves.items()}
    return _dataset({name: (("timestep",), x) for name, x in means.items()}, timestep=as_numpy(t))


def as_numpy(x: Tensor) -> np.ndarray:
    """A tensor's values, wherever it is."""
    return x.detach().cpu().numpy()
