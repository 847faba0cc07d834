r"""A step of Heun's method along the probability flow: a map of states, with its Jacobian and its inverse.

With the velocity :math:`v` of the flow (E18) a step of length :math:`h` in log-SNR is

.. math::
    \Phi(y) = y + \tfrac h2 \big( v(y, \lambda) + v(y + h\, v(y, \lambda), \lambda + h) \big), \qquad
    \frac{\partial \Phi}{\partial y} = I + \tfrac h2 \big(A + B\,(I + h A)\big),

with :math:`A` and :math:`B` the Jacobians of the velocity at both ends. The inverse is that of this same map.
It begins with the step in the other direction, which is right to third order, and is corrected by Newton's
method. Above 64 dimensions there is no whole Jacobian, and the inverse is a fixed-point iteration.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.checks import require
from pyro_diffusion.evidence.flow import DENSE, Velocity
from pyro_diffusion.reading import alone

_ROUNDS = 40  # of Newton's method; a handful is the rule
_HALVINGS = 12  # of a correction after which more is missing than before
_CLOSE = 1e-8  # largest last correction, in units of the noise; what is left is its square
_ROUNDING = 64  # rounding errors of a state that a correction may have besides


class HeunStep(NamedTuple):
    """A step between two log-SNRs. States have the shape ``batch_shape + event_shape``."""

    velocity: Velocity
    start: Tensor  #: log-SNR
    end: Tensor  #: log-SNR
    num_steps: int  #: of the whole map, for messages

    @property
    def reverse(self) -> "HeunStep":
        """The step in the other direction, which is close to the inverse."""
        return self._replace(start=self.end, end=self.start)

    @property
    def _size(self) -> int:
        return self.velocity.diffusion.event_shape.numel()

    def _length(self, y: Tensor) -> Tensor:
        return (self.end - self.start).to(y.dtype)

    def __call__(self, y: Tensor) -> Tensor:
        r""":math:`\Phi(y)`."""
        h = self._length(y)
        first = self.velocity(y, self.start)[0]
        return y + 0.5 * h * (first + self.velocity(y + h * first, self.end)[0])

    def jacobian(self, y: Tensor) -> Tensor:
        r""":math:`\partial \Phi / \partial y`, ``batch_shape + (D, D)``."""
        h = self._length(y)
        first, a = self._gradient(y, self.start)
        b = self._gradient(y + h * first, self.end)[1]
        identity = torch.eye(self._size, dtype=y.dtype, device=y.device)
        return identity + 0.5 * h * (a + b @ (identity + h * a))

    def _gradient(self, y: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity and its Jacobian, from a copy of the states for each row of it."""
        size, event = self._size, self.velocity.diffusion.event_shape
        copies = y.expand(size, *y.shape)
        unit = torch.eye(size, dtype=y.dtype, device=y.device)
        unit = unit.reshape(size, *(1,) * (y.dim() - len(event)), *event).expand_as(copies)
        velocity, rows = self.velocity(copies, log_snr, unit[None])
        return velocity[0], self._flat(rows[0]).movedim(0, -2)

    def log_det(self, y: Tensor) -> Tensor:
        r""":math:`\log |\det \partial \Phi / \partial y|`, ``batch_shape``.

        Raises:
            ValueError: A determinant that is not positive: the map folds there.
        """
        sign, log_det = torch.linalg.slogdet(self.jacobian(y))
        if bool((sign <= 0).any()):
            raise self._not_found(sign <= 0)
        return log_det

    def inverse(self, end: Tensor) -> Tensor:
        r""":math:`\Phi^{-1}`, with gradients by the implicit function theorem up to 64 dimensions.

        Raises:
            ValueError: A row whose inverse is not found; a gradient in more dimensions.
        """
        with torch.no_grad():
            y = self._solved(end)
        if not torch.is_grad_enabled():
            return y
        missing = end - self(y)  # zero, with the gradients of both
        if not missing.requires_grad:
            return y
        check_size(
            self._size,
            "the inverse of the flow with a gradient",
            "Invert in torch.no_grad(), or use",
        )

        def jacobian(flat: Tensor) -> Tensor:
            """That of the step at a state, flattened."""
            with alone(self.velocity.diffusion):
                return self.jacobian(flat.reshape(y.shape))

        moved: Tensor = _Implicit.apply(self._flat(missing), self._flat(y), jacobian)
        return moved.reshape(y.shape)

    def _solved(self, end: Tensor) -> Tensor:
        """The state from which the step leads to ``end``."""
        allowed = self._allowed(end)
        y = self.reverse(end)
        missing = end - self(y)
        for _ in range(_ROUNDS):
            change = self._correction(y, missing, end)
            y, missing = self._moved(y, missing, change, end)
            close = self._flat(change).abs().amax(-1) <= allowed
            if bool(close.all()):
                return y
        raise self._not_found(~close)

    def _allowed(self, end: Tensor) -> Tensor:
        """The largest last correction of each row."""
        alpha = self.velocity.scales(self.start)[0]
        noise = (1 - alpha.square()).sqrt().to(end.dtype)
        eps = max(torch.finfo(x).eps for x in (end.dtype, self.velocity.diffusion.dtype))
        largest = self._flat(end).abs().amax(-1).clamp(min=1.0)
        return _CLOSE * noise + _ROUNDING * eps * largest

    def _correction(self, y: Tensor, missing: Tensor, end: Tensor) -> Tensor:
        """Newton's, or where there is no Jacobian that of the step in the other direction."""
        if self._size <= DENSE:
            change = torch.linalg.solve(self.jacobian(y), self._flat(missing)[..., None])
            return change.reshape(y.shape)
        return self.reverse(end) - self.reverse(end - missing)

    def _moved(
        self, y: Tensor, missing: Tensor, change: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The state after a correction, which is halved in each row until less is missing."""
        event_dim = self.velocity.diffusion.denoiser.event_dim

        def norm(x: Tensor) -> Tensor:
            """Of each row, broadcastable to the states."""
            length = self._flat(x).norm(dim=-1)
            return length.reshape(length.shape + (1,) * event_dim)

        share = torch.ones_like(norm(missing))
        for _ in range(_HALVINGS):
            there = y + share * change
            left = end - self(there)
            worse = norm(left) > (1 - 0.1 * share) * norm(missing)
            # Near the solution, what is missing is rounding error.
            worse = worse & (norm(change) > 1e-6 * norm(y))
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        return there, left

    def _flat(self, y: Tensor) -> Tensor:
        event_dim = self.velocity.diffusion.denoiser.event_dim
        return y.reshape(*y.shape[: y.dim() - event_dim], self._size)

    def _not_found(self, failed: Tensor) -> ValueError:
        row = failed.nonzero()[0].tolist()
        where = f"row {row[0] if len(row) == 1 else tuple(row)}" if row else "the datum"
        return ValueError(
            f"argument 'value' of the flow's log_prob or inverse: got {where} ({int(failed.sum())} of "
            f"{failed.numel()} data), where the inverse of one of {self.num_steps} steps was not found; "
            "expected steps that are short enough for a unique inverse. Pass more steps, "
            f"num_steps={2 * self.num_steps}, and check that the datum has the units of the model's data."
        )


class _Implicit(torch.autograd.Function):
    r"""The solution :math:`y` of a step's equation, with the gradient :math:`J(y)^{-1}` by what is missing.

    The Jacobian is computed again in the backward pass, at the solution with its own gradient, so that second
    derivatives by the datum are right as well. Those that involve a parameter are not.
    """

    @staticmethod
    def forward(
        ctx: Any, missing: Tensor, y: Tensor, jacobian: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The solution, flattened to ``(…, D)``."""
        solution = y.clone()
        ctx.save_for_backward(solution)
        ctx.jacobian = jacobian
        return solution

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The product with the transposed inverse."""
        (solution,) = ctx.saved_tensors
        jacobian = ctx.jacobian(solution)
        return torch.linalg.solve(jacobian.mT, gradient[..., None])[..., 0], None, None


def check_size(size: int, what: str, remedy: str) -> None:
    """Raise a ``ValueError`` for more dimensions than whole Jacobians are computed of."""
    require(
        size <= DENSE,
        "argument 'diffusion'",
        f"a model of {size} dimensions for {what}",
        f"at most {DENSE}, because it takes whole Jacobians",
        f"{remedy} poutine.reparam(model, {{'x': TransformReparam()}}) for a site 'x', so that only the "
        "normal base is scored.",
    )
