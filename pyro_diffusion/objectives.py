r"""What to train on besides the bound itself: KL warm-up, free bits, and the bound's own variance.

Left alone, upper levels of a hierarchy tend to fall silent early in training, their KL at zero, and stay
so. Two usual remedies change the *objective*, never the bound that is reported:
:func:`~pyro_diffusion.bounds.elbo_terms` is unscaled whatever handlers do. The interior of a learned
schedule has no share in the bound of a long chain, and is trained for the variance of its estimator.

References:
    Ladder Variational Autoencoders (Sønderby et al., 2016), section 2.3. https://arxiv.org/abs/1602.02282
    Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), appendix C.8.
    https://arxiv.org/abs/1606.04934
    Variational Diffusion Models (Kingma et al., 2021), appendix I.2 (variance of the bound).
    https://arxiv.org/abs/2107.00630
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

__all__ = ["FreeBitsELBO", "KLWarmup", "MinimumVarianceELBO", "bound_by_datum"]


class KLWarmup(Messenger):
    r"""Scale the terms of latent sites: :math:`E \log p(x_0 \mid x_1) - \sum_t \beta_t L_t`.

    A handler, for any model and guide; it goes around a step of training, so that it holds for both
    programs::

        for step in range(10_000):
            with KLWarmup(min(1.0, step / 2_000)):
                svi.step(x_0)

    Args:
        scale: :math:`\beta`, one for all latent sites, or one for each by name (a site that is not named
            keeps its own); a zero leaves its term out.

    Raises:
        ValueError: A scale that is negative or not a number, the name of a site that is not there, or a
            program that is traced once and for all, as a ``Jit…ELBO`` does: the scale would stay in it.
    """

    def __init__(self, scale: float | Mapping[str, float]) -> None:
        super().__init__()
        if isinstance(scale, Mapping):
            self.scale: Any = {site: _check_scale(value, site) for site, value in scale.items()}
        else:
            self.scale = _check_scale(scale, "every latent site")
        self._seen: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if torch._C._get_tracing_state():
            raise ValueError(
                f"site {msg['name']!r}: got a KLWarmup inside a program that is being traced; expected an "
                "ELBO that runs it anew, or this scale would hold for ever. Use Trace_ELBO or "
                "TraceMeanField_ELBO."
            )
        self._seen.add(msg["name"])
        scale = self.scale
        if isinstance(scale, Mapping):
            scale = scale.get(msg["name"], 1.0)
        msg["scale"] = msg["scale"] * scale

    def __exit__(self, *exception: Any) -> Any:
        super().__exit__(*exception)
        unknown = set(self.scale) - self._seen if isinstance(self.scale, Mapping) else set()
        if unknown and exception[0] is None:
            raise ValueError(
                f"argument 'scale': got the site {min(unknown)!r}; expected latent sites of the programs, "
                f"{', '.join(sorted(self._seen)) or 'of which none ran'}. Take names from "
                "model.site_names."
            )


def _check_scale(value: Any, site: str) -> float:
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"argument 'scale': got {value!r} for {site}; expected a number of at least 0. Pass "
            "min(1.0, step / num_steps) for a linear warm-up."
        )
    return number


class FreeBitsELBO(TraceMeanField_ELBO):
    r"""The bound with a floor under the KL of every latent site, for guides in the model's order:

    .. math::
        E \log p(x_0 \mid x_1) - \sum_t \max\Big(\lambda,\;
            \frac1N \sum_{n=1}^N \mathrm{KL}\big(q(x_t \mid \cdot) \,\|\, p(x_t \mid \cdot)\big)\Big),

    the mean being over the batch (and over vectorised particles; of particles drawn in turn each has a
    floor of its own). A level whose KL is below :math:`\lambda` is not pushed further down. A site in a
    plate of its own inside that of the data has :math:`\lambda` for each entry of that plate.

    Args:
        free_nats: :math:`\lambda`, nats for each level and datum.
        arguments: Of ``TraceMeanField_ELBO``.

    Raises:
        ValueError: A negative :math:`\lambda`; from a step, a site without an analytic KL, as those of a
            bottom-up guide are.
    """

    def __init__(self, free_nats: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not isinstance(free_nats, int | float) or not 0 <= free_nats < float("inf"):
            raise ValueError(
                f"argument 'free_nats': got {free_nats!r}; expected a number of at least 0, the nats of KL "
                "that each level has for nothing. Multiply bits by ln 2."
            )
        self.free_nats = free_nats

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        for name, p in model_trace.nodes.items():
            if p["type"] == "sample" and not p["is_observed"] and not site_is_subsample(p):
                shortfall = self._shortfall(name, p["fn"], guide_trace.nodes[name])
                surrogate = surrogate + shortfall
                loss = loss + shortfall.item()
        return loss, surrogate

    def _shortfall(self, name: str, p: Any, q: Any) -> Tensor:
        r""":math:`\max(\lambda, \mathrm{KL}) - \mathrm{KL}`, summed over the batch."""
        try:
            kl = kl_divergence(q["fn"], p)
        except NotImplementedError as error:
            raise ValueError(
                f"site {name!r}: got no formula for the KL of {type(q['fn']).__name__} and "
                f"{type(p).__name__}; expected one, for free bits are a floor under it. Use Gaussian layers, "
                "or KLWarmup."
            ) from error
        floor = torch.full_like(kl, self.free_nats)
        kl, floor = (scale_and_mask(x, scale=q["scale"], mask=q["mask"]) for x in (kl, floor))
        return (floor.sum() - kl.sum()).clamp(min=0)


class MinimumVarianceELBO(TraceMeanField_ELBO):
    r"""The bound for most parameters, and the variance of its estimate for a few:

    .. math::
        \theta \leftarrow \nabla_\theta\, E\, \hat L, \qquad
        \eta \leftarrow -\nabla_\eta\, \tfrac12 \log \frac1N \sum_{n=1}^N \hat L_n^2,

    :math:`\hat L_n` one draw of the bound of a datum. The bound of a long chain does not depend on the
    interior :math:`\eta` of its schedule, so that the mean of the squares falls as the variance does (the
    logarithm is there for optimisers that mind the scale of a gradient). For a continuous pair, and in good
    approximation for a long chain: of a short one the bound itself depends on :math:`\eta`. It is least where
    :math:`-d\lambda/du \propto (E\, \ell^2)^{-1/2}`, :math:`\ell` the bound's rate in the log-SNR. It takes
    one more backward pass a step::

        elbo = MinimumVarianceELBO([schedule.interior])
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), elbo)

    Args:
        parameters: :math:`\eta`, parameters of the programs, such as a
            :class:`~pyro_diffusion.schedules.MonotoneSchedule`'s ``interior``.
        arguments: Of ``TraceMeanField_ELBO``.

    Raises:
        ValueError: No parameters; from a step, sites outside a data plate at dim −1, or a parameter that the
            bound does not depend on, or draws that are not reparameterised.
    """

    def __init__(self, parameters: Iterable[Tensor], **arguments: Any) -> None:
        super().__init__(**arguments)
        # A tensor is an iterable, too, of its rows.
        proper = isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
        self.parameters = list(parameters) if proper else []
        if not self.parameters or not all(
            isinstance(p, Tensor) and p.is_leaf for p in self.parameters
        ):
            raise ValueError(
                f"argument 'parameters': got {parameters!r}; expected a list of parameters of the programs. "
                "Pass [schedule.interior]."
            )

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, minus the bound; gradients of it, and of the squares, are added to the parameters'."""
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
                        "does not depend on; expected parameters of the programs. Pass those of this model's "
                        "schedule."
                    )
                parameter.grad = square if grad is None else grad + square
        return loss


