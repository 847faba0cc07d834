"""What :func:`~pyro_diffusion.training.fit` returns: the history of a run, and its best held-out bound."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_diffusion.bounds import Estimate
from pyro_diffusion.family import Pair
from pyro_diffusion.training.columns import Parts
from pyro_diffusion.training.held_out import BEHIND, Mean, Record

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
            name=type(family).__name__
            if not isinstance(family, tuple | list)
            else "a model and a guide",
        )

    @property
    def num_steps(self) -> int:
        """Steps of the optimiser."""
        return int(self.history["step"][-1])

    @property
    def overfits(self) -> bool:
        """Whether the last weights are behind the best by more than two paired standard errors."""
        return self.behind.value > BEHIND * self.behind.error

    @property
    def overfitting(self) -> str:
        """The sentence about it."""
        return (
            f"the held-out bound at the end (step {self.num_steps}) is {self.behind.value:.3g} ± "
            f"{self.behind.error:.2g} nats per datum below the best (step {self.best.step}): the model "
            "overfits. The best weights are in the model. More data, dropout or weight decay "
            "(recipe=Recipe(weight_decay=1.0)) may help."
        )

    def __repr__(self) -> str:
        lines = [
            f"Fit of {self.name}: {self.num_data:,} data to train on, {self.num_held_out:,} held out",
            f"  held-out bound  {self.best.bound} nats per datum",
            f"  at step         {self.best.step:,} of {self.num_steps:,}; ended: {self.ended}",
            f"  time            {self.seconds:.1f} s, {self.num_steps / max(self.seconds, 1e-9):.0f} steps/s",
        ]
        if self.overfits:
            lines.append(
                f"  overfits        {self.behind.value:.3g} ± {self.behind.error:.2g} nats behind at the end"
            )
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, **errorbar: Any) -> "Axes":
        """The held-out bound by step with its error, that of the batches, and the best step.

        Args:
            ax: Axes to draw into; ``None`` makes new ones.
            errorbar: Passed on to ``Axes.fill_between``, the band of the error.

        Returns:
            The axes, step against nats per datum. The first checks are left out of the limits, where the
            bound is far below the best.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")[1]
        step, bound = self.history["step"].values, self.history["bound"].values
        error, train = self.history["bound_error"].values, self.history["train_bound"].values
        (line,) = ax.plot(step, bound, label="held-out bound, averaged weights")
        band = {"alpha": 0.25, "lw": 0, "color": line.get_color()} | errorbar
        ax.fill_between(step, bound - error, bound + error, label="one standard error", **band)
        ax.plot(step, train, ".", ms=3, color="C1", label="bound of the training batches")
        ax.axvline(self.best.step, ls=":", color="0.5", label=f"best, step {self.best.step:,}")
        shown = np.concatenate([bound[len(bound) // 4 :], train[len(train) // 4 :]])
        if len(shown := shown[np.isfinite(shown)]):
            spread = max(np.ptp(shown), 1e-6)
            ax.set_ylim(shown.min() - 0.3 * spread, shown.max() + 0.2 * spread)
        ax.set(xlabel="step", ylabel="bound, nats per datum")
        ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return ax
