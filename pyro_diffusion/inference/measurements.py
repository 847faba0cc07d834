r"""Linear-Gaussian measurements of a datum, :math:`y = A x_0 + n`.

An operator is a matrix, or any callable that maps data ``batch + event_shape`` to ``batch`` + the shape of a
measurement. Autograd finds its adjoint. :mod:`~pyro_diffusion.inference.operators` has a few.
"""

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from pyro_diffusion.checks import as_numbers, check_finite, check_values, described, require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.given import as_real, usable
from pyro_diffusion.inference.targets import (
    Basis,
    Local,
    Target,
    in_users_units,
    log_independent,
    of_columns,
)

__all__ = ["Linear", "LinearGaussian"]

Operator = Callable[[Tensor], Tensor]


class LinearGaussian:
    r"""The likelihood :math:`N(y; A x_0, \operatorname{diag} s^2)` of a linear measurement.

    :func:`~pyro_diffusion.inference.posterior_samples` multiplies the reverse kernels with the measurement in
    closed form. If the noise is correlated, whiten the operator and ``y``.

    Args:
        operator: :math:`A`: a matrix ``(d_y, D)`` for the flattened datum, or a callable that maps
            ``batch + event_shape`` to ``batch`` + the shape of a measurement, such as ``Blur(kernel)``. A
            constant may be added: the operator may be affine.
        y: The measurement in the user's units, or several, ``(N,)`` + the shape of one; each has a posterior.
        noise: Standard deviation :math:`s` of the noise, a number or a tensor that broadcasts to ``y``; for a
            noise of each of ``N`` measurements, ``noise[:, None]``. Zero conditions on :math:`A x_0 = y`
            exactly, if the data are real numbers.
        linearize: Whether to linearise what is not affine (a transform such as ``Logit``, or the operator) at
            :math:`\hat x_0(x_t)`. The weights stay exact.

    Raises:
        ValueError: A noise that is negative, not finite, or of another shape than ``y``; a ``y`` that is not
            finite. From ``posterior_samples``: a ``y`` of another shape than the operator's output, or
            something that is not affine without ``linearize``.

    Example:
        >>> LinearGaussian(torch.ones(1, 3), y=torch.tensor([0.5]), noise=0.1)
        LinearGaussian(a matrix (1, 3), y of shape (1,))

    References:
        Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024).
        https://arxiv.org/abs/2310.06721
        Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024).
        https://arxiv.org/abs/2405.13712
    """

    def __init__(
        self,
        operator: Tensor | Operator,
        y: Tensor,
        noise: Tensor | float,
        *,
        linearize: bool = False,
    ) -> None:
        matrix = None if callable(operator) else as_numbers("operator", operator)
        self.operator: Any = operator if matrix is None else matrix
        require(
            matrix is None or matrix.dim() == 2,
            "argument 'operator'",
            described(operator),
            "a matrix (d_y, D) for the flattened datum, or a callable",
            "Pass row[None] for a single measurement.",
        )
        self.y = check_finite(
            "argument 'y'", as_numbers("y", y), "Leave out what was not measured: Entries(mask)."
        )
        if not self.y.is_floating_point():
            self.y = self.y.to(torch.get_default_dtype())
        self.noise = as_numbers("noise", noise, like=self.y)
        check_values(
            "argument 'noise'",
            self.noise,
            self.noise.isfinite() & (self.noise >= 0),
            "standard deviations of at least zero",
            "Pass the standard deviation of the measurement's noise, not its variance or precision.",
        )
        try:
            self.noise = self.noise.expand(torch.broadcast_shapes(self.noise.shape, self.y.shape))
            self.y = self.y.expand(self.noise.shape)
        except RuntimeError:
            require(
                False, "argument 'noise'", f"shape {tuple(self.noise.shape)} for a y of shape "
                f"{tuple(self.y.shape)}", "a number, or a shape that broadcasts with y's",
                "For a noise for each of N measurements, pass noise[:, None].",
            )  # fmt: skip
        self.linearize = linearize

    def __repr__(self) -> str:
        matrix = isinstance(self.operator, Tensor)
        what = f"a matrix {tuple(self.operator.shape)}" if matrix else repr(self.operator)
        return f"LinearGaussian({what}, y of shape {tuple(self.y.shape)})"

    def measured(self, x_0: Tensor, event_dim: int) -> Tensor:
        """:math:`A x_0` for data of ``batch + event_shape``, flattened to ``batch + (d_y,)``."""
        batch = x_0.shape[: x_0.dim() - event_dim]
        if isinstance(self.operator, Tensor):
            return x_0.reshape(*batch, -1) @ usable(self.operator).to(x_0).mT
        measured: Tensor = self.operator(x_0).reshape(*batch, -1)
        return measured

    def target(self, diffusion: DiffusionModel) -> "Linear":
        """The measurement as a target of the chain of a model."""
        diffusion.process.check_has_score("log_likelihood", "Pass a function of the datum.")
        return Linear(diffusion, self)


