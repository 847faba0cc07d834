r"""The probability flow as a distribution: a site of any Pyro model.

The flow (E18) is a bijection of :math:`N(0, I)`. Here it is a discrete map, a fixed number of Heun's steps
along the log-SNR, from :math:`\lambda(T)` to :math:`\lambda(1)`:

.. math::
    z \sim N(0, I), \qquad y_0 = z, \qquad y_{k+1} = \Phi_k(y_k), \qquad x_0 = f^{-1}(y_K / \alpha_1),

with :math:`y` the states of unit scale (:mod:`~pyro_diffusion.evidence.flow`) and :math:`f` the model's
transform. A step of length :math:`h` is, with the velocity :math:`v`,

.. math::
    \Phi(y) = y + \tfrac h2 \big( v(y, \lambda) + v(y + h\, v(y, \lambda), \lambda + h) \big) .

A program samples from this discrete map, and inverts and scores the same map, for any number of steps. The
density is therefore exact: it is that of the draws. More steps bring the map closer to the flow of the model,
with an error of the order :math:`K^{-2}`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.utils._pytree import tree_leaves

from pyro_diffusion.checks import check_count, require
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.evidence.flow import DENSE, Velocity, check_has_flow
from pyro_diffusion.given import Given
from pyro_diffusion.reading import alone
from pyro_diffusion.typed import TorchDistribution
from pyro_diffusion.walk import check_weights

__all__ = ["ProbabilityFlow", "flow"]

_ROUNDS = 40  # of Newton's method in a step of the inverse; a handful is the rule
_HALVINGS = 12  # of a correction after which more is missing than before
_CLOSE = 1e-8  # largest last correction, in units of the noise; what is left is its square
_ROUNDING = 64  # rounding errors of a state that a correction may have besides


def flow(diffusion: DiffusionModel, num_steps: int = 20, context: Any = None) -> TorchDistribution:
    r"""The law of a model's probability flow, as a distribution for ``pyro.sample``.

    .. code-block:: python

        def instrument(y):
            sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
            x = pyro.sample("x", flow(diffusion))
            pyro.sample("y", dist.Normal(A(x), sigma).to_event(1), obs=y)

        nuts = NUTS(poutine.reparam(instrument, {"x": TransformReparam()}))

    It is a ``TransformedDistribution``: a standard normal through :class:`ProbabilityFlow` and the inverse of
    the model's transform. With Pyro's ``TransformReparam`` (or ``AutoReparam``), inference moves in the
    normal base. It then needs no inverse and no Jacobian. Give this form to ``NUTS`` and to the automatic
    guides of ``SVI``. Without it, ``log_prob`` inverts the map step by step, which costs many times more.

    This is the law of the *flow*, not of the chain that ``diffusion.sample`` runs. Both are the law of the
    data for an exact score and :math:`T \to \infty`. For a network they are two models, and neither is a
    bound on the other. The flow ends at :math:`x_1 / a_1`, without the last kernel
    :math:`p(x_0 \mid x_1)`. A draw therefore still has the noise of :math:`x_1`, of variance
    :math:`\sigma_1^2 / a_1^2 = e^{-\lambda_1}` in the model's units. It begins with :math:`N(0, I)` in place
    of the law of :math:`x_T`.

    Draws have gradients by the base, by the model's parameters and by the context. The parameters are no
    sites of the program around it, and are not trained there. State them with ``pyro.module`` to train them.

    Args:
        diffusion: The model. Its states must be real numbers, and it must have no likelihood.
        num_steps: Heun's steps :math:`K`, two calls of the network each.
        context: Context of conditional data, for :math:`p(x_0 \mid c)`: a row for each datum, so that the
            batch shape is ``(N,)``, for the plate of the data; or a single row or number, for batch shape
            ``()``.

    Returns:
        A distribution over data in the user's units, of batch shape ``()``, or ``(N,)`` for ``N`` contexts,
        and of the datum's event shape. ``log_prob`` is nats per datum, for at most 64 dimensions.

    Raises:
        ValueError: A model without a flow; ``num_steps`` below one; a context that the model does not take.
            From ``log_prob``: more than 64 dimensions, or a datum at which the inverse of a step is not
            found.

    Example:
        >>> schedule = LogSNRSchedule(50, log_snr_max=12, log_snr_min=-12)
        >>> diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(2), 0.5 * torch.ones(2), schedule))
        >>> law = flow(diffusion, num_steps=40)
        >>> law.sample((3,)).shape
        torch.Size([3, 2])
        >>> law.log_prob(torch.zeros(2)), ode_log_likelihood(diffusion, torch.zeros(1, 2)).log_evidence
        (tensor(-0.4521), tensor([-0.4516], dtype=torch.float64))

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section
        4.3. https://arxiv.org/abs/2011.13456
        Automatic Reparameterisation of Probabilistic Programs (Gorinova et al., 2020).
        https://arxiv.org/abs/1906.03028
    """
    diffusion = check_weights(check_diffusion(diffusion))
    given = Given.of(context=context)
    single = not any(x.dim() for x in _leaves(given.context))
    given = given.with_rows(None, device=diffusion.device)
    diffusion.denoiser.check_given(given.of_kernels())
    rows = next((len(x) for x in _leaves(given.context)), 1)
    event = diffusion.event_shape
    zero = torch.zeros(event if single or rows == 1 else (rows, *event), dtype=diffusion.dtype)
    base = dist.Normal(zero.to(diffusion.device), 1.0).to_event(len(event))
    transforms: list[Transform] = [ProbabilityFlow(diffusion, num_steps, given)]
    if diffusion.transform is not None:
        transforms.append(diffusion.transform.inv)
    return dist.TransformedDistribution(base, transforms)


class Stage(NamedTuple):
    """A step of the map: log-SNRs at its ends."""

    start: Tensor
    end: Tensor

    @property
    def length(self) -> Tensor:
        """:math:`h`."""
        return self.end - self.start

    @property
    def reverse(self) -> "Stage":
        """The step from its end to its start."""
        return Stage(self.end, self.start)


class _Drawn(NamedTuple):
    """A draw and its base, which ``log_prob`` of the draw then need not compute by the inverse."""

    z: Tensor
    z_version: int
    x: Tensor
    x_version: int
    with_gradients: bool

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` is the draw: not changed in place, and with the gradients that it should have."""
        same = (
            x is self.x
            and not x.is_inference()
            and (self.z._version, x._version) == (self.z_version, self.x_version)
        )
        free = x.is_leaf and x.requires_grad  # a variable of the caller
        return same and not free and (self.with_gradients or not torch.is_grad_enabled())


