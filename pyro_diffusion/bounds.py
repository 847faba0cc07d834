r"""The hierarchical bound as named terms with errors, for any Pyro model and guide.

The bound is a sum over sites, one term for each timestep, and the guide's order says which:

.. math::
    \mathrm{ELBO} = \underbrace{E \log p(x_0 \mid x_1)}_{\text{reconstruction}}
        - \sum_{t=1}^{T-1} \underbrace{L_t}_{\text{transition}} - \underbrace{L_T}_{\text{prior}}.

With the posterior-ordered guide the terms are KLs (E10),
:math:`L_t = E\,\mathrm{KL}(q(x_t \mid x_{t+1}, x_0) \| p(x_t \mid x_{t+1}))`; with the forward guide
they are expected log-ratios (E11), :math:`L_t = E \log q(x_t \mid x_{t-1}) / p(x_t \mid x_{t+1})`,
with the same sum. (:math:`L_T` is a mean KL in either: :math:`p(x_T)` has no parents.) Lecture notes
print the log-ratios as
:math:`E\,\mathrm{KL}(q(x_t \mid x_{t-1}) \| p(x_t \mid x_{t+1}))`. That is another number for
:math:`t < T`, because given both neighbours :math:`x_t` does not follow
:math:`q(x_t \mid x_{t-1})`; it is not used here.

Ratios are taken site by site and added in float64: two sums of a thousand large float32 numbers,
subtracted at the end, would leave noise of the size of the bound's own errors. Two errors are told
apart: the *Monte Carlo* error says what more particles would change, the *sampling* error what more
data would.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), eqs. 34-58.
    https://arxiv.org/abs/2208.11970
    Variational Diffusion Models (Kingma et al., 2021), eq. 13 (SNR weights).
    https://arxiv.org/abs/2107.00630
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from tqdm.auto import tqdm

from pyro_diffusion.chains import SubsampledProgram
from pyro_diffusion.checks import check_data
from pyro_diffusion.distributions import BottomUpSite, ChainNormal, unexpanded
from pyro_diffusion.networks import evaluating
from pyro_diffusion.params import ParamScope
from pyro_diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    import xarray

__all__ = [
    "ROWS",
    "ELBOTerms",
    "Estimate",
    "TermMoments",
    "elbo_terms",
    "join_chunks",
    "log_density",
    "measure_of",
    "snr_weight",
    "trajectory_terms",
]

ROWS = 2048  #: of a network at a time, where nothing else says how many: a batch that fits a cache

_CHUNK_BYTES = 2**28  # of states held at a time, while the model scores the guide's trajectories


class Estimate(NamedTuple):
    """A mean over data with its two errors, each one standard deviation.

    The Monte Carlo noise is taken out of the sampling error. Where it hides the spread over data, the
    sampling error is the smallest that could have been told from none: an upper limit, not zero. With
    a single particle the noise is not known, and the sampling error holds both.
    """

    value: float  #: the estimate
    monte_carlo_error: float  #: what more particles would change; NaN for a single particle
    sampling_error: float  #: what more data would change; NaN for a single datum

    @classmethod
    def of(cls, values: Tensor, standard_error: Tensor) -> Self:
        """Mean over data of estimates with Monte Carlo errors, both of shape ``(N,)``."""
        n = len(values)
        noise = standard_error.square()
        spread = math.nan
        if n > 1:
            variance = values.var().item()
            resolution = variance * math.sqrt(2 / (n - 1))  # one standard error of a variance
            spread = max(variance - noise.mean().nan_to_num(0.0).item(), resolution)
        return cls(values.mean().item(), noise.sum().sqrt().item() / n, math.sqrt(spread / n))

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        """The value alone if a format is given, as in ``f"{estimate:.3f}"``."""
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        errors = [error for error in self[1:] if math.isfinite(error) and error > 0]
        decimals = max(0, 1 - math.floor(math.log10(min(errors)))) if errors else 4
        value = f"{self.value:.{min(decimals, 8)}f}"
        if math.isnan(self.monte_carlo_error):
            return f"{value} ± {self.sampling_error:.2g} (Monte Carlo and sampling)"
        return (
            f"{value} ± {self.monte_carlo_error:.2g} (Monte Carlo) "
            f"± {self.sampling_error:.2g} (sampling)"
        )


class ELBOTerms(NamedTuple):
    """The bound, term by term and datum by datum; nats per datum, float64, unscaled.

    ``elbo`` is the bound, ``mean()`` and ``bits_per_dim()`` its mean over data with both errors,
    ``term_means()`` that of every term, and ``to_dataset()`` all of it with labels.
    """

    reconstruction: Tensor  #: expected log-likelihood, shape ``(N,)``
    transition: Tensor  #: row ``t - 1`` is :math:`L_t`, t = 1 … T−1; shape ``(T - 1, N)``
    prior: Tensor  #: :math:`L_T`, shape ``(N,)``
    standard_error: Tensor  #: Monte Carlo error of the bound, ``(N,)``; NaN for one particle
    term_standard_error: Tensor  #: Monte Carlo error of the term at ``x_t`` in row t, ``(T+1, N)``
    kinds: tuple[str, ...]  #: of each term by timestep: "log-likelihood", "KL" or "log-ratio"
    site_names: tuple[str, ...]  #: where each term lives, by timestep
    event_size: float  #: entries :math:`D` of one datum; under a mask, observed ones in the mean

    def __repr__(self) -> str:
        counts = {kind: self.kinds[1:].count(kind) for kind in ("KL", "log-ratio")}
        terms = " and ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items() if n)
        return f"ELBOTerms({len(self.prior)} data, {terms}, elbo={self.mean()} nats per datum)"

    def table(self, max_levels: int = 8) -> str:
        """Mean terms in nats per datum, a line each: what it is, where it lives, its value and errors.

        Args:
            max_levels: Latent sites to show; of a longer chain as many, evenly spaced.
        """
        terms, last = self.term_means(), len(self.kinds) - 1
        evenly = (k / max(max_levels - 1, 1) for k in range(max_levels))
        levels = sorted({1 + round((last - 1) * share) for share in evenly})
        lines = [(f"{self.kinds[t]} at {self.site_names[t]}", str(terms[t])) for t in (0, *levels)]
        total = sum(term.value for term in terms[1:])
        lines.insert(1, (f"sum over {last} latent sites", f"{total:.4f}"))
        lines.append(("ELBO", str(self.mean())))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}s}  {value}" for name, value in lines)

    @property
    def elbo(self) -> Tensor:
        """The bound, ``reconstruction - transition.sum(0) - prior``, shape ``(N,)``."""
        return self.reconstruction - self.transition.sum(0) - self.prior

    @property
    def is_kl(self) -> bool:
        """Whether the latent sites' terms are KLs (and not log-ratios, which can be negative)."""
        return all(kind == "KL" for kind in self.kinds[1:])

    def mean(self) -> Estimate:
        """Mean bound over data in nats per datum, with its errors."""
        return Estimate.of(self.elbo, self.standard_error)

    def term_means(self) -> list[Estimate]:
        """Mean over data of the term at each site ``x_0 … x_T`` (``x_0``: the reconstruction)."""
        terms = torch.cat([self.reconstruction[None], self.transition, self.prior[None]])
        return [Estimate.of(*pair) for pair in zip(terms, self.term_standard_error, strict=True)]

    def bits_per_dim(self) -> Estimate:
        r"""Mean of :math:`-\mathrm{ELBO} / (D \ln 2)` over data (E15), with its errors.

        Bits of information for data with a probability mass (a discretised likelihood). For a density
        it depends on the data's unit, and can be negative.
        """
        nats, monte_carlo_error, sampling_error = self.mean()
        unit = self.event_size * math.log(2)
        return Estimate(-nats / unit, monte_carlo_error / unit, sampling_error / unit)

    def to_dataset(self) -> "xarray.Dataset":
        """The terms with named dimensions ``timestep`` and ``data``, units in the attributes."""
        import xarray

        latent = "mean KL" if self.is_kl else "mean log-ratio"
        fields: dict[str, tuple[tuple[str, ...], Tensor, str]] = {
            "elbo": (("data",), self.elbo, "evidence lower bound"),
            "elbo_standard_error": (("data",), self.standard_error, "Monte Carlo error of elbo"),
            "reconstruction": (("data",), self.reconstruction, "expected log p(x_0 | x_1)"),
            "transition": (("timestep", "data"), self.transition, f"{latent} at site x_t"),
            "transition_standard_error": (
                ("timestep", "data"),
                self.term_standard_error[1:-1],
                "Monte Carlo error of transition",
            ),
            "prior": (("data",), self.prior, f"mean {self.kinds[-1]} at site x_T"),
        }
        bits = self.bits_per_dim()
        return xarray.Dataset(
            {
                name: (dims, values.cpu().numpy(), {"units": "nats per datum", "long_name": label})
                for name, (dims, values, label) in fields.items()
            },
            coords={
                "timestep": range(1, len(self.transition) + 1),
                "data": range(len(self.prior)),
            },
            attrs={
                "kind": "KL" if self.is_kl else "log-ratio",
                "event_size": self.event_size,
                "bits_per_dim": bits.value,
                "bits_per_dim_monte_carlo_error": bits.monte_carlo_error,
                "bits_per_dim_sampling_error": bits.sampling_error,
            },
        )


