r"""Objectives besides the bound: KL warm-up, free bits, and the variance of the bound's estimate.

The upper levels of a hierarchy often become inactive early in training: their KL falls to zero and stays
there. Two usual remedies, KL warm-up and free bits, change the *objective*. They never change the bound that
is reported, because :func:`~pyro_diffusion.bounds.elbo_terms` ignores the scales of handlers.

The bound of a long chain does not depend on the interior of a learned schedule. The interior is therefore
trained to reduce the variance of the bound's estimate.

References:
    Ladder Variational Autoencoders (Sønderby et al., 2016), section 2.3. https://arxiv.org/abs/1602.02282
    Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), appendix C.8.
    https://arxiv.org/abs/1606.04934
    Variational Diffusion Models (Kingma et al., 2021), appendix I.2 (variance of the bound).
    https://arxiv.org/abs/2107.00630
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, overload

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.bounds.checks import check_program, is_latent, is_of_latent
from pyro_diffusion.checks import require
from pyro_diffusion.family import Pair, unpacked
from pyro_diffusion.given import run
from pyro_diffusion.scoring import log_density, replayed, score

_WARMUP = "Pass min(1.0, step / num_steps) for a linear warm-up."


class KLWarmup(Messenger):
    r"""Scale the terms of latent sites: :math:`E \log p(x_0 \mid x_1) - \sum_t \beta_t L_t`.

    It is a handler for any model and guide. Put it around a step of training, so that it holds for both
    programs::

        for step in range(10_000):
            with KLWarmup(min(1.0, step / 2_000)):
                svi.step(x_0)

    Args:
        scale: :math:`\beta`, one for all latent sites, or one for each by name. A site that is not named
            keeps its own scale. A zero leaves the term out.

    Raises:
        ValueError: A scale that is negative or not a number, or the name of a site that does not exist. Also
            a program that is traced once for all steps, as by a ``Jit…ELBO``, because the scale would become
            a constant of the trace.
    """

    def __init__(self, scale: float | Mapping[str, float]) -> None:
        super().__init__()
        self.scale: Any = (
            {x: _at_least_zero("scale", beta, _WARMUP, f" for {x}") for x, beta in scale.items()}
            if isinstance(scale, Mapping)
            else _at_least_zero("scale", scale, _WARMUP, " for every latent site")
        )
        self._seen: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if not is_of_latent(msg):
            return
        if torch._C._get_tracing_state():
            raise ValueError(
                f"site {msg['name']!r}: got a KLWarmup inside a program that is being traced; expected an "
                "ELBO that runs the program at every step, because a trace keeps this scale for all steps. "
                "Use Trace_ELBO or TraceMeanField_ELBO."
            )
        self._seen.add(msg["name"])
        msg["scale"] = msg["scale"] * (
            self.scale.get(msg["name"], 1.0) if isinstance(self.scale, Mapping) else self.scale
        )

    def __exit__(self, *exception: Any) -> Any:
        super().__exit__(*exception)
        unknown = set(self.scale) - self._seen if isinstance(self.scale, Mapping) else set()
        if unknown and exception[0] is None:
            raise ValueError(
                f"argument 'scale': got the site {min(unknown)!r}; expected latent sites of the programs, "
                f"{', '.join(sorted(self._seen)) or 'but none was run'}. Take names from "
                "model.site_names."
            )


def _at_least_zero(argument: str, value: Any, remedy: str, where: str = "") -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    require(
        0 <= number < math.inf,
        f"argument {argument!r}",
        f"{value!r}{where}",
        "a number of at least 0",
        remedy,
    )
    return number


class FreeBitsELBO(TraceMeanField_ELBO):
    r"""The bound with a floor under the KL of every latent site, for guides in the model's order:

    .. math::
        E \log p(x_0 \mid x_1) - \sum_t \max\Big(\lambda,\;
            \frac1N \sum_{n=1}^N \mathrm{KL}\big(q(x_t \mid \cdot) \,\|\, p(x_t \mid \cdot)\big)\Big),

    where the mean is over the batch. Vectorised particles are part of the mean; particles that are drawn one
    after another each have their own floor. The KL of a level below :math:`\lambda` is not reduced further.
    A site in a plate of its own, inside the data plate, has :math:`\lambda` for each entry of that plate.

    Args:
        free_nats: :math:`\lambda`, nats for each level and datum.
        arguments: Arguments of ``TraceMeanField_ELBO``.

    Raises:
        ValueError: A negative :math:`\lambda`. From a step: a site without an analytic KL. The sites of a
            bottom-up guide have none.
    """

    def __init__(self, free_nats: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.free_nats = _at_least_zero(
            "free_nats",
            free_nats,
            "It is the KL in nats that costs nothing at each level: multiply bits by ln 2.",
        )

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        for name, p in model_trace.nodes.items():
            if is_latent(p):
                shortfall = self._shortfall(name, p["fn"], guide_trace.nodes[name])
                surrogate = surrogate + shortfall
                loss = loss + shortfall.item()
        return loss, surrogate

    def _shortfall(self, name: str, p: Any, q: Any) -> Tensor:
        r""":math:`\max(\lambda, \mathrm{KL}) - \mathrm{KL}`, summed over the batch."""
        kl = score(q["fn"], p).kl
        if kl is None:
            raise ValueError(
                f"site {name!r}: got no formula for the KL of {type(q['fn']).__name__} and "
                f"{type(p).__name__}; expected one, because free bits are a floor under it. Use Gaussian "
                "layers, or KLWarmup."
            )
        floor = torch.full_like(kl, self.free_nats)
        kl, floor = (scale_and_mask(x, scale=q["scale"], mask=q["mask"]) for x in (kl, floor))
        return (floor.sum() - kl.sum()).clamp(min=0)


class MinimumVarianceELBO(TraceMeanField_ELBO):
    r"""The bound for most parameters, and the variance of its estimate for a few:

    .. math::
        \theta \leftarrow \nabla_\theta\, E\, \hat L, \qquad
        \eta \leftarrow -\nabla_\eta\, \tfrac12 \log \frac1N \sum_{n=1}^N \hat L_n^2,

    where :math:`\hat L_n` is one draw of the bound of a datum. The bound of a long chain does not depend on
    the interior :math:`\eta` of its schedule, so the mean of the squares falls when the variance falls. This
    is exact for a continuous pair and a good approximation for a long chain. It does not hold for a short
    chain, whose bound depends on :math:`\eta`. The logarithm makes the gradient independent of the scale of
    the bound, for optimisers that depend on it.

    The variance is smallest where :math:`-d\lambda/du \propto (E\, \ell^2)^{-1/2}`, with :math:`\ell` the
    bound's rate in the log-SNR. A step takes one more backward pass::

        elbo = MinimumVarianceELBO([schedule.interior])
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), elbo)

    Args:
        parameters: :math:`\eta`, parameters of the programs, such as a
            :class:`~pyro_diffusion.schedules.MonotoneSchedule`'s ``interior``.
        arguments: Arguments of ``TraceMeanField_ELBO``.

    Raises:
        ValueError: No parameters. From a step: sites outside a data plate at dim −1, a parameter that the
            bound does not depend on, or draws that are not reparameterised.
    """

    def __init__(self, parameters: Iterable[Tensor], **arguments: Any) -> None:
        super().__init__(**arguments)
        # A tensor is iterable as well, by rows.
        self.parameters = (
            list(parameters)
            if isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
            else []
        )
        if not self.parameters or not all(
            isinstance(p, Tensor) and p.is_leaf for p in self.parameters
        ):
            raise ValueError(
                f"argument 'parameters': got {parameters!r}; expected a list of parameters of the programs. "
                "Pass [schedule.interior]."
            )

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound. Adds its gradients, and those of the squares, to the gradients of parameters."""
        loss = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            _check_reparameterised(guide_trace)
            bound = _bound_of_data(model_trace, guide_trace) / self.num_particles
            loss -= bound.sum().item()
            before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
            squares = torch.autograd.grad(
                bound.square().mean().log() / 2,
                self.parameters,
                retain_graph=True,
                allow_unused=True,
            )
            (-bound.sum()).backward()
            for parameter, grad, square in zip(self.parameters, before, squares, strict=True):
                if square is None:
                    raise ValueError(
                        f"argument 'parameters': got one of shape {tuple(parameter.shape)} that the bound "
                        "does not depend on; expected parameters of the programs. Pass the parameters of "
                        "this model's schedule."
                    )
                parameter.grad = square if grad is None else grad + square
        return loss


