r"""The bound as named terms with errors.

The bound is a sum over sites, with one term for each timestep. The guide's order determines the terms:

.. math::
    \mathrm{ELBO} = \underbrace{E \log p(x_0 \mid x_1)}_{\text{reconstruction}}
        - \sum_{t=1}^{T-1} \underbrace{L_t}_{\text{transition}} - \underbrace{L_T}_{\text{prior}}.

For a latent :math:`z_0` that is the datum of a chain (:class:`~pyro_diffusion.inference.DiffusionPrior`), two
terms of its encoder stand between reconstruction and transitions: :math:`E \log q(z_0 \mid x)`, which is
minus an entropy, and the cross-entropy :math:`-E \log p(z_0 \mid z_1)`.

Two errors are reported separately. The *Monte Carlo* error shrinks with more particles, the *sampling* error
with more data.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), eqs. 34-58.
    https://arxiv.org/abs/2208.11970
    Variational Diffusion Models (Kingma et al., 2021), eq. 13 (SNR weights).
    https://arxiv.org/abs/2107.00630
"""

import math
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from pyro_diffusion.display import as_table
from pyro_diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    import xarray


class Estimate(NamedTuple):
    """A mean over data with its two errors, each one standard deviation.

    The Monte Carlo noise is subtracted from the sampling error. Where the noise is larger than the spread
    over data, the sampling error is the smallest one that could be detected: an upper limit, and not zero.
    With a single particle the noise is not known, and the sampling error contains both.
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

    def bits_per_dim(self, event_size: float) -> Self:
        r"""A log-probability :math:`x` in nats as bits per dimension, :math:`-x / (D \ln 2)` (E15)."""
        unit = event_size * math.log(2)
        return type(self)(-self.value / unit, *(error / unit for error in self[1:]))

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


#: kinds of the terms of an encoder whose draw is the datum of a chain
ENCODER = ("negative entropy", "cross-entropy")


def rows_of(kinds: tuple[str, ...], *, encoder: bool = False) -> list[int]:
    """Rows of the reconstruction and of :math:`L_1 … L_T`; or the others, of encoders."""
    return [row for row, kind in enumerate(kinds) if (kind in ENCODER) == encoder]


class ELBOTerms(NamedTuple):
    """The bound, term by term and datum by datum; nats per datum, float64, unscaled.

    ``elbo`` is the bound of each datum. ``mean()`` and ``bits_per_dim()`` are its mean over data with both
    errors. ``term_means()`` is the mean of every term, and ``to_dataset()`` has all of it with labels.
    """

    reconstruction: Tensor  #: expected log-likelihood, shape ``(N,)``
    transition: Tensor  #: row ``t - 1`` is :math:`L_t`, t = 1 … T−1; shape ``(T - 1, N)``
    prior: Tensor  #: :math:`L_T`, shape ``(N,)``
    standard_error: Tensor  #: Monte Carlo error of the bound, ``(N,)``; NaN for one particle
    #: Monte Carlo error of the term in each row of ``stacked``; the term at ``x_t`` is in row t; ``(T+1, N)``
    term_standard_error: Tensor
    #: kind of each row: "log-likelihood", "KL" or "log-ratio"; an encoder has "negative entropy" and
    #: "cross-entropy"
    kinds: tuple[str, ...]
    site_names: tuple[str, ...]  #: site of each row
    event_size: float  #: entries :math:`D` of one datum; under a mask, observed ones in the mean
    #: "paths", or "single" if the states of different timesteps were drawn independently of each other
    draws: str = "paths"
    #: negative entropy and cross-entropy of a latent that is the datum of a chain, ``(2, N)``
    encoder: Tensor | None = None

    def __repr__(self) -> str:
        counts = {kind: self.kinds.count(kind) for kind in ("KL", "log-ratio")}
        terms = " and ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items() if n)
        return f"ELBOTerms({len(self.prior)} data, {terms}, elbo={self.mean()} nats per datum)"

    def _repr_html_(self) -> str:
        *latent, top = self.term_means()
        sums = f"{sum(term.value for term in latent[1:]):.4f}"
        return as_table(
            repr(self).split(", elbo=")[0] + "), nats per datum",
            {
                "bound": str(self.mean()),
                "bits per dimension": str(self.bits_per_dim()),
                f"{self.kinds[0]} at {self.site_names[0]}": str(latent[0]),
                f"sum over {len(latent) - 1} sites between": sums,
                f"{self.kinds[-1]} at {self.site_names[-1]}": str(top),
            },
        )

    def table(self, max_levels: int = 8) -> str:
        """Mean terms in nats per datum, one line each: its kind, its site, its value and its errors.

        Args:
            max_levels: Largest number of levels of the chain to show; a longer chain shows this many, evenly
                spaced. The terms of an encoder are always shown.
        """
        terms, chain = self.term_means(), rows_of(self.kinds)[1:]
        evenly = (k / max(max_levels - 1, 1) for k in range(max_levels))
        levels = {chain[round((len(chain) - 1) * share)] for share in evenly}
        shown = sorted({0, *levels, *rows_of(self.kinds, encoder=True)})
        lines = [(f"{self.kinds[t]} at {self.site_names[t]}", str(terms[t])) for t in shown]
        total = f"{sum(term.value for term in terms[1:]):.4f}"
        lines.insert(1, (f"sum over {len(set(self.site_names[1:]))} latent sites", total))
        lines.append(("ELBO", str(self.mean())))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}s}  {value}" for name, value in lines)

    @property
    def elbo(self) -> Tensor:
        """The bound, ``reconstruction - encoder.sum(0) - transition.sum(0) - prior``, shape ``(N,)``."""
        above = (
            self.reconstruction
            if self.encoder is None
            else self.reconstruction - self.encoder.sum(0)
        )
        return above - self.transition.sum(0) - self.prior

    @property
    def is_kl(self) -> bool:
        """Whether the latent sites' terms are KLs (and not log-ratios, which can be negative)."""
        return "log-ratio" not in self.kinds

    @property
    def stacked(self) -> Tensor:
        """All terms: reconstruction, those of an encoder, :math:`L_1 … L_T`; ``(T + 1, N)``, or two more."""
        chain = torch.cat([self.reconstruction[None], self.transition, self.prior[None]])
        if self.encoder is None:
            return chain
        rows = chain.new_empty(len(self.kinds), chain.shape[1])
        rows[rows_of(self.kinds, encoder=True)] = self.encoder
        rows[rows_of(self.kinds)] = chain
        return rows

    def mean(self) -> Estimate:
        """Mean bound over data in nats per datum, with its errors."""
        return Estimate.of(self.elbo, self.standard_error)

    def term_means(self) -> list[Estimate]:
        """Mean over data of the term in each row: at ``x_0 … x_T`` (``x_0``: the reconstruction)."""
        return [
            Estimate.of(*pair) for pair in zip(self.stacked, self.term_standard_error, strict=True)
        ]

    def bits_per_dim(self) -> Estimate:
        r"""Mean of :math:`-\mathrm{ELBO} / (D \ln 2)` over data (E15), with its errors.

        These are bits of information if the data have a probability mass (a discretised likelihood). For a
        density the value depends on the data's unit, and can be negative.
        """
        return self.mean().bits_per_dim(self.event_size)

    def _of_encoder(self) -> dict[str, tuple[tuple[str, ...], Tensor, str]]:
        """The encoders' terms for :meth:`to_dataset`, with the name of the site if there are several."""
        fields: dict[str, tuple[tuple[str, ...], Tensor, str]] = {}
        places = rows_of(self.kinds, encoder=True)
        for row in places:
            kind, site = self.kinds[row], self.site_names[row]
            name = kind.replace("-", "_").replace(" ", "_")
            name = name if len(places) == len(ENCODER) else f"{name}_{site}"
            fields[name] = ("data",), self.stacked[row], f"{kind} at site {site}"
        return fields

    def to_dataset(self) -> "xarray.Dataset":
        """The terms with named dimensions ``timestep`` and ``data``, units in the attributes."""
        import xarray

        kind = "KL" if self.is_kl else "log-ratio"
        law = "log p(x_0 | x_1)" if self.encoder is None else "log p(x | z_0)"
        fields: dict[str, tuple[tuple[str, ...], Tensor, str]] = {
            "elbo": (("data",), self.elbo, "evidence lower bound"),
            "elbo_standard_error": (("data",), self.standard_error, "Monte Carlo error of elbo"),
            "reconstruction": (("data",), self.reconstruction, f"expected {law}"),
            "transition": (("timestep", "data"), self.transition, f"mean {kind} at site x_t"),
            "transition_standard_error": (
                ("timestep", "data"),
                self.term_standard_error[rows_of(self.kinds)[1:-1]],
                "Monte Carlo error of transition",
            ),
            "prior": (("data",), self.prior, f"mean {self.kinds[-1]} at site x_T"),
        }
        bits = self.bits_per_dim()
        return xarray.Dataset(
            {
                name: (dims, values.cpu().numpy(), {"units": "nats per datum", "long_name": label})
                for name, (dims, values, label) in (fields | self._of_encoder()).items()
            },
            coords={
                "timestep": range(1, len(self.transition) + 1),
                "data": range(len(self.prior)),
            },
            attrs={
                "kind": kind,
                "event_size": self.event_size,
                "draws": self.draws,
                "bits_per_dim": bits.value,
                "bits_per_dim_monte_carlo_error": bits.monte_carlo_error,
                "bits_per_dim_sampling_error": bits.sampling_error,
            },
        )


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
