r"""The reverse chain walked step by step, outside of a Pyro program.

Paths of ``evaluate_bound``, sequential Monte Carlo and samplers go from :math:`x_T` to :math:`x_0`. They take
their steps from one :class:`ReverseWalk`:

- ``start``: the law of :math:`x_T`, :math:`q(x_T \mid x)` given a target :math:`x`, or :math:`p(x_T)`;
- ``look``: the denoiser's output at :math:`x_t`;
- ``kernel`` and ``posterior``: :math:`p_\theta(x_{t-1} \mid x_t)` and :math:`q(x_{t-1} \mid x_t, x)`;
- ``step``: a draw of the posterior with both densities; the step's weight is kernel over posterior;
- ``end``: :math:`p_\theta(x_0 \mid x_1)`.

The target is a datum, or a state :math:`x_s` at any timestep. With a state, the walk follows the chain
:math:`x_{s:T}`, and its steps are counted from the target. States have the shape ``(K, N) + event_shape``,
with particles first and data second. A network computes a limited number of rows at a time.

A mask and a context act as they do in the programs. Under a mask every density is the density of the observed
entries, and a kernel of the model gets the gap's value in the others. A context is passed to the denoiser, a
row for each datum.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_diffusion.chains import GenerativeChain
from pyro_diffusion.checks import require
from pyro_diffusion.denoisers import Denoised, Denoiser
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.given import Given, as_real, first_repeated, flattened, observed_part, seen
from pyro_diffusion.processes.gaussian import ChainStep, posterior_mean
from pyro_diffusion.reading import footprint, rows_within
from pyro_diffusion.scoring import Score, log_density, score
from pyro_diffusion.typed import TorchDistribution

__all__ = [
    "ROWS",
    "ReverseWalk",
    "Walked",
    "check_weights",
    "diffusion_of",
    "in_slices",
    "look",
    "taken",
    "whose_programs",
]

ROWS = 2048  #: rows of a network at a time, by default: a batch that fits a cache
Walked = (
    DiffusionModel | tuple[Callable[..., Any], Callable[..., Any]]
)  # the two are its own programs


def whose_programs(model: Any, guide: Any) -> DiffusionModel | None:
    """The diffusion model to which these programs of a whole chain belong; ``None`` for any others."""
    owner = getattr(model, "owner", None)
    both = owner is getattr(guide, "owner", None)
    if not isinstance(owner, DiffusionModel) or not both:
        return None
    own, length = owner.model, owner.schedule.num_timesteps
    kernels = ("prior", "transition", "likelihood")
    same = isinstance(model, GenerativeChain) and all(
        getattr(model, kernel).function == getattr(own, kernel).function for kernel in kernels
    )
    return owner if same and model.num_timesteps == guide.num_timesteps == length else None


def diffusion_of(model: Any, guide: Any, x_0: Any) -> tuple[DiffusionModel, Any]:
    """A diffusion model and data, from the arguments of a reader: these, or its programs and data.

    Raises:
        ValueError: Programs of another kind, or of a part of the chain; weights that are drawn.
    """
    if isinstance(model, tuple | list) and len(model) == 2:
        x_0 = guide if x_0 is None else x_0
        model, guide = model[0], model[1]
    if callable(guide) and not isinstance(model, DiffusionModel):
        diffusion = whose_programs(model, guide)
        if diffusion is None:
            raise ValueError(
                f"arguments 'model' and 'guide': got a {type(model).__name__} and a {type(guide).__name__}; "
                "expected the whole programs of one DiffusionModel, whose kernels are called one by one. "
                "Pass the model itself, and state=t for states."
            )
    else:
        diffusion, x_0 = check_diffusion(model), guide if x_0 is None else x_0
    return check_weights(diffusion), x_0


def drawing(diffusion: DiffusionModel) -> list[Any]:
    """The modules of a model whose weights are drawn from a prior."""
    return [module for module in diffusion.modules() if getattr(module, "_pyro_samples", None)]


def check_weights(diffusion: DiffusionModel) -> DiffusionModel:
    """``diffusion``, if no weight is drawn from a prior: every call would then be of another model."""
    drawn = drawing(diffusion)
    require(
        not drawn,
        "argument 'diffusion'",
        f"a {type(drawn[0]).__name__ if drawn else ''} with a PyroSample, whose weights are drawn",
        "fixed weights",
        "Use SVI and Trace_ELBO, with a guide that draws the weights too.",
    )
    return diffusion


class ReverseWalk:
    r"""The steps from :math:`x_T` to :math:`x_0` of a model's chain.

    Args:
        diffusion: The model.
        state: Timestep :math:`s` of the target, in ``{0, …, T − 1}``; 0 is the datum.
        rows: Network rows at a time.
        denoiser: Denoiser in place of the model's own, such as one with a compiled network.
        given: What goes with the data, ``N`` rows each.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        state: int = 0,
        *,
        rows: int = ROWS,
        denoiser: Denoiser | None = None,
        given: Given = Given(),
    ) -> None:
        self.diffusion, self.state, self.rows, self.given = diffusion, state, rows, given
        self.denoiser = diffusion.denoiser if denoiser is None else denoiser
        self.process = diffusion.process.tail(state) if state else diffusion.process
        self.of_state = None if given.mask is None else diffusion.state_mask(given.mask)

    @property
    def timesteps(self) -> range:
        """The timesteps of the walk, downwards to 1, counted from the target."""
        return range(self.process.schedule.num_timesteps, 0, -1)

    def target(self, x: Tensor) -> Tensor:
        """Data, or states, as a point of the chain."""
        return (
            x.to(self.diffusion.dtype)
            if self.state
            else self.diffusion.embed(x, mask=self.given.mask)
        )

    def seen(self, x_t: Tensor) -> Tensor:
        """A state as a kernel of the model gets it, with the gap's value in unobserved entries."""
        return seen(x_t, self.of_state, self.process.gap)

    def start(self, x: Tensor | None = None) -> TorchDistribution:
        r""":math:`q(x_T \mid x)` given the target as a point of the chain; :math:`p(x_T)` without one."""
        if x is None:
            return observed_part(self.diffusion.prior(), self.of_state)
        last = self.process.marginal(x, self.process.schedule.num_timesteps)
        return observed_part(last, self.of_state)

    def look(self, x_t: Tensor, t: int) -> Denoised:
        """The denoiser's output, ``t`` steps from the target."""
        return self.pulled(x_t, t)[0]

    def pulled(
        self, x_t: Tensor, t: int, pull: "Pull | None" = None
    ) -> tuple[Denoised, list[Tensor]]:
        """The same, and the vector-Jacobian products that ``pull`` asks for; see :func:`look`."""
        log_snr = self.diffusion.schedule.log_snr(t + self.state)
        given = self.denoiser.check_given(self.given.of_kernels())
        return look(self.denoiser, self.seen(x_t), log_snr, pull=pull, rows=self.rows, **given)

    def kernel(self, x_t: Tensor, t: int, denoised: Denoised) -> TorchDistribution:
        r""":math:`p_\theta(x_{t-1} \mid x_t)`."""
        kernel = self.denoiser.reverse_kernel(self.seen(x_t), t + self.state, denoised)
        return observed_part(kernel, self.of_state)

    def posterior(self, x_t: Tensor, x: Tensor, t: int) -> TorchDistribution:
        r""":math:`q(x_{t-1} \mid x_t, x)` given the target, ``t ≥ 2``."""
        return observed_part(self.process.posterior(x_t, x, t), self.of_state)

    def step(self, x_t: Tensor, x: Tensor, t: int, denoised: Denoised | None = None) -> Score:
        """A draw of the posterior with its density there and under the kernel, ``t ≥ 2``."""
        denoised = self.look(x_t, t) if denoised is None else denoised
        return score(self.posterior(x_t, x, t), self.kernel(x_t, t, denoised))

    def end(self, x_1: Tensor, denoised: Denoised | None = None) -> TorchDistribution:
        r"""The kernel into the target, in the user's units: :math:`p_\theta(x_0 \mid x_1)` for data."""
        denoised = self.look(x_1, 1) if denoised is None else denoised
        if self.state:
            return self.kernel(x_1, 1, denoised)
        return observed_part(self.diffusion.decode(self.seen(x_1), denoised), self.given.mask)

    def rows_within(self, x_0: Tensor) -> int:
        """Rows whose step fits the budget of memory, at most :data:`ROWS`; measured with the first datum."""

        def cost(count: int) -> float:
            """Bytes of a step."""
            data, own = first_repeated(x_0, self.given, count)
            walk = ReverseWalk(self.diffusion, self.state, denoiser=self.denoiser, given=own)
            return footprint(lambda: walk.rehearse(data)).peak

        return rows_within(cost, ROWS)

    def rehearse(self, x_0: Tensor) -> tuple[TorchDistribution, Tensor]:
        """One step and the end for data or states ``x_0``, to measure the memory that they take.

        Returns:
            A site's distribution and its draw, which a trajectory keeps of each step.
        """
        x = self.target(x_0)
        q = self.start(x)
        last, x_t = self.timesteps[0], q.sample()
        denoised = self.look(x_t, last)
        if last > 1:
            site = self.step(x_t, x, last, denoised)
            q, x_t = site.q, site.x
            _ = site.log_ratio, site.kl
        log_density(self.end(x_t, denoised), as_real(x_0))  # type: ignore[arg-type]
        return q, x_t

    def estimate(self, x_t: Tensor, t: int, denoised: Denoised) -> Tensor:
        """The mean of the target given :math:`x_t`; for a state it follows from the datum's estimate."""
        if not self.state:
            return denoised.x_0_hat
        schedule, ends = self.diffusion.schedule, torch.tensor([self.state, t + self.state])
        step = ChainStep.between(schedule, *schedule.log_snr(ends.to(x_t.device)))
        return posterior_mean(
            x_t, denoised.x_0_hat, step, missing_dim=self.diffusion.process.missing_dim
        )


