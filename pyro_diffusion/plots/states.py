r"""Samples and states of a chain, as images, points, curves or histograms.

:func:`plot_samples` shows data in the user's units. :func:`plot_trajectory` and :func:`plot_denoised` show
states of the chain in the model's units.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_diffusion.checks import as_numbers, check_timesteps, require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.given import Given
from pyro_diffusion.networks import evaluating
from pyro_diffusion.style import BLUE, PALETTE, count_on, new_axes, row_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 30  # more curves than this are a tangle, and are shown as rows of a strip
_MOST_ROWS = 200  # more rows than this are thinner than a pixel

_SHAPES = "(n,) + the shape of one datum with n ≥ 1, the same shape for samples and data"


@styled
def plot_samples(samples: Tensor, data: Tensor | None = None, axes: Any = None) -> Any:
    """Samples, and beside them data if they are given, on one scale.

    ========================== ===========================================================================
    shape                      picture
    ========================== ===========================================================================
    ``(n, height, width)``     grey images, side by side in a sheet
    ``(n, 3, height, width)``  images in colour; the channels may be last instead, or a single one
    ``(n, 2)``, real numbers   points
    ``(n,)`` or ``(n, 1)``     a histogram
    ``(n, D)`` and others      up to 30 vectors as curves over their entries; more of them, and vectors of
                               whole numbers, as a strip with a row for each of the first 200
    ========================== ===========================================================================

    Args:
        samples: Samples in the user's units, of a shape in the table above.
        data: Data of the same shape, except that their number may differ; the first ``n`` are shown.
        axes: Axes to draw into, two if there are data.

    Returns:
        The axes, as a sequence of one or two.

    Raises:
        ValueError: Nothing to show, or data of another shape than the samples.
    """
    samples = _checked("samples", samples)
    sets = {"samples": samples}
    if data is not None:
        sets["data"] = _checked("data", data, samples.shape[1:])[: len(samples)]
    axes = row_of(axes, len(sets))
    limits = _ends(torch.cat([x.flatten() for x in sets.values()]))
    kind = _kind(samples)
    for ax, (name, x) in zip(axes, sets.items(), strict=True):
        shown = kind.draw(ax, x, limits)
        ax.set(title=name, xlabel=kind.xlabel.format("data's units"))
        ax.set_ylabel(kind.ylabel.format("data's units"))
        if kind is _IMAGES:
            ax.set_axis_off()
    if kind is _NUMBERS:
        top = max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(0, top)
    if kind is _STRIP:
        ax.figure.colorbar(shown, ax=list(axes), label="value, data's units")
    return axes


def _checked(argument: str, x: Any, event_shape: torch.Size | None = None) -> Tensor:
    """Numbers to show, on the CPU."""
    x = as_numbers(argument, x).detach().cpu()
    require(
        x.dim() > 0 and x.numel() != 0 and event_shape in (None, x.shape[1:]),
        f"argument {argument!r}",
        f"shape {tuple(x.shape)}"
        + ("" if event_shape is None else f" beside samples of {tuple(event_shape)}"),
        _SHAPES,
        "Put the samples along the first axis; reshape vectors that are images, e.g. x.reshape(-1, 8, 8).",
    )
    return x


@styled
@torch.no_grad()
def plot_trajectory(
    diffusion: DiffusionModel,
    x_0: Tensor,
    *,
    timesteps: Sequence[int] | None = None,
    context: Any = None,
    axes: Any = None,
) -> Any:
    r"""States of the two chains: data that become noise, and noise that becomes data.

    States of shape ``(height, width)`` are drawn as grey images, and those with channels in colour. States of
    shape ``(2,)`` are drawn as points, and single numbers as histograms. All others are drawn as curves over
    their entries, or as a strip if there are more than 30. All panels except images share one scale.

    Args:
        diffusion: The model.
        x_0: Data, shape ``(N,)`` + the shape of one datum. The model draws as many.
        timesteps: Increasing timesteps in ``0 … T``, one for each column; by default six of them.
        context: Context of conditional data, a row for each datum; the model draws given the same.
        axes: Axes of shape ``(2, len(timesteps))``.

    Returns:
        The axes. The forward chain is on top. The reverse chain is below and ends in
        :math:`\hat x_0(x_1)`.

    Raises:
        ValueError: A timestep outside ``0 … T``, or a context that does not fit.
    """
    timesteps, given = _columns(diffusion, timesteps, 0), _given(diffusion, x_0, context)
    with evaluating(diffusion):
        forward = poutine.trace(diffusion.guide).get_trace(x_0).nodes
        reverse = poutine.trace(diffusion.model).get_trace(num_samples=len(x_0), **given).nodes
        x_1, log_snr = reverse["x_1"]["value"], diffusion.schedule.log_snr(1)
        x_0_hat = diffusion.denoiser.x_0_hat(x_1, log_snr, **given)
    chains = {
        "forward, $q$": (forward, diffusion.embed(x_0)),
        "reverse, $p$": (reverse, x_0_hat),
    }
    rows = {
        name: [end if t == 0 else sites[f"x_{t}"]["value"] for t in timesteps]
        for name, (sites, end) in chains.items()
    }
    return _grid(rows, _titles(diffusion, timesteps), axes)


@styled
@torch.no_grad()
def plot_denoised(
    diffusion: DiffusionModel,
    x_0: Tensor,
    *,
    timesteps: Sequence[int] | None = None,
    context: Any = None,
    axes: Any = None,
) -> Any:
    r"""Noisy data :math:`x_t \sim q(x_t \mid x_0)`, and the denoiser's estimates :math:`\hat x_0(x_t)`.

    Args:
        diffusion: The model.
        x_0: Data, shape ``(N,)`` + the shape of one datum; drawn as in :func:`plot_trajectory`.
        timesteps: Increasing timesteps in ``1 … T``, one for each column; by default six of them.
        context: Context of conditional data, a row for each datum.
        axes: Axes of shape ``(2, len(timesteps))``.

    Returns:
        The axes, with states on top, estimates below.

    Raises:
        ValueError: A timestep outside ``1 … T``, or a context that does not fit.
    """
    timesteps, given = _columns(diffusion, timesteps, 1), _given(diffusion, x_0, context)
    embedded = diffusion.embed(x_0)
    with evaluating(diffusion):
        states = [diffusion.process.marginal(embedded, t).sample() for t in timesteps]
        estimates = [
            diffusion.denoiser.x_0_hat(x_t, diffusion.schedule.log_snr(t), **given)
            for x_t, t in zip(states, timesteps, strict=True)
        ]
    rows = {"state $x_t$": states, r"estimate $\hat x_0(x_t)$": estimates}
    return _grid(rows, _titles(diffusion, timesteps), axes)


def _columns(diffusion: DiffusionModel, timesteps: Sequence[int] | None, first: int) -> list[int]:
    last = diffusion.schedule.num_timesteps
    if timesteps is None:
        return sorted({round(first + (last - first) * k / 5) for k in range(6)})
    remedy = "Leave them out for six that are evenly spaced."
    return check_timesteps(timesteps, first, last, remedy)


def _given(diffusion: DiffusionModel, x_0: Tensor, context: Any) -> dict[str, Any]:
    given = Given.of(context=context).with_rows(len(x_0), device=x_0.device)
    return diffusion.denoiser.check_given(given.of_kernels())


def _titles(diffusion: DiffusionModel, timesteps: list[int]) -> list[str]:
    log_snr = diffusion.schedule.log_snr(torch.tensor(timesteps)).reshape(len(timesteps), -1)
    return [
        f"$t = {t}$\n" + ("data; $\\hat x_0(x_1)$" if t == 0 else f"$\\lambda = {value:.1f}$")
        for t, value in zip(timesteps, log_snr.mean(1).tolist(), strict=True)
    ]


def _grid(rows: Mapping[str, list[Tensor]], titles: list[str], axes: Any) -> Any:
    """States in a grid, in which every row has a name and every column a title."""
    if axes is None:
        axes = new_axes(len(rows), len(titles), (1.9 * len(titles), 1.9 * len(rows) + 0.7))
        axes[0, 0].figure.get_layout_engine().set(w_pad=0.1)  # inches
    everything = torch.cat([x.flatten() for states in rows.values() for x in states]).cpu().double()
    # One scale for all; quantiles, so that a few extreme states do not hide the others.
    low, high = np.quantile(everything.numpy(), [0.002, 0.998])
    limits = (low - 0.1 * (high - low), high + 0.1 * (high - low))
    for row, (name, states) in zip(axes, rows.items(), strict=True):
        for ax, x in zip(row, states, strict=True):
            kind = _kind(x)
            own = _ends(x) if kind is _IMAGES else limits
            shown = kind.draw(ax, x.cpu(), own)
            ax.tick_params(labelsize="x-small")
        row[0].set_ylabel(f"{name}\n{kind.ylabel.format(_UNITS)}".strip(), fontsize="small")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="small")
    for ax in axes[-1]:
        ax.set_xlabel(kind.xlabel.format(_UNITS), fontsize="x-small")
    if kind is _STRIP:
        ax.figure.colorbar(shown, ax=list(axes.flat), label=f"value, {_UNITS}")
    return axes


def _kind(x: Tensor) -> "_Kind":
    """How states of a shape are drawn."""
    if x[0].numel() == 1 and x.dim() < 3:
        return _NUMBERS
    if x.dim() == 3 or _channels(x) is not None:
        return _IMAGES
    if x.shape[1:] == (2,) and x.is_floating_point():
        return _POINTS
    return _LINES if len(x) <= _MOST_LINES and x.is_floating_point() else _STRIP


def _channels(x: Tensor) -> int | None:
    """The axis of one or three channels of images, if there is one."""
    if x.dim() != 4:
        return None
    return next((axis for axis in (1, 3) if x.shape[axis] in (1, 3)), None)


def _ends(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest finite number."""
    finite = x.double()[x.isfinite()]
    return (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 1.0)


