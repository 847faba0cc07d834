r"""The bound of held-out data while a model is fitted, and the decision to stop.

Every check reads the bound :math:`\hat L_n` of the same held-out data with the same noise, so that two checks
differ by the model alone. What one check is behind another is therefore a paired difference,

.. math::
    d_n = \hat L_n^{\text{best}} - \hat L_n^{\text{now}}, \qquad
    \bar d = \sum_n w_n d_n, \qquad
    \operatorname{se}^2 = \tfrac{N}{N - 1} \sum_n w_n^2 (d_n - \bar d)^2,

with :math:`w_n` the data's shares, :math:`1/N` unless they have weights. A model that overfits falls behind
its best by more than :math:`2 \operatorname{se}`.
"""

import math
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_diffusion.bounds import Estimate, elbo_terms
from pyro_diffusion.bounds.rows import Rows
from pyro_diffusion.bounds.single import whose_terms_are_single
from pyro_diffusion.chains import Steps, SubsampledProgram
from pyro_diffusion.checks import require
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence.evidence import fingerprint
from pyro_diffusion.family import Pair, programs
from pyro_diffusion.given import Given
from pyro_diffusion.reading import reading
from pyro_diffusion.training.batches import arrays_of, each, rows_of
from pyro_diffusion.training.columns import Columns, ShuffledRows
from pyro_diffusion.training.objectives import bound_by_datum

_ROWS = 8192  # network rows of a reading, at most
_FEWEST, _MOST = 4, 64  # rows for each datum of a diffusion model
_PARTICLES = 8  # trajectories for each datum of anything else, at most
_READINGS = 8  # of the best weights, at the end
_BEHIND = 2.0  # standard errors by which the best is ahead of a model that overfits


