"""Draws of a guide with global latents, and their densities under guide and model."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.bounds.checks import is_latent
from pyro_diffusion.checks import check_count, check_finite, require
from pyro_diffusion.reading import forked, reading
from pyro_diffusion.scoring import log_density, replayed

_CHUNK = 100  # particles at a time, where a plate holds them
_PARTICLES = "_pyro_diffusion_draws"  # the plate


class GlobalDraws(NamedTuple):
    """Draws of a guide of global latents, with their densities."""

    values: dict[str, Tensor]  #: by site, ``(K,)`` + the site's shape
    log_p: Tensor  #: :math:`\log p(y, z_k)`, float64, ``(K,)``
    log_q: Tensor  #: :math:`\log q(z_k)`, with auxiliary sites and factors of the guide

    @property
    def log_weights(self) -> Tensor:
        r""":math:`\log w_k`, if all are finite."""
        remedy = "Check its parameters for NaN."
        what = "argument 'guide', log p − log q of its draws"
        return check_finite(what, self.log_p - self.log_q, remedy)


def global_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    count: int,
    nesting: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    progress: bool,
) -> GlobalDraws:
    """Draws of a guide, scored by guide and model; for the arguments see :func:`global_evidence`."""
    parts: list[Any] = []
    _check_nesting(nesting)
    with (
        reading(model, guide, data=(args, kwargs)),
        tqdm(
            total=count, desc="draws", unit="draw", delay=5, disable=not progress, leave=False
        ) as bar,
    ):
        for number in _numbers(count, nesting):
            p, q = (partial(_plated, program, number, nesting) for program in (model, guide))
            drawn, scored = replayed(p, q, args, kwargs)
            if not parts:
                check_random(drawn, scored, q, args, kwargs)
            densities = (log_joint(trace, number, nesting) for trace in (scored, drawn))
            parts.append((_values(drawn, nesting), *densities))
            bar.update(number)
    values, log_p, log_q = zip(*parts, strict=True)
    return GlobalDraws(_joined(values), torch.cat(log_p), torch.cat(log_q))


def guide_draws(
    guide: Callable[..., Any],
    count: int,
    nesting: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inside: tuple[Callable[..., Any], ...] = (),
) -> dict[str, Tensor]:
    """Draws of a guide's latents by site, ``(K,)`` + the site's shape.

    ``inside`` are programs that the guide runs; modules among them are in evaluation mode too.
    """
    parts = []
    _check_nesting(nesting)
    with reading(guide, *inside, data=(args, kwargs)):
        for number in _numbers(count, nesting):
            with poutine.block(), poutine.trace() as tracer:
                _plated(guide, number, nesting, args, kwargs)
            parts.append(_values(tracer.trace, nesting))
    return _joined(parts)


def _numbers(count: int, nesting: int | None) -> list[int]:
    """How many draws are made at a time."""
    size = 1 if nesting is None else _CHUNK
    return [min(size, count - start) for start in range(0, count, size)]


def _joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Chunks of draws as one."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _values(trace: poutine.Trace, nesting: int | None) -> dict[str, Tensor]:
    """Values of a guide's latents without auxiliary ones, with the axis of the draws in front."""
    values = {}
    for name, site in _latents(trace).items():
        value = site["value"]
        if nesting is None:
            values[name] = value[None]
            continue
        # Plates of the site itself: those of the draws, and others that it is not in, have no axis.
        frames = [x for x in site["cond_indep_stack"] if x.vectorized and x.name != _PARTICLES]
        kept = site["fn"].event_dim + max((-x.dim for x in frames), default=0)
        value = value.movedim(-1 - nesting - site["fn"].event_dim, 0)
        values[name] = value.reshape(len(value), *value.shape[value.dim() - kept :])
    return values