Limits = tuple[float, float]


def _draw_images(ax: "Axes", x: Tensor, limits: Limits) -> Any:
    low, high = limits
    axis = _channels(x)
    if axis is not None:
        x = x.movedim(axis, -1).squeeze(-1)
    if x.dim() == 3:
        shown = ax.imshow(_tile(x, low).numpy(), cmap="gray_r", vmin=low, vmax=high)
    else:  # in colour, on a white sheet
        share = (x.double() - low) / ((high - low) or 1.0)
        shown = ax.imshow(_tile(share, 1.0).clamp(0, 1).numpy())
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return shown


def _draw_points(ax: "Axes", x: Tensor, limits: Limits) -> Any:
    pad = 0.03 * (limits[1] - limits[0])
    ends = (limits[0] - pad, limits[1] + pad)
    size = min(10.0, max(1.5, 1500 / len(x)))
    shown = ax.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=size, lw=0, color=BLUE, alpha=0.7)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    return shown


def _draw_numbers(ax: "Axes", x: Tensor, limits: Limits) -> Any:
    low, high = limits
    if x.is_floating_point() or high - low > 100:
        bins: Any = np.linspace(low, high, max(2, min(50, len(x))) + 1) if high > low else 1
    else:  # a bar for each whole number
        bins = np.arange(low - 0.5, high + 1)
    values = x.flatten().double()
    shown = ax.hist(values[values.isfinite()].numpy(), bins=bins, color=BLUE)
    ax.set(xlim=(bins[0], bins[-1]) if high > low else None)
    return shown


