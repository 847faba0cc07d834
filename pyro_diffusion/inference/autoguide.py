r"""A diffusion chain as the guide of any Pyro model.

The roles of a diffusion model are swapped. The latents :math:`z` of a user's model :math:`p(y, z)` are at the
end of a learned reverse chain, which is the guide. The fixed forward chain extends the model to the other
states of the chain (E19):

.. math::
    z = z(x_0), \qquad
    \log w = \log p(y, z) + \log \Big\lvert \det \frac{\partial z}{\partial x_0} \Big\rvert
        + \sum_{t=1}^T \log q(x_t \mid x_{t-1}) - \log p_\phi(x_{0:T}), \qquad
    E_{p_\phi} \log w \le \log p(y) .

The map :math:`z(x_0)` is that of another guide, the *base*, from the standard normal to its own law. A chain
without a drift draws :math:`x_0 \sim N(0, I)` and weighs a path exactly as the base weighs its own draw.

References:
    Langevin Diffusion Variational Inference (Geffner and Domke, 2023). https://arxiv.org/abs/2208.07743
    Denoising Diffusion Samplers (Vargas et al., 2023). https://arxiv.org/abs/2302.13834
    An Optimal Control Perspective on Diffusion-Based Generative Modeling (Berner et al., 2024).
    https://arxiv.org/abs/2211.01364
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous, AutoDiagonalNormal
from pyro.nn import PyroModule
from pyro.poutine.runtime import _DIM_ALLOCATOR, am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, Transform, biject_to
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_diffusion.chains import GenerativeChain
from pyro_diffusion.checks import (
    check_argument,
    check_count,
    check_positive,
    finite,
    holds,
    require,
)
from pyro_diffusion.denoisers.base import check_network
from pyro_diffusion.evidence.particles import guide_draws
from pyro_diffusion.inference.bases import beginning, checked_nesting, own_base, rename, uncached
from pyro_diffusion.inference.drift import Drift
from pyro_diffusion.networks import MLP
from pyro_diffusion.params import ParamScope, free_name, snake_case
from pyro_diffusion.schedules import LogSNRSchedule, NoiseSchedule

__all__ = ["AutoDiffusion"]

_AUXILIARY = {"is_auxiliary": True}


class AutoDiffusion(AutoContinuous):
    r"""A guide whose draws are the end of a reverse diffusion chain, for any Pyro model with global latents.

    It is used like every automatic guide of Pyro::

        guide = AutoDiffusion(model, base=AutoMultivariateNormal)
        elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
        svi = SVI(model, guide, ClippedAdam({"lr": 5e-3}), elbo)
        best = KeepBest(model, guide, y, max_plate_nesting=1)
        for step in range(2_000):
            svi.step(y)
            if step % 200 == 199:
                best.update()
        best.restore()
        global_evidence(model, guide, y, max_plate_nesting=1)

    At the beginning its bound is that of its base, path by path, unless ``init_scale`` is given. The states
    of the chain are auxiliary sites, and the forward chain of the extended model is a factor of the guide.

    The bound prefers one mode to two. For a posterior of several modes begin broad, with
    ``init_scale``, minimise the variance of :math:`\log w` first
    (:class:`~pyro_diffusion.training.LogVarianceELBO`, with hundreds of particles, the base held), and then
    the bound. The start must reach the modes: three times as broad as their distance asks for.

    A trained guide is saved by its ``state_dict``: build it anew, call it once, and load. Pyro's param store
    alone does not restore it, because every guide has names of its own there.

    Args:
        model: Program with continuous latents that all data share.
        num_timesteps: Length of the chain :math:`T`.
        base: The guide whose coordinates the chain uses: ``AutoDiagonalNormal``,
            ``AutoMultivariateNormal`` or ``AutoIAFNormal``, another function from a model to such a guide,
            or a guide of the same model that is fitted already. The guide is copied, and the copy goes on
            learning, as far as it has parameters. To hold it, call ``guide.base.requires_grad_(False)``
            after the guide's first call.
        init_scale: How many times broader than its base the guide begins. The gates of the score then begin
            at :math:`a_t \sigma_t`, so that the chain is drawn to the modes from the beginning.
        network: The drift's network, called as ``network(x_t, log_snr)`` for states ``(B, d)`` and
            log-SNRs ``(B,)``, zero at the beginning. Its output is the drift, ``(B, d)``, or with one more
            axis of two numbers also the logarithm of a factor of the noise. It is not copied, and takes the
            base's dtype. By default an ``MLP`` of two blocks of 64 units, with both numbers.
        schedule: Noise schedule of the chain, whose number of steps takes the place of ``num_timesteps``; by
            default a log-SNR from 4 to -6.
        init_loc_fn: Where the base begins, for a base that is not fitted; see Pyro's autoguides.
        score: Whether the drift uses the gradient of the model, one more run of the model for each timestep.
            Its own derivative is left out, so that the gradients of the base, and of parameters of the model,
            are biased where the gates are large. Where the guide sees a part of the model's latents, use
            ``False``: the others would be drawn from their prior.

    Raises:
        ValueError: An argument of another kind. From the first call: a model without latents, with discrete
            latents, or with latents in a plate that is subsampled or sequential. From a call: a score that
            is finite for no draw. (Single draws far away, where it is not, get none.)

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoDiffusion(model, num_timesteps=8)
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=4))
        >>> loss = svi.step(torch.tensor([0.5, -1.0]))
        >>> guide.sample_posterior(10, torch.tensor([0.5, -1.0]))["scale"].shape
        torch.Size([10])

    References:
        Denoising Diffusion Samplers (Vargas et al., 2023). https://arxiv.org/abs/2302.13834
        Improved sampling via learned diffusions (Richter and Berner, 2024; the log-variance).
        https://arxiv.org/abs/2307.01198
    """

    base: AutoContinuous  #: its copy, whose coordinates the chain uses
    _model: Any
    master: Any

    def __init__(
        self,
        model: Callable[..., Any],
        num_timesteps: int = 16,
        base: Callable[..., AutoContinuous] | AutoContinuous = AutoDiagonalNormal,
        init_scale: float | None = None,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        init_loc_fn: Callable[..., Any] | None = None,
        score: bool = True,
    ) -> None:
        super().__init__(model)
        self._take_name()
        self._program, self.score = (model,), score
        remedy = "Three is three times as broad as the base."
        self.init_scale = (
            None if init_scale is None else check_positive("init_scale", init_scale, remedy)
        )
        count = check_count("num_timesteps", num_timesteps, 1, "The default is 16.")
        if schedule is None:
            schedule = LogSNRSchedule(count, log_snr_max=4.0, log_snr_min=-6.0)
        check_argument("schedule", schedule, NoiseSchedule, "LogSNRSchedule(16)")
        self._parts = None if network is None else check_network(network, "MLP((d,))"), schedule
        # Not as an AutoGuide's attribute is set: this guide would become the master of the base's plates.
        PyroModule.__setattr__(self, "base", own_base(base, model, init_loc_fn))
        self._model = self._begun = beginning(self.base, model)

    def _take_name(self) -> None:
        """Take a name of its own in Pyro's param store."""
        self._pyro_name = ParamScope(free_name(snake_case(type(self).__name__))).name

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._model = self._begun
        if self.base.prototype_trace is None:
            self.base._model = self._begun  # which copying takes away
        self._nesting = checked_nesting(self.model, args, kwargs)
        super()._setup_prototype(*args, **kwargs)
        if self.base.prototype_trace is None:
            self.base._setup_prototype(*args, **kwargs)
        self.base.get_posterior(*args, **kwargs)  # makes the transform of a normalizing flow
        dim, start = self.latent_dim, self.base.get_base_dist()
        require(
            start.event_shape == (dim,),
            "argument 'base'",
            f"a guide of {start.event_shape.numel()} numbers",
            f"one of this model, whose latents have {dim}",
            "Pass a class, or a guide that was built from the same model.",
        )
        network, schedule = self._parts
        if network is None:
            network = MLP((dim,), hidden_size=64, num_blocks=2, num_outputs=2)
        drift = Drift(
            network, schedule, dim, pulled=self.init_scale is not None,
            name=f"{self._pyro_name}.drift",
        )  # fmt: skip
        self.add_module("drift", drift.to(start.mean))

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        r"""State the sites of the chain and the factor of the extended model; returns :math:`z`."""
        # Its own programs state the parameters of the drift, so that it is not read as an attribute.
        drift, z = self._modules["drift"], self._map(*args, **kwargs)
        score = partial(self._score, z, args, kwargs) if self.score else None
        path: list[Tensor] = []

        def transition(x_t: Tensor, t: int) -> Any:
            """The reverse kernel. It keeps the state."""
            path.append(x_t)
            return drift.transition(x_t, t, score)

        chain = GenerativeChain(
            drift.prior, transition, partial(transition, t=1),
            num_timesteps=drift.schedule.num_timesteps, owner=drift,
        )  # fmt: skip
        prefix = f"_{self._pyro_name}"
        with poutine.infer_config(config_fn=lambda site: _AUXILIARY):
            x_0 = chain(plate=False, prefix=prefix)
        latent: Tensor = z(x_0)
        if not am_i_wrapped():  # nothing reads the factor
            return latent
        log_q = drift.log_forward([*path, x_0]) + _log_det(z, x_0, latent)
        pyro.factor(f"{prefix}.extension", -log_q, has_rsample=True)
        return latent

    def _map(self, *args: Any, **kwargs: Any) -> Transform:
        r""":math:`z(x_0)`, from the chain's coordinates to unconstrained latents."""
        base = self.base.get_transform(*args, **kwargs)
        if self.init_scale is None:
            return base
        return ComposeTransform([AffineTransform(0.0, self.init_scale, event_dim=1), base])

    def _score(
        self, z: Transform, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> Tensor:
        r""":math:`r(x)`, the gradient of the model's log-density over that of :math:`N(0, I)`."""
        batch = () if x.numel() == x.shape[-1] else (-1, *[1] * self._nesting)

        def gradients(x: Tensor, by_site: bool = False) -> dict[str, Tensor]:
            """The gradient of the log-density by the state, or that of each site of the model."""
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                rows = x.reshape(*batch, x.shape[-1])  # to the left of the model's plates
                latent = z(rows)
                log_p, trace = self._log_joint(latent, args, kwargs)
                terms = {"": log_p + _log_det(z, rows, latent).sum()}
                if by_site:
                    terms = {name: site["log_prob_sum"] for name, site in _scored(trace)}
                grads = (torch.autograd.grad(v, x, retain_graph=by_site)[0] for v in terms.values())
                return dict(zip(terms, grads, strict=True))

        if torch._C._get_tracing_state():  # of JitTrace_ELBO
            found = _traceable(lambda x: gradients(x)[""], x)
        else:
            found = gradients(x)[""]
        known = found.isfinite().all(-1, keepdim=True)
        if not holds(known.any()):
            bad = [name for name, g in gradients(x, by_site=True).items() if not finite(g)]
            raise ValueError(
                f"site {bad[0] if bad else 'of a latent'!r}: got a log-density whose gradient by the latents "
                "is not finite; expected a finite one wherever the guide goes. Check scales for underflow, "
                "begin the base elsewhere, or use score=False."
            )
        return torch.where(known, found + x.detach(), 0.0)

    def _log_joint(
        self, latent: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, poutine.Trace]:
        r""":math:`\log p(y, z)` in unconstrained coordinates, summed over rows, and the model's trace."""
        total, values = torch.zeros((), dtype=latent.dtype, device=latent.device), {}
        for site, unconstrained in self._unpack_latent(latent):
            constrain = biject_to(site["fn"].support)
            values[site["name"]] = value = constrain(unconstrained)
            total = total + constrain.log_abs_det_jacobian(unconstrained, value).sum()
        held = poutine.condition(data=values)
        with _plates_of_its_own(), poutine.block(), poutine.trace() as tracer, held:
            self._program[0](*args, **kwargs)
        return total + tracer.trace.log_prob_sum(), tracer.trace

    def sample_posterior(
        self, num_samples: int, *args: Any, max_plate_nesting: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws of the latents by name, each ``(num_samples,)`` + the shape of the site.

        Args:
            num_samples: Number of draws.
            args: Arguments of the model.
            max_plate_nesting: Number of dimensions that the model's plates take, to make all draws together;
                ``None`` makes them one by one, which any model can do.
            kwargs: Arguments of the model by name.
        """
        count = check_count("num_samples", num_samples, 1, "A thousand are enough for quantiles.")
        return guide_draws(self, count, max_plate_nesting, args, kwargs, inside=self._program)

    def median(
        self, *args: Any, max_plate_nesting: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The median of each latent, of a thousand draws; much faster with ``max_plate_nesting``."""
        found = self.quantiles([0.5], *args, max_plate_nesting=max_plate_nesting, **kwargs)
        return {name: x[0] for name, x in found.items()}

    def quantiles(
        self,
        quantiles: Sequence[float],
        *args: Any,
        max_plate_nesting: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantiles of each latent, of a thousand draws, each ``(len(quantiles),)`` + the site's shape.

        The draws are made one by one, or together with ``max_plate_nesting``, as by :meth:`sample_posterior`.
        """
        draws = self.sample_posterior(1000, *args, max_plate_nesting=max_plate_nesting, **kwargs)
        return {
            name: torch.quantile(x, torch.as_tensor(quantiles).to(x), dim=0)
            for name, x in draws.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        kept = self._model, self.master  # which Pyro takes from the guide that is copied
        uncached(self.base)
        state: dict[str, Any] = super().__getstate__()
        self._model, self.master = kept
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_model": state["_begun"]})
        self._modules["base"].__dict__["master"] = None  # as at the beginning
        self._take_name()
        rename(self, self._pyro_name)


@contextmanager
def _plates_of_its_own() -> Iterator[None]:
    """Run a program with its own plates on the right, whatever plates are open around it."""
    allocated, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = allocated


def _traceable(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function with a derivative inside, as plain operations, which ``torch.jit`` can trace."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        graph: Callable[[Tensor], Tensor] = make_fx(function)(x.detach())
    finally:
        tracer._set_tracing_state(state)
    return graph(x.detach())


def _log_det(z: Transform, x: Tensor, latent: Tensor) -> Tensor:
    r""":math:`\log \lvert \det \partial z / \partial x \rvert`, ``batch_shape``."""
    return sum_rightmost(z.log_abs_det_jacobian(x, latent), 1 - z.domain.event_dim)


def _scored(trace: poutine.Trace) -> list[tuple[str, Any]]:
    """The sites of a trace whose log-density depends on latents."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and torch.as_tensor(site["log_prob_sum"]).requires_grad
    ]
