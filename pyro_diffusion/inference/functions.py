r"""A log-likelihood that is a function of the datum, and its expansion near an estimate.

The expansion of :math:`\log r` is to second order, in the subspace of the gradient :math:`g` and of
directions in the range of the Hessian. With one direction it is along the gradient, with a curvature
:math:`h > 0`: :math:`J = \sqrt h\, g^\top / \lVert g \rVert`, :math:`e = \lVert g \rVert / \sqrt h` and
:math:`v = 1`. The curvature is that of the Hessian if the expansion is right about :math:`\log r` at its own
maximum. Otherwise the curvature is quartered or doubled until it is, up to the larger of :math:`\lVert g
\rVert^2` and the Hessian's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.checks import holds, require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.given import Given, as_real
from pyro_diffusion.inference.targets import Local, Target, in_users_units
from pyro_diffusion.typed import TorchDistribution

__all__ = ["Function"]

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
_PROBES = 17  # data at which a function is tried out
_LOST = 3.0  # nats below a typical value, for an estimate that is impossible itself
_TRIALS = 16  # of a curvature, at most


class Function(Target):
    """A log-likelihood that is a function of the datum."""

    def __init__(
        self,
        diffusion: DiffusionModel,
        function: Callable[[Tensor], Tensor],
        directions: int,
        context: Any = None,
    ) -> None:
        super().__init__(diffusion)
        self.function, self.directions = function, directions
        generator = torch.Generator(diffusion.device).manual_seed(0)
        x = torch.randn(
            (_PROBES, *diffusion.event_shape),
            generator=generator,
            dtype=diffusion.dtype,
            device=diffusion.device,
        )
        given = Given.of(context=context).with_rows(_PROBES, shared=True, device=diffusion.device)
        law = diffusion.decode(diffusion.prior().sample((_PROBES,)), **given.of_kernels())
        self.whole, self.has_rows = bool(law.support.is_discrete), diffusion.process.has_score
        try:
            self._try(self._in_users_units(x) if self.has_rows else law.sample())
        except ValueError:
            if not (self.whole and self.has_rows):
                raise
            self.has_rows = False  # a function of whole numbers alone, such as a look-up
            self._try(law.sample())

    def _try(self, probe: Tensor) -> None:
        """See what the function gives for some data."""
        self.probe = probe
        self.num_data, self.flat = self._layout()
        self._check_gradient()

    def _layout(self) -> tuple[int, bool]:
        """The number of data, and whether the function takes one batch axis only."""
        found = []
        for batch in (self.probe.unsqueeze(1), self.probe):
            try:
                value: Any = self.function(batch)
            except _FAILURES as error:
                found.append(f"{type(error).__name__}: {error}")
                continue
            shape = tuple(getattr(value, "shape", ("no tensor",)))
            if len(shape) == batch.dim() - self.probe.dim() + 1 and shape[0] == _PROBES:
                return (shape[1], False) if len(shape) == 2 else (1, True)
            found.append(f"shape {shape} for data {tuple(batch.shape)}")
        raise ValueError(
            f"argument 'log_likelihood': got {'; '.join(found)}; expected a number for each datum, of shape "
            f"({_PROBES}, N) or ({_PROBES},). Sum over the entries of a datum, and keep the batch axes: "
            "Normal(A(x_0), 0.1).log_prob(y).sum(-1)."
        )

    def _call(self, x_0: Tensor) -> Tensor:
        """The function at data of ``(K, M) + event``, ``(K, M)``."""
        batch, event = x_0.shape[:2], x_0.shape[2:]
        value = self.function(
            x_0.reshape(-1, *event) if self.flat else x_0.reshape(-1, self.num_data, *event)
        )
        fit = value.shape.numel() == batch.numel()
        if not fit or not holds(~value.isnan()):
            raise ValueError(
                f"argument 'log_likelihood': got {'NaN' if fit else f'shape {tuple(value.shape)}'} for "
                f"{batch.numel()} data; expected a number for each. Return -inf where a datum is impossible, "
                "and keep the batch axes."
            )
        return value.reshape(batch)

    def log_prob(self, x_0: Tensor) -> Tensor:
        real: Any = as_real(x_0)  # a function that guides by its gradient takes real numbers
        return self._call(real if self.has_rows else x_0).double()

    def expected(self, law: TorchDistribution) -> Tensor:
        expected = super().expected(law)
        return torch.where(expected.isfinite(), expected, self.impossible)

    def _check_gradient(self) -> None:
        """Raise a ``ValueError`` if the function has no gradient, or is flat; a hard constraint may be."""
        with torch.inference_mode(False), torch.enable_grad():
            x = self.probe.clone()
            x = x.requires_grad_() if self.has_rows else x
            value = self.function(x if self.flat else x.unsqueeze(1))
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        finite = value.detach()[value.isfinite()].double()
        self.impossible = finite.median().item() - _LOST if len(finite) else 0.0
        fit = gradient is not None
        steep = gradient is not None and bool(gradient.abs().amax() > 0)
        require(
            steep or len(finite) < value.numel() or not self.has_rows,
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
            value = self._value(x, exponent)
            gradient = torch.zeros_like(x)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            tridiagonal, basis = self._curvature(gradient, x)
        value = value.detach().double()
        size = gradient.detach().double().reshape(*batch, -1).norm(dim=-1)
        smooth = value.isfinite() & size.isfinite() & tridiagonal.isfinite().all(-1).all(-1)
        value = value.where(value.isfinite(), exponent * self.impossible)
        size = size.where(smooth, 0.0)
        curvature, vectors = torch.linalg.eigh(tridiagonal.where(smooth[..., None, None], 0.0))
        slopes = size[..., None] * vectors[..., 0, :]
        directions = vectors.mT @ basis
        curvature = self._kept(x.detach(), exponent, value, slopes, curvature, directions)
        residual = slopes / curvature.sqrt()
        offset = value + 0.5 * residual.square().sum(-1)
        offset = offset + 0.5 * self.directions * math.log(2 * math.pi)
        rows = curvature.sqrt().unsqueeze(-1) * directions
        return Local(rows, residual, torch.ones_like(residual), offset)

    def _value(self, x: Tensor, exponent: float) -> Tensor:
        """A power of the likelihood at states, as a logarithm."""
        return exponent * self._call(self._in_users_units(x))

    def _in_users_units(self, x: Tensor) -> Tensor:
        """An estimate in the user's units; between the smallest and the largest level, if data are levels."""
        return in_users_units(self.diffusion, x.clamp(-1, 1) if self.whole else x)

    def _kept(
        self,
        x: Tensor,
        exponent: float,
        value: Tensor,
        slopes: Tensor,
        curvature: Tensor,
        directions: Tensor,
    ) -> Tensor:
        """Curvatures at whose maximum the expansion agrees with the likelihood, ``(K, M, d)``."""
        squares = slopes.square()
        curvature = torch.where(curvature > 1e-6 * squares, curvature, 0.5 * squares + 1e-30)
        for i in range(slopes.shape[-1]):
            slope, h = slopes[..., i], curvature[..., i]
            largest, moving = h.maximum(squares[..., i]), slope.abs() > 0
            going, grows = moving, moving
            for _ in range(_TRIALS):
                step = slope / h
                moved = (step.unsqueeze(-1) * directions[..., i, :]).to(x).reshape(x.shape)
                there = self._value(x + moved, exponent).double()
                surplus = there - (value + 0.5 * slope * step)
                margin = 0.1 + 0.05 * slope * step
                kept = surplus >= -margin  # false where it is not a number
                going = going & (~kept | (grows & (surplus > margin)))
                grows = grows & kept
                if not bool(going.any()):
                    break
                h = torch.where(going, torch.where(kept, h / 4, (2 * h).minimum(largest)), h)
            curvature[..., i] = h
        return curvature

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


def _unit(x: Tensor) -> Tensor:
    """A vector of length one in the direction of ``x``; zero for one that is zero."""
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size > 1e-12 * (1 + size), x / size.clamp(min=1e-300), 0.0)