#: ``pull(denoised, vjp, rows)``: tensors of the states' shape, from the output at some rows and the function
#: that multiplies its Jacobian with a vector.
Pull = Callable[[Denoised, Callable[[Tensor], Tensor], slice], Sequence[Tensor]]


def look(
    denoiser: Denoiser,
    x_t: Tensor,
    log_snr: Tensor,
    *,
    pull: Pull | None = None,
    rows: int = ROWS,
    **given: Any,
) -> tuple[Denoised, list[Tensor]]:
    r"""A denoiser's output at states of one log-SNR, and vector-Jacobian products if ``pull`` is given.

    Both are computed chunk by chunk, and the network's graph of a chunk is freed before the next one. If
    gradients are recorded, both have gradients, and the graphs are kept.

    Args:
        denoiser: The denoiser.
        x_t: States, ``batch_shape + event_shape``.
        log_snr: Their log-SNR, one for all.
        pull: ``pull(denoised, vjp, part)`` gives vector-Jacobian products for the rows ``part`` of the
            flattened states, where ``vjp(e)`` is :math:`e^\top \partial \hat x_0 / \partial x_t`.
        rows: Network rows at a time.
        given: ``context=`` of conditional data.

    Returns:
        :class:`Denoised`, and the tensors of ``pull`` for all states.
    """
    batch_shape = x_t.shape[: x_t.dim() - denoiser.event_dim]
    count = batch_shape.numel()
    if count <= rows and pull is None:
        return denoiser.denoise(x_t, log_snr, **given), []
    flat = x_t.reshape(count, *denoiser.event_shape)
    given = {name: flattened(value, batch_shape) for name, value in given.items()}
    slices = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    parts = [_look(denoiser, flat[part], log_snr, pull, part, given) for part in slices]
    joined = [
        None if values[0] is None else torch.cat(values).reshape(batch_shape + values[0].shape[1:])
        for values in zip(*(said + tuple(gradients) for said, gradients in parts), strict=True)
    ]
    return Denoised(*joined[: len(Denoised._fields)]), joined[len(Denoised._fields) :]  # type: ignore[arg-type, return-value]


