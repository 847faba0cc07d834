r"""Trajectories as labelled arrays, in ArviZ's schema.

A trajectory of the guide is a draw of the approximate posterior :math:`q(x_{1:T} \mid x_0)`. Its log-weight
:math:`\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)` corrects for the difference from the true posterior.
:func:`to_arviz` collects trajectories and weights. It adds draws of the model without data, and
reconstructions: draws of the model that start from states of the guide.

References:
    ArviZ's schema: https://python.arviz.org/en/latest/schema/schema.html
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path
from tqdm.auto import tqdm

from pyro_diffusion import arviz_bridge
from pyro_diffusion.bounds import ELBOTerms, TermMoments, join_chunks, trajectory_terms
from pyro_diffusion.checks import check_count, check_data, check_timesteps, require
from pyro_diffusion.diagnostics.guides import of_guide
from pyro_diffusion.diagnostics.recording import (
    DRAWS,
    Held,
    Record,
    as_numpy,
    dataset,
    importance_fields,
    joined,
    states_dataset,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import Evidence, average, fingerprint
from pyro_diffusion.family import Family, Pair, unpacked
from pyro_diffusion.given import Given, chunks, repeated, run, together
from pyro_diffusion.reading import reading
from pyro_diffusion.walk import ROWS, ReverseWalk

if TYPE_CHECKING:
    import xarray


@overload
def to_arviz(
    family: Pair, /, x_0: Tensor, *, num_draws: int = ..., timesteps: Sequence[int] | None = ...,
    batch_size: int | None = ..., progress: bool = ..., **given: Any,
) -> Any: ...  # fmt: skip


@overload
def to_arviz(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, *, num_draws: int = ...,
    timesteps: Sequence[int] | None = ..., batch_size: int | None = ..., progress: bool = ...,
    **given: Any,
) -> Any: ...  # fmt: skip


def to_arviz(  # type: ignore[misc]
    family: Any,
    guide: Any = None,
    x_0: Any = None,
    *,
    num_draws: int = 100,
    timesteps: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    **given: Any,
) -> Any:
    r"""Draws, terms and weights in ArviZ's schema: an ``xarray.DataTree``, for 0.23 an ``InferenceData``.

    ===================== ============================================================ =====================
    group                 variables                                                    dimensions
    ===================== ============================================================ =====================
    posterior             ``x``: states of the guide's trajectories                    chain, draw, data,
                                                                                       timestep, *event*
    prior                 ``x``: states that the model draws                           chain, draw, timestep,
                                                                                       *event*
    prior_predictive      ``x_0``: data that the model draws                           chain, draw, *datum*
    posterior_predictive  ``x_0``: reconstructions, draws of the model from each kept  chain, draw, data,
                          :math:`x_t \sim q(x_t \mid x_0)`                             timestep, *datum*
    observed_data         ``x_0``                                                      data, *datum*
    constant_data         ``alpha_bar``, ``log_snr`` of the schedule                   timestep
    sample_stats          ``lp``, ``log_q``, ``log_weight`` of whole trajectories      chain, draw, data
    bound                 ``term``, ``monte_carlo_error``, ``sampling_error``          timestep (all)
    importance            ``elbo``, ``evidence``, their errors, ``pareto_k``, ``ess``  data
    ===================== ============================================================ =====================

    The draws of a guide are independent, so they form a single chain. There is no group
    ``log_likelihood``: the reconstruction term is not the log-likelihood of a datum, and ``loo`` of it would
    be meaningless. Use :func:`~pyro_diffusion.diagnostics.comparison.compare` to compare models. Latents of
    different shapes (those of a hierarchical VAE or of an ordinary program) are all kept, each as a variable
    with the name of its site. The groups ``prior`` and ``prior_predictive`` of an ordinary program have a
    dimension ``data``, and its reconstructions have no ``timestep``. With a context the model's own draws are
    conditional: ``prior`` and ``prior_predictive`` have a dimension ``data``, and ``constant_data`` has the
    context, and as ``null`` the rows where it was dropped.

    Args:
        family: An automatic guide of global latents, for which see below; or a
            :class:`~pyro_diffusion.diffusion.DiffusionModel`, a
            :class:`~pyro_diffusion.hvae.HierarchicalVAE`, or a (model, guide) pair of any Pyro programs
            that :func:`~pyro_diffusion.bounds.elbo_terms` takes; or the model of such a pair.
        guide: The guide of the pair; leave it out for a family.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_draws: Trajectories for each datum. Pareto k of fewer than 25 is unknown: ``pareto_k`` is NaN
            except for constant weights, and a warning says so.
        timesteps: Latent states to keep; by default at most five, evenly spaced from 1 to T. A
            reconstruction from :math:`x_t` takes ``t`` network rows for each draw and datum.
        batch_size: Trajectories in a chunk; by default as many as fit into 256 MiB.
        progress: Show a progress bar if it takes more than five seconds.
        given: What goes with the data: ``mask=``, true where an entry is observed. With it, ``lp``,
            ``log_q``, the weights and the bound are those of the observed entries, and ``observed_data`` has
            a variable ``observed``; ``context=`` of conditional data, and ``null=``, true where it was
            dropped.

    Returns:
        The container of the installed ArviZ; ``.to_netcdf(path)`` writes it. Log-densities are nats.

    Raises:
        ValueError: No draw, timesteps outside ``1 … T``, and the errors of
            :func:`~pyro_diffusion.bounds.elbo_terms`: latents that differ between the programs, a latent
            outside the data plate, weights that are not finite.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> draws = to_arviz(DiffusionModel(denoiser), torch.zeros(3, 2), num_draws=30)
        >>> dict(draws["posterior"]["x"].sizes)
        {'chain': 1, 'draw': 30, 'data': 3, 'timestep': 5, 'x_dim_0': 2}
    """
    num_draws = _check_num_draws(num_draws)
    if isinstance(family, AutoGuide):
        args = [value for value in (guide, x_0) if value is not None]
        return of_guide(family, args, given, num_draws, progress=progress)
    return _of_pair(
        family, guide, x_0, Given.of(**given), num_draws, timesteps, batch_size, progress
    )


def _of_pair(
    family: Any,
    guide: Any,
    x_0: Any,
    what: Given,
    num_draws: int,
    timesteps: Sequence[int] | None,
    batch_size: int | None,
    progress: bool,
) -> Any:
    """The container of a family, or of a pair whose latents are in the data plate."""
    model, guide, x_0 = unpacked(family, guide, x_0)
    timesteps = _kept_timesteps(family, timesteps)
    keep = None if timesteps is None else [f"x_{t}" for t in timesteps]
    drawn = _draw(model, guide, x_0, what, num_draws, keep, batch_size, progress)
    what = what.with_rows(len(x_0))
    with reading(model, guide):
        rows = _rows_at_a_time(family, x_0, what) if batch_size is None else batch_size
        if isinstance(family, Family):
            predictions = _family_predictions(family, drawn, x_0, what, timesteps, rows, progress)
        else:
            predictions = _pair_predictions(model, drawn, x_0, what, rows)
    if what.mask is not None:
        predictions["observed_data"] = dataset(("data",), {"x_0": x_0, "observed": what.mask})
    groups = {
        "posterior": states_dataset(DRAWS, drawn.states, timesteps),
        **predictions,
        "sample_stats": dataset(DRAWS, drawn.weights()),
        "bound": _bound(drawn.terms),
        "importance": _importance(
            average(drawn.log_weight)._replace(data=fingerprint(x_0, what.mask))
        ),
    }
    constants = [_curves(family)] if isinstance(family, DiffusionModel) else []
    constants += [] if what.context is None else [_context(what)]
    if constants:
        groups["constant_data"] = constants[0].merge(constants[-1])
    return arviz_bridge.as_arviz(groups)


def _check_num_draws(num_draws: Any) -> int:
    """The number of draws. A warning says if they are too few for Pareto k."""
    num_draws = check_count("num_draws", num_draws, 1, "The default is 100 for each datum.")
    if num_draws < arviz_bridge.MIN_DRAWS:
        warnings.warn(
            f"argument 'num_draws': got {num_draws}, so that Pareto k is unknown (NaN), and the weights "
            f"cannot be checked. Draw {arviz_bridge.MIN_DRAWS} or more for each datum.",
            stacklevel=3,
        )
    return num_draws


def _rows_at_a_time(family: Any, x_0: Tensor, given: Given) -> int:
    """Rows of a reconstruction at a time; for a diffusion model as many as fit into memory."""
    if not isinstance(family, DiffusionModel):
        return ROWS
    return ReverseWalk(family, given=given).rows_within(check_data(x_0, given.mask))


def _kept_timesteps(family: Pair, timesteps: Sequence[int] | None) -> list[int] | None:
    """Timesteps to keep, for a diffusion model; ``None`` for other programs, which keep all sites."""
    if isinstance(family, DiffusionModel):
        last = family.schedule.num_timesteps
        if timesteps is None:
            timesteps = [1 + round((last - 1) * k / 4) for k in range(5)]
        remedy = "Leave them out for five that are evenly spaced."
        return sorted(set(check_timesteps(timesteps, 1, last, remedy)))
    require(
        timesteps is None,
        "argument 'timesteps'",
        f"{timesteps!r} for a {type(family).__name__}",
        "None, because all of its latents are kept",
        "Select from the result.",
    )
    return None


class _Drawn(NamedTuple):
    """Trajectories of the guide, of shape ``(K, N, …)`` for ``K`` particles."""

    states: dict[str, Tensor]
    log_weight: Tensor
    log_q: Tensor
    terms: ELBOTerms

    def weights(self) -> dict[str, Tensor]:
        """Log-densities and log-weights of whole trajectories."""
        log_p = self.log_weight + self.log_q
        return {"lp": log_p, "log_q": self.log_q, "log_weight": self.log_weight}


def _draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x_0: Tensor,
    given: Given,
    num_draws: int,
    keep: Collection[str] | None,
    batch_size: int | None,
    progress: bool,
) -> _Drawn:
    moments = TermMoments()
    weights: dict[int, list[Tensor]] = defaultdict(list)
    log_qs: dict[int, list[Tensor]] = defaultdict(list)
    states: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for start, sites in trajectory_terms(
        model, guide, x_0, given, num_particles=num_draws, analytic_kl=False, batch_size=batch_size,
        progress=progress, description="draws", keep=keep,
    ):  # fmt: skip
        moments.update(start, sites)
        kept = ((states[name], x_t) for name, x_t in sites.states.items())
        for parts, values in ((weights, sites.log_weight), (log_qs, sites.log_q), *kept):
            parts[start].append(values)
    return _Drawn(
        states={name: join_chunks(parts) for name, parts in states.items()},
        log_weight=join_chunks(weights),
        log_q=join_chunks(log_qs),
        terms=moments.terms(),
    )


def _family_predictions(
    family: Family,
    drawn: _Drawn,
    x_0: Tensor,
    given: Given,
    timesteps: list[int] | None,
    rows: int,
    progress: bool,
) -> "dict[str, xarray.Dataset]":
    """Draws of a family's model, without data and from every kept state.

    With a context the model's own draws are given the context of each datum.
    """
    model, shape = family.model, drawn.log_weight.shape
    each = partial(repeated, times=shape[0])  # a row for each draw of each datum
    numbers, given = together(each, torch.arange(shape[1]), given._replace(mask=None))
    names = [*drawn.states, "x_0"]
    if given.context is None:
        prior = Record(names).of(model, num_samples=shape[0])
    else:
        parts = [
            Record(names).of(model, num_samples=len(part), **own.of_kernels())
            for _, part, own in chunks(numbers, given, rows)
        ]
        prior = {name: x.unflatten(0, shape) for name, x in joined(parts, 0).items()}
    data, dims = prior.pop("x_0"), DRAWS if given.context is not None else DRAWS[:2]
    levels = [t for t, name in enumerate(model.site_names) if name in drawn.states]
    reconstructions = []
    for t in tqdm(
        levels, "reconstructions", unit="state", delay=5, disable=not progress, leave=False
    ):
        x_t = drawn.states[f"x_{t}"]
        again = [
            model.from_state(part, t)(num_samples=len(part), **own.of_kernels())
            for _, part, own in chunks(x_t.flatten(0, 1), given, rows)
        ]
        reconstructions.append(torch.cat(again).unflatten(0, shape))
    posterior = {"x_0": torch.stack(reconstructions, dim=2)}
    return {
        "prior": states_dataset(dims, prior, timesteps),
        "prior_predictive": dataset(dims, {"x_0": data}),
        "posterior_predictive": dataset((*DRAWS, "timestep"), posterior, timestep=levels),
        "observed_data": dataset(("data",), {"x_0": x_0}),
    }


def _pair_predictions(
    model: Callable[..., Any], drawn: _Drawn, x_0: Tensor, given: Given, rows: int
) -> "dict[str, xarray.Dataset]":
    """Draws of an ordinary model without observations, with its own latents and with those of the guide."""
    free = poutine.uncondition(model)
    values = Record().of(run, model, x_0, given.arguments())
    data = {name: x for name, x in values.items() if name not in drawn.states}
    priors, posteriors = [], []
    for part in torch.arange(len(drawn.log_weight)).split(max(rows // len(x_0), 1)):
        states = {name: x[part].flatten(0, 1) for name, x in drawn.states.items()}
        priors.append(Record().of_particles(free, x_0, len(part), given))
        posteriors.append(Record(data).of_particles(Held(states)(free), x_0, len(part), given))
    prior, posterior = joined(priors, 0), joined(posteriors, 0)
    return {
        "prior": dataset(DRAWS, {name: prior[name] for name in drawn.states}),
        "prior_predictive": dataset(DRAWS, {name: prior[name] for name in data}),
        "posterior_predictive": dataset(DRAWS, {name: posterior[name] for name in data}),
        "observed_data": dataset(("data",), data),
    }


def _bound(terms: ELBOTerms) -> "xarray.Dataset":
    """Means over data of the bound's terms, by timestep."""
    means = torch.tensor(terms.term_means(), dtype=torch.float64)
    names = ("term", "monte_carlo_error", "sampling_error")
    kind, site = ("timestep", list(terms.kinds)), ("timestep", list(terms.site_names))
    labelled = dataset(("timestep",), dict(zip(names, means.T, strict=True)), kind=kind, site=site)
    return labelled.assign_attrs(units="nats per datum", event_size=terms.event_size)


