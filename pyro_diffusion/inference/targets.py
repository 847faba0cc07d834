r"""A likelihood as the chain meets it: in the chain's units, and near an estimate :math:`\hat x_0`.

At each state of the chain, posterior sampling replaces the likelihood by a linear-Gaussian one,

.. math::
    \log r(x_0) \approx c + \log N\big(e;\; J (x_0 - \hat x_0),\; \operatorname{diag} v\big) .

For a linear-Gaussian measurement this is an identity, with :math:`J = A` and :math:`e = y - A \hat x_0`.
For a function it is the expansion of :math:`\log r` to second order, in the subspace of the gradient and of
directions in the range of the Hessian. With one direction it is along the gradient :math:`g`, with the
curvature :math:`h` there,
:math:`J = \sqrt h\, g^\top / \lVert g \rVert`, :math:`e = \lVert g \rVert / \sqrt h` and :math:`v = 1`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pyro_diffusion.checks import require
from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.inference.measurements import LinearGaussian
from pyro_diffusion.typed import TorchDistribution

_DRAWS = 8  # of independent entries, for an expected log-likelihood

__all__ = ["Function", "Linear", "Local", "Target", "in_users_units", "of_columns"]


class Local(NamedTuple):
    r"""A likelihood near estimates :math:`\hat x_0` of shape ``(K, M) + event_shape``."""

    rows: Tensor  #: :math:`J`, broadcastable to ``(K, M, m, D)``
    residual: Tensor  #: :math:`e`, ``(K, M, m)``, float64
    variance: Tensor  #: :math:`v`, broadcastable to ``(K, M, m)``, float64
    offset: Tensor  #: :math:`c`, broadcastable to ``(K, M)``, float64


class Target(ABC):
    """A likelihood for one or several data, bound to a model.

    The columns of particles are runs of all data: ``M = R · N``, the datum varying fastest.
    """

    num_data: int
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

    @abstractmethod
    def log_prob(self, x_0: Tensor) -> Tensor:
        r""":math:`\log r(x_0)` for data in the user's units, ``(K, M) + event``; float64 ``(K, M)``."""

    @abstractmethod
    def local(self, x_0_hat: Tensor, exponent: float) -> Local:
        """The expansion of :math:`r` to a power, at estimates in the chain's units."""

    def expected(self, law: TorchDistribution) -> Tensor:
        r"""The mean of :math:`\log r` over draws of independent entries, ``(K, M)``."""
        return torch.stack([self.log_prob(law.sample()) for _ in range(_DRAWS)]).mean(0)

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