def _check_reparameterised(guide_trace: Any) -> None:
    for name, site in guide_trace.nodes.items():
        if is_latent(site) and not site["fn"].has_rsample:
            raise ValueError(
                f"site {name!r}: got draws of a {type(site['fn']).__name__}, which are not reparameterised; "
                "expected draws that have a gradient, because the gradient of the variance needs it. Use a "
                "fixed schedule."
            )


@overload
def bound_by_datum(family: Pair, /, x_0: Tensor, **given: Any) -> Tensor: ...


@overload
def bound_by_datum(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, **given: Any
) -> Tensor: ...


def bound_by_datum(model: Any, guide: Any = None, x_0: Any = None, **given: Any) -> Tensor:  # type: ignore[misc]
    r"""One draw of the bound of every datum, :math:`\hat L_n`; ``TraceMeanField_ELBO`` is minus their sum.

    It takes any pair, including a subsampled one. KLs are analytic where they have a formula. The result has
    gradients by the data and by the parameters, and can be used in a ``pyro.factor`` of another program. Its
    sites are hidden from handlers outside, but ``SVI`` trains its parameters.

    Args:
        model: Program for :math:`p`, called as ``model(x_0)``; or a family, which has both programs.
        guide: Program for :math:`q`, called as ``guide(x_0)``, in the model's order; left out for a family.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        given: Other arguments of both programs.

    Returns:
        Float64 nats, ``(N,)``. Their standard deviation over :math:`\sqrt N` is the error of their mean.

    Raises:
        ValueError: A site outside a data plate at dim −1.
    """
    model, guide, x_0 = unpacked(model, guide, x_0)
    check_program("model", model)
    check_program("guide", guide)
    drawn, scored = replayed(partial(run, model), partial(run, guide), x_0, given)
    return _bound_of_data(scored, drawn)


