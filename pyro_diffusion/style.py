"""The style of all figures: colours, text and lines of the figures that the package makes itself.

The settings apply only while a function draws a figure of its own. Every call that draws also names its
colours, so that they are the same in axes that the user passes.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: The palette of Okabe and Ito, without its yellow, which is too light for lines on white.
BLUE, RED, GREEN, PINK, ORANGE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
PALETTE = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
INK = "#222222"  # text, axes and totals
PALE = "#DDDDDD"  # grids


def _settings() -> Any:
    from cycler import cycler

    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    return ink | {
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlesize": "medium",
        "font.size": 10,
        "legend.frameon": False,
    }


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """A function that draws in the style of the package, unless it is given axes."""
    signature = inspect.signature(plot)

    @wraps(plot)
    def _drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("ax", given.get("axes")) is not None:
            return plot(*args, **kwargs)
        import matplotlib

        with matplotlib.rc_context(_settings()):
            return plot(*args, **kwargs)

    return _drawn


def new_axes(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.8, 3.6), *, grid: bool = False
) -> Any:
    """Axes of a new figure as an array of shape ``(rows, columns)``; ``size`` is in inches."""
    import matplotlib.pyplot as plt

    axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]
    for ax in axes.flat:
        # Ticks are made when the figure is drawn, and the settings may no longer apply then.
        ax.tick_params(color=INK, labelcolor=INK)
        if grid:
            ax.grid(color=PALE, lw=0.6)
    return axes


def row_of(axes: Any, columns: int, size: tuple[float, float] = (4.2, 3.6), **settings: Any) -> Any:
    """The given axes, or ``columns`` new ones of a size each, as a sequence."""
    if axes is None:
        return new_axes(1, columns, (size[0] * columns, size[1]), **settings)[0]
    return axes if hasattr(axes, "__len__") else [axes]


def ink(ax: Any) -> Any:
    """The colour of text on some axes; a user's own axes may have light text on a dark background."""
    return ax.xaxis.label.get_color()


def legend_beside(ax: Any, first: str = "", **settings: Any) -> None:
    """A legend to the right of the axes, where it covers nothing; labels that begin with ``first`` on top."""
    entries = list(zip(*ax.get_legend_handles_labels(), strict=True))
    entries.sort(key=lambda entry: not entry[1].startswith(first))
    handles, labels = zip(*entries, strict=True)
    ax.legend(
        handles,
        labels,
        fontsize="small",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        **settings,
    )


def count_on(axis: Any) -> None:
    """Ticks of an axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True))