def _draw_lines(ax: "Axes", x: Tensor, limits: Limits) -> Any:
    entries = np.arange(1, x[0].numel() + 1)
    for color, values in zip(cycle(PALETTE), x.flatten(1), strict=False):
        ax.plot(entries, values.numpy(), lw=0.8, alpha=0.8, color=color)
    pad = 0.03 * (limits[1] - limits[0])
    ax.set(ylim=(limits[0] - pad, limits[1] + pad) if limits[1] > limits[0] else None)
    count_on(ax.xaxis)


def _draw_strip(ax: "Axes", x: Tensor, limits: Limits) -> Any:
    rows = x.flatten(1)[:_MOST_ROWS].double().numpy()
    place = (0.5, rows.shape[1] + 0.5, len(rows) + 0.5, 0.5)  # entries and rows count from one
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "cmap": "cividis"}
    shown = ax.imshow(rows, extent=place, vmin=limits[0], vmax=limits[1], **style)
    count_on(ax.xaxis)
    return shown


class _Kind(NamedTuple):
    """A way to draw states, and what its axes show."""

    draw: Callable[["Axes", Tensor, Limits], Any]
    xlabel: str
    ylabel: str


_UNITS = "model's units"  # of states
_IMAGES = _Kind(_draw_images, "", "")
_POINTS = _Kind(_draw_points, "entry 1, {}", "entry 2, {}")
_NUMBERS = _Kind(_draw_numbers, "value, {}", "count")
_LINES = _Kind(_draw_lines, "entry", "value, {}")
_STRIP = _Kind(_draw_strip, "entry", "row")


def _tile(images: Tensor, background: float) -> Tensor:
    """Images side by side in an almost square sheet, a pixel of background between them."""
    n, height, width, *channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    padded = images.new_full((rows * columns, height + 1, width + 1, *channels), background)
    padded[:n, :height, :width] = images
    sheet = padded.reshape(rows, columns, height + 1, width + 1, *channels).transpose(1, 2)
    return sheet.reshape(rows * (height + 1), columns * (width + 1), *channels)[:-1, :-1]