class _Implicit(torch.autograd.Function):
    r"""The solution :math:`y` of a step's equation, with the gradient :math:`J(y)^{-1}` by what is missing.

    The Jacobian is computed again in the backward pass, at the solution with its own gradient, so that second
    derivatives by the datum are right as well.
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


class ProbabilityFlow(Transform):
    r"""The discrete map from :math:`z` to :math:`x_1 / a_1`, its inverse and its log-determinant.

    The inverse is that of the same map. Each step is solved by Newton's method, from the step in the other
    direction, which is right to third order. The Jacobian of a step is

    .. math::
        \frac{\partial \Phi}{\partial y} = I + \tfrac h2 \big(A + B\,(I + h A)\big),

    with :math:`A` and :math:`B` those of the velocity at both ends. Above 64 dimensions there is no Jacobian:
    a step is inverted by fixed-point iteration, and there is no determinant.

    Args:
        diffusion: The model.
        num_steps: Heun's steps :math:`K`.
        given: What goes with the data: a context, a row for each.
        cache_size: One remembers the last draw and its base, as in other transforms of torch.
    """

    bijective = True

    def __init__(
        self, diffusion: DiffusionModel, num_steps: int, given: Given = Given(), cache_size: int = 1
    ) -> None:
        check_has_flow(diffusion, "draw from its posterior with posterior_samples.")
        super().__init__(cache_size=cache_size)
        self._drawn: _Drawn | None = None
        remedy = "Twenty suit most models; compare with twice as many."
        self.num_steps = check_count("num_steps", num_steps, 1, remedy)
        self.diffusion, self.given = diffusion.with_both_ends(), given
        self.velocity = Velocity(self.diffusion, given)

    def __repr__(self) -> str:
        return f"ProbabilityFlow({self.diffusion.name!r}, num_steps={self.num_steps})"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_drawn": None}

    def with_cache(self, cache_size: int = 1) -> "ProbabilityFlow":
        """The same map, with or without a memory of its last draw."""
        return ProbabilityFlow(self.diffusion, self.num_steps, self.given, cache_size)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Real numbers, as many as a state has."""
        return constraints.independent(constraints.real, len(self.diffusion.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """The same."""
        return self.domain

    @property
    def size(self) -> int:
        """Dimensions of a state."""
        return self.diffusion.event_shape.numel()

    @property
    def stages(self) -> list[Stage]:
        """The steps, from noise to data: evenly spaced in log-SNR."""
        schedule = self.diffusion.schedule
        ends = torch.tensor([schedule.num_timesteps, 1], device=schedule.device)
        last, first = schedule.log_snr(ends)
        share = torch.linspace(0, 1, self.num_steps + 1, dtype=last.dtype, device=last.device)
        levels = (last + (first - last) * share).unbind()
        return [Stage(*pair) for pair in pairwise(levels)]

    def _signal(self, y: Tensor) -> Tensor:
        r""":math:`\alpha_1`, by which a state is divided at the end."""
        schedule = self.diffusion.schedule
        return self.velocity.scales(schedule.log_snr(1))[0].to(y.dtype)

    def _call(self, z: Tensor) -> Tensor:
        with alone(self.diffusion):
            y = z
            for stage in self.stages:
                y = self._step(y, stage)
            return y / self._signal(y)

    def _step(self, y: Tensor, stage: Stage) -> Tensor:
        r""":math:`\Phi(y)`."""
        h = stage.length.to(y.dtype)
        first = self.velocity(y, stage.start)[0]
        return y + 0.5 * h * (first + self.velocity(y + h * first, stage.end)[0])

    def __call__(self, z: Tensor) -> Tensor:
        """The draw that a base becomes. It is remembered together with its base."""
        x = self._call(z)
        if self._cache_size and not (z.is_inference() or x.is_inference()):
            self._drawn = _Drawn(z, z._version, x, x._version, torch.is_grad_enabled())
        return x

    def _inv_call(self, x: Tensor) -> Tensor:
        if self._drawn is None or not self._drawn.holds(x):
            return self._inverse(x)
        with torch.no_grad():  # a parameter may have changed in between
            same = torch.equal(self._call(self._drawn.z), x)
        return self._drawn.z if same else self._inverse(x)

    def _inverse(self, x: Tensor) -> Tensor:
        with alone(self.diffusion):
            y = x * self._signal(x)
            for stage in reversed(self.stages):
                y = self._undone(y, stage)
            return y

    def _undone(self, end: Tensor, stage: Stage) -> Tensor:
        r""":math:`\Phi^{-1}`, with gradients by the implicit function theorem."""
        with torch.no_grad():
            y = self._solved(end, stage)
        if not torch.is_grad_enabled():
            return y
        missing = end - self._step(y, stage)  # zero, with the gradients of both
        if not missing.requires_grad:
            return y
        self._check_size("the inverse of the flow with a gradient", "Invert in torch.no_grad()")

        def jacobian(flat: Tensor) -> Tensor:
            """That of the step at a state."""
            with alone(self.diffusion):
                return self._jacobian(flat.reshape(y.shape), stage)

        moved: Tensor = _Implicit.apply(self._flat(missing), self._flat(y), jacobian)
        return moved.reshape(y.shape)

    def _solved(self, end: Tensor, stage: Stage) -> Tensor:
        """The state from which a step leads to ``end``."""
        y = self._step(end, stage.reverse)
        noise = (
            self.diffusion.schedule.scales(stage.start)[1] / self.velocity.scales(stage.start)[1]
        )
        eps = max(torch.finfo(dtype).eps for dtype in (y.dtype, self.diffusion.dtype))
        largest = self._flat(end).abs().amax(-1)
        allowed = _CLOSE * noise.to(y.dtype) + _ROUNDING * eps * largest.clamp(min=1.0)
        missing = end - self._step(y, stage)
        for _ in range(_ROUNDS):
            change = self._correction(y, missing, end, stage)
            y, missing = self._moved(y, missing, change, end, stage)
            largest = self._flat(change).abs().amax(-1)
            if bool((largest <= allowed).all()):
                return y
        raise self._not_found(largest > allowed)

    def _correction(self, y: Tensor, missing: Tensor, end: Tensor, stage: Stage) -> Tensor:
        """Newton's, or where there is no Jacobian that of the step in the other direction."""
        if self.size <= DENSE:
            return self._divided(missing, self._jacobian(y, stage))
        return self._step(end, stage.reverse) - self._step(end - missing, stage.reverse)

    def _moved(
        self, y: Tensor, missing: Tensor, change: Tensor, end: Tensor, stage: Stage
    ) -> tuple[Tensor, Tensor]:
        """The state after a correction, which is halved in each row until less is missing."""

        def norm(x: Tensor) -> Tensor:
            """Of each row, broadcastable to the states."""
            length = self._flat(x).norm(dim=-1)
            return length.reshape(length.shape + (1,) * len(self.diffusion.event_shape))

        share = torch.ones_like(norm(missing))
        for _ in range(_HALVINGS):
            there = y + share * change
            left = end - self._step(there, stage)
            worse = norm(left) > (1 - 0.1 * share) * norm(missing)
            # Near the solution, what is missing is rounding error.
            worse = worse & (norm(change) > 1e-6 * norm(y))
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        return there, left

    def _not_found(self, failed: Tensor) -> ValueError:
        row = failed.nonzero()[0].tolist()
        where = f"row {row[0] if len(row) == 1 else tuple(row)}" if row else "the datum"
        return ValueError(
            f"argument 'value' of the flow's log_prob or inverse: got {where} "
            f"({int(failed.sum())} of {failed.numel()} data), where the inverse of a step of {self!r} was "
            "not found; expected steps that are short enough for a unique inverse. Pass more steps, "
            f"num_steps={2 * self.num_steps}, and check that the datum has the units of the model's data."
        )

    def _jacobian(self, y: Tensor, stage: Stage) -> Tensor:
        r""":math:`\partial \Phi / \partial y`, ``(…, D, D)``."""
        h = stage.length.to(y.dtype)
        first, a = self._gradient(y, stage.start)
        b = self._gradient(y + h * first, stage.end)[1]
        identity = torch.eye(self.size, dtype=y.dtype, device=y.device)
        return identity + 0.5 * h * (a + b @ (identity + h * a))

    def _gradient(self, y: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity and its Jacobian, from a copy of the states for each row of it."""
        size, event = self.size, self.diffusion.event_shape
        copies = y.expand(size, *y.shape)
        unit = torch.eye(size, dtype=y.dtype, device=y.device)
        unit = unit.reshape(size, *(1,) * (y.dim() - len(event)), *event).expand_as(copies)
        velocity, rows = self.velocity(copies, log_snr, unit[None])
        return velocity[0], self._flat(rows[0]).movedim(0, -2)

    def _divided(self, x: Tensor, jacobian: Tensor) -> Tensor:
        """The solution of a linear system with each Jacobian."""
        return torch.linalg.solve(jacobian, self._flat(x)[..., None])[..., 0].reshape(x.shape)

    def _flat(self, y: Tensor) -> Tensor:
        return y.reshape(*y.shape[: y.dim() - self.diffusion.denoiser.event_dim], self.size)

    def log_abs_det_jacobian(self, x: Tensor, y: Any) -> Tensor:
        r""":math:`\sum_k \log |\det \partial \Phi_k / \partial y_k| - D \log \alpha_1`, ``batch_shape``.

        Args:
            x: The base :math:`z`.
            y: The draw that it becomes, which is not used.
        """
        self._check_size("log_prob of the flow", "Do not score the flow: reparametrise its site")
        with alone(self.diffusion):
            total, state = -self.size * self._signal(x).log(), x
            for stage in self.stages:
                sign, log_det = torch.linalg.slogdet(self._jacobian(state, stage))
                if bool((sign <= 0).any()):
                    raise self._not_found(sign <= 0)
                total, state = total + log_det, self._step(state, stage)
            return total

    def _check_size(self, what: str, remedy: str) -> None:
        require(
            self.size <= DENSE,
            "argument 'diffusion'",
            f"a model of {self.size} dimensions for {what}",
            f"at most {DENSE}, because it takes whole Jacobians",
            f"{remedy}, poutine.reparam(model, {{'x': TransformReparam()}}) for a site 'x', so that only the "
            "normal base is scored.",
        )


def _leaves(context: Any) -> list[Tensor]:
    return [x for x in tree_leaves(context) if isinstance(x, Tensor)]
