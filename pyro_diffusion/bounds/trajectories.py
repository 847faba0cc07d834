r"""The terms of whole trajectories, for any Pyro model and guide: all numbers come from the programs.

The guide draws :math:`x_{1:T}` and the model is replayed on the draws. Each of its sites becomes a term, and
its state is freed:

.. math::
    \log p(x_0 \mid x_1), \qquad \log q(x_t \mid \cdot) - \log p(x_t \mid \cdot)
    \quad \text{or} \quad \mathrm{KL}\big(q(x_t \mid \cdot) \,\|\, p(x_t \mid \cdot)\big) .

A KL is legal at a site if the guide has drawn everything that the model draws before it, because only then
both condition on the same states. The draw of an encoder that is the datum of a chain
(:class:`~pyro_diffusion.inference.DiffusionPrior`) has two terms, :math:`\log q(z_0 \mid x)` and
:math:`-\log p(z_0 \mid z_1)`: the negative entropy and the cross-entropy.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.bounds.checks import (
    check_data_plate,
    check_programs,
    check_same_masks,
    check_sites,
    is_latent,
    latents_differ,
)
from pyro_diffusion.bounds.terms import ENCODER
from pyro_diffusion.chains import Program
from pyro_diffusion.checks import check_count, check_data, check_finite, data_checked, require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.distributions import BottomUpSite, EncoderSite
from pyro_diffusion.given import Given, chunks, first_repeated, repeated, run, together
from pyro_diffusion.reading import footprint, reading, refuse_gradients, rows_within
from pyro_diffusion.scoring import log_density, measure_of, score
from pyro_diffusion.walk import ROWS, ReverseWalk


class Term(NamedTuple):
    """The term of a latent site for each trajectory."""

    site: str
    kind: str  #: "KL", "log-ratio", "negative entropy" or "cross-entropy"
    values: Tensor  #: ``(rows,)``


class Sites(NamedTuple):
    """Terms of one chunk, ordered by timestep: ``x_0`` first."""

    values: Tensor  #: ``(T + 1, rows)``, or ``(T + 1, particles, data)``
    kinds: tuple[str, ...]
    names: tuple[str, ...]
    event_size: int
    measure: str  #: "density" or "mass", of what is observed
    log_q: Tensor  #: log-density of the trajectory under the guide, ``(rows,)``
    states: dict[str, Tensor]  #: of latent sites that are kept, ``(rows, …)``

    @property
    def log_weight(self) -> Tensor:
        """log p − log q of every trajectory if all terms are log-ratios; with KLs, one draw of the bound."""
        return self.values[0] - self.values[1:].sum(0)

    def by_particle(self, shape: tuple[int, int]) -> "Sites":
        """The same with rows as ``(particles, data)``."""
        return self._replace(
            values=self.values.unflatten(1, shape),
            log_q=self.log_q.unflatten(0, shape),
            states={name: x.unflatten(0, shape) for name, x in self.states.items()},
        )


def trajectory_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x_0: Tensor,
    given: Given = Given(),
    *,
    num_particles: int,
    analytic_kl: bool | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    description: str = "bound",
    keep: Collection[str] | None = (),
) -> Iterator[tuple[int, Sites]]:
    """The terms of every trajectory, chunk by chunk; the arguments are those of ``elbo_terms``.

    Yields the row of the chunk's first datum, and the chunk's terms of shape
    ``(T + 1, particles, data)``, with the states of latent sites in ``keep`` (``None``: of all). The
    particles of a datum may be spread over several chunks.
    """
    check_programs(model, guide)
    refuse_gradients((x_0, given))
    num_particles = check_count("num_particles", num_particles, 1, PARTICLES)
    x_0 = check_data(x_0, given.mask)
    given = given.with_rows(len(x_0), device=x_0.device)
    batch_size = (
        _rows_at_a_time(model, guide, x_0, given, num_particles)
        if batch_size is None
        else check_count("batch_size", batch_size, 1, PARTICLES)
    )
    chunk_data = min(len(x_0), batch_size)
    chunk_particles = max(1, min(num_particles, batch_size // chunk_data))
    num_chunks = math.ceil(len(x_0) / chunk_data) * math.ceil(num_particles / chunk_particles)
    with tqdm(
        total=0, desc=description, unit="site", delay=5, disable=not progress, leave=False
    ) as bar:
        for start, data, parts in chunks(x_0, given, chunk_data):
            for first in range(0, num_particles, chunk_particles):
                times = min(chunk_particles, num_particles - first)
                rows_of_all = together(partial(repeated, times=times), data, parts)
                sites = _read(model, guide, *rows_of_all, analytic_kl, keep, bar, num_chunks)
                yield start, sites.by_particle((times, len(data)))


def _read(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x_0: Tensor,
    given: Given,
    analytic_kl: bool | None,
    keep: Collection[str] | None,
    bar: tqdm,
    num_chunks: int,
) -> Sites:
    """The terms of one trajectory for each row; data were checked."""
    # A user's own programs may pass other data to programs of this package.
    ours = isinstance(model, Program) and isinstance(guide, Program)
    checked = data_checked() if ours else nullcontext()
    with reading(model, guide), checked:
        with _Draw(len(x_0)) as drawn:
            run(guide, x_0, given.arguments())
        bar.total = num_chunks * (len(drawn.sites) + 1)
        with _Score(drawn.sites, len(x_0), bar, keep, analytic_kl is not False) as scored:
            run(model, x_0, given.arguments())
    check_sites(scored.drawn, scored.terms, scored.observed)
    require(
        not analytic_kl or all(term.kind == "KL" for term in scored.terms),
        "argument 'analytic_kl'",
        "True for a guide that samples its sites in another order than the model",
        "None or False, because its terms are log-ratios and not KLs",
        "Use posterior_guide, the same joint distribution in the model's order.",
    )
    return scored.sites()


class _Draw(Messenger):
    """Record the guide's draws and their distributions."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.sites: dict[str, tuple[Tensor, Any, Any]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_latent(msg):
            check_data_plate(msg, self.rows)
            self.sites[msg["name"]] = (msg["value"], msg["fn"], msg["mask"])