def elbo_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x_0: Tensor,
    *,
    num_particles: int = 8,
    mask: Tensor | None = None,
    analytic_kl: bool | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> ELBOTerms:
    r"""The bound of a Pyro model and guide, with the term of every site (E10, or E11).

    Any pair will do that is called with a batch of data, has the same latent sites in both
    programs and every site inside a data plate at dim −1. The latent site that the model samples
    first is :math:`x_T`, the last one :math:`x_1`; observed sites together are the reconstruction.
    Values are unscaled whatever plates or handlers scale, no gradient is recorded, and programs that
    are modules are in evaluation mode meanwhile (inside a function or a handler, call ``eval()``).

    Data and particles are processed in chunks of ``batch_size`` trajectories, and a trajectory's states
    are let go of one by one while the model scores it. The default keeps the states of a chunk under
    256 MiB, fewer trajectories at a time the longer the chain. The programs see a chunk as a batch, in
    which each datum stands once for each of its particles.

    Args:
        model: Program for :math:`p`, called as ``model(x_0)``.
        guide: Program for :math:`q`, called as ``guide(x_0)``.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_particles: Trajectories for each datum.
        mask: Observed entries, boolean, of the data's shape, handed to both programs: the bound is
            that of the observed part. ``None`` if all are observed.
        analytic_kl: Take KLs in closed form. ``None`` does so where that is legal (the guide runs
            in the model's order) and a formula is known, which is the quieter estimator of a *term*.
            ``False`` averages log-ratios along the trajectories: for a denoiser close to exact their
            noise cancels in the sum, and the *bound* can be many times quieter.
        batch_size: Trajectories (data times particles) in a chunk.
        progress: Show a progress bar if the evaluation takes more than five seconds.

    Returns:
        :class:`ELBOTerms`.

    Raises:
        ValueError: Latents or masks that differ between the programs, a site outside the data plate,
            a subsampled pair, ``analytic_kl=True`` with the forward guide, or a term that is not
            finite (the message names the site).

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> diffusion = DiffusionModel(denoiser)
        >>> terms = elbo_terms(diffusion.model, diffusion.posterior_guide, torch.zeros(3, 2))
        >>> terms.transition.shape, terms.is_kl
        (torch.Size([4, 3]), True)
    """
    moments = TermMoments()
    for start, sites in trajectory_terms(
        model, guide, x_0, num_particles=num_particles, mask=mask, analytic_kl=analytic_kl,
        batch_size=batch_size, progress=progress,
    ):  # fmt: skip
        moments.update(start, sites)
    terms = moments.terms()
    return terms if mask is None else terms._replace(event_size=int(mask.sum()) / len(x_0))


