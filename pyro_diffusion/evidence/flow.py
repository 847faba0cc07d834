r"""The density of the probability flow: the deterministic model that shares a diffusion's marginals.

The time is the log-SNR :math:`\lambda`. The coordinates are states of unit scale,
:math:`y = x_\lambda / \sqrt{a^2 + \sigma^2}`, with the signal
:math:`\alpha = a / \sqrt{a^2 + \sigma^2}`. In a chain that preserves variance they are the states
themselves. With Tweedie's score the flow of
:math:`x_\lambda = a x_0 + \sigma \epsilon` is

.. math::
    \frac{dy}{d\lambda} = \tfrac12\, \alpha\, \big(\hat x_0(x_\lambda) - \alpha y\big) \quad \text{(E18)},

and the log-density changes along the flow by its divergence,

.. math::
    \log p(y_{\lambda_t}) = \log p(y_{\lambda_T})
        + \int_{\lambda_t}^{\lambda_T} \nabla \cdot \frac{dy}{d\lambda}\, d\lambda .

The flow is *another model* than the chain: their densities are equal only for the exact score and
:math:`T \to \infty`, and the density of the flow is not a bound on that of the chain. The denoiser is called
only at log-SNRs that the schedule covers.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section
    4.3. https://arxiv.org/abs/2011.13456
    FFJORD (Grathwohl et al., 2019), section 3.1 (stochastic trace). https://arxiv.org/abs/1810.01367
"""

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_diffusion.checks import check_count, check_data, check_positive, check_state, require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence.evidence import Evidence, fingerprint
from pyro_diffusion.given import Given, chunks, first_repeated, flattened, together, usable
from pyro_diffusion.reading import alone, footprint, rows_within
from pyro_diffusion.walk import Walked, diffusion_of, look

DENSE = 64  #: dimensions up to which Jacobians are computed as a whole by default
_MOST = 256  # largest number of data that share the solver's steps
_STAGES = 20  # states that a solver of order five keeps in memory, and its working copies


@overload
def ode_log_likelihood(
    diffusion: Walked, /, x_0: Tensor, *, state: int = ..., num_probes: int | None = ...,
    rtol: float = ..., atol: float = ..., batch_size: int | None = ..., **given: Any,
) -> Evidence: ...  # fmt: skip


@overload
def ode_log_likelihood(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, *, state: int = ...,
    num_probes: int | None = ..., rtol: float = ..., atol: float = ...,
    batch_size: int | None = ..., **given: Any,
) -> Evidence: ...  # fmt: skip


