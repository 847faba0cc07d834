r"""Draws of a posterior with their evidence, and how far both can be trusted."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion import arviz_bridge
from pyro_diffusion.checks import check_between, check_count
from pyro_diffusion.diagnostics.recording import dataset
from pyro_diffusion.display import as_lines, as_table
from pyro_diffusion.evidence.evidence import systematic

FEW = 9.99  #: effective particles, below which results are not reliable

__all__ = ["FEW", "PosteriorSamples", "Statistic"]


class Statistic(NamedTuple):
    """A number of a posterior with its Monte Carlo error, of equal shapes."""

    value: Tensor
    standard_error: Tensor  #: from the spread of the runs; NaN for a single run

    def __repr__(self) -> str:
        if self.value.numel() == 1:
            return f"{self.value.item():.4g} ± {self.standard_error.item():.2g}"
        return f"Statistic of shape {tuple(self.value.shape)}, largest error {self.standard_error.max():.2g}"


class PosteriorSamples(NamedTuple):
    r"""Draws of :math:`p(x_0 \mid y) \propto p_\theta(x_0)\, r(x_0)` with :math:`\log Z = \log p(y)`.

    For one posterior the shapes are those below; for ``N`` posteriors an axis of ``N`` follows the draws, and
    numbers are ``(N,)`` in place of ``()``. The ``R`` runs are independent of one another.
    """

    samples: Tensor  #: draws, resampled from all runs by weight, ``(num_samples,) + event_shape``
    log_evidence: Tensor  #: :math:`\log \hat Z`, the logarithm of the mean over runs, nats; ``()``
    standard_error: Tensor  #: of ``log_evidence``, from the spread of the runs, ``()``
    ess: Tensor  #: effective sample size at the end, of the particles of all runs, ``()``
    #: effective sample size of a run's particles at :math:`x_t` before resampling, in row ``t − 1``, the mean
    #: over runs, ``(T,)``
    ess_by_timestep: Tensor
    #: the largest :math:`\hat k` of weights that were averaged, ``()``; −∞ if these always had more than nine
    #: tenths effective particles, and so no tail that matters
    pareto_k: Tensor
    particles: Tensor  #: the particles of all runs, ``(R, K) + event_shape``
    log_weights: Tensor  #: their weights, whose exponentials sum to one over all runs, ``(R, K)``
    is_biased: bool = False  #: whether no weight corrects the draws: a single particle a run

    @property
    def _several(self) -> bool:
        return self.log_evidence.dim() > 0

    @property
    def reliable(self) -> Tensor:
        r"""Whether a posterior's numbers can be trusted, boolean, ``()`` or ``(N,)``.

        As for sequential Monte Carlo in :class:`~pyro_diffusion.evidence.Evidence`: at least ten effective
        particles at every timestep and at the end, a standard error below a half, and :math:`\hat k` below
        0.9. Biased draws are never reliable.
        """
        least = self.ess_by_timestep.amin(0).minimum(self.ess)
        return (least > FEW) & (self.standard_error < 0.5) & (self.pareto_k < 0.9)

    @property
    def log_evidence_by_run(self) -> Tensor:
        r""":math:`\log \hat Z_r` of each run, ``(R,)``: with ``common_noise``, for errors of differences."""
        runs = len(self.log_weights)
        return self.log_weights.logsumexp(1) + math.log(runs) + self.log_evidence

    def _rows(self) -> dict[str, str]:
        if self.is_biased:
            return {"biased": "uncorrected guidance: no weight corrects the draws"}
        runs, particles = self.log_weights.shape[:2]
        least = self.ess_by_timestep.amin(0)
        if self.log_evidence.numel() > 1:
            evidence = f"{self.log_evidence.min():.4g} to {self.log_evidence.max():.4g} nats"
            evidence += f", standard errors up to {self.standard_error.max():.2g}"
            trust = f"{int(self.reliable.sum())} of {self.reliable.numel()} posteriors"
        else:
            evidence = f"{self.log_evidence.item():.4f} ± {self.standard_error.item():.2g} nats"
            trust = "yes" if self.reliable else "no"
        return {
            "log p(y)": evidence,
            "runs": f"{runs} of {particles:,} particles",
            "effective": f"{self.ess.min():.0f} draws at the end, at least {least.min():.0f} in a run before",
            "largest Pareto k": f"{self.pareto_k.max().item():.2f}",
            "reliable": trust,
        }

    @property
    def _title(self) -> str:
        count = self.log_evidence.numel()
        several = f" each of {count} posterior{'s' * (count != 1)}" if self._several else ""
        event = tuple(self.samples.shape[1 + self._several :])
        return f"PosteriorSamples: {len(self.samples):,} draws{several}, event shape {event}"

    def __repr__(self) -> str:
        return as_lines(self._title, self._rows())

    def _repr_html_(self) -> str:
        return as_table(self._title, self._rows())

    def resample(self, num_samples: int) -> Tensor:
        """Other draws from the particles of all runs, by weight; ``(num_samples,) + event_shape``.

        Args:
            num_samples: Number of draws. A particle may be drawn several times.
        """
        num_samples = check_count("num_samples", num_samples, 1, "Pass the number of draws.")
        return drawn(self.particles, self.log_weights, num_samples)

    def mean(self) -> Statistic:
        r"""The posterior mean, of the event's shape, by the weighted particles.

        Its error is that of a ratio of means over runs, with :math:`m_r` the mean of run :math:`r`,
        :math:`\sqrt{\sum_r \hat Z_r^2 (m_r - m)^2 / R (R - 1)} / \bar Z`.
        """
        return self._moment(self.particles.double())

    def std(self) -> Statistic:
        """The posterior standard deviation of each entry."""
        x = self.particles.double()
        square = self._moment((x - self.mean().value).square())
        value = square.value.sqrt()
        return Statistic(value, square.standard_error / (2 * value.clamp(min=1e-300)))

    def quantile(self, q: float) -> Statistic:
        r"""The ``q``-quantile of each entry.

        Its error follows from the error of the weighted distribution function at the quantile: half of the
        distance of the quantiles at ``q`` plus and minus that error (Woodruff, 1952).

        Args:
            q: A number in (0, 1).
        """
        q = check_between(
            "q", q, 0, 1, "a probability", "Pass 0.5 for the median; call it once for each q."
        )
        x, weights = self.particles.double().flatten(0, 1), self._weights().flatten(0, 1)
        ordered, order = x.sort(dim=0)
        edges = weights.expand(x.shape).gather(0, order).cumsum(0)

        def at(level: Tensor) -> Tensor:
            """The quantiles at a level for each entry."""
            index = (edges < level).sum(0, keepdim=True).clamp(max=len(x) - 1)
            return ordered.gather(0, index)[0]

        value = at(torch.as_tensor(q, dtype=x.dtype))
        error = self._moment((self.particles <= value).double()).standard_error
        low, high = at((q - error).clamp(min=0)), at((q + error).clamp(max=1))
        return Statistic(value, torch.where(error.isnan(), math.nan, (high - low) / 2))

    def _weights(self) -> Tensor:
        """Weights of the particles, with the event's dimensions."""
        weights = self.log_weights.exp()
        return weights.reshape(weights.shape + (1,) * (self.particles.dim() - weights.dim()))

    def _moment(self, values: Tensor) -> Statistic:
        """A weighted mean of values of the particles, with its error from the spread of the runs."""
        weights, runs = self._weights(), len(values)
        mean = (weights * values).sum((0, 1))
        if runs == 1:
            return Statistic(mean, torch.full_like(mean, math.nan))
        by_run = (weights * (values - mean)).sum(1)  # its mean over runs is zero
        return Statistic(mean, (runs / (runs - 1) * by_run.square().sum(0)).sqrt())

    def to_arviz(self) -> Any:
        """ArviZ's container: draws in the group ``posterior``, a chain for each run, evidence beside.

        Draws of a run are resampled by its weights. Runs are weighted equally there, so that ``az.ess`` and
        ``az.rhat`` compare them; ``samples`` weights them by their evidence.
        """
        particles = self.log_weights.shape[1]
        draws = torch.stack([
            drawn(x[None], w[None], particles) for x, w in zip(self.particles, self.log_weights, strict=True)
        ])  # fmt: skip
        several = ("data",) if self._several else ()
        posterior = dataset(("run", "draw", *several), {"x_0": draws}).rename(run="chain")
        numbers = {
            name: getattr(self, name)
            for name in ("log_evidence", "standard_error", "ess", "pareto_k")
        } | {"reliable": self.reliable}
        evidence = dataset(several, numbers)
        steps = dataset(
            ("timestep", *several),
            {"ess_by_timestep": self.ess_by_timestep},
            timestep=range(1, 1 + len(self.ess_by_timestep)),
        )
        return arviz_bridge.as_arviz({"posterior": posterior, "evidence": evidence.merge(steps)})


def drawn(particles: Tensor, log_weights: Tensor, num_samples: int) -> Tensor:
    """Draws from particles ``(R, K) + …`` by weight, ``(num_samples,) + …``, in random order."""
    flat, weights = particles.flatten(0, 1), log_weights.flatten(0, 1).softmax(0)
    rows = systematic(weights.reshape(len(weights), -1), num_samples)
    order = torch.rand(rows.shape, device=rows.device).argsort(0)
    rows = rows.gather(0, order).reshape(num_samples, *weights.shape[1:])
    index = rows.reshape(rows.shape + (1,) * (flat.dim() - rows.dim()))
    return flat.gather(0, index.expand(num_samples, *flat.shape[1:]))
