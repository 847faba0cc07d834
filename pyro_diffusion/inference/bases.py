"""What a guide needs of a model, and of its base: another guide, which maps a standard normal to latents."""

import copy
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.nn import PyroModule
from torch.distributions import Transform

from pyro_diffusion.bounds.checks import is_latent
from pyro_diffusion.checks import require


def own_base(base: Any, model: Any, init_loc_fn: Any) -> AutoContinuous:
    """A base of the guide's own: built from the model, or a copy of one that is there."""
    settings = {} if init_loc_fn is None else {"init_loc_fn": init_loc_fn}
    made = (
        base if isinstance(base, AutoGuide) else base(model, **settings) if callable(base) else base
    )
    known = isinstance(made, AutoContinuous) and all(
        getattr(type(made), name) is not getattr(AutoContinuous, name)
        for name in ("get_base_dist", "get_transform")
    )
    require(
        known,
        "argument 'base'",
        f"a {type(made).__name__}",
        "a guide that maps a standard normal to its latents",
        "Pass AutoDiagonalNormal, AutoMultivariateNormal or AutoIAFNormal, or one that is fitted.",
    )
    require(
        made is not base or init_loc_fn is None,
        "argument 'init_loc_fn'",
        "one beside a base that is built already",
        "one for a class",
        "Leave it out: the base begins where it is.",
    )
    if made is not base:
        return made
    kept, master = base._model, base.master  # which copying would take away
    uncached(base)
    own = copy.deepcopy(base)
    base._model, base.master, own._model = kept, master, kept
    rename(own, own._pyro_name)
    return own


def beginning(base: AutoContinuous, model: Any) -> tuple[Any]:
    """The model with the initial values of its base; the bare model may be one that cannot be drawn from."""
    if base.prototype_trace is None:
        own: tuple[Any] = base._model
        return own
    sites = base.prototype_trace.iter_stochastic_nodes()
    values = {name: site["value"].detach() for name, site in sites}
    return (InitMessenger(partial(init_to_value, values=values))(model),)


def rename(guide: AutoContinuous, name: str) -> None:
    """Give a copied guide a name, and the state of one that has not run."""
    for module in guide.modules():
        if isinstance(module, PyroModule):
            module.__dict__["_pyro_context"] = PyroModule()._pyro_context
    guide._pyro_set_supermodule(name, guide._pyro_context)


def uncached(guide: AutoContinuous) -> None:
    """Empty the caches of the transforms of a guide: their tensors have a history, which cannot be copied."""
    for module in guide.modules():
        if isinstance(module, Transform):
            module._cached_x_y = None, None
            if hasattr(module, "_cached_log_scale"):
                module._cached_log_scale = None


def checked_nesting(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Number of dimensions of the model's plates, if it has latents, all continuous and global."""
    with poutine.block(), poutine.trace() as tracer, torch.no_grad():
        model(*args, **kwargs)
    sites = {name: x for name, x in tracer.trace.nodes.items() if x["type"] == "sample"}
    latents = {name: site for name, site in sites.items() if is_latent(site)}
    require(
        len(latents) > 0,
        "argument 'model'",
        "a model without latents",
        "latents for a guide to draw",
        "A model whose sites are all observed needs no guide.",
    )
    for name, site in latents.items():
        require(
            not site["fn"].support.is_discrete,
            f"site {name!r}",
            "a discrete latent",
            "continuous ones, which a chain of Gaussian steps ends in",
            f"Sum it out: AutoDiffusion(poutine.block(config_enumerate(model), hide=[{name!r}]), "
            "score=False) with TraceEnum_ELBO.",
        )
        for frame in site["cond_indep_stack"]:
            part = frame.full_size is not None and frame.size < frame.full_size
            require(
                frame.vectorized and not part,
                f"site {name!r}",
                f"a latent in the {'subsampled' if part else 'sequential'} plate {frame.name!r}",
                "latents that all data share, or a plate of all of them",
                "Use AutoNormal for it in an AutoGuideList, or leave out subsample_size."
                if part
                else "Use a vectorised plate: with pyro.plate(…).",
            )
    frames = (x for site in sites.values() for x in site["cond_indep_stack"] if x.vectorized)
    return max((-frame.dim for frame in frames), default=0)
