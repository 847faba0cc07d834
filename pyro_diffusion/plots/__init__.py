"""Pictures: the bound by timestep and over training, the schedule, samples, states by noise level.

Each function draws into the matplotlib axes that it is given and returns them. ``None`` makes a new figure in
the style of the package: the colours of Okabe and Ito, which colour-blind readers can tell apart, on white.
A white figure is legible in print and on a dark page. Axes that are given keep their own style. No global
setting of matplotlib is changed.

References:
    Color Universal Design (Okabe and Ito, 2008). https://jfly.uni-koeln.de/color/
"""

from pyro_diffusion.plots.bound import plot_bound
from pyro_diffusion.plots.curves import plot_schedule, plot_training
from pyro_diffusion.plots.diagnostics import plot_compare, plot_khat, plot_pit
from pyro_diffusion.plots.states import plot_denoised, plot_samples, plot_trajectory

__all__ = [
    "plot_bound",
    "plot_compare",
    "plot_denoised",
    "plot_khat",
    "plot_pit",
    "plot_samples",
    "plot_schedule",
    "plot_training",
    "plot_trajectory",
]
