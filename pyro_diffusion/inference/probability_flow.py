r"""The probability flow as a distribution: a site of any Pyro model.

The flow (E18) is a bijection of :math:`N(0, I)`. Here it is a discrete map, a fixed number of steps
:math:`\Phi_k` of Heun's method (:mod:`~pyro_diffusion.inference.heun`) along the log-SNR, from
:math:`\lambda(T)` to :math:`\lambda(1)`:

.. math::
    z \sim N(0, I), \qquad y_0 = z, \qquad y_{k+1} = \Phi_k(y_k), \qquad x_0 = f^{-1}(y_K / \alpha_1),

with :math:`y` the states of unit scale (:mod:`~pyro_diffusion.evidence.flow`) and :math:`f` the model's
transform. A program samples from this discrete map, and inverts and scores the same map, for any number of
steps. The density is therefore exact: it is that of the draws. More steps bring the map closer to the flow of
the model, with an error of the order :math:`K^{-2}`.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.utils._pytree import tree_leaves

from pyro_diffusion.checks import check_count
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.evidence.flow import Velocity, check_has_flow
from pyro_diffusion.given import Given
from pyro_diffusion.inference.heun import HeunStep, check_size
from pyro_diffusion.reading import alone
from pyro_diffusion.typed import TorchDistribution
from pyro_diffusion.walk import check_weights

__all__ = ["ProbabilityFlow", "flow"]


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
    Second derivatives of ``log_prob`` by the datum are right for exact denoisers. They need third derivatives
    of the network, which torch 2.13 computes wrongly for ``layer_norm``, as in ``MLP``. Second derivatives
    that involve a parameter are not supported.

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
    given = Given.of(context=context).with_rows(None, device=diffusion.device)
    diffusion.denoiser.check_given(given.of_kernels())
    transform = ProbabilityFlow(diffusion, num_steps, given)
    zero = torch.zeros(transform.shape, dtype=diffusion.dtype, device=diffusion.device)
    base = dist.Normal(zero, 1.0).to_event(len(diffusion.event_shape))
    transforms: list[Transform] = [transform]
    if diffusion.transform is not None:
        transforms.append(diffusion.transform.inv)
    return dist.TransformedDistribution(base, transforms)


class _Drawn(NamedTuple):
    """A draw and its base, which ``log_prob`` of the draw then need not compute by the inverse."""

    z: Tensor
    x: Tensor
    with_gradients: bool

    def serves(self, x: Tensor) -> bool:
        """Whether ``x`` is the draw, with the gradients that the caller should get."""
        free = x.is_leaf and x.requires_grad  # a variable of the caller
        return x is self.x and not free and (self.with_gradients or not torch.is_grad_enabled())


class ProbabilityFlow(Transform):
    r"""The discrete map from :math:`z` to :math:`x_1 / a_1`, its inverse and its log-determinant.

    The inverse is that of the same map, step by step. Above 64 dimensions there is no determinant.

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
    def shape(self) -> torch.Size:
        """Shape of a draw for each context, if there are several, or of one draw."""
        rows = 1 if self.given.context is None else len(tree_leaves(self.given.context)[0])
        event = self.diffusion.event_shape
        return event if rows == 1 else torch.Size((rows, *event))

    def _for_each_context(self, y: Tensor) -> Tensor:
        return y.expand(torch.broadcast_shapes(y.shape, self.shape))

    @property
    def steps(self) -> list[HeunStep]:
        """The steps, from noise to data: evenly spaced in log-SNR."""
        schedule = self.diffusion.schedule
        ends = torch.tensor([schedule.num_timesteps, 1], device=schedule.device)
        last, first = schedule.log_snr(ends)
        share = torch.linspace(0, 1, self.num_steps + 1, dtype=last.dtype, device=last.device)
        levels = (last + (first - last) * share).unbind()
        return [HeunStep(self.velocity, *pair, self.num_steps) for pair in pairwise(levels)]

    def _signal(self, y: Tensor) -> Tensor:
        r""":math:`\alpha_1`, by which a state is divided at the end."""
        schedule = self.diffusion.schedule
        return self.velocity.scales(schedule.log_snr(1))[0].to(y.dtype)

    def _call(self, z: Tensor) -> Tensor:
        with alone(self.diffusion):
            y = self._for_each_context(z)
            for step in self.steps:
                y = step(y)
            return y / self._signal(y)

    def _inverse(self, x: Tensor) -> Tensor:
        with alone(self.diffusion):
            y = self._for_each_context(x) * self._signal(x)
            for step in reversed(self.steps):
                y = step.inverse(y)
            return y

    def __call__(self, z: Tensor) -> Tensor:
        """The draw that a base becomes. It is remembered together with its base."""
        x = self._call(z)
        if self._cache_size:
            self._drawn = _Drawn(z, x, torch.is_grad_enabled())
        return x

    def _inv_call(self, x: Tensor) -> Tensor:
        if self._drawn is None or not self._drawn.serves(x):
            return self._inverse(x)
        with torch.no_grad():  # either may have changed in place, and so may a parameter
            same = torch.equal(self._call(self._drawn.z), x)
        return self._drawn.z if same else self._inverse(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Any) -> Tensor:
        r""":math:`\sum_k \log |\det \partial \Phi_k / \partial y_k| - D \log \alpha_1`, ``batch_shape``.

        Args:
            x: The base :math:`z`.
            y: The draw that it becomes, which is not used.
        """
        size = self.diffusion.event_shape.numel()
        check_size(size, "log_prob of the flow", "Do not score the flow: reparametrise its site,")
        with alone(self.diffusion):
            total, state = -size * self._signal(x).log(), self._for_each_context(x)
            for step in self.steps:
                total, state = total + step.log_det(state), step(state)
            return total