class HeldOut:
    r"""Held-out data, and how their bound is read.

    A diffusion model is read at :math:`m` timesteps for each datum, evenly spaced over groups of timesteps
    that are finer where the chain begins, and once at the reconstruction:

    .. math::
        \hat L_n = \log p(x_0 \mid x_1) - \frac{G}{m} \sum_{i=1}^m |g_i|\, L_{t_i} - L_T, \qquad
        t_i \in g_i .

    Anything else is read by whole trajectories.

    Args:
        family: What is fitted: a family, or a model and a guide.
        data: Columns of the held-out data.
        batch_size: Rows that the network takes at a time.
        device: Where the model is.
    """

    model: nn.Module
    guide: nn.Module

    def __init__(self, family: Pair, data: Columns, batch_size: int, device: torch.device) -> None:
        self.data, self.batch_size, self.device = dict(data), batch_size, device
        self.weights: Tensor | None = self.data.pop("weights", None)
        self.count = len(self.data["x_0"])
        self.model, self.guide = programs(family)  # type: ignore[assignment]  # fit has checked it
        self._bound = self._reader()

    def _reader(self) -> Callable[..., Tensor]:
        single = whose_terms_are_single(self.model, self.guide)
        return self._along_paths if single is None else partial(self._of_rows, single)

    @property
    def fingerprint(self) -> str:
        """Words that tell these data, with their mask, context and weights, from others."""
        x_0, *mask = (
            rows_of(self.data[name], slice(None)) for name in ("x_0", "mask") if name in self.data
        )
        others = [self.data[name] for name in ("context", "null") if name in self.data]
        beside = [rows_of(array, slice(None)) for part in others for array in arrays_of(part)]
        beside += [] if self.weights is None else [self.weights]
        return " ".join([fingerprint(x_0, *mask), *map(fingerprint, beside)])

    def fewer(self, most: int) -> "HeldOut":
        """At most so many of the data, a random choice that is always the same; all if they have weights."""
        if self.count <= most or self.weights is not None:
            return self
        part = copy(self)
        part.data = each(lambda array: ShuffledRows(array, 0, most, 0).whole(), self.data)
        part.count = most
        part._bound = part._reader()
        return part

    def estimate(self) -> Estimate:
        """The mean bound with both errors, from eight readings with noise of their own."""
        readings = torch.stack([self.read(seed) for seed in range(1, 1 + _READINGS)])
        bounds, errors = readings.mean(0), readings.std(0) / math.sqrt(_READINGS)
        if self.weights is None:
            return Estimate.of(bounds, errors)
        shares = self.count * (self.weights / self.weights.sum()).double().cpu()
        mean = (shares * bounds).mean()
        return Estimate.of(mean + shares * (bounds - mean), shares * errors)

    def read(self, seed: int = 0, rows: int = _ROWS) -> Tensor:
        """An estimate of the bound of every datum, float64 nats, ``(N,)``.

        Args:
            seed: Of the noise.
            rows: Network rows for all data, or trajectories; each datum has four rows at least.
        """
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        bounds = []
        with reading(self.model, self.guide), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for first in range(0, self.count, self.batch_size):
                batch = slice(first, first + self.batch_size)
                given = self._rows(batch)
                bounds.append(self._bound(given.pop("x_0"), given, rows // self.count))
        return torch.cat(bounds).cpu()

    def _rows(self, rows: slice) -> Columns:
        batch: Columns = each(lambda array: rows_of(array, rows).to(self.device), self.data)
        return batch

    def _of_rows(
        self, diffusion: DiffusionModel, x_0: Tensor, given: dict[str, Any], share: int
    ) -> Tensor:
        time = Steps(diffusion.schedule.num_timesteps)
        rows = Rows(diffusion, x_0, Given.of(**given), time, self.batch_size)
        data = torch.arange(len(x_0), device=x_0.device)
        bound = rows.known + rows.terms(data, rows.timesteps(torch.zeros_like(data), data))
        groups = len(rows.sizes) - 1
        if not groups:  # a chain of one step
            return bound
        m = min(max(_FEWEST, share), _MOST)
        shift = torch.rand(len(x_0), dtype=torch.float64, device=x_0.device)
        place = (torch.arange(m, device=x_0.device)[:, None] + shift) * groups / m
        group, position = 1 + place.long(), place.frac()
        t = rows.timesteps(group.flatten(), position.flatten())
        terms = rows.terms(data.expand(m, -1).flatten(), t).reshape(m, -1)
        return bound + (rows.sizes[group] * terms).sum(0) * groups / m

    def _along_paths(self, x_0: Tensor, given: dict[str, Any], share: int) -> Tensor:
        particles = min(max(1, share), _PARTICLES)
        if any(isinstance(part, SubsampledProgram) for part in self.model.modules()):
            draws = [bound_by_datum(self.model, self.guide, x_0, **given) for _ in range(particles)]
            return torch.stack(draws).mean(0)
        terms = elbo_terms(
            self.model, self.guide, x_0, num_particles=particles, progress=False, **given
        )
        return terms.elbo


class Mean(NamedTuple):
    """A mean over data with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None = None) -> "Mean":
        """Of values ``(N,)``, with the data's weights."""
        n = len(values)
        w = torch.full_like(values, 1 / n) if weights is None else (weights / weights.sum()).cpu()
        mean = (w * values).sum()
        error = ((w * (values - mean)).square().sum() * n / (n - 1)).sqrt() if n > 1 else math.nan
        return cls(float(mean), float(error))

    @property
    def is_clear(self) -> bool:
        """Whether it is positive by more than two standard errors."""
        return self.value > _BEHIND * self.error


class Record:
    """What the checks of a run found, the best weights, and whether to stop.

    Args:
        held_out: The held-out data.
        patience: Checks in a row in which the best is ahead by two standard errors, after which a run ends.

    Attributes:
        checks: A dictionary of numbers for each check, in order.
        behind: What the last check is behind the best one, with the error of this difference.
    """

    def __init__(self, held_out: HeldOut, patience: int) -> None:
        self.data, self.weights, self.patience = held_out.fingerprint, held_out.weights, patience
        self.checks: list[dict[str, float]] = []
        self.behind = Mean(0.0, 0.0)
        self.best: dict[str, float] = {}
        self._best_bounds: Tensor | None = None
        self._best_tensors: list[Tensor] = []
        self._in_a_row = 0

    def add(self, bounds: Tensor, tensors: Callable[[], list[Tensor]], **numbers: float) -> None:
        """Put down a check.

        Args:
            bounds: Bound of every held-out datum.
            tensors: Gives the weights that were read; they are copied if they are the best so far.
            numbers: Other numbers of this check.
        """
        mean = Mean.of(bounds, self.weights)
        check = {"bound": mean.value, "bound_error": mean.error, **numbers}
        if self._best_bounds is None or mean.value > self.best["bound"]:
            self.best, self._best_bounds, self.behind = check, bounds, Mean(0.0, 0.0)
            self._best_tensors = [tensor.detach().clone() for tensor in tensors()]
        else:
            self.behind = Mean.of(self._best_bounds - bounds, self.weights)
        self._in_a_row = self._in_a_row + 1 if self.behind.is_clear else 0
        self.checks.append(check | {"behind": self.behind.value, "behind_error": self.behind.error})

    @property
    def is_over(self) -> bool:
        """Whether the best has been ahead often enough."""
        return self._in_a_row >= self.patience

    def restore(self, tensors: list[Tensor]) -> None:
        """Write the best weights into the tensors that they were copied from."""
        if self._best_tensors:
            with torch.no_grad():
                torch._foreach_copy_(tensors, self._best_tensors)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers and words."""
        return {
            "data": self.data,
            "checks": self.checks,
            "best": self.best,
            "behind": list(self.behind),
            "best_bounds": self._best_bounds,
            "best_tensors": self._best_tensors,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a record of the same held-out data."""
        require(
            state["data"] == self.data,
            "argument 'validation' or 'x_0'",
            "other held-out data than those that the run in this folder was begun with",
            "the same",
            "Resume with the data and the seed of before, or begin in another folder.",
        )
        self.checks, self.best = state["checks"], state["best"]
        self._best_bounds = state["best_bounds"]
        self.behind, self._best_tensors = Mean(*state["behind"]), state["best_tensors"]
        self._in_a_row = state["in_a_row"]
