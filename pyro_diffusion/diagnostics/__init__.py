"""Diagnostics of a fitted model and its guide.

- ``draws``: :func:`~pyro_diffusion.diagnostics.draws.to_arviz` draws trajectories and returns them as
  labelled arrays for ArviZ.
- ``comparison``: :func:`~pyro_diffusion.diagnostics.comparison.compare` ranks models by their scores of
  the same held-out data.
- ``calibration``: :func:`~pyro_diffusion.diagnostics.calibration.simulation_based_calibration` tests
  whether the guide is the posterior,
  :func:`~pyro_diffusion.diagnostics.calibration.randomized_pit` ranks observations among draws of a model,
  or parameters among draws of a posterior,
  and :func:`~pyro_diffusion.diagnostics.calibration.active_units` finds the latent numbers that depend on
  the datum.
- ``coverage``: :func:`~pyro_diffusion.diagnostics.coverage.expected_coverage` tests the draws of a posterior,
  all coordinates together.
- ``recording`` is used by all of these: it reads the values of sample sites, as tensors and as ``xarray``
  datasets.
"""

from pyro_diffusion.diagnostics.calibration import (
    active_units,
    randomized_pit,
    simulation_based_calibration,
)
from pyro_diffusion.diagnostics.comparison import compare
from pyro_diffusion.diagnostics.coverage import expected_coverage
from pyro_diffusion.diagnostics.draws import to_arviz

__all__ = [
    "active_units",
    "compare",
    "expected_coverage",
    "randomized_pit",
    "simulation_based_calibration",
    "to_arviz",
]
