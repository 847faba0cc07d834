"""Programs and their sites, looked at: what a bound by datum needs of a Pyro model and guide."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from pyro_diffusion.chains import SubsampledProgram
from pyro_diffusion.checks import require
from pyro_diffusion.params import ParamScope


def latents_differ(how: str) -> ValueError:
    """The error of programs whose latent sites are not the same."""
    return ValueError(
        f"latent sites: got programs that differ, {how}; expected the same latent sites in model and guide. "
        "Rename the sites, or observe in both what is data."
    )


def check_programs(model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    """Raise a ``ValueError`` if one is no program with every site."""
    if isinstance(model, SubsampledProgram) or isinstance(guide, SubsampledProgram):
        raise _subsampled()
    check_program("model", model)
    check_program("guide", guide)


def check_program(argument: str, program: Any) -> None:
    """Raise a ``ValueError`` if a model or a guide is no program."""
    require(
        not isinstance(program, ParamScope) and callable(program),
        f"argument {argument!r}",
        f"a {type(program).__name__}",
        "one of its programs",
        "Pass its .model, and its .posterior_guide (or .guide), or the family itself, and the data.",
    )


def _subsampled() -> ValueError:
    return ValueError(
        "arguments 'model' and 'guide': got a subsampled pair, whose sites are a random few of the chain's; "
        "expected programs with every site. Pass diffusion.model and diffusion.posterior_guide; they have "
        "the same bound."
    )


def check_data_plate(msg: Any, rows: int) -> None:
    """Raise a ``ValueError`` if a site is not in a plate of the batch's size at dim −1."""
    plates = [f for f in msg["cond_indep_stack"] if f.vectorized and f.dim == -1]
    if not plates or plates[0].size != rows:
        raise ValueError(
            f"site {msg['name']!r}: got a site "
            + (f"in a plate of size {plates[0].size}" if plates else "outside of every plate")
            + f"; expected all sites in a plate of the batch's size ({rows}) at dim -1, because terms "
            "are reported by datum. Put local variables into the data plate; a model with global "
            "latents has no bound for a single datum."
        )
    if isinstance(msg["scale"], torch.Tensor) and msg["scale"].numel() > 1:
        raise _subsampled()


def check_same_masks(name: str, ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    """Raise a ``ValueError`` if a site's masks, of the batch and of entries, differ between programs."""
    if not all(map(_alike, ours, theirs)):
        raise ValueError(
            f"site {name!r}: got another mask in the guide than in the model; expected the "
            "same in both, so that a term has one set of entries. Mask both programs alike."
        )


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two masks leave out the same; ``None`` leaves out nothing."""
    if ours is theirs:
        return True
    device = next((m.device for m in (ours, theirs) if isinstance(m, torch.Tensor)), None)
    masks = (torch.as_tensor(True if m is None else m, device=device) for m in (ours, theirs))
    return torch.equal(*torch.broadcast_tensors(*masks))


def check_sites(
    left: Mapping[str, Any], latents: Mapping[str, Any], observed: Mapping[str, Any]
) -> None:
    """Raise a ``ValueError`` if the guide has latents that the model has not, or the model none at all."""
    if left:
        raise latents_differ(f"the guide alone samples {', '.join(map(repr, left))}")
    require(
        len(observed) > 0 and len(latents) > 0,
        "argument 'model'",
        f"a program with {len(latents)} latent and {len(observed)} observed sites",
        "at least one of each",
        "Pass the data to obs= of the site that they are observed at.",
    )
