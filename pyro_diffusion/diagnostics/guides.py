"""Draws of an automatic guide with global latents, in ArviZ's schema."""

from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide

from pyro_diffusion import arviz_bridge
from pyro_diffusion.checks import require
from pyro_diffusion.diagnostics.recording import DRAWS, dataset, importance_fields
from pyro_diffusion.evidence.evidence import average, systematic
from pyro_diffusion.evidence.particles import global_draws


def of_guide(
    guide: AutoGuide, args: list[Any], kwargs: dict[str, Any], num_draws: int, *, progress: bool
) -> Any:
    """Draws, weights, and draws resampled by weight; see :func:`~pyro_diffusion.diagnostics.to_arviz`.

    Args:
        guide: The guide, which has run and holds its model.
        args: Arguments of the model.
        kwargs: Arguments of the model by name, and ``max_plate_nesting``.
        num_draws: Number of draws.
        progress: Show a progress bar if it takes more than five seconds.
    """
    require(
        guide._model is not None,
        "argument 'guide'",
        "a guide that was copied or unpickled, which holds no model",
        "one that can score its draws",
        "Build it from the model, and load its state_dict.",
    )
    nesting = kwargs.pop("max_plate_nesting", None)
    drawn = global_draws(
        guide.model, guide, num_draws, nesting, tuple(args), kwargs, progress=progress
    )
    log_weights, dims = drawn.log_weights, DRAWS[:2]
    fields = importance_fields(average(log_weights[:, None]))
    rows = systematic(torch.softmax(log_weights, 0)[:, None])[:, 0]
    stats = {"lp": drawn.log_p, "log_q": drawn.log_q, "log_weight": log_weights}
    return arviz_bridge.as_arviz(
        {
            "posterior": dataset(dims, drawn.values),
            "resampled": dataset(dims, {name: x[rows] for name, x in drawn.values.items()}),
            "sample_stats": dataset(dims, stats),
            "importance": dataset((), {name: x[0] for name, x in fields.items()}).assign_attrs(
                units="nats", estimator="importance weights", num_particles=num_draws
            ),
        }
    )