def _importance(evidence: Evidence) -> "xarray.Dataset":
    """Evidence and bound of every datum from importance weights, with diagnostics of the weights."""
    return dataset(("data",), importance_fields(evidence)).assign_attrs(
        units="nats per datum", estimator=evidence.estimator, data=evidence.data,
        num_particles=evidence.num_particles,
    )  # fmt: skip


def _context(given: Given) -> "xarray.Dataset":
    """The context of each datum, a variable for each tensor of it, and the rows where it was dropped."""

    def name(key: Any) -> str:
        """Of a part: ``['label']`` and ``[0]``, or ``.label`` in a named tuple."""
        words = str(key)
        return words[1:-1].strip("'") if words.startswith("[") else words[1:]

    leaves, _ = tree_flatten_with_path(given.context)
    named = {"_".join(["context", *map(name, path)]): x for path, x in leaves}
    return dataset(("data",), named | ({} if given.null is None else {"null": given.null}))


def _curves(diffusion: DiffusionModel) -> "xarray.Dataset":
    """The curves of the schedule by timestep, averaged over entries if each entry has its own curve."""
    schedule = diffusion.schedule
    t = torch.arange(1, schedule.num_timesteps + 1, device=schedule.device)
    curves = {"alpha_bar": schedule.alpha_bar(t), "log_snr": schedule.log_snr(t)}
    means = {name: x.reshape(len(t), -1).mean(1) for name, x in curves.items()}
    return dataset(("timestep",), means, timestep=as_numpy(t))