def _bound_of_data(model_trace: Any, guide_trace: Any) -> Tensor:
    """One draw of the bound for each datum, ``(N,)``."""
    total: Tensor = torch.zeros(())
    for name, p in model_trace.nodes.items():
        if p["type"] != "sample" or site_is_subsample(p):
            continue
        if p["is_observed"]:
            term = scale_and_mask(log_density(p["fn"], p["value"]), p["scale"], p["mask"])
        else:
            q = guide_trace.nodes[name]
            kl = score(q["fn"], p["fn"], q["value"]).term
            term = -scale_and_mask(kl, q["scale"], q["mask"])
        if not any(plate.vectorized and plate.dim == -1 for plate in p["cond_indep_stack"]):
            raise ValueError(
                f"site {name!r}: got a site outside of every plate; expected all sites in the data "
                "plate, because the bound is computed by datum. Put it into the plate."
            )
        term = term.expand(torch.broadcast_shapes(term.shape, p["fn"].batch_shape))
        total = total + term.reshape(-1, term.shape[-1]).sum(0)
    return total


class LogVarianceELBO(Trace_ELBO):
    def __init__(self, num_particles=16, **kw):
        super().__init__(num_particles=num_particles, **kw)

    def _log_weights(self, model, guide, args, kwargs):
        with _Drawn():
            found = [self._by_particle(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        return torch.cat(found)

    def _by_particle(self, p, q):
        n = self.num_particles if self.vectorize_particles else 1
        def total(trace):
            s = 0.0
            for site in trace.nodes.values():
                if site["type"] == "sample":
                    lp = site["log_prob"]
                    if self.vectorize_particles:
                        k = self.max_plate_nesting
                        lp = lp.movedim(-k, 0).reshape(n, -1).sum(1) if lp.dim() >= k else lp.sum()
                    else: lp = lp.sum()[None]
                    s = s + lp
            return s
        return total(p) - total(q)

    def loss_and_grads(self, model, guide, *args, **kwargs):
        w = self._log_weights(model, guide, args, kwargs)
        loss = w.var() / 2
        loss.backward()
        return loss.item()


class _Drawn(Messenger):
    def _pyro_post_sample(self, msg):
        if is_latent(msg) and type(msg["fn"]).__name__ != "Delta":
            msg["value"] = msg["value"].detach()
