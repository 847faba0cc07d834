r"""Stages of independent replicates, pooled: a mean, its error, and how well the error is known.

A stage has :math:`R` independent replicates of the bound of every datum. The data are divided into blocks
with independent draws, so that the variance of a stage's mean over data is a sum over blocks,

.. math::
    s^2 = \sum_b \frac{s_b^2}{R}, \qquad s_b^2 \text{ the variance of block } b \text{ over replicates},

which has many degrees of freedom even for few replicates. Stages are weighted by their sizes
:math:`n_k`, which were fixed before their draws: :math:`s^2 = \sum_k (n_k / n)^2 s_k^2`.

The variance is an estimate as well. Where the noise comes from few rare terms, the estimated variance may be
far too small, and so may the error. The fourth moment of the replicates gives the precision of the variance.
With :math:`\nu = 2 s^4 / \operatorname{Var} s^2` degrees of freedom the mean follows a t law about the truth.
The reported error is its standard deviation,

.. math::
    s \sqrt{\nu / (\nu - 2)} .

References:
    Satterthwaite (1946), An Approximate Distribution of Estimates of Variance Components.
    https://doi.org/10.2307/3002019
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

FREEDOM = 30  # degrees of freedom below which an error is not accepted and more is drawn
_MARGIN = 0.9  # a stage aims at this fraction of the chosen error
_NEGLIGIBLE = 1e-3  # of the chosen error: a spread below this may be rounding, and is accepted


class Stage(NamedTuple):
    """Independent replicates of the bound of every datum."""

    values: Tensor  #: ``(R, N)``
    block: Tensor  #: block of each datum, ``(N,)``; blocks are drawn independently
    size: int  #: draws of each datum, in all replicates


class Pooled:
    """The mean of stages."""

    def __init__(self) -> None:
        self.size = 0
        self.variance, self.doubt = 0.0, 0.0  # times size², and its variance, times size⁴
        self.total, self.noise = torch.zeros(()), torch.zeros(())

    def add(self, stage: Stage) -> None:
        """Add a stage."""
        count, size = len(stage.values), stage.size
        self.size += size
        self.total = self.total + size * stage.values.mean(0)
        self.noise = self.noise + size**2 * stage.values.var(0) / count
        variance, doubt = _variance_of_mean(stage)
        self.variance += size**2 * variance
        self.doubt += size**4 * doubt

    @property
    def mean(self) -> Tensor:
        """The bound of every datum, ``(N,)``."""
        return self.total / self.size

    @property
    def standard_error(self) -> Tensor:
        """The Monte Carlo error of the bound of every datum, ``(N,)``."""
        return self.noise.sqrt() / self.size

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error of the mean over data."""
        return math.inf if self.doubt == 0 else 2 * self.variance**2 / self.doubt

    @property
    def error(self) -> float:
        """The Monte Carlo error of the mean over data."""
        freedom = max(self.freedom, 3.0)  # a t law with two or fewer has no variance
        inflation = 1.0 if freedom == math.inf else freedom / (freedom - 2)
        return math.sqrt(self.variance * inflation) / self.size

    def settled(self, error: float) -> bool:
        """Whether the error is small enough, and has enough degrees of freedom to be trusted."""
        return self.error <= error and (
            self.freedom >= FREEDOM or self.error <= _NEGLIGIBLE * error
        )

    def next_size(self, error: float, gain: float) -> int:
        """Draws of each datum that the next stage needs; at least as many as were made so far.

        Args:
            error: The error to reach.
            gain: Variance of a draw of the next stage divided by that of the draws so far.
        """
        # Solve variance + size · one = (n + size)² aim for the size.
        n, aim, one = self.size, (_MARGIN * error) ** 2, gain * self.variance / self.size
        linear, constant = one - 2 * n * aim, self.variance - n**2 * aim
        root = math.sqrt(max(linear**2 + 4 * aim * constant, 0.0))
        return max(n, math.ceil((linear + root) / (2 * aim)))


def _variance_of_mean(stage: Stage) -> tuple[float, float]:
    """Variance of the mean over data and replicates, and the variance of this estimate."""
    count, num_data = stage.values.shape
    blocks = torch.zeros(count, int(stage.block.max()) + 1, dtype=torch.float64).to(stage.values)
    blocks = blocks.index_add(1, stage.block, stage.values / num_data)
    error = blocks - blocks.mean(0)
    variance = error.square().sum(0) / (count - 1)
    # Var s² = (μ₄ − σ⁴ (R − 3) / (R − 1)) / R, with estimates that have no bias for Gaussian noise.
    fourth = error.pow(4).mean(0) / (1 - 1 / count) ** 2
    square = variance.square() * (count - 1) / (count + 1)
    doubt = ((fourth - square * (count - 3) / (count - 1)) / count).sum().item()
    gaussian = (2 * square / (count - 1)).sum().item()
    return variance.sum().item() / count, max(doubt, gaussian) / count**2
