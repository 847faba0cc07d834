r"""Pictures: the bound by timestep, the schedule, samples beside data.

Each function takes matplotlib axes, draws into them and returns them; ``None`` makes new ones.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_diffusion.bounds import ELBOTerms
from pyro_diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_bound", "plot_samples", "plot_schedule"]


def plot_bound(terms: ELBOTerms, ax: "Axes | None" = None, **errorbar: Any) -> "Axes":
    r"""Mean :math:`L_t` over data by timestep, with both errors, and the two ends of the chain.

    Args:
        terms: The bound; its transition terms make the curve, prior and reconstruction the legend.
        ax: Axes to draw into.
        errorbar: Passed on to ``Axes.errorbar``.

    Returns:
        The axes: timestep against nats per datum. Bars are one Monte Carlo error, the band is one
        sampling error.
    """
    ax = _axes(ax)
    reconstruction, *transition, prior = terms.term_means()
    t = np.arange(1, len(transition) + 1)
    value, monte_carlo, sampling = np.array(transition).reshape(-1, 3).T
    label = "KL at $x_t$" if terms.is_kl else "log-ratio at $x_t$"
    style: dict[str, Any] = {"fmt": ".-", "ms": 3, "lw": 0.8} | errorbar
    bars = ax.errorbar(t, value, np.nan_to_num(monte_carlo), **style)
    bars.set_label(f"{label}, sum {value.sum():.3g}; bars: Monte Carlo error")
    band = ax.fill_between(t, value - sampling, value + sampling, alpha=0.25, lw=0)
    band.set_label("sampling error of the mean")
    ax.plot([], [], " ", label=f"reconstruction $E\\,\\log p(x_0|x_1)$: {reconstruction.value:.3g}")
    ax.plot([], [], " ", label=f"prior term at $x_T$: {prior.value:.3g}")
    if terms.is_kl and len(value) and bool((value > 0).all()):
        ax.set_yscale("log")
    ax.set(xlabel="timestep $t$", ylabel="nats per datum")
    ax.set_title(f"bound {terms.mean()} nats per datum", fontsize="medium")
    ax.legend(fontsize="small")
    return ax


def plot_schedule(schedule: NoiseSchedule, axes: Any = None) -> Any:
    r"""Log-SNR and :math:`\bar\alpha_t` by timestep.

    Args:
        schedule: The schedule.
        axes: Two axes, for the log-SNR and for :math:`\bar\alpha_t`.

    Returns:
        The two axes.
    """
    axes = _axes(axes, 1, 2)
    t = np.arange(1, schedule.num_timesteps + 1)
    with torch.no_grad():
        timesteps = torch.as_tensor(t, device=schedule.device)
        log_snr = schedule.log_snr(timesteps).cpu().numpy()
        alpha_bar = schedule.alpha_bar(timesteps).cpu().numpy()
    style = "." if schedule.num_timesteps < 50 else "-"
    axes[0].plot(t, log_snr, style)
    axes[0].set(xlabel="timestep $t$", ylabel=r"log-SNR $\lambda_t$")
    axes[1].plot(t, alpha_bar, style)
    axes[1].set(xlabel="timestep $t$", ylabel=r"$\bar\alpha_t$", ylim=(-0.02, 1.02))
    return axes


def plot_samples(samples: Tensor, data: Tensor | None = None, axes: Any = None) -> Any:
    """A grid of sampled images, beside a grid of data if there are any.

    Args:
        samples: Grey images, shape ``(n, height, width)``.
        data: Grey images of the same size, shape ``(m, height, width)``; the first ``n`` are shown.
        axes: One axes, or two with data.

    Returns:
        The axes, as an array of one or two.

    Raises:
        ValueError: Images that are not of shape ``(n, height, width)``.
    """
    grids = {"samples": samples} | ({} if data is None else {"data": data[: len(samples)]})
    for name, images in grids.items():
        if images.dim() != 3 or len(images) == 0:
            raise ValueError(
                f"argument {name!r}: got shape {tuple(images.shape)}; expected (n, height, width) "
                "with n ≥ 1. Reshape vectors, e.g. x.reshape(-1, 8, 8)."
            )
    axes = _axes(axes, 1, len(grids))
    low, high = (float(bound) for bound in torch.cat(list(grids.values())).aminmax())
    for ax, (name, images) in zip(axes, grids.items(), strict=True):
        ax.imshow(_tile(images.cpu(), low).numpy(), cmap="gray_r", vmin=low, vmax=high)
        ax.set_title(name)
        ax.set_axis_off()
    return axes


def _tile(images: Tensor, background: float) -> Tensor:
    """Images side by side in an almost square sheet, a pixel of background between them."""
    n, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    padded = images.new_full((rows * columns, height + 1, width + 1), background)
    padded[:n, :height, :width] = images
    sheet = padded.reshape(rows, columns, height + 1, width + 1).transpose(1, 2)
    return sheet.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]


def _axes(axes: Any, rows: int = 1, columns: int = 0) -> Any:
    """The given axes, or new ones: a single axes for no columns, else an array of them."""
    if axes is None:
        import matplotlib.pyplot as plt

        size = (4.8 * max(columns, 1), 3.6 * rows)
        _, axes = plt.subplots(
            rows, max(columns, 1), figsize=size, squeeze=columns == 0, layout="constrained"
        )
        axes = axes if columns == 0 else axes[0]
    return axes if columns == 0 or hasattr(axes, "__len__") else [axes]