class Linear(Target):
    """A linear-Gaussian measurement."""

    is_divisible = True

    def __init__(self, diffusion: DiffusionModel, likelihood: LinearGaussian) -> None:
        super().__init__(diffusion)
        self.likelihood = likelihood
        size = self._size()
        y, noise = (
            usable(x).to(diffusion.device).double().reshape(self._data_of(x, size), -1)
            for x in (likelihood.y, likelihood.noise)
        )
        self.num_data, self.y, self.variance = len(y), y, noise.square()
        self.is_affine = self._check_affine()
        self.is_exact = self.is_affine
        origin = torch.zeros(1, *diffusion.event_shape).to(diffusion.device, diffusion.dtype)
        self.rows = self._jacobian(origin)[0].double() if self.is_affine else None
        self.num_rows = size
        self._check_independent()

    def _check_independent(self) -> None:
        """Raise a ``ValueError`` for numbers without noise that repeat others: they have no density."""
        if self.rows is None or not bool((self.variance == 0).any()):
            return
        exact = self.rows[(self.variance == 0).any(0)]
        rank = int(torch.linalg.matrix_rank(exact))
        require(
            rank == len(exact),
            "argument 'noise'",
            f"zero for {len(exact)} numbers, of which only {rank} are linearly independent",
            "independent numbers where there is no noise",
            "Drop those that follow from others, or pass the noise that they have.",
        )

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
        several = x.dim() > 0 and len(x) > 0 and x.numel() == size * len(x)
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

    def _size(self) -> int:
        """Number of measured numbers, :math:`d_y`."""
        diffusion = self.diffusion
        zero = torch.zeros(
            2, *diffusion.event_shape, dtype=diffusion.dtype, device=diffusion.device
        )
        try:
            return self._measured(zero).shape[-1]
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"argument 'operator': got {self.likelihood}, which does not take data of shape "
                f"{tuple(zero.shape)} ({error}); expected a matrix (d_y, {zero[0].numel()}), or a "
                "callable of data with a batch axis in front. Check operator(x_0) for data x_0."
            ) from error

    def _check_affine(self) -> bool:
        generator = torch.Generator(self.diffusion.device).manual_seed(0)
        shape = (2, *self.diffusion.event_shape)
        points = torch.randn(
            shape, generator=generator, dtype=self.diffusion.dtype, device=self.diffusion.device
        )
        ends = torch.stack((torch.zeros_like(points[0]), points.sum(0)))
        with torch.no_grad():
            affine = all(self._is_affine(scale * points, scale * ends) for scale in (1, 10, 100))
        require(
            affine or self.likelihood.linearize,
            "argument 'log_likelihood'",
            f"{self.likelihood} of data that depend on the chain's units through "
            f"{self.diffusion.transform or self.diffusion.likelihood or 'an operator'}, not affinely",
            "a measurement that is affine in the chain's units",
            "Pass linearize=True to linearise it at each state; the weights stay exact.",
        )
        return affine

    def _is_affine(self, points: Tensor, ends: Tensor) -> bool:
        together, apart = self._measured(ends).sum(0), self._measured(points).sum(0)
        size = apart.abs().amax().clamp(min=1e-30)
        return bool(((together - apart).abs() <= torch.finfo(size.dtype).eps ** 0.6 * size).all())

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

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """A scale of the noise by number, and the singular values and vectors of the rows over it.

        ``None`` where there is no basis in which the noise is independent. Parts of the data share it.
        """
        if self.rows is None:
            return None
        scale = self.variance[0].sqrt()
        if bool((self.variance == self.variance[:, :1]).all()):
            scale = torch.ones_like(scale)  # each datum has one noise, which may be zero
        elif not bool((self.variance == self.variance[:1]).all()) or not bool((scale > 0).all()):
            return None
        left, sizes, rows = torch.linalg.svd(self.rows / scale[:, None], full_matrices=False)
        kept = sizes > 1e-8 * sizes[0]
        if not bool((self.variance > 0).all()) and len(self.rows) > int(kept.sum()):
            return None  # some numbers repeat others, without noise
        return scale, left[:, kept], sizes[kept], rows[kept]

    @property
    def has_basis(self) -> bool:
        return self._decomposed is not None

    def basis(self) -> Basis:
        assert self._decomposed is not None  # the caller has looked
        scale, left, sizes, rows = self._decomposed
        x_0_hat = torch.zeros(1, *self.diffusion.event_shape).to(
            self.diffusion.device, self.diffusion.dtype
        )
        y = self.y - self._measured(x_0_hat).double()
        values = (y / scale) @ left / sizes
        variance = (self.variance / scale.square())[:, :1] / sizes.square()
        if bool((variance > 0).all()):
            x_0 = in_users_units(self.diffusion, x_0_hat)
            offset = self.log_prob(x_0.expand(1, len(values), *x_0.shape[1:]))[0]
            offset = offset - log_independent(values, variance)
        else:
            offset = -sizes.log().sum().expand(len(values))
        return Basis(rows[None], values, variance, offset)

    def log_prob(self, x_0: Tensor) -> Tensor:
        real: Any = as_real(x_0)  # levels are whole numbers
        measured = self.likelihood.measured(real, x_0.dim() - 2).double()
        y, variance = (of_columns(x, x_0.shape[1]) for x in (self.y, self.variance))
        return log_independent(y - measured, variance)

    def local(self, x_0_hat: Tensor, exponent: float) -> Local:
        y, variance = (of_columns(x, x_0_hat.shape[1]) for x in (self.y, self.variance))
        rows = self.rows
        if rows is None:
            rows = self._jacobian(x_0_hat.flatten(0, 1)).double()
            rows = rows.reshape(*x_0_hat.shape[:2], *rows.shape[1:])
        residual = y - self._measured(x_0_hat).double()
        return Local(rows, residual, variance / exponent, torch.zeros_like(residual[..., 0]))
