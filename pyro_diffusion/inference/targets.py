r"""A likelihood as the chain meets it: in the chain's units, and near an estimate :math:`\hat x_0`.

At each state of the chain, posterior sampling replaces the likelihood by a linear-Gaussian one,

.. math::
    \log r(x_0) \approx c + \log N\big(e;\; J (x_0 - \hat x_0),\; \operatorname{diag} v\big) .

For a linear-Gaussian measurement this is an identity, with :math:`J = A` and :math:`e = y - A \hat x_0`
(:mod:`~pyro_diffusion.inference.measurements`). For a function it is an expansion to second order
(:mod:`~pyro_diffusion.inference.functions`), and for observed entries the limit of no noise
(:mod:`~pyro_diffusion.inference.imputation`).
"""

import math
from abc import ABC, abstractmethod
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.typed import TorchDistribution

_DRAWS = 8  # of independent entries, for an expected log-likelihood

__all__ = [
    "Basis",
    "Local",
    "Target",
    "in_chains_units",
    "in_users_units",
    "log_independent",
    "of_columns",
]


class Local(NamedTuple):
    r"""A likelihood near estimates :math:`\hat x_0` of shape ``(K, M) + event_shape``."""

    rows: Tensor  #: :math:`J`, broadcastable to ``(K, M, m, D)``
    residual: Tensor  #: :math:`e`, ``(K, M, m)``, float64
    variance: Tensor  #: :math:`v`, broadcastable to ``(K, M, m)``, float64
    offset: Tensor  #: :math:`c`, broadcastable to ``(K, M)``, float64


class Basis(NamedTuple):
    """A measurement :math:`y = V x_0 + n`, rows orthonormal or zero, for ``N`` data or for one; float64."""

    rows: Tensor  #: :math:`V`, ``(N, m, D)``
    values: Tensor  #: :math:`y`, ``(N, m)``
    variance: Tensor  #: of the noise, ``(N, m)``
    #: log-likelihood minus the log-density of the values, a constant for each of all data, ``(N,)``
    offset: Tensor

    def project(self, x: Tensor) -> Tensor:
        """:math:`V x` for ``(K, M, D)``."""
        if len(self.rows) == 1:
            return x @ self.rows[0].mT
        return torch.einsum("nmd,knd->knm", self.rows, x)

    def lift(self, p: Tensor) -> Tensor:
        r""":math:`V^\top p` for ``(K, M, m)``."""
        if len(self.rows) == 1:
            return p @ self.rows[0]
        return torch.einsum("nmd,knm->knd", self.rows, p)

    def along(self, variance: Tensor) -> Tensor:
        r"""The diagonal of :math:`V \operatorname{diag}(v) V^\top` for ``(K, M, D)`` or ``(D,)``."""
        squares = self._replace(rows=self.rows.square())
        whole = variance if variance.dim() > 1 else variance.expand(1, len(self.rows), -1)
        return squares.project(whole)


class Target(ABC):
    """A likelihood for one or several data, bound to a model.

    The columns of particles are runs of all data: ``M = R · N``, the datum varying fastest.
    """

    num_data: int
    num_rows = 0  #: of an expansion with the same rows at every state
    argument = "log_likelihood"  #: what a warning names
    remedy = ", or temper a sharp likelihood: tempering=torch.logspace(0, -3, T)"
    is_exact = False  #: whether the expansion is the likelihood itself
    has_rows = True  #: whether there is an expansion
    is_divisible = False  #: whether data can be taken in parts

    def __init__(self, diffusion: DiffusionModel) -> None:
        self.diffusion = diffusion

    def expanded(self, num_data: int) -> Self:
        """The target of so many data, if it is one for all of them."""
        target = copy(self)
        target.num_data = num_data
        return target

    def part(self, rows: slice) -> Self:
        """The target of some of the data."""
        raise NotImplementedError

    @property
    def has_basis(self) -> bool:
        """Whether it is linear, with the same rows at every state."""
        return False

    def basis(self) -> Basis:
        """The measurement with orthonormal rows."""
        raise NotImplementedError

    @abstractmethod
    def log_prob(self, x_0: Tensor) -> Tensor:
        r""":math:`\log r(x_0)` for data in the user's units, ``(K, M) + event``; float64 ``(K, M)``."""

    @abstractmethod
    def local(self, x_0_hat: Tensor, exponent: float) -> Local:
        """The expansion of :math:`r` to a power, at estimates in the chain's units."""

    def expected(self, law: TorchDistribution) -> Tensor:
        r"""The mean of :math:`\log r` over draws of independent entries, lower by impossible ones."""
        values = torch.stack([self.log_prob(law.sample()) for _ in range(_DRAWS)])
        possible = values > -math.inf
        mean = values.where(possible, 0.0).sum(0) / possible.sum(0)
        return mean + (possible.sum(0) / len(values)).log()

    def drawn(self, law: TorchDistribution) -> tuple[Tensor, Tensor]:
        r"""Data from :math:`p(x_0 \mid x_1)` in the user's units, and their :math:`\log r`."""
        x_0 = law.sample()
        return x_0, self.log_prob(x_0)

    def known(self, denoised: Denoised, x_t: Tensor) -> Denoised:
        """The estimate by which states without a score are proposed."""
        return denoised

    def completed(self, x_0: Tensor) -> Tensor:
        """Data of the last step as they are returned."""
        return x_0


def in_users_units(diffusion: DiffusionModel, x_0_hat: Tensor) -> Tensor:
    """An estimate in the chain's units as a datum in the user's, differentiably; levels as real numbers."""
    if diffusion.transform is not None:
        return diffusion.transform.inv(x_0_hat)
    levels = getattr(diffusion.entrance, "num_levels", None)
    levels = getattr(getattr(diffusion.denoiser, "prediction", None), "num_levels", levels)
    if levels is not None:
        return (x_0_hat + 1) * ((levels - 1) / 2)
    if diffusion.likelihood is not None:
        mean: Tensor = diffusion.likelihood(x_0_hat).mean
        return mean
    return x_0_hat


def in_chains_units(diffusion: DiffusionModel, kernel: Any, denoised: Denoised) -> bool:
    """Whether a kernel into the data is over the chain's units, with the estimate as its mean."""
    if diffusion.likelihood is None:
        return True
    if kernel.support.is_discrete:
        return False
    mean: Tensor = kernel.mean
    return torch.allclose(mean.expand(denoised.x_0_hat.shape), denoised.x_0_hat)


def log_independent(x: Tensor, variance: Tensor) -> Tensor:
    r""":math:`\sum_i \log N(x_i; 0, v_i)` over the last axis."""
    return -0.5 * (x.square() / variance + (2 * math.pi * variance).log()).sum(-1)


def of_columns(x: Tensor, columns: int) -> Tensor:
    """A row for each datum, ``(N, …)``, repeated for the runs: ``(M, …)``."""
    return x.repeat(columns // len(x), *(1,) * (x.dim() - 1))
