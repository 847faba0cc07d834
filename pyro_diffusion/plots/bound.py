"""The bound, term by term: by timestep, or summed from the data to the prior."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pyro_diffusion.bounds import ELBOTerms
from pyro_diffusion.bounds.terms import rows_of
from pyro_diffusion.checks import check_argument, require
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.style import (
    BLUE,
    ORANGE,
    RED,
    SKY,
    count_on,
    ink,
    legend_beside,
    new_axes,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_bound(
    terms: ELBOTerms,
    ax: Any = None,
    *,
    cumulative: bool = False,
    schedule: NoiseSchedule | None = None,
    **errorbar: Any,
) -> Any:
    r"""Mean :math:`L_t` over data by timestep with both errors, or the cumulative sum of the terms.

    By default the curve shows the transition terms, and the legend the two ends of the chain. Error bars show
    one Monte Carlo error, the band one sampling error. A model with at most ten latent sites has a bar for
    each of them, including the top one.

    With ``cumulative=True`` the picture shows :math:`-\mathrm{ELBO}` as a stack. Its height at timestep
    :math:`t` is the sum of the terms between the datum and :math:`x_t`,

    .. math::
        C_t = -E \log p(x_0 \mid x_1) + \sum_{s=1}^{t-1} L_s, \qquad -\mathrm{ELBO} = C_T + L_T,

    with the reconstruction below, the transition terms above it, and the prior term in a strip to the right
    of :math:`x_T`. A negative reconstruction loss, of data with a density, is in a strip to the left. The
    band shows one standard error of the mean over data, which contains both errors. A
    ``schedule`` adds a second picture: the nats in each decade of the signal-to-noise ratio, from data to
    noise, with the reconstruction and the prior term beside them. :math:`L_t` belongs to the step from
    :math:`x_{t+1}` to :math:`x_t`, and is spread evenly over the log-SNR between them.

    Args:
        terms: The bound.
        ax: Axes to draw into; two of them with a schedule.
        cumulative: Whether to sum the terms up.
        schedule: The noise schedule of the model, such as ``diffusion.schedule``.
        errorbar: Without ``cumulative``, passed on to ``Axes.errorbar``, or to ``Axes.bar`` where there are
            bars.

    Returns:
        The axes, timestep against nats per datum; the two axes with a schedule.

    Raises:
        ValueError: A schedule without ``cumulative``, or of another number of timesteps; settings of error
            bars with ``cumulative``.
    """
    if cumulative:
        return _plot_sums(terms, ax, schedule, errorbar)
    require(
        schedule is None,
        "argument 'schedule'",
        "one without cumulative=True",
        "none, because the picture is by timestep",
        "Pass cumulative=True with it.",
    )
    ax = new_axes(size=(7.4, 3.6), grid=True)[0, 0] if ax is None else ax
    plot = _plot_levels if len(terms.transition) < 10 else _plot_timesteps
    return plot(terms, ax, **errorbar)


def _plot_timesteps(terms: ELBOTerms, ax: "Axes", **errorbar: Any) -> "Axes":
    """The curve of a long chain."""
    means = terms.term_means()
    *transition, prior = (means[row] for row in rows_of(terms.kinds)[1:])
    t = np.arange(1, len(transition) + 1)
    value, monte_carlo, sampling = np.array(transition).T
    label = f"{terms.kinds[-2]} at $x_t$, sum {value.sum():.3g}\n(bars: Monte Carlo error)"
    style: dict[str, Any] = {"fmt": ".-", "ms": 3, "lw": 0.8, "color": BLUE} | errorbar
    ax.errorbar(t, value, np.nan_to_num(monte_carlo), **style | {"label": label})
    ax.fill_between(
        t,
        value - sampling,
        value + sampling,
        color=SKY,
        alpha=0.35,
        lw=0,
        label="sampling error of the mean",
    )
    _write_ends(ax, terms, f"prior term at $x_T$: {prior.value:.3g}")
    if terms.is_kl and bool((value > 0).all()):
        ax.set_yscale("log")
    ax.set(xlabel=f"timestep $t$, of {len(transition) + 1:,}", ylabel="nats per datum")
    legend_beside(ax, first=terms.kinds[-2])
    return ax


def _plot_levels(terms: ELBOTerms, ax: "Axes", **bar: Any) -> "Axes":
    """The bars of a short chain."""
    means, rows = terms.term_means(), rows_of(terms.kinds)[1:]
    value, monte_carlo, sampling = np.array([means[row] for row in rows]).T
    t = np.arange(1, len(value) + 1)
    colors = {"KL": BLUE, "log-ratio": ORANGE}
    error = np.hypot(np.nan_to_num(monte_carlo), np.nan_to_num(sampling))
    style: dict[str, Any] = {
        "color": [colors[terms.kinds[row]] for row in rows],
        "ecolor": ink(ax),
    }
    ax.bar(t, value, yerr=error, **style | bar)
    for kind, color in colors.items():
        if kind in terms.kinds:
            ax.plot([], [], "s", color=color, label=f"{kind} at $x_t$")
    _write_ends(ax, terms, "error bars: both errors together")
    ax.set(xlabel=f"level $t$, of {len(t)}", ylabel="nats per datum", xticks=t)
    legend_beside(ax)
    return ax


def _write_ends(ax: "Axes", terms: ELBOTerms, line: str) -> None:
    """The bound as title; the reconstruction term and one more line in the legend."""
    means = terms.term_means()
    law = "p(x_0|x_1)" if terms.encoder is None else "p(x|z_0)"
    lines = [f"reconstruction,\n$E\\,\\log {law}$: {means[0].value:.3g}"]
    for row in rows_of(terms.kinds, encoder=True):
        lines.append(f"{terms.kinds[row]}: {means[row].value:.3g}")
    for label in (*lines, line):
        ax.plot([], [], " ", label=label)
    _write_bound(ax, terms)


def _write_bound(ax: "Axes", terms: ELBOTerms) -> None:
    ax.set_title(f"bound, nats per datum\n{terms.mean()}", fontsize="medium")


def _plot_sums(
    terms: ELBOTerms, axes: Any, schedule: NoiseSchedule | None, errorbar: dict[str, Any]
) -> Any:
    """The stack by timestep, and with a schedule the bars by decade."""
    require(
        not errorbar,
        f"argument {next(iter(errorbar), '')!r}",
        "a setting of error bars with cumulative=True",
        "none, because there are no error bars",
        "Leave it out, or change the axes that are returned.",
    )
    if schedule is None:
        ax = new_axes(size=(7.4, 3.6), grid=True)[0, 0] if axes is None else axes
        return _plot_stack(terms, ax)
    check_argument("schedule", schedule, NoiseSchedule, "diffusion.schedule")
    require(
        schedule.num_timesteps == len(terms.transition) + 1,
        "argument 'schedule'",
        f"one of {schedule.num_timesteps} timesteps for terms of {len(terms.transition) + 1}",
        "the schedule of the model that has these terms",
        "Pass diffusion.schedule of the same diffusion.",
    )
    axes = new_axes(1, 2, (11.5, 3.8), grid=True)[0] if axes is None else axes
    _plot_stack(terms, axes[0])
    _plot_decades(terms, schedule, axes[1])
    return axes


def _plot_stack(terms: ELBOTerms, ax: "Axes") -> "Axes":
    """Nats between the datum and x_t, by kind of term, with the prior term in a strip beyond T."""
    first, between, prior = _parts(terms)
    start = _below(terms)
    sums = torch.cat([start[None], terms.transition]).cumsum(0).cpu()
    mean, last = sums.mean(1).numpy(), len(sums)
    error = sums.std(1).numpy() / math.sqrt(sums.shape[1]) if sums.shape[1] > 1 else 0 * mean
    t, width = np.arange(1, last + 1), max(0.05 * (last - 1), 0.2)
    start, stop, end = mean[0], mean[-1], mean[-1] + prior.value
    before, beyond = np.array([1 - width, 1]), np.array([last, last + width])
    fill: dict[str, Any] = {"alpha": 0.85, "lw": 0}
    # A negative reconstruction loss would overlap the sum of the other terms: it is drawn in its own strip.
    whole = np.array([1 - width, last + width]) if start >= 0 else before
    ax.fill_between(whole, 0, start, color=first.color, label=first.label, **fill)
    ax.fill_between(
        [*t, beyond[1]], start, [*mean, stop], color=between.color, label=between.label, **fill
    )
    ax.fill_between(beyond, stop, end, color=prior.color, label=prior.label, **fill)
    ax.fill_between(t, mean - error, mean + error, color=ink(ax), alpha=0.25, lw=0)
    ax.plot([before[0], *t, last, beyond[1]], [start, *mean, end, end], color=ink(ax), lw=1.2)
    ax.axhline(0, color=ink(ax), lw=0.6)
    ax.set(xlabel=f"timestep $t$, of {last:,}", ylabel="nats per datum, from the data to $x_t$")
    ax.set_xlim(before[0], beyond[1])
    count_on(ax.xaxis)
    _write_bound(ax, terms)
    legend_beside(ax, reverse=True)
    return ax


def _plot_decades(terms: ELBOTerms, schedule: NoiseSchedule, ax: "Axes") -> None:
    """Nats in each decade of the SNR, between the reconstruction and the prior."""
    edges, weights = _decades(schedule)
    by_decade = weights.to(terms.transition) @ terms.transition
    start = _below(terms)
    nats = torch.cat([start[None], by_decade, terms.prior[None]]).cpu().numpy()
    value = nats.mean(1)
    error = nats.std(1, ddof=1) / math.sqrt(nats.shape[1]) if nats.shape[1] > 1 else 0 * value
    data, noise = edges[0] + 1.3, edges[-1] - 1.3
    place = np.array([data, *(edges[:-1] - 0.5), noise])
    color = [ORANGE] + [BLUE] * len(by_decade) + [RED]
    ax.bar(place, value, 0.9, yerr=error, color=color, alpha=0.85, ecolor=ink(ax))
    if (value >= 0).all() and value.sum() > 0:
        for x, y, high in zip(place, value, value + error, strict=True):
            text = f"{y / value.sum():.0%}"
            ax.annotate(text, (x, high), (0, 2), textcoords="offset points", ha="center", size=8)
    shown = edges[:: 1 + len(edges) // 9].tolist()
    first = "$p(x_0|x_1)$" if terms.encoder is None else "encoder"
    ticks = {data: first, **{k: f"$10^{{{k}}}$" for k in shown}, noise: "prior"}
    ax.set_xticks(list(ticks), list(ticks.values()), size="small")
    ax.axhline(0, color=ink(ax), lw=0.6)
    ax.set(
        xlabel="signal-to-noise ratio $e^{\\lambda}$, in decades", ylabel="nats per datum, in each"
    )
    ax.grid(visible=False, axis="x")
    ax.set_title("where the nats go", fontsize="medium")
    ax.invert_xaxis()


def _below(terms: ELBOTerms) -> torch.Tensor:
    """What is below the chain: the reconstruction loss, and the terms of an encoder."""
    below = -terms.reconstruction
    return below if terms.encoder is None else below + terms.encoder.sum(0)


class _Part(NamedTuple):
    """A part of −ELBO: its mean over data, and how it is drawn."""

    value: float
    label: str
    color: str


def _parts(terms: ELBOTerms) -> list[_Part]:
    """Reconstruction, transition terms and prior term, with their shares if all are positive."""
    last = len(terms.transition) + 1
    between = {1: "nothing between", 2: "$x_1$"}.get(last, f"$x_1$ … $x_{{{last - 1}}}$")
    below = (
        "reconstruction and encoder"
        if terms.encoder is not None
        else "reconstruction, $p(x_0|x_1)$"
    )
    names = (below, between, f"prior, $x_{{{last}}}$")
    parts = (_below(terms), terms.transition.sum(0), terms.prior)
    values = [x.mean().item() for x in parts]
    total = sum(values)
    shares = [f" ({x / total:.0%})" if min(values) >= 0 and total > 0 else "" for x in values]
    labels = [f"{name}: {x:.3g}{y}" for name, x, y in zip(names, values, shares, strict=True)]
    return list(map(_Part, values, labels, (ORANGE, BLUE, RED)))


def _decades(schedule: NoiseSchedule) -> "tuple[np.ndarray, torch.Tensor]":
    """Edges as powers of ten, from data to noise, and the share of each step in each decade between them."""
    t = torch.arange(1, schedule.num_timesteps + 1, device=schedule.device)
    with torch.no_grad():
        powers = schedule.log_snr(t).reshape(len(t), -1).mean(1).cpu() / math.log(10)
    high, low = math.ceil(powers[0].item()), math.floor(powers[-1].item())
    edges = torch.arange(high, min(low, high - 1) - 1, -1)
    upper, lower = edges[:-1, None], edges[1:, None]
    overlap = torch.minimum(powers[:-1], upper) - torch.maximum(powers[1:], lower)
    return edges.numpy(), overlap.clamp(min=0) / (powers[:-1] - powers[1:])