def ode_log_likelihood(  # type: ignore[misc]
    diffusion: Any,
    guide: Any = None,
    x_0: Any = None,
    *,
    state: int = 0,
    num_probes: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int | None = None,
    **given: Any,
) -> Evidence:
    r"""Log-density of data, or of states, under the probability flow; differentiable.

    The flow starts at :math:`\lambda(t = 1)`, where a little noise is left. The density of a datum is the
    density of :math:`a_1 x_0` there times :math:`a_1^D`, with an error of the order of :math:`\sigma_1^2`
    over the variance of the data. A larger ``log_snr_max`` makes this error smaller.

    Where gradients are recorded, the result has gradients by the data and by the model's parameters. They
    come from the adjoint equation, which is solved backwards to the same tolerances and needs no more memory
    for more steps. The result can therefore be used in a ``pyro.factor``, under ``SVI`` or ``NUTS``. The
    model's own parameters are not trained there, because they are not sites of the program around it. Call
    it in ``torch.no_grad()`` if you need no gradients.

    Args:
        diffusion: The model, or its program ``diffusion.model``. It must not have a likelihood, because the
            flow has a density of real numbers only. Add noise to grey levels first (dequantise them): the
            result is the density of the noisy data.
        guide: The program ``diffusion.guide`` if the first argument is ``diffusion.model``; else left out.
        x_0: Data, shape ``(N,)`` + the shape of one datum; states in the chain's space if ``state`` is
            not zero.
        state: Timestep ``t`` of the states; 0 for data.
        num_probes: Random vectors for Hutchinson's estimate of the divergence, at least 2. ``None`` computes
            the exact value (``D`` gradients a call) up to 64 dimensions, and uses 8 probes for more.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        batch_size: Data that share the solver's steps; by default as many as fit into 256 MiB, at most 256.
        given: ``context=`` of conditional data, for :math:`\log p(x_0 \mid c)`. A mask is an error, because
            the flow has no density of a part of the data.

    Returns:
        :class:`~pyro_diffusion.evidence.Evidence`. Its standard error is the error of the stochastic trace,
        and zero for the exact trace. It does not include the solver's error, which is of the order of the
        tolerances (``estimator`` names them). The diagnostics of weights are NaN.

    Raises:
        ValueError: A model with a likelihood, over levels or bits, or with a curve for each entry;
            a timestep outside ``0 … T``; fewer than two probes; a mask; data or a context that the programs
            do not take.

    Example:
        >>> schedule = LogSNRSchedule(5, log_snr_max=15, log_snr_min=-20)
        >>> diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), schedule))
        >>> ode_log_likelihood(diffusion, torch.zeros(3, 2)).log_evidence
        tensor([-1.8379, -1.8379, -1.8379], dtype=torch.float64)

    References:
        Neural Ordinary Differential Equations (Chen et al., 2018), section 2 (the adjoint equation).
        https://arxiv.org/abs/1806.07366
    """
    diffusion, x_0 = diffusion_of(diffusion, guide, x_0)
    _check(diffusion, state, num_probes)
    rtol, atol = (check_positive(name, x, "1e-5.") for name, x in (("rtol", rtol), ("atol", atol)))
    x_0 = check_data(x_0)
    what = _checked_given(diffusion, x_0, given)
    if state == 0:  # the flow follows the whole curve, even for a chain of one step
        diffusion = diffusion.with_both_ends()
    if num_probes is None and diffusion.event_shape.numel() > DENSE:
        num_probes = 8
    with torch.inference_mode(False), alone(diffusion):
        x_0, what = together(usable, x_0, what)
        size = _rows_at_a_time(diffusion, x_0, what, num_probes, batch_size)
        parts = [
            _solve(diffusion, x, own, state, num_probes, rtol, atol)
            for _, x, own in chunks(x_0, what, size)
        ]
    trace = "exact trace" if num_probes is None else f"{num_probes} probes"
    estimator = f"probability flow, {trace}, rtol={rtol:g}, atol={atol:g}"
    return _evidence(torch.cat(parts, dim=1), estimator, fingerprint(x_0))


def _evidence(log_p: Tensor, estimator: str, data: str) -> Evidence:
    """The mean over probes, with its error; an exact trace has one row and no error."""
    exact = len(log_p) == 1
    error = torch.zeros_like(log_p[0]) if exact else log_p.std(0) / math.sqrt(len(log_p))
    nan = torch.full_like(error, math.nan)
    return Evidence(
        log_evidence=log_p.mean(0),
        standard_error=error,
        ess=nan,
        pareto_k=nan,
        estimator=estimator,
        data=data,
        measure="density",
    )


def _solve(
    diffusion: DiffusionModel,
    x_0: Tensor,
    given: Given,
    state: int,
    num_probes: int | None,
    rtol: float,
    atol: float,
) -> Tensor:
    """Log-densities by probe, ``(P, N)``; for the exact trace ``P`` is one."""
    velocity = Velocity(diffusion, given)
    ends = torch.tensor([max(state, 1), diffusion.schedule.num_timesteps], device=x_0.device)
    log_snr = diffusion.schedule.log_snr(ends)
    signal, scale = velocity.scales(log_snr[0])
    x = x_0.to(diffusion.dtype) if state else diffusion.embed(x_0)
    change = 1 / scale if state else signal  # dy/dx
    y = (change * x).to(diffusion.dtype)
    log_volume = diffusion.event_shape.numel() * change.log()
    if state == 0 and diffusion.transform is not None:
        log_volume = log_volume + diffusion.log_volume(x_0)
    probes = _probes(y, num_probes)
    divergence = y.new_zeros(1 if num_probes is None else num_probes, len(y), dtype=torch.float64)
    start = (y.double(), divergence)
    if ends[0] < ends[1]:
        # The parameters of an exact denoiser are buffers.
        numbers = [*diffusion.parameters(), *diffusion.buffers(), *tree_leaves(given.context)]
        field = _with_divergence(velocity, probes, exact=num_probes is None)
        start = _integrated(field, start, log_snr, numbers, rtol, atol)
    y_T, divergence = start
    normal = -0.5 * (y_T.square() + math.log(2 * math.pi)).reshape(len(y_T), -1).sum(1)
    return normal + divergence + log_volume