class Linear(Target):
    """A linear-Gaussian measurement."""

    is_divisible = True

    def __init__(self, diffusion: DiffusionModel, likelihood: LinearGaussian) -> None:
        super().__init__(diffusion)
        self.likelihood = likelihood
        zero = torch.zeros(
            1, *diffusion.event_shape, dtype=diffusion.dtype, device=diffusion.device
        )
        size = self._measured(zero).shape[-1]
        y, noise = (
            x.to(diffusion.device).double().reshape(self._data_of(x, size), -1)
            for x in (likelihood.y, likelihood.noise)
        )
        self.num_data, self.y, self.variance = len(y), y, noise.square()
        self.is_affine = self._check_affine()
        self.is_exact = self.is_affine
        self.rows = self._jacobian(zero)[0].double() if self.is_affine else None

    def expanded(self, num_data: int) -> Self:
        target = super().expanded(num_data)
        target.y, target.variance = (x.expand(num_data, -1) for x in (self.y, self.variance))
        return target

    def part(self, rows: slice) -> Self:
        target = copy(self)
        target.y, target.variance = self.y[rows], self.variance[rows]
        target.num_data = len(target.y)
        return target

    def _data_of(self, x: Tensor, size: int) -> int:
        whole = x.numel() == size and x.dim() > 0
        several = x.dim() > 0 and x.numel() == size * len(x)
        require(
            whole or several,
            "argument 'y'",
            f"shape {tuple(x.shape)} for an operator whose output has {size} numbers",
            "the shape of the operator's output, or (N,) in front of it for N measurements",
            "Check operator(x_0).shape for a datum x_0.",
        )
        return 1 if whole else len(x)

    def _measured(self, x_0_hat: Tensor) -> Tensor:
        """:math:`A x_0` at estimates in the chain's units, ``batch + (d_y,)``."""
        x_0 = in_users_units(self.diffusion, x_0_hat)
        return self.likelihood.measured(x_0, len(self.diffusion.event_shape))

    def _check_affine(self) -> bool:
        generator = torch.Generator(self.diffusion.device).manual_seed(0)
        shape = (2, *self.diffusion.event_shape)
        points = torch.randn(
            shape, generator=generator, dtype=self.diffusion.dtype, device=self.diffusion.device
        )
        ends = torch.stack((torch.zeros_like(points[0]), points.sum(0)))
        with torch.no_grad():
            together, apart = self._measured(ends).sum(0), self._measured(points).sum(0)
        size = apart.abs().amax().clamp(min=1e-30)
        affine = bool(((together - apart).abs() <= torch.finfo(size.dtype).eps ** 0.6 * size).all())
        require(
            affine or self.likelihood.linearize,
            "argument 'log_likelihood'",
            f"{self.likelihood} of data that depend on the chain's units through "
            f"{self.diffusion.transform or self.diffusion.likelihood or 'an operator'}, not affinely",
            "a measurement that is affine in the chain's units",
            "Pass linearize=True to linearise it at each state; the weights stay exact.",
        )
        return affine

    def _jacobian(self, x_0_hat: Tensor) -> Tensor:
        """:math:`J` at estimates ``(P,) + event_shape``, ``(P, m, D)``."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x_0_hat.detach().clone().requires_grad_()
            measured = self._measured(x)
            rows = [
                torch.autograd.grad(measured[:, i].sum(), x, retain_graph=True)[0].flatten(1)
                for i in range(measured.shape[-1])
            ]
        return torch.stack(rows, dim=1)

    def log_prob(self, x_0: Tensor) -> Tensor:
        measured = self.likelihood.measured(x_0, x_0.dim() - 2).double()
        y, variance = (of_columns(x, x_0.shape[1]) for x in (self.y, self.variance))
        squares = (y - measured).square() / variance + variance.log() + math.log(2 * math.pi)
        return -0.5 * squares.sum(-1)

    def local(self, x_0_hat: Tensor, exponent: float) -> Local:
        y, variance = (of_columns(x, x_0_hat.shape[1]) for x in (self.y, self.variance))
        rows = self.rows
        if rows is None:
            rows = self._jacobian(x_0_hat.flatten(0, 1)).double()
            rows = rows.reshape(*x_0_hat.shape[:2], *rows.shape[1:])
        residual = y - self._measured(x_0_hat).double()
        return Local(rows, residual, variance / exponent, torch.zeros_like(residual[..., 0]))


class Function(Target):
    """A log-likelihood that is a function of the datum."""

    def __init__(
        self, diffusion: DiffusionModel, function: Callable[[Tensor], Tensor], directions: int
    ) -> None:
        super().__init__(diffusion)
        self.function, self.directions = function, directions
        generator = torch.Generator(diffusion.device).manual_seed(0)
        x = torch.randn(
            (3, *diffusion.event_shape),
            generator=generator,
            dtype=diffusion.dtype,
            device=diffusion.device,
        )
        self.has_rows = not _is_discrete(diffusion, x)
        self.probe = in_users_units(diffusion, x) if self.has_rows else diffusion.sample(3)
        self.num_data, self.flat = self._layout()
        if self.has_rows:
            self._check_gradient()

    def _layout(self) -> tuple[int, bool]:
        """The number of data, and whether the function takes one batch axis only."""
        found = []
        for batch in (self.probe.unsqueeze(1), self.probe):
            try:
                value: Any = self.function(batch)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                found.append(f"{type(error).__name__}: {error}")
                continue
            shape = tuple(getattr(value, "shape", ("no tensor",)))
            if len(shape) == batch.dim() - self.probe.dim() + 1 and shape[0] == 3:
                return (shape[1], False) if len(shape) == 2 else (1, True)
            found.append(f"shape {shape} for data {tuple(batch.shape)}")
        raise ValueError(
            f"argument 'log_likelihood': got {'; '.join(found)}; expected a number for each datum, of shape "
            "(3, N) and (3,). Sum over the entries of a datum, and keep the batch axes: "
            "Normal(A(x_0), 0.1).log_prob(y).sum(-1)."
        )

    def _call(self, x_0: Tensor) -> Tensor:
        """The function at data of ``(K, M) + event``, ``(K, M)``."""
        batch, event = x_0.shape[:2], x_0.shape[2:]
        value = self.function(
            x_0.reshape(-1, *event) if self.flat else x_0.reshape(-1, self.num_data, *event)
        )
        if value.shape.numel() != batch.numel() or bool(value.isnan().any()):
            got = "NaN" if value.shape.numel() == batch.numel() else f"shape {tuple(value.shape)}"
            raise ValueError(
                f"argument 'log_likelihood': got {got} for {batch.numel()} data; expected a number for each. "
                "Return -inf where a datum is impossible, and keep the batch axes."
            )
        return value.reshape(batch)

    def log_prob(self, x_0: Tensor) -> Tensor:
        return self._call(x_0).double()

    def _check_gradient(self) -> None:
        """Raise a ``ValueError`` if the function has no gradient, or is flat."""
        with torch.inference_mode(False), torch.enable_grad():
            x = self.probe.clone().requires_grad_()
            value = self.function(x if self.flat else x.unsqueeze(1)).sum()
            fit = value.requires_grad
            (gradient,) = torch.autograd.grad(value, x, allow_unused=True) if fit else (None,)
        fit = gradient is not None
        require(
            gradient is not None and bool((gradient != 0).any()),
            "argument 'log_likelihood'",
            "a function that is flat: its gradient is zero"
            if fit
            else "a function without a gradient",
            "one that depends on x_0 and that torch can differentiate, because its gradient guides the draws",
            "Compute it with torch from x_0 itself, without .item(), .detach(), NumPy or rounding.",
        )

    def local(self, x_0_hat: Tensor, exponent: float) -> Local:
        batch = x_0_hat.shape[:2]
        with torch.inference_mode(False), torch.enable_grad():
            x = x_0_hat.detach().clone().requires_grad_()
            value = exponent * self._call(in_users_units(self.diffusion, x))
            (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            tridiagonal, basis = self._curvature(gradient, x)
        size = gradient.detach().double().reshape(*batch, -1).norm(dim=-1)
        curvature, vectors = torch.linalg.eigh(tridiagonal)
        slopes = size[..., None] * vectors[..., 0, :]
        # Where r is not log-concave, or has no curvature, a hundredth of the squared slope stands for it.
        squares = slopes.square()
        curvature = torch.where(curvature > 1e-6 * squares, curvature, 0.01 * squares + 1e-30)
        residual = slopes / curvature.sqrt()
        rows = curvature.sqrt().unsqueeze(-1) * (vectors.mT @ basis)
        offset = value.detach().double() + 0.5 * residual.square().sum(-1)
        offset = offset + 0.5 * self.directions * math.log(2 * math.pi)
        return Local(rows, residual, torch.ones_like(residual), offset)

    def _curvature(self, gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`Q^\top H Q` and :math:`Q^\top`, for :math:`H = -\nabla^2 \log r` and a basis of the
        gradient and of directions in the range of :math:`H`; ``(K, M, d, d)``, ``(K, M, d, D)``."""

        def curved(q: Tensor) -> Tensor:
            """:math:`H q`."""
            if not gradient.requires_grad:
                return torch.zeros_like(q)
            along = (gradient * q.to(gradient).reshape(gradient.shape)).sum()
            (product,) = torch.autograd.grad(along, x, retain_graph=True, allow_unused=True)
            return torch.zeros_like(q) if product is None else -product.double().reshape(q.shape)

        flat = gradient.detach().double().nan_to_num().reshape(*x.shape[:2], -1)
        generator = torch.Generator().manual_seed(0)
        basis = [_unit(flat)]
        for _ in range(self.directions - 1):
            probe = torch.randn(flat.shape[-1:], generator=generator, dtype=torch.float64)
            rest = curved(probe.to(flat).expand(flat.shape))
            for q in basis + basis:  # twice, against rounding
                rest = rest - (rest * q).sum(-1, keepdim=True) * q
            basis.append(_unit(rest))
        products = [curved(q) for q in basis]
        q, h = torch.stack(basis, dim=-2), torch.stack(products, dim=-2)
        inner = q @ h.mT
        return 0.5 * (inner + inner.mT), q


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


def _is_discrete(diffusion: DiffusionModel, x_1: Tensor) -> bool:
    """Whether data are whole numbers."""
    return bool(diffusion.decode(x_1).support.is_discrete)


def _unit(x: Tensor) -> Tensor:
    """A vector of length one in the direction of ``x``; zero for one that is zero."""
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size > 1e-12 * (1 + size), x / size.clamp(min=1e-300), 0.0)


def of_columns(x: Tensor, columns: int) -> Tensor:
    """A row for each datum, ``(N, …)``, repeated for the runs: ``(M, …)``."""
    return x.repeat(columns // len(x), *(1,) * (x.dim() - 1))
