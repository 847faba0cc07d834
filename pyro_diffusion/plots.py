"""Pictures: the bound by timestep and over training, the schedule, samples, states by noise level.

Each function draws into the matplotlib axes that it is given and returns them. ``None`` makes new ones.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_diffusion import arviz_bridge
from pyro_diffusion.bounds import ELBOTerms
from pyro_diffusion.checks import check_timesteps, require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import Evidence
from pyro_diffusion.networks import evaluating
from pyro_diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def plot_bound(terms: ELBOTerms, ax: "Axes | None" = None, **errorbar: Any) -> "Axes":
    r"""Mean :math:`L_t` over data by timestep, with both errors, and the two ends of the chain.

    A model with at most ten latent sites gets a bar for each of them, the top one included.

    Args:
        terms: The bound. The curve shows its transition terms, the legend its prior and reconstruction.
        ax: Axes to draw into.
        errorbar: Passed on to ``Axes.errorbar``, or to ``Axes.bar`` where there are bars.

    Returns:
        The axes, timestep against nats per datum. Error bars show one Monte Carlo error, the band shows one
        sampling error.
    """
    ax = _new_axes()[0, 0] if ax is None else ax
    _, *transition, prior = terms.term_means()
    if len(transition) < 10:
        return _plot_levels(terms, ax, **errorbar)
    t = np.arange(1, len(transition) + 1)
    value, monte_carlo, sampling = np.array(transition).reshape(-1, 3).T
    label = f"{terms.kinds[1]} at $x_t$, sum {value.sum():.3g}; bars: Monte Carlo error"
    style: dict[str, Any] = {"fmt": ".-", "ms": 3, "lw": 0.8} | errorbar | {"label": label}
    ax.errorbar(t, value, np.nan_to_num(monte_carlo), **style)
    ax.fill_between(
        t,
        value - sampling,
        value + sampling,
        alpha=0.25,
        lw=0,
        label="sampling error of the mean",
    )
    _write_ends(ax, terms, f"prior term at $x_T$: {prior.value:.3g}")
    if terms.is_kl and len(value) and bool((value > 0).all()):
        ax.set_yscale("log")
    ax.set(xlabel="timestep $t$", ylabel="nats per datum")
    ax.legend(fontsize="small")
    return ax


def _plot_levels(terms: ELBOTerms, ax: "Axes", **bar: Any) -> "Axes":
    value, monte_carlo, sampling = np.array(terms.term_means()[1:]).T
    t = np.arange(1, len(value) + 1)
    colors = ["C0" if kind == "KL" else "C1" for kind in terms.kinds[1:]]
    error = np.hypot(np.nan_to_num(monte_carlo), np.nan_to_num(sampling))
    ax.bar(t, value, yerr=error, color=colors, **bar)
    for kind, color in (("KL", "C0"), ("log-ratio", "C1")):
        if kind in terms.kinds:
            ax.plot([], [], "s", color=color, label=f"{kind} at $x_t$")
    _write_ends(ax, terms, "bars: both errors together")
    ax.set(xlabel="level $t$", ylabel="nats per datum", xticks=t)
    ax.margins(y=0.3)
    ax.legend(fontsize="small", loc="upper right")
    return ax


def _write_ends(ax: "Axes", terms: ELBOTerms, line: str) -> None:
    """The bound as title; the reconstruction term and one more line in the legend."""
    value = terms.term_means()[0].value
    for label in (f"reconstruction $E\\,\\log p(x_0|x_1)$: {value:.3g}", line):
        ax.plot([], [], " ", label=label)
    ax.set_title(f"bound, nats per datum\n{terms.mean()}", fontsize="medium")


def plot_schedule(schedule: NoiseSchedule, axes: Any = None) -> Any:
    r"""Log-SNR and :math:`\bar\alpha_t` by timestep.

    Args:
        schedule: The schedule.
        axes: Two axes, for the log-SNR and for :math:`\bar\alpha_t`.

    Returns:
        The two axes.
    """
    axes = _row(axes, 2)
    t = torch.arange(1, schedule.num_timesteps + 1, device=schedule.device)
    style = "." if schedule.num_timesteps < 50 else "-"
    for ax, curve in zip(axes, (schedule.log_snr(t), schedule.alpha_bar(t)), strict=True):
        ax.plot(t.cpu().numpy(), curve.detach().cpu().numpy(), style)
    axes[0].set(xlabel="timestep $t$", ylabel=r"log-SNR $\lambda_t$")
    axes[1].set(xlabel="timestep $t$", ylabel=r"$\bar\alpha_t$", ylim=(-0.02, 1.02))
    return axes


def plot_samples(samples: Tensor, data: Tensor | None = None, axes: Any = None) -> Any:
    """A grid of sampled images, and beside it a grid of data if they are given.

    Args:
        samples: Grey images, shape ``(n, height, width)``.
        data: Grey images of the same size, shape ``(m, height, width)``; the first ``n`` are shown.
        axes: Axes to draw into, two if there are data.

    Returns:
        The axes, as a sequence of one or two.

    Raises:
        ValueError: Images that are not of shape ``(n, height, width)``.
    """
    grids = {"samples": samples} | ({} if data is None else {"data": data[: len(samples)]})
    for name, images in grids.items():
        require(
            images.dim() == 3 and len(images) != 0,
            f"argument {name!r}",
            f"shape {tuple(images.shape)}",
            "(n, height, width) with n ≥ 1",
            (
                "Reshape vectors that are images, e.g. x.reshape(-1, 8, 8); draw points with "
                "matplotlib's own scatter."
            ),
        )
    axes = _row(axes, len(grids))
    low, high = (float(bound) for bound in torch.cat(list(grids.values())).aminmax())
    for ax, (name, images) in zip(axes, grids.items(), strict=True):
        ax.imshow(_tile(images.cpu(), low).numpy(), cmap="gray_r", vmin=low, vmax=high)
        ax.set_title(name)
        ax.set_axis_off()
    return axes


@torch.no_grad()
def plot_trajectory(
    diffusion: DiffusionModel,
    x_0: Tensor,
    *,
    timesteps: Sequence[int] | None = None,
    axes: Any = None,
) -> Any:
    r"""States of the two chains: data that become noise, and noise that becomes data.

    States of shape ``(height, width)`` are drawn as grey images, states of shape ``(2,)`` as points, single
    numbers as histograms, and others as lines over their entries. All but images share one scale.

    Args:
        diffusion: The model.
        x_0: Data, shape ``(N,)`` + the shape of one datum. The model draws as many.
        timesteps: Increasing timesteps in ``0 … T``, one for each column; by default six of them.
        axes: Axes of shape ``(2, len(timesteps))``.

    Returns:
        The axes. The forward chain is on top. The reverse chain is below and ends in
        :math:`\hat x_0(x_1)`.

    Raises:
        ValueError: A timestep outside ``0 … T``.
    """
    timesteps = _columns(diffusion, timesteps, 0)
    with evaluating(diffusion):
        forward = poutine.trace(diffusion.guide).get_trace(x_0).nodes
        reverse = poutine.trace(diffusion.model).get_trace(num_samples=len(x_0)).nodes
        x_0_hat = diffusion.denoiser.x_0_hat(reverse["x_1"]["value"], diffusion.schedule.log_snr(1))
    chains = {
        "forward, $q$": (forward, diffusion.embed(x_0)),
        "reverse, $p$": (reverse, x_0_hat),
    }
    rows = {
        name: [end if t == 0 else sites[f"x_{t}"]["value"] for t in timesteps]
        for name, (sites, end) in chains.items()
    }
    return _grid(rows, _titles(diffusion, timesteps), axes)


@torch.no_grad()
def plot_denoised(
    diffusion: DiffusionModel,
    x_0: Tensor,
    *,
    timesteps: Sequence[int] | None = None,
    axes: Any = None,
) -> Any:
    r"""Noisy data :math:`x_t \sim q(x_t \mid x_0)`, and the denoiser's estimates :math:`\hat x_0(x_t)`.

    Args:
        diffusion: The model.
        x_0: Data, shape ``(N,)`` + the shape of one datum; drawn as in :func:`plot_trajectory`.
        timesteps: Increasing timesteps in ``1 … T``, one for each column; by default six of them.
        axes: Axes of shape ``(2, len(timesteps))``.

    Returns:
        The axes, with states on top, estimates below.

    Raises:
        ValueError: A timestep outside ``1 … T``.
    """
    timesteps = _columns(diffusion, timesteps, 1)
    embedded = diffusion.embed(x_0)
    with evaluating(diffusion):
        states = [diffusion.process.marginal(embedded, t).sample() for t in timesteps]
        estimates = [
            diffusion.denoiser.x_0_hat(x_t, diffusion.schedule.log_snr(t))
            for x_t, t in zip(states, timesteps, strict=True)
        ]
    rows = {"state $x_t$": states, r"estimate $\hat x_0(x_t)$": estimates}
    return _grid(rows, _titles(diffusion, timesteps), axes)


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
    ax = _new_axes()[0, 0] if ax is None else ax
    terms = np.array([[float(value) for value in history[step]] for step in steps]).T
    last = len(terms) - 1
    layers = {f"$x_{{{last}}}$ (prior)": terms[last]}
    for block in reversed(np.array_split(np.arange(1, last), num_blocks)):
        if len(block):
            name = f"$x_{{{block[0]}}}$" + (f" … $x_{{{block[-1]}}}$" if len(block) > 1 else "")
            layers[name] = terms[block].sum(0)
    loss = -terms[0]
    if (loss >= 0).all():
        layers["$-\\log p(x_0|x_1)$"] = loss
    else:
        ax.plot(steps, loss, "k:", lw=1, label="$-\\log p(x_0|x_1)$")
    ax.stackplot(steps, *layers.values(), labels=list(layers), alpha=0.8, lw=0)
    ax.plot(steps, terms[1:].sum(0) + loss, "k-", lw=1, label="$-$ELBO")
    ax.set(xlabel="step", ylabel="nats per datum", xlim=(steps[0], steps[-1]))
    ax.legend(fontsize="small", reverse=True, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax


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


def plot_compare(table: Any, ax: "Axes | None" = None) -> Any:
    """The table of :func:`~pyro_diffusion.diagnostics.comparison.compare`, by ArviZ.

    Args:
        table: What ``compare`` returned.
        ax: Axes to draw into, before ArviZ 1.0.

    Returns:
        What ArviZ returns, which is the axes and from 1.0 on a ``PlotCollection``.
    """
    return arviz_bridge.plot_compare(table, ax)


def plot_pit(pit: Tensor, ax: "Axes | None" = None, *, envelope: float = 0.99) -> Any:
    """Distribution function of a PIT minus that of uniform numbers, with ArviZ's band or test.

    Args:
        pit: Values in [0, 1], shape ``(N,)``.
        ax: Axes to draw into, before ArviZ 1.0.
        envelope: Probability that uniform values stay inside the band everywhere.

    Returns:
        What ArviZ returns, which is the axes and from 1.0 on a ``PlotCollection``.
    """
    return arviz_bridge.plot_pit(pit.cpu().numpy(), ax, envelope)


def _columns(diffusion: DiffusionModel, timesteps: Sequence[int] | None, first: int) -> list[int]:
    last = diffusion.schedule.num_timesteps
    if timesteps is None:
        return sorted({round(first + (last - first) * k / 5) for k in range(6)})
    remedy = "Leave them out for six that are evenly spaced."
    return check_timesteps(timesteps, first, last, remedy)


def _titles(diffusion: DiffusionModel, timesteps: list[int]) -> list[str]:
    log_snr = diffusion.schedule.log_snr(torch.tensor(timesteps)).reshape(len(timesteps), -1)
    return [
        f"$t = {t}$\n" + ("data; $\\hat x_0(x_1)$" if t == 0 else f"$\\lambda = {value:.1f}$")
        for t, value in zip(timesteps, log_snr.mean(1).tolist(), strict=True)
    ]


def _grid(rows: Mapping[str, list[Tensor]], titles: list[str], axes: Any) -> Any:
    """States in rows with a name each and columns with a title each."""
    if axes is None:
        size = (1.9 * len(titles), 2.1 * len(rows) + 0.5)
        axes = _new_axes(len(rows), len(titles), size)
    everything = torch.cat([x.flatten() for states in rows.values() for x in states]).cpu().double()
    # One scale for all; quantiles, so that a few extreme states do not hide the others.
    low, high = np.quantile(everything.numpy(), [0.002, 0.998])
    for row, (name, states) in zip(axes, rows.items(), strict=True):
        for ax, x in zip(row, states, strict=True):
            _draw_states(ax, x.cpu(), (low - 0.1 * (high - low), high + 0.1 * (high - low)))
        row[0].set_ylabel(name)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="small")
    return axes


def _draw_states(ax: "Axes", x: Tensor, limits: tuple[float, float]) -> None:
    if x.dim() == 3:
        ax.imshow(_tile(x, float(x.min())).numpy(), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
    elif x.shape[1:] == (2,):
        ax.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=2, lw=0)
        ax.set(xlim=limits, ylim=limits, aspect="equal")
    elif x[0].numel() == 1:
        ax.hist(x.flatten().numpy(), bins=min(50, len(x)), range=limits)
        ax.set(xlim=limits, yticks=[])
    else:
        ax.plot(x.flatten(1).T.numpy(), lw=0.7, alpha=0.7)
        ax.set(ylim=limits, xticks=[])
    ax.tick_params(labelsize="x-small")


def _tile(images: Tensor, background: float) -> Tensor:
    """Images side by side in an almost square sheet, a pixel of background between them."""
    n, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    padded = images.new_full((rows * columns, height + 1, width + 1), background)
    padded[:n, :height, :width] = images
    sheet = padded.reshape(rows, columns, height + 1, width + 1).transpose(1, 2)
    return sheet.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]


def _row(axes: Any, columns: int) -> Any:
    """The given axes, or new ones, as a sequence of ``columns``."""
    if axes is None:
        return _new_axes(1, columns, (4.8 * columns, 3.6))[0]
    return axes if hasattr(axes, "__len__") else [axes]


def _new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.8, 3.6)) -> Any:
    """Axes of a new figure as an array of shape ``(rows, columns)``; ``size`` is in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]