def trajectory_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x_0: Tensor,
    *,
    num_particles: int,
    mask: Tensor | None = None,
    analytic_kl: bool | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    description: str = "bound",
    keep: Collection[str] | None = (),
) -> "Iterator[tuple[int, _Sites]]":
    """The terms of every trajectory, chunk by chunk; the arguments are those of :func:`elbo_terms`.

    Yields the row of the chunk's first datum, and its terms of shape ``(T + 1, particles, data)``, with
    the states of latent sites in ``keep`` (``None``: of all). A datum's particles may come in several
    chunks.
    """
    _check_arguments(model, guide, num_particles, batch_size)
    check_data(x_0, mask)
    if batch_size is None:
        batch_size = _default_batch_size(model, x_0)
    chunk_data = min(len(x_0), batch_size)
    chunk_particles = max(1, min(num_particles, batch_size // chunk_data))
    num_chunks = math.ceil(len(x_0) / chunk_data) * math.ceil(num_particles / chunk_particles)
    settings = {"unit": "site", "delay": 5, "disable": not progress, "leave": False}
    with tqdm(total=0, desc=description, **settings) as bar:
        for start in range(0, len(x_0), chunk_data):
            data, *observed = (x[start : start + chunk_data] for x in (x_0, mask) if x is not None)
            for particles in _parts(num_particles, chunk_particles):
                rows, *masks = (
                    x.repeat(particles, *(1,) * (x.dim() - 1)) for x in (data, *observed)
                )
                given = {"mask": masks[0]} if masks else {}
                # Around the scoring, and not around what the caller does with a chunk.
                with torch.no_grad(), evaluating(model, guide):
                    sites = _score(model, guide, rows, given, analytic_kl, bar, num_chunks, keep)
                shape = (particles, len(data))
                sites = sites._replace(
                    values=sites.values.unflatten(1, shape),
                    log_q=sites.log_q.unflatten(0, shape),
                    states={name: x.unflatten(0, shape) for name, x in sites.states.items()},
                )
                yield start, sites


def snr_weight(schedule: NoiseSchedule, t: int | Tensor) -> Tensor:
    r"""Weight of the squared error in :math:`L_t` when the reverse variance is :math:`\tilde\beta`.

    .. math::
        L_t = \tfrac12 \big(\mathrm{SNR}(t) - \mathrm{SNR}(t+1)\big)
              E\,\lVert x_0 - \hat x_0(x_{t+1}) \rVert^2, \qquad t = 1 … T-1 \quad \text{(E12)}.

    Args:
        schedule: Noise schedule.
        t: Timestep in ``{1, …, T − 1}``; an integer or a LongTensor.

    Returns:
        The weight, float64, of ``t``'s shape (+ the schedule's event shape).

    Raises:
        ValueError: ``t`` outside ``{1, …, T − 1}``.

    References:
        Variational Diffusion Models (Kingma et al., 2021), eq. 13.
        https://arxiv.org/abs/2107.00630
    """
    t = schedule.check_timestep(t, at_least=1)
    return 0.5 * (schedule.snr(t) - schedule.snr(t + 1))


class _Sites(NamedTuple):
    """Terms of one chunk, ordered by timestep: ``x_0`` first."""

    values: Tensor  # (T + 1, rows), or (T + 1, particles, data)
    kinds: tuple[str, ...]
    names: tuple[str, ...]
    event_size: int
    measure: str  # "density" or "mass", of what is observed
    log_q: Tensor  # log-density of the trajectory under the guide, (rows,)
    states: dict[str, Tensor]  # of latent sites that are kept, (rows, …)

    @property
    def log_weight(self) -> Tensor:
        """The ratio p/q of every trajectory, where no KL is analytic; with KLs, its draw of the bound."""
        return self.values[0] - self.values[1:].sum(0)


class _Moments:
    """Running mean and squared deviations over particles (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def update(self, values: Tensor) -> None:
        """Take in values with the particles in front."""
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        total = self.count + count
        shift = mean - self.mean if self.count else torch.zeros_like(mean)
        self.mean = self.mean + shift * (count / total) if self.count else mean
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.count = total

    def standard_error(self) -> Tensor:
        if self.count == 1:
            return torch.full_like(self.mean, math.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt()


def join_chunks(chunks: Mapping[int, Sequence[Tensor]]) -> Tensor:
    """Values of shape ``(particles, data, …)`` from chunks by the row of their first datum."""
    return torch.cat([torch.cat(list(parts)) for parts in chunks.values()], dim=1)


class TermMoments:
    """Means and errors of terms, from the chunks of :func:`trajectory_terms`."""

    def __init__(self) -> None:
        self.totals: dict[int, _Moments] = defaultdict(_Moments)
        self.sites: dict[int, _Moments] = defaultdict(_Moments)

    def update(self, start: int, sites: _Sites) -> None:
        """Take in a chunk whose first datum is in row ``start``."""
        self.last = sites
        self.sites[start].update(sites.values.movedim(1, 0))
        self.totals[start].update(sites.log_weight)

    def terms(self) -> ELBOTerms:
        """The bound of all data taken in."""
        mean = torch.cat([moments.mean for moments in self.sites.values()], dim=-1)
        return ELBOTerms(
            reconstruction=mean[0],
            transition=mean[1:-1],
            prior=mean[-1],
            standard_error=_errors(self.totals),
            term_standard_error=_errors(self.sites),
            kinds=self.last.kinds,
            site_names=self.last.names,
            event_size=self.last.event_size,
        )


def _errors(moments: dict[int, _Moments]) -> Tensor:
    return torch.cat([part.standard_error() for part in moments.values()], dim=-1)


class _Draw(Messenger):
    """Record what the guide sampled, and from what."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.sites: dict[str, tuple[Tensor, Any, Any]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_latent(msg):
            _check_data_plate(msg, self.rows)
            self.sites[msg["name"]] = (msg["value"], msg["fn"], msg["mask"])


class _Score(Messenger):
    """Replay the model on the guide's draws; turn each site into a term and let go of its state."""

    def __init__(
        self,
        drawn: dict[str, tuple[Tensor, Any, Any]],
        rows: int,
        bar: Any,
        keep: Collection[str] | None,
    ) -> None:
        super().__init__()
        self.drawn, self.rows, self.bar, self.keep = drawn, rows, bar, keep
        self.states: dict[str, Tensor] = {}
        self.measures: set[str] = set()
        self.log_q: Tensor = torch.zeros(())
        self.guide_order = iter(list(drawn))
        self.in_order = (
            True  # whether the model has visited its latents in the guide's order so far
        )
        self.log_ratio: dict[str, Tensor] = {}
        self.kl: dict[str, Tensor] = {}
        self.observed: dict[str, Tensor] = {}
        self.event_size = 0

    def _pyro_sample(self, msg: Any) -> None:
        if _is_latent(msg):
            if msg["name"] not in self.drawn:
                raise ValueError(_LATENTS_DIFFER.format(f"the model samples {msg['name']!r}"))
            msg["value"], msg["done"] = self.drawn[msg["name"]][0], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name, p, value = msg["name"], msg["fn"], msg["value"]
        if msg["is_observed"]:
            self.observed[name] = self._per_datum(log_density(p, value), msg)
            self.measures.add(measure_of(p))
            self.event_size += value.numel() // self.rows
        else:
            _, q, mask = self.drawn.pop(name)
            alike = mask is msg["mask"] or (mask is not None and torch.equal(*_masks(mask, msg)))
            if not alike or not _same(_entry_mask(q), _entry_mask(p)):
                raise ValueError(
                    f"site {name!r}: got another mask in the guide than in the model; expected the "
                    "same in both, so that a term has one set of entries. Mask both programs alike."
                )
            log_q = log_density(q, value)
            self.log_q = self.log_q + self._per_datum(log_q, msg)
            self.log_ratio[name] = self._per_datum(log_q - log_density(p, value), msg)
            if self.keep is None or name in self.keep:
                self.states[name] = value.movedim(value.dim() - p.event_dim - 1, 0)
            self.in_order = self.in_order and name == next(self.guide_order)
            if self.in_order:
                with suppress(NotImplementedError):  # no formula: the log-ratio is used
                    self.kl[name] = self._per_datum(kl_divergence(q, p), msg)
        self.bar.update()

    def _per_datum(self, values: Tensor, msg: Any) -> Tensor:
        """Sum a site's values over everything but the data plate, shape ``(rows,)``."""
        _check_data_plate(msg, self.rows)
        values = scale_and_mask(values.double(), mask=msg["mask"])
        values = values.expand(torch.broadcast_shapes(values.shape, (self.rows,)))
        values = values.reshape(-1, self.rows).sum(0)
        if not values.isfinite().all():
            raise ValueError(
                f"site {msg['name']!r}: got a log-probability or KL that is NaN or infinite for "
                f"{int((~values.isfinite()).sum())} of {self.rows} rows; expected finite numbers. "
                "Check the parameters for NaN and the data for values outside the support."
            )
        return values


def _is_latent(msg: Any) -> bool:
    return not msg["is_observed"] and not site_is_subsample(msg)


def _check_data_plate(msg: Any, rows: int) -> None:
    plates = [f for f in msg["cond_indep_stack"] if f.vectorized and f.dim == -1]
    if not plates or plates[0].size != rows:
        raise ValueError(
            f"site {msg['name']!r}: got a site "
            + (f"in a plate of size {plates[0].size}" if plates else "outside of every plate")
            + f"; expected all sites in a plate of the batch's size ({rows}) at dim -1, because terms "
            "are reported by datum. Put local variables into the data plate; a model with global "
            "latents has no bound for a single datum."
        )
    if isinstance(msg["scale"], Tensor) and msg["scale"].numel() > 1:
        raise ValueError(_SUBSAMPLED)


def _masks(mask: Any, msg: Any) -> tuple[Tensor, Tensor]:
    shape = msg["fn"].batch_shape
    ours, theirs = (torch.as_tensor(True if m is None else m).cpu() for m in (mask, msg["mask"]))
    return ours.expand(shape), theirs.expand(shape)


def _entry_mask(distribution: Any) -> Any:
    """The mask of entries inside a distribution, or ``None``."""
    while not isinstance(distribution, MaskedDistribution):
        if not hasattr(distribution, "base_dist"):
            return None
        distribution = distribution.base_dist
    return distribution._mask


def _same(ours: Any, theirs: Any) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(*torch.broadcast_tensors(*map(torch.as_tensor, (ours, theirs))))


def measure_of(distribution: Any) -> str:
    """Whether a distribution has a "density" or a "mass"; nothing where its support is not known."""
    try:
        return "mass" if distribution.support.is_discrete else "density"
    except NotImplementedError:
        return ""


def log_density(distribution: Any, value: Tensor) -> Tensor:
    """log-density as float64; a Gaussian's entries are in float64 before they are summed."""
    base = distribution
    if type(base) is BottomUpSite:
        base = base.base_dist
    if isinstance(base, Independent) and type(base.base_dist) in (Normal, dist.Normal, ChainNormal):
        return _normal_log_density(base.base_dist, value, base.reinterpreted_batch_ndims)
    while hasattr(base, "base_dist") and not isinstance(base, TransformedDistribution):
        base = base.base_dist  # a transform may have parameters, and wants the dtype of those
    if isinstance(base, Normal):
        value = value.double()
    return distribution.log_prob(value).double()


def _normal_log_density(normal: Normal, value: Tensor, event_dim: int) -> Tensor:
    r""":math:`\sum_i -\tfrac12 z_i^2 - \log s_i - \tfrac12 \log 2\pi`, with one logarithm a scale.

    A scale that a kernel expanded over batch and event is one number, not as many as the states have.
    """
    z = (value.double() - normal.loc).div_(normal.scale)
    size = math.prod(z.shape[z.dim() - event_dim :])
    scale = normal.scale
    few = unexpanded(scale)
    log_scale = (
        few.double()
        .log()
        .expand(*few.shape[: few.dim() - event_dim], *z.shape[z.dim() - event_dim :])
    )
    dims = tuple(range(-event_dim, 0))
    constant = 0.5 * size * math.log(2 * math.pi)
    if not event_dim:
        return -0.5 * z.square_() - log_scale - constant
    return -0.5 * z.square_().sum(dims) - log_scale.sum(dims) - constant


def _score(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    rows: Tensor,
    given: dict[str, Tensor],
    analytic_kl: bool | None,
    bar: Any,
    num_chunks: int,
    keep: Collection[str] | None,
) -> _Sites:
    with _Draw(len(rows)) as drawn:
        guide(rows, **given)
    bar.total = num_chunks * (len(drawn.sites) + 1)
    with _Score(drawn.sites, len(rows), bar, keep) as score:
        model(rows, **given)
    if score.drawn:
        missing = ", ".join(map(repr, score.drawn))
        raise ValueError(_LATENTS_DIFFER.format(f"the guide alone samples {missing}"))
    if not score.observed or not score.log_ratio:
        raise ValueError(
            f"argument 'model': got a program with {len(score.log_ratio)} latent and "
            f"{len(score.observed)} observed sites; expected at least one of each. Pass the data to "
            "obs= of the site that they are observed at."
        )
    if analytic_kl and not score.in_order:
        raise ValueError(
            "argument 'analytic_kl': got True for a guide that samples its sites in another order "
            "than the model; expected None or False, because its terms are log-ratios and not KLs. "
            "Use posterior_guide, the same joint distribution in the model's order."
        )
    kl = score.kl if score.in_order and analytic_kl is not False else {}
    latents = list(reversed(score.log_ratio))
    terms = [kl.get(name, score.log_ratio[name]) for name in latents]
    reconstruction = torch.stack(list(score.observed.values())).sum(0)
    return _Sites(
        values=torch.stack([reconstruction, *terms]),
        # Whatever the guide's order: p(x_T) has no parents, and E log q(x_T | ·)/p(x_T) is a mean KL.
        kinds=(
            "log-likelihood",
            *["KL" if score.in_order else "log-ratio"] * (len(latents) - 1),
            "KL",
        ),
        names=("+".join(score.observed), *latents),
        event_size=score.event_size,
        measure=" and ".join(sorted(score.measures - {""})),
        log_q=score.log_q,
        states=score.states,
    )


_LATENTS_DIFFER = (
    "latent sites: got programs that differ, {}; expected the same latent sites in model and guide. "
    "Rename the sites, or observe in both what is data."
)


_SUBSAMPLED = (
    "arguments 'model' and 'guide': got a subsampled pair, whose sites are a random few of the chain's; "
    "expected programs with every site. Pass diffusion.model and diffusion.posterior_guide; they have "
    "the same bound."
)


def _check_arguments(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    num_particles: int,
    batch_size: int | None,
) -> None:
    if isinstance(model, SubsampledProgram) or isinstance(guide, SubsampledProgram):
        raise ValueError(_SUBSAMPLED)
    for name, program in (("model", model), ("guide", guide)):
        if isinstance(program, ParamScope):
            raise ValueError(
                f"argument {name!r}: got a {type(program).__name__}; expected one of its programs. Pass "
                "its .model, and its .posterior_guide (or .guide)."
            )
    for name, number in (("num_particles", num_particles), ("batch_size", batch_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(
                f"argument {name!r}: got {number!r}; expected a whole number of at least 1. Use two "
                "particles or more to have a Monte Carlo error, and batch_size=None for a default."
            )


def _default_batch_size(model: Callable[..., Any], x_0: Tensor) -> int:
    num_sites = len(getattr(model, "site_names", "zx"))  # a chain knows; else a VAE's two
    numbers = 2 * num_sites * x_0[:1].numel()  # a state and its mean at each site
    size = max(x_0.element_size(), 4)  # whole numbers become float32 states
    return min(max(_CHUNK_BYTES // (size * max(numbers, 1)), 1), ROWS)


def _parts(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
