"""What :func:`~pyro_diffusion.training.fit` returns: the history of a run, and its best held-out bound."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_diffusion.bounds import Estimate
from pyro_diffusion.display import as_lines, as_table
from pyro_diffusion.family import Family, Pair
from pyro_diffusion.style import BLUE, RED, ink, legend_beside, new_axes, styled
from pyro_diffusion.training.columns import Parts
from pyro_diffusion.training.held_out import Mean, Record

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

ALL_STEPS = "all steps taken"

_UNITS = {
    "bound": "nats per datum",
    "bound_error": "nats per datum",
    "train_bound": "nats per datum",
    "behind": "nats per datum",
    "behind_error": "nats per datum",
    "learning_rate": "",
    "seconds": "s",
}


class Best(NamedTuple):
    """The check with the best held-out bound, whose weights are in the model."""

    step: int  #: steps of the optimiser before it
    bound: Estimate  #: mean held-out bound, nats per datum, read again with new noise


class Fit(NamedTuple):
    """A run of :func:`~pyro_diffusion.training.fit`. The weights of ``best`` are in the model.

    The held-out bound chose these weights, so that it is a little too good. Report a bound of data that
    neither training nor validation has seen.
    """

    #: by step: ``bound`` and ``bound_error`` of held-out data; ``behind`` and ``behind_error``, the best
    #: bound so far minus this one, paired; ``train_bound`` of the batches since the last check;
    #: ``learning_rate`` and ``seconds``
    history: "xarray.Dataset"
    best: Best  #: step and held-out bound of the best weights
    seconds: float  #: of training, checks and compilation included
    ended: str  #: why the run ended
    num_data: int  #: data for training
    num_held_out: int  #: held-out data
    behind: (
        Mean  #: what the last weights are behind the best, nats per datum, with the paired error
    )
    name: str  #: of the model

    @classmethod
    def of(cls, record: Record, bound: Estimate, ended: str, family: Pair, data: Parts) -> "Fit":
        """The result of a run, from its record and the held-out bound of the best weights."""
        import xarray

        checks = record.checks
        history = xarray.Dataset(
            {
                name: ("step", np.array([check[name] for check in checks]), {"units": units})
                for name, units in _UNITS.items()
            },
            {"step": np.array([int(check["step"]) for check in checks])},
        )
        return cls(
            history=history,
            best=Best(int(record.best["step"]), bound),
            seconds=checks[-1]["seconds"],
            ended=ended or ALL_STEPS,
            num_data=len(data.training["x_0"]),
            num_held_out=len(data.held_out["x_0"]),
            behind=record.behind,
            name=type(family).__name__ if isinstance(family, Family) else "a model and a guide",
        )

    @property
    def num_steps(self) -> int:
        """Steps of the optimiser."""
        return int(self.history["step"][-1])

    @property
    def overfits(self) -> bool:
        """Whether the last weights are behind the best by more than two paired standard errors."""
        return self.behind.is_clear

    @property
    def overfitting(self) -> str:
        """The sentence about it."""
        return (
            f"the held-out bound at the end (step {self.num_steps}) is {self.behind.value:.3g} ± "
            f"{self.behind.error:.2g} nats per datum below the best (step {self.best.step}): the model "
            "overfits. The best weights are in the model. More data, dropout or weight decay "
            "(recipe=Recipe(weight_decay=0.1)) may help."
        )

    def __repr__(self) -> str:
        return as_lines(*self._in_words())

    def _repr_html_(self) -> str:
        return as_table(*self._in_words())

    def _in_words(self) -> tuple[str, dict[str, str]]:
        speed = self.num_steps / max(self.seconds, 1e-9)
        rows = {
            "held-out bound": f"{self.best.bound} nats per datum",
            "at step": f"{self.best.step:,} of {self.num_steps:,}",
            "ended": self.ended,
            "time": f"{self.seconds:.1f} s, {speed:.0f} steps/s",
        }
        if self.overfits:
            behind = f"{self.behind.value:.3g} ± {self.behind.error:.2g}"
            rows["overfits"] = f"the last weights are {behind} nats behind the best"
        counts = f"{self.num_data:,} data to train on, {self.num_held_out:,} held out"
        return f"Fit of {self.name}: {counts}", rows

    @styled
    def plot(self, ax: "Axes | None" = None, **errorbar: Any) -> "Axes":
        """The held-out bound by step with its error, that of the batches, and the best step.

        Args:
            ax: Axes to draw into; ``None`` makes new ones.
            errorbar: Passed on to ``Axes.fill_between``, the band of the error.

        Returns:
            The axes, step against nats per datum. The first quarter of the checks does not count for the
            limits, because the bound is far below the best there.
        """
        ax = new_axes(size=(6.4, 3.6))[0, 0] if ax is None else ax
        history = {name: column.values for name, column in self.history.items()}
        step, bound, error = self.history["step"].values, history["bound"], history["bound_error"]
        band: dict[str, Any] = {
            "alpha": 0.25,
            "lw": 0,
            "color": BLUE,
            "label": "± one standard error",
        } | errorbar
        ax.plot(step, bound, color=BLUE, label="held-out data, averaged weights")
        ax.fill_between(step, bound - error, bound + error, **band)
        ax.plot(step, history["train_bound"], ".", ms=3, color=RED, label="training batches")
        ax.axvline(self.best.step, ls=":", color=ink(ax), label=f"best, step {self.best.step:,}")
        curves = (bound - error, bound + error, history["train_bound"])
        late = np.concatenate([curve[len(curve) // 4 :] for curve in curves])
        if len(late := late[np.isfinite(late)]):
            margin = 0.1 * max(np.ptp(late), 1e-6)
            ax.set_ylim(late.min() - margin, late.max() + margin)
        ax.set(xlabel="step", ylabel="bound, nats per datum")
        legend_beside(ax)
        return ax