def _check_reparameterised(guide_trace: Any) -> None:
    for name, site in guide_trace.nodes.items():
        latent = (
            site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        )
        if latent and not site["fn"].has_rsample:
            raise ValueError(
                f"site {name!r}: got draws of a {type(site['fn']).__name__}, which are not reparameterised; "
                "expected draws that have a gradient, of which that of the variance is made. Use a schedule "
                "that is fixed."
            )


def bound_by_datum(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, **given: Any
) -> Tensor:
    r"""One draw of the bound of every datum, :math:`\hat L_n`: what ``TraceMeanField_ELBO`` adds up.

    For any pair, a subsampled one included, with analytic KLs where there is a formula.

    Args:
        model: Program for :math:`p`, called as ``model(x_0)``.
        guide: Program for :math:`q`, called as ``guide(x_0)``, in the model's order.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        given: Other arguments of both programs.

    Returns:
        Shape ``(N,)``, nats; a mean over data has the spread of these over :math:`\sqrt N` as its error.

    Raises:
        ValueError: A site outside of a data plate at dim −1.
    """
    drawn = poutine.trace(guide).get_trace(x_0, **given)
    scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x_0, **given)
    return _bound_of_data(scored, drawn)


def _bound_of_data(model_trace: Any, guide_trace: Any) -> Tensor:
    """One draw of the bound for each datum, ``(N,)``."""
    total: Tensor = torch.zeros(())
    for name, p in model_trace.nodes.items():
        if p["type"] != "sample" or site_is_subsample(p):
            continue
        if p["is_observed"]:
            term = scale_and_mask(p["fn"].log_prob(p["value"]), p["scale"], p["mask"])
        else:
            q = guide_trace.nodes[name]
            try:
                kl = kl_divergence(q["fn"], p["fn"])
            except NotImplementedError:  # no formula
                kl = q["fn"].log_prob(q["value"]) - p["fn"].log_prob(q["value"])
            term = -scale_and_mask(kl, q["scale"], q["mask"])
        if not any(plate.vectorized and plate.dim == -1 for plate in p["cond_indep_stack"]):
            raise ValueError(
                f"site {name!r}: got a site outside of every plate; expected all sites in the data "
                "plate, because the variance is that of a datum's bound. Put it into the plate."
            )
        term = term.expand(torch.broadcast_shapes(term.shape, p["fn"].batch_shape))
        total = total + term.reshape(-1, term.shape[-1]).sum(0)
    return total
