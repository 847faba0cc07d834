"""Means and Monte Carlo errors of terms, from chunks of particles."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.bounds.terms import ELBOTerms, rows_of


class Moments:
    """Running mean and squared deviations over particles (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def update(self, values: Tensor) -> None:
        """Add values; the first dimension is that of the particles."""
        count, mean = len(values), values.mean(0)
        total, shift = self.count + count, mean - self.mean
        self.squares = self.squares + (values - mean).square().sum(0)
        self.squares = self.squares + shift.square() * (self.count * count / total)
        self.count, self.mean = total, self.mean + shift * (count / total)

    def standard_error(self) -> Tensor:
        """Standard error of the mean; for a single particle 0/0, which is NaN."""
        return (self.squares / (self.count - 1) / self.count).sqrt()


class TermMoments:
    """Means and errors of terms, from the chunks of :func:`~pyro_diffusion.bounds.trajectory_terms`."""

    def __init__(self) -> None:
        self.totals: dict[int, Moments] = defaultdict(Moments)
        self.sites: dict[int, Moments] = defaultdict(Moments)

    def update(self, start: int, sites: Any) -> None:
        """Add a chunk that begins at the datum in row ``start``."""
        self.last = sites
        self.sites[start].update(sites.values.movedim(1, 0))
        self.totals[start].update(sites.log_weight)

    def terms(self) -> ELBOTerms:
        """The bound of all data that were added."""
        mean = torch.cat([moments.mean for moments in self.sites.values()], dim=-1)
        kinds = self.last.kinds
        first, *between, last = rows_of(kinds)
        of_encoder = rows_of(kinds, encoder=True)
        return ELBOTerms(
            reconstruction=mean[first],
            encoder=mean[of_encoder] if of_encoder else None,
            transition=mean[between],
            prior=mean[last],
            standard_error=_errors(self.totals),
            term_standard_error=_errors(self.sites),
            kinds=kinds,
            site_names=self.last.names,
            event_size=self.last.event_size,
        )


def _errors(moments: dict[int, Moments]) -> Tensor:
    return torch.cat([part.standard_error() for part in moments.values()], dim=-1)


def join_chunks(chunks: Mapping[int, Sequence[Tensor]]) -> Tensor:
    """Values of shape ``(particles, data, …)``, from chunks under the row of their first datum."""
    return torch.cat([torch.cat(list(parts)) for parts in chunks.values()], dim=1)