def _plated(
    program: Callable[..., Any],
    count: int,
    nesting: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run a program in the plate of the draws, if there is one."""
    plate = pyro.plate(_PARTICLES, count, dim=-1 - (nesting or 0))
    with nullcontext() if nesting is None else plate:
        program(*args, **kwargs)


def log_joint(trace: poutine.Trace, count: int, nesting: int | None) -> Tensor:
    """Log-density of all sites of a trace together, for each draw, float64, ``(count,)``.

    Args:
        trace: Trace of a run in the plate of the draws, the leftmost one.
        count: Number of draws.
        nesting: Number of dimensions that the other plates take; ``None`` for a run of one draw.
    """
    total = torch.zeros(count, dtype=torch.float64)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        _check_plates(name, site, nesting)
        values = scale_and_mask(log_density(site["fn"], site["value"]), mask=site["mask"])
        if nesting is None:
            total = total + values.sum().to(total.device)
        else:
            kept = values.dim() > nesting and values.shape[-1 - nesting] == count
            _check_shape(name, site, values, nesting)
            by_draw = (
                values.movedim(-1 - nesting, 0).reshape(count, -1).sum(1) if kept else values.sum()
            )
            total = total + by_draw.to(total.device)
    return total


def _check_shape(name: str, site: Any, values: Tensor, nesting: int) -> None:
    """Raise a ``ValueError`` for a log-density that may have the draws in another dimension."""
    sizes = {x.dim: x.size for x in site["cond_indep_stack"] if x.vectorized}
    right = values.shape[max(values.dim() - nesting, 0) :]
    wrong = [d for d, size in enumerate(reversed(right), 1) if size not in (1, sizes.get(-d))]
    require(
        not wrong,
        f"site {name!r}",
        f"a log-density of shape {tuple(values.shape)}",
        f"draws in the dimension {-1 - nesting}, to the left of the model's plates",
        "Sum over event dimensions and keep those of plates, or leave out max_plate_nesting.",
    )


def _check_plates(name: str, site: Any, nesting: int | None) -> None:
    """Raise a ``ValueError`` for a part of the data, or for a plate to the left of that of the draws."""
    require(
        bool(torch.as_tensor(site["scale"] == 1).all()),
        f"site {name!r}",
        "a scale, from a plate of a part of the data or from a handler",
        "all of the data, and no scale, because weights are ratios of whole densities",
        "Leave out subsample_size, and pass all data.",
    )
    deepest = max((-x.dim for x in site["cond_indep_stack"] if x.vectorized), default=0)
    require(
        nesting is None or deepest <= nesting + 1,
        "argument 'max_plate_nesting'",
        f"{nesting} for site {name!r}, which is in a plate at dim {-deepest}",
        "plates to the right of that of the draws",
        f"Pass max_plate_nesting={deepest - 1}, or leave it out to run draws one by one.",
    )


def _latents(trace: poutine.Trace) -> dict[str, Any]:
    """Latent sites of a program by name, without auxiliary ones."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if is_latent(site) and not site["infer"].get("is_auxiliary")
    }


def _check_latents(drawn: poutine.Trace, scored: poutine.Trace) -> None:
    """Raise a ``ValueError`` unless model and guide have the same latents, apart from auxiliary ones."""
    ours, theirs = set(_latents(drawn)), set(_latents(scored))
    require(
        ours == theirs,
        "arguments 'model' and 'guide'",
        f"latent sites that one of them alone has, {', '.join(map(repr, sorted(ours ^ theirs)))}",
        "the same latents in both",
        'Rename the sites, or mark auxiliary ones of the guide with infer={"is_auxiliary": True}.',
    )


def check_random(
    drawn: poutine.Trace,
    scored: poutine.Trace,
    guide: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Raise a ``ValueError`` unless the programs have the same latents, and those of the guide are random.

    Args:
        drawn: A trace of the guide.
        scored: A trace of the model with its draws.
        guide: The guide, which runs once more if a latent is a point.
        args: Its arguments.
        kwargs: Its arguments by name.
    """
    _check_latents(drawn, scored)
    points = {
        name: site["value"]
        for name, site in _latents(drawn).items()
        if _is_point(site["fn"]) and not _is_point(scored.nodes[name]["fn"])
    }
    if not points:
        return
    with forked(), torch.no_grad(), poutine.block(), poutine.trace() as again:
        guide(*args, **kwargs)
    for name, value in points.items():
        require(
            not torch.equal(value, again.trace.nodes[name]["value"]),
            f"site {name!r} of argument 'guide'",
            "a point, of which every weight is log p(y, z)",
            "a law with a density",
            "Use AutoNormal, or AutoLaplaceApproximation(model).laplace_approximation(*args).",
        )


def _check_nesting(nesting: Any) -> None:
    """Raise a ``ValueError`` unless it is a number of dimensions, or ``None``."""
    if nesting is not None:
        remedy = (
            "It is the number of dimensions of plates, 0 without any; None runs draws one by one."
        )
        check_count("max_plate_nesting", nesting, 0, remedy)


def _is_point(distribution: Any) -> bool:
    """Whether a distribution is a point mass."""
    while not isinstance(distribution, Delta) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, Delta)