def _integrated(
    velocity: Callable[..., Any],
    start: tuple[Tensor, Tensor],
    log_snr: Tensor,
    numbers: list[Any],
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """State and integrated divergence at the second log-SNR, from those at the first.

    ``numbers`` are what the velocity depends on besides: parameters, and a context.
    """
    from torchdiffeq import odeint, odeint_adjoint

    parameters = [x for x in numbers if isinstance(x, Tensor) and x.requires_grad]
    wanted = any(x.requires_grad for x in (*start, log_snr, *parameters))
    # The solver's own choice of a first step evaluates log-SNRs far outside the curve, and can be zero.
    first = 0.01 * (log_snr[1] - log_snr[0]).abs().detach()
    settings: dict[str, Any] = {
        "rtol": rtol,
        "atol": atol,
        "options": {"first_step": first, "step_t": log_snr.detach()},
    }
    if torch.is_grad_enabled() and wanted:
        path = odeint_adjoint(
            velocity, start, log_snr, adjoint_params=parameters, method="dopri5", **settings
        )
    else:
        with torch.no_grad():
            path = odeint(velocity, start, log_snr, method="dopri5", **settings)
    return path[0][-1], path[1][-1]


class Velocity:
    r""":math:`dy/d\lambda` of a model's probability flow, for states :math:`y` of unit scale (E18).

    Args:
        diffusion: The model.
        given: What goes with the states: a context, a row for each datum.
    """

    def __init__(self, diffusion: DiffusionModel, given: Given = Given()) -> None:
        self.diffusion, self.given = diffusion, given.of_kernels()

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        r"""The signal :math:`\alpha` of :math:`y` at log-SNRs, and :math:`\sqrt{a^2 + \sigma^2}`."""
        signal, noise = self.diffusion.schedule.scales(log_snr)
        scale = (signal.square() + noise.square()).sqrt()
        return signal / scale, scale

    def __call__(
        self, y: Tensor, log_snr: Tensor, vectors: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""The velocity at states ``(…) + event_shape``, in their dtype, and vector-Jacobian products.

        Args:
            y: States of unit scale.
            log_snr: Their log-SNR, one for all.
            vectors: :math:`v`, ``(P,)`` + the states' shape; the products
                :math:`v^\top \partial (dy/d\lambda) / \partial y` have this shape.
        """
        alpha, scale = (c.to(y.dtype) for c in self.scales(log_snr))
        event, dtype = self.diffusion.event_shape, self.diffusion.dtype
        batch_shape = y.shape[: y.dim() - len(event)] or torch.Size((1,))
        states = (scale * y).to(dtype).reshape(-1, *event)
        vectors = y[None][:0] if vectors is None else vectors
        count = len(vectors)
        flat = vectors.to(dtype).reshape(count, *states.shape)
        said, products = look(
            self.diffusion.denoiser,
            states,
            log_snr,
            pull=(lambda said, vjp, part: [vjp(e[part]) for e in flat]) if count else None,
            **{name: flattened(part, batch_shape) for name, part in self.given.items()},
        )
        x_0_hat = said.x_0_hat.reshape(y.shape).to(y.dtype)
        velocity = 0.5 * alpha * (x_0_hat - alpha * y)
        pulled = torch.stack(products).to(y.dtype) if count else flat
        return velocity, 0.5 * alpha * (scale * pulled.reshape(vectors.shape) - alpha * vectors)


def _with_divergence(
    velocity: Velocity, probes: Tensor, *, exact: bool
) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """The velocity and its divergence, as a function for the solver."""

    def at(log_snr: Tensor, path: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Derivatives at a log-SNR, for a state and the divergence integrated so far."""
        dy, products = velocity(path[0], log_snr, probes)
        trace = (products * probes).reshape(*probes.shape[:2], -1).sum(2)
        return dy, trace.sum(0, keepdim=True) if exact else trace

    return at


def _probes(x: Tensor, num_probes: int | None) -> Tensor:
    """Unit vectors for the exact trace, or random signs for each datum."""
    if num_probes is None:
        size = x[0].numel()
        unit = torch.eye(size, dtype=x.dtype, device=x.device)
        return unit.reshape(size, 1, *x.shape[1:]).expand(size, *x.shape)
    return 2.0 * torch.randint(2, (num_probes, *x.shape), dtype=x.dtype, device=x.device) - 1.0


def _rows_at_a_time(
    diffusion: DiffusionModel,
    x_0: Tensor,
    given: Given,
    num_probes: int | None,
    batch_size: int | None,
) -> int:
    """``batch_size``, or the number of data whose solver step fits into the budget of memory."""
    if batch_size is not None:
        return check_count("batch_size", batch_size, 1, "Leave it out.")

    def cost(count: int) -> float:
        """Bytes needed for the solver's stages, each as large as one step."""
        shape = (count, *diffusion.event_shape)
        x = torch.zeros(shape, dtype=diffusion.dtype, device=x_0.device)
        _, own = first_repeated(x_0, given, count)
        signs = x.expand(num_probes, *shape) + 1 if num_probes is not None else _probes(x, None)
        field = _with_divergence(Velocity(diffusion, own), signs, exact=num_probes is None)
        level, start = (
            diffusion.schedule.log_snr(1).detach(),
            (x.double(), x.new_zeros(len(signs), count)),
        )
        with torch.no_grad():
            held, peak = footprint(lambda: field(level, start))
        return _STAGES * held + peak

    return rows_within(cost, min(len(x_0), _MOST))


def _checked_given(diffusion: DiffusionModel, x_0: Tensor, given: dict[str, Any]) -> Given:
    what = Given.of(**given)
    require(
        what.mask is None,
        "argument 'mask'",
        "one for the density of the flow",
        "complete data, because the flow has no density of the observed part alone",
        "Use importance_evidence(diffusion, x_0, mask=…).",
    )
    what = what.with_rows(len(x_0), device=x_0.device)
    diffusion.denoiser.check_given(what.of_kernels())
    return what


def _check(diffusion: DiffusionModel, state: int, num_probes: int | None) -> None:
    check_state(state, diffusion.schedule.num_timesteps)
    check_has_flow(diffusion, "use importance_evidence(diffusion, x_0, num_particles=100).", state)
    if num_probes is not None:
        remedy = "Leave it out for the exact trace of small data."
        check_count("num_probes", num_probes, 2, remedy, "whose spread is the standard error")


def check_has_flow(diffusion: DiffusionModel, remedy: str, state: int = 0) -> None:
    """Raise a ``ValueError`` unless the probability flow of a model leads to data, or to a state."""
    diffusion.process.check_has_score("diffusion", remedy[0].upper() + remedy[1:])
    require(
        not diffusion.schedule.event_dim,
        "argument 'diffusion'",
        "a schedule with a curve for each entry",
        "one curve for all entries, because the flow runs along a single log-SNR",
        f"Use a schedule without an event shape, or {remedy}",
    )
    levels = getattr(getattr(diffusion.denoiser, "prediction", None), "num_outputs", 1) > 1
    what = "levels" if diffusion.likelihood is None else repr(diffusion.likelihood)
    require(
        state != 0 or (diffusion.likelihood is None and not levels),
        "argument 'diffusion'",
        f"a model with {what} between its states and the data",
        "none, because the flow has a density of states only",
        "Dequantise the data and fit a model without a likelihood, pass states to "
        f"ode_log_likelihood(diffusion, x_t, state=1), or {remedy}",
    )
