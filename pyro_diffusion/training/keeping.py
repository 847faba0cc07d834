r"""The best parameters of a run, by a paired estimate of the bound.

A bound of a few draws is noisy, and a step can make a guide worse. Two states of a guide are compared with
the same random numbers, and by many draws,

.. math::
    \Delta = \frac1K \sum_{k=1}^K \big(\log w_k' - \log w_k\big),

so that the error of the difference is smaller than that of either bound.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_diffusion.checks import check_count, require
from pyro_diffusion.evidence.particles import global_draws
from pyro_diffusion.reading import forked

__all__ = ["Gain", "KeepBest"]


class Gain(NamedTuple):
    """A paired difference of two bounds, in nats."""

    value: float  #: bound of the present parameters minus that of the best ones before
    standard_error: float  #: of the difference
    kept: bool  #: whether the present parameters are now the best ones


class KeepBest:
    r"""Keep the parameters with the best bound of a model and a guide with global latents.

    It holds the present parameters as the best ones, and compares later ones with them. They take their
    place if the paired difference of the bounds is larger than its own standard error. A run that begins as
    good as a simpler guide therefore does not end worse than it, up to that error::

        best = KeepBest(model, guide, y, max_plate_nesting=1)
        for step in range(2_000):
            svi.step(y)
            if step % 200 == 199:
                best.update()
        best.restore()

    Args:
        model: Program for :math:`p(y, z)`.
        guide: Program for :math:`q(z)`, which has run once or runs here.
        args: Arguments of both programs.
        num_particles: Draws :math:`K` of a comparison.
        max_plate_nesting: See :func:`~pyro_diffusion.evidence.global_evidence`.
        seed: Seed of the draws, which are the same in every comparison. Draws of training are others.
        kwargs: Arguments of both programs by name.

    Raises:
        ValueError: The errors of :func:`~pyro_diffusion.evidence.global_evidence`; programs without
            parameters.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(1.0, 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> best = KeepBest(model, guide, num_particles=100)
        >>> svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
        >>> losses = [svi.step() for _ in range(100)]
        >>> best.update().kept
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        num_particles: int = 500,
        max_plate_nesting: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        remedy = "Some hundreds make the error of a difference small."
        self.num_particles = check_count("num_particles", num_particles, 2, remedy)
        self.max_plate_nesting, self.seed = max_plate_nesting, seed
        with torch.no_grad(), poutine.block():
            guide(*args, **kwargs)  # an automatic guide makes its parameters
        self._log_weights, self._values = self._read(), self._parameters()
        require(
            len(self._values) > 0,
            "argument 'guide'",
            "programs without parameters",
            "parameters to keep",
            "Pass a guide that is trained.",
        )

    @property
    def bound(self) -> float:
        """The bound of the best parameters, in nats, by the draws that chose them: high, the more so the more
        states were compared. Read ``global_evidence`` for one from fresh draws.
        """
        return self._log_weights.mean().item()

    def update(self) -> Gain:
        """Compare the present parameters with the best ones, and keep the better."""
        try:
            log_weights = self._read()
        except ValueError as error:
            warnings.warn(f"these parameters are not kept, because of {error}", stacklevel=2)
            return Gain(-float("inf"), 0.0, False)
        change = log_weights - self._log_weights
        value, spread = change.mean().item(), (change.std() / len(change) ** 0.5).item()
        kept = value > spread
        if kept:
            self._log_weights, self._values = log_weights, self._parameters()
        return Gain(value, spread, kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best parameters back, in place."""
        for parameter, value in self._values:
            parameter.copy_(value)

    def _read(self) -> Tensor:
        """Log-weights of the same random numbers as ever."""
        with forked():
            torch.manual_seed(self.seed)
            return global_draws(
                self.model, self.guide, self.num_particles, self.max_plate_nesting, self.args,
                self.kwargs, progress=False,
            ).log_weights  # fmt: skip

    def _parameters(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that both programs state, with copies of their values."""
        with torch.no_grad(), poutine.block(), poutine.trace(param_only=True) as stated:
            with poutine.trace() as drawn:
                self.guide(*self.args, **self.kwargs)
            with poutine.replay(trace=drawn.trace):
                self.model(*self.args, **self.kwargs)
        found = [
            pyro.get_param_store()._params[name]
            for name, site in stated.trace.nodes.items() if site["type"] == "param"
        ]  # fmt: skip
        return [(parameter, parameter.detach().clone()) for parameter in found]