class _Score(Messenger):
    """Replay the model on the guide's draws; turn each site into a term and free its state."""

    def __init__(
        self,
        drawn: dict[str, tuple[Tensor, Any, Any]],
        rows: int,
        bar: tqdm,
        keep: Collection[str] | None,
        analytic: bool,
    ) -> None:
        super().__init__()
        self.drawn, self.rows, self.bar, self.keep, self.analytic = drawn, rows, bar, keep, analytic
        self.place = {name: i for i, name in enumerate(drawn)}  # in the guide's order
        self.last = -1  # place of the last site that the model has visited so far
        self.log_q: Tensor = torch.zeros(())
        self.terms: list[Term] = []  # in the model's order
        self.observed: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.measures: set[str] = set()
        self.event_size = 0

    def _pyro_sample(self, msg: Any) -> None:
        if is_latent(msg):
            if msg["name"] not in self.drawn:
                raise latents_differ(f"the model samples {msg['name']!r}")
            msg["value"], msg["done"] = self.drawn[msg["name"]][0], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        if msg["is_observed"]:
            self.observed[msg["name"]] = self._per_datum(log_density(msg["fn"], msg["value"]), msg)
            self.measures.add(measure_of(msg["fn"]))
            self.event_size += msg["value"].numel() // self.rows
        else:
            self._score_latent(msg)
        self.bar.update()

    def _score_latent(self, msg: Any) -> None:
        name, p, value = msg["name"], msg["fn"], msg["value"]
        _, q, mask = self.drawn.pop(name)
        check_same_masks(name, (mask, _entry_mask(q)), (msg["mask"], _entry_mask(p)))
        scored = score(q, p, value)
        self.log_q = self.log_q + self._per_datum(scored.log_q, msg)
        if self.keep is None or name in self.keep:
            self.states[name] = value.movedim(value.dim() - p.event_dim - 1, 0)
        self.last = max(self.last, self.place[name])
        legal = self.last == self.place[name]
        if isinstance(q, EncoderSite):
            parts = zip(ENCODER, (scored.log_q, -scored.log_p), strict=True)
            terms = [Term(name, kind, self._per_datum(x, msg)) for kind, x in parts]
            self.terms += terms[::-1]
            return
        kl = scored.kl if legal and self.analytic and not isinstance(q, BottomUpSite) else None
        values = self._per_datum(scored.log_ratio if kl is None else kl, msg)
        self.terms.append(Term(name, "KL" if legal else "log-ratio", values))

    def _per_datum(self, values: Tensor, msg: Any) -> Tensor:
        """Sum a site's values over everything but the data plate, shape ``(rows,)``."""
        check_data_plate(msg, self.rows)
        values = scale_and_mask(values.double(), mask=msg["mask"])
        values = values.expand(torch.broadcast_shapes(values.shape, (self.rows,)))
        values = values.reshape(-1, self.rows).sum(0)
        remedy = "Check the parameters for NaN and the data for values outside the support."
        return check_finite(f"site {msg['name']!r}, its log-probability or KL", values, remedy)

    def sites(self) -> Sites:
        """The terms by timestep."""
        latents = self.terms[::-1]
        reconstruction = torch.stack(list(self.observed.values())).sum(0)
        return Sites(
            values=torch.stack([reconstruction, *(term.values for term in latents)]),
            kinds=("log-likelihood", *(term.kind for term in latents)),
            names=("+".join(self.observed), *(term.site for term in latents)),
            event_size=self.event_size,
            measure=" and ".join(sorted(self.measures - {""})),
            log_q=self.log_q,
            states=self.states,
        )


def _entry_mask(distribution: Any) -> Any:
    """The mask of entries inside a distribution, or ``None``."""
    while not isinstance(distribution, MaskedDistribution):
        if not hasattr(distribution, "base_dist"):
            return None
        distribution = distribution.base_dist
    return distribution._mask


def _rows_at_a_time(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, given: Given, particles: int
) -> int:
    """Number of trajectories whose states and step fit into the budget of memory."""

    def of_programs(count: int) -> float:
        """Bytes needed for a run of both programs."""
        with tqdm(disable=True) as bar:
            rows = first_repeated(x_0, given, count)
            return footprint(partial(_read, model, guide, *rows, None, (), bar, 1)).peak

    def of_chain(count: int) -> float:
        """Bytes needed for a state at every site of a diffusion model's chain, and for a step."""
        state = diffusion.schedule.num_timesteps - length
        with reading(diffusion):
            data, own = first_repeated(x_0, given, count)
            walk = ReverseWalk(diffusion, state, given=own)
            held, peak = footprint(partial(walk.rehearse, data))
        return length * held + peak

    diffusion: Any = getattr(model, "owner", None)
    length = getattr(model, "num_timesteps", 0)
    cost = of_chain if isinstance(diffusion, DiffusionModel) else of_programs
    return rows_within(cost, min(len(x_0) * particles, ROWS))


PARTICLES = (
    "Use two particles or more to have a Monte Carlo error, and batch_size=None for a default."
)
