"""Checks of a Pyro model and guide and of their sites, for a bound that is reported by datum."""

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample

from pyro_diffusion.chains import SubsampledProgram
from pyro_diffusion.checks import require
from pyro_diffusion.params import ParamScope


def latents_differ(how: str) -> ValueError:
    """The error for programs that do not have the same latent sites."""
    return ValueError(
        f"latent sites: got programs that differ, {how}; expected the same latent sites in model and guide. "
        "Rename the sites; a site that holds data must be observed in both programs."
    )


def check_programs(model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    """Raise a ``ValueError`` unless both are programs that contain every site of the chain."""
    if isinstance(model, SubsampledProgram) or isinstance(guide, SubsampledProgram):
        raise _subsampled()
    check_program("model", model)
    check_program("guide", guide)


def check_program(argument: str, program: Any) -> None:
    """Raise a ``ValueError`` unless a model or a guide is a program."""
    require(
        not isinstance(program, ParamScope) and callable(program),
        f"argument {argument!r}",
        f"a {type(program).__name__}",
        "one of its programs",
        "Pass its .model, and its .posterior_guide (or .guide), or the family itself, and the data.",
    )


def _subsampled() -> ValueError:
    return ValueError(
        "arguments 'model' and 'guide': got a subsampled pair, which draws a few random sites of the chain; "
        "expected programs with every site. Pass diffusion.model and diffusion.posterior_guide, which have "
        "the same bound."
    )


def is_latent(site: Any) -> bool:
    """Whether a site, or a message of one, is a draw of a latent."""
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def is_of_latent(site: Any) -> bool:
    """Whether a site has a term of a latent: it is one, or it observes the draw of one."""
    return is_latent(site) or (bool(site["infer"].get("of_latent")) and not site_is_subsample(site))


def check_data_plate(msg: Any, rows: int) -> None:
    """Raise a ``ValueError`` unless a site is in a plate of the batch's size at dim −1."""
    plates = [f for f in msg["cond_indep_stack"] if f.vectorized and f.dim == -1]
    if not plates or plates[0].size != rows:
        raise ValueError(
            f"site {msg['name']!r}: got a site "
            + (f"in a plate of size {plates[0].size}" if plates else "outside of every plate")
            + f"; expected all sites in a plate of the batch's size ({rows}) at dim -1, because terms "
            "are reported by datum. Put local variables into the data plate; a model with global "
            "latents has no bound for a single datum."
        )
    if isinstance(msg["scale"], torch.Tensor) and msg["scale"].dim() > 0:
        raise _subsampled()


def check_same_masks(name: str, ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    """Raise a ``ValueError`` if a site has different masks, of data or of entries, in the two programs."""
    if not all(map(_alike, ours, theirs)):
        raise ValueError(
            f"site {name!r}: got different masks in the guide and in the model; expected the "
            "same in both, so that a term has one set of entries. Use the same mask in both programs."
        )


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two masks leave out the same entries; ``None`` leaves out nothing."""
    if ours is theirs:
        return True
    device = next((m.device for m in (ours, theirs) if isinstance(m, torch.Tensor)), None)
    masks = (torch.as_tensor(True if m is None else m, device=device) for m in (ours, theirs))
    return torch.equal(*torch.broadcast_tensors(*masks))


def check_sites(left: Mapping[str, Any], latents: Sized, observed: Sized) -> None:
    """Raise a ``ValueError`` if only the guide has a latent, or the model has no latent or no data."""
    if left:
        raise latents_differ(f"the guide alone samples {', '.join(map(repr, left))}")
    require(
        len(observed) > 0 and len(latents) > 0,
        "argument 'model'",
        f"a program with {len(latents)} latent and {len(observed)} observed sites",
        "at least one of each",
        "Pass the data to obs= at the site where they are observed.",
    )
