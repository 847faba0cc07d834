"""Curves over timesteps and over training: the noise schedule, and the terms of the bound by step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_diffusion.checks import require
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.style import (
    BLUE,
    ORANGE,
    RED,
    ink,
    legend_beside,
    new_axes,
    row_of,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_schedule(schedule: NoiseSchedule, axes: Any = None) -> Any:
    r"""Log-SNR and :math:`\bar\alpha_t` by timestep.

    Args:
        schedule: The schedule.
        axes: Two axes, for the log-SNR and for :math:`\bar\alpha_t`.

    Returns:
        The two axes.
    """
    axes = row_of(axes, 2, grid=True)
    t = torch.arange(1, schedule.num_timesteps + 1, device=schedule.device)
    style = "." if schedule.num_timesteps < 50 else "-"
    for ax, curve in zip(axes, (schedule.log_snr(t), schedule.alpha_bar(t)), strict=True):
        values = curve.detach().cpu().flatten(1) if curve.dim() > 1 else curve.detach().cpu()
        ax.plot(t.cpu().numpy(), values.numpy(), style, color=BLUE)
        ax.set_xlabel(f"timestep $t$, of {schedule.num_timesteps:,}")
    axes[0].set_ylabel(r"log-SNR $\lambda_t$, natural logarithm")
    axes[1].set(ylabel=r"$\bar\alpha_t$, signal's share of the variance", ylim=(-0.02, 1.02))
    return axes


@styled
def plot_training(
    history: Mapping[int, Sequence[float] | Tensor],
    ax: "Axes | None" = None,
    *,
    num_blocks: int = 5,
) -> "Axes":
    r"""The terms of :math:`-\mathrm{ELBO}` over training: prior, blocks of timesteps, reconstruction.

    Args:
        history: For each step the terms by timestep, shape ``(T + 1,)``, in nats per datum; row 0 is the
            reconstruction. It is the ``history`` of a :class:`~pyro_diffusion.training.SVIModule`, or your
            own from ``[float(term) for term in terms.term_means()]``.
        ax: Axes to draw into.
        num_blocks: Number of blocks into which the timesteps :math:`1 … T-1` are divided.

    Returns:
        The axes, step against nats per datum. Terms are stacked. A reconstruction loss that is negative
        somewhere (data with a density) is drawn as a line instead.

    Raises:
        ValueError: Fewer than two steps, or terms of different lengths.
    """
    steps = sorted(history)
    lengths = {len(history[step]) for step in steps}
    require(
        len(steps) >= 2 and len(lengths) == 1 and min(lengths) >= 2,
        "argument 'history'",
        f"{len(steps)} steps with terms of lengths {sorted(lengths)}",
        "two steps or more with T + 1 terms each",
        "Read the bound at least twice during training.",
    )
    ax = new_axes(size=(6.8, 3.8))[0, 0] if ax is None else ax
    terms = np.array([[float(value) for value in history[step]] for step in steps]).T
    loss = -terms[0]
    layers = _layers(terms, num_blocks)
    blues = [_blend(k / max(len(layers) - 2, 1)) for k in range(len(layers) - 1)]
    colors: list[Any] = [RED, *blues]
    if (loss >= 0).all():
        layers["reconstruction, $-\\log p(x_0|x_1)$"] = loss
        colors.append(ORANGE)
    else:
        ax.plot(steps, loss, ":", color=ORANGE, lw=1.5, label="$-\\log p(x_0|x_1)$")
    ax.stackplot(steps, *layers.values(), labels=list(layers), colors=colors, lw=0)
    ax.plot(steps, terms[1:].sum(0) + loss, "-", color=ink(ax), lw=1, label="$-$ELBO")
    ax.set(xlabel="training step", ylabel="nats per datum", xlim=(steps[0], steps[-1]))
    legend_beside(ax, reverse=True)
    return ax


def _layers(terms: np.ndarray, num_blocks: int) -> dict[str, np.ndarray]:
    """The prior term, and the sums over blocks of timesteps from noise to data."""
    last = len(terms) - 1
    layers = {f"prior, $x_{{{last}}}$": terms[last]}
    for block in reversed(np.array_split(np.arange(1, last), num_blocks)):
        if len(block):
            name = f"$x_{{{block[0]}}}$" + (f" … $x_{{{block[-1]}}}$" if len(block) > 1 else "")
            layers[name] = terms[block].sum(0)
    return layers


def _blend(share: float) -> tuple[float, ...]:
    """Blue at 0, nearly white at 1: neighbouring blocks differ in lightness."""
    from matplotlib.colors import to_rgb

    return tuple(value + 0.75 * share * (1 - value) for value in to_rgb(BLUE))
