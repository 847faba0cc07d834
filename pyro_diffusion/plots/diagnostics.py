r"""ArviZ's plots of Pareto :math:`\hat k`, of a comparison of models, and of a PIT."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_diffusion import arviz_bridge
from pyro_diffusion.checks import require
from pyro_diffusion.evidence import Evidence
from pyro_diffusion.style import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_khat(evidence: Evidence, ax: "Axes | None" = None) -> Any:
    r"""Pareto :math:`\hat k` of every datum, by ArviZ, except where constant weights make it exact.

    Args:
        evidence: An estimate from importance weights.
        ax: Axes to draw into, before ArviZ 1.0.

    Returns:
        What ArviZ returns, which is the axes and from 1.0 on a ``PlotCollection``.

    Raises:
        ValueError: No datum with weights that vary.
    """
    return arviz_bridge.plot_khat(evidence.pareto_k.cpu().numpy(), evidence.num_particles, ax)


@styled
def plot_compare(table: Any, ax: "Axes | None" = None) -> Any:
    """The table of :func:`~pyro_diffusion.diagnostics.comparison.compare`, by ArviZ.

    Args:
        table: What ``compare`` returned.
        ax: Axes to draw into, before ArviZ 1.0.

    Returns:
        What ArviZ returns, which is the axes and from 1.0 on a ``PlotCollection``.
    """
    return arviz_bridge.plot_compare(table, ax)


@styled
def plot_pit(pit: Tensor, ax: "Axes | None" = None, *, envelope: float = 0.99) -> Any:
    """Distribution function of a PIT minus that of uniform numbers, with ArviZ's band or test.

    Args:
        pit: Values in [0, 1], shape ``(N,)``.
        ax: Axes to draw into, before ArviZ 1.0.
        envelope: Probability that uniform values stay inside the band everywhere.

    Returns:
        What ArviZ returns, which is the axes and from 1.0 on a ``PlotCollection``.

    Raises:
        ValueError: More than one value for a datum, because the band is for independent values.
    """
    require(
        pit.dim() == 1, "argument 'pit'", f"shape {tuple(pit.shape)}", "one value for each datum, (N,)",
        "Draw each coordinate by itself, as in plot_pit(pit[:, 0]).",
    )  # fmt: skip
    return arviz_bridge.plot_pit(pit.cpu().numpy(), ax, envelope)