def _look(
    denoiser: Denoiser,
    x_t: Tensor,
    log_snr: Tensor,
    pull: Pull | None,
    part: slice,
    given: dict[str, Any],
) -> tuple[Denoised, list[Tensor]]:
    """A chunk of :func:`look`."""
    given = {name: tree_map(itemgetter(part), value) for name, value in given.items()}
    if pull is None:
        return denoiser.denoise(x_t, log_snr, **given), []
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        x_t = x_t.clone() if x_t.is_inference() else x_t
        x_t = x_t if wanted and x_t.requires_grad else x_t.detach().requires_grad_()
        said = denoiser.denoise(x_t, log_snr, **given)

        def vjp(e: Tensor) -> Tensor:
            """The product with a vector."""
            (product,) = torch.autograd.grad(
                said.x_0_hat, x_t, e, retain_graph=True, create_graph=wanted
            )
            return product

        gradients = list(pull(said, vjp, part))
    if wanted:
        return said, gradients
    return Denoised(*(None if x is None else x.detach() for x in said)), gradients  # type: ignore[arg-type]


def taken(particles: Any, rows: Tensor) -> Any:
    """Particles of each datum, by row: of all tensors ``(K, N, …)`` in a tree, such as :class:`Denoised`."""

    def of(x: Tensor | None) -> Tensor | None:
        """The same for one tensor."""
        if x is None:
            return None
        index = rows.reshape(rows.shape + (1,) * (x.dim() - 2))
        return x.gather(0, index.expand_as(x))

    return tree_map(of, particles)


def in_slices(function: Callable[..., Any], size: int, *particles: Any) -> Any:
    """Apply a function to trees of particles ``(K, N, …)``, in slices of ``size`` along the first axis."""
    first: Tensor = particles[0]
    if len(first) <= size:
        return function(*particles)

    def part(start: int) -> Any:
        """The function's result for a slice."""
        rows = slice(start, start + size)
        return function(*tree_map(lambda x: None if x is None else x[rows], particles))

    parts = [part(start) for start in range(0, len(first), size)]
    return tree_map(lambda *x: None if x[0] is None else torch.cat(x), *parts)
