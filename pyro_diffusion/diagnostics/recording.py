"""Programs run from outside, and the values of their sample sites as tensors and as labelled arrays.

:class:`Record` reads the sites of a program, :class:`Held` sets latent sites to values that were recorded.
In both, the rows of the data plate are the first dimension of a value. :func:`dataset` names the dimensions.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.evidence import Evidence
from pyro_diffusion.given import Given, repeated, run, together

if TYPE_CHECKING:
    import xarray


class Record(Messenger):
    """Records the values of sample sites, or the means of their distributions; the first dimension is rows.

    Args:
        keep: Names of the sites to record; ``None`` is all of them.
        mean: Record means. Where a distribution has no formula for its mean, the draw is recorded.
    """

    def __init__(self, keep: Collection[str] | None = None, *, mean: bool = False) -> None:
        super().__init__()
        self.keep, self.mean = keep, mean
        self.values: dict[str, Tensor] = {}
        self.observed: list[str] = []

    def of(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run a program, and return the values that were recorded."""
        with self:
            program(*args, **kwargs)
        return self.values

    def of_particles(
        self, program: Callable[..., Any], x_0: Tensor, particles: int, given: Given = Given()
    ) -> dict[str, Tensor]:
        """Run ``program(x_0)`` once for all particles; the values have shape ``(particles, N, …)``."""
        data, rows = together(lambda x: repeated(x, particles), x_0, given)
        values = self.of(run, program, data, rows.arguments())
        return {name: x.unflatten(0, (particles, -1)) for name, x in values.items()}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            self.observed.append(msg["name"])
        deterministic = site_is_subsample(msg) or msg["infer"].get("_deterministic")
        factor = msg["is_observed"] and msg["value"].numel() == 0
        if not (deterministic or factor) and (self.keep is None or msg["name"] in self.keep):
            value = _mean(msg) if self.mean else msg["value"]
            self.values[msg["name"]] = value.movedim(value.dim() - msg["fn"].event_dim - 1, 0)


def _mean(msg: Any) -> Tensor:
    try:
        mean = msg["fn"].mean
    except NotImplementedError:
        return msg["value"]
    if mean.isnan().any():
        raise ValueError(
            f"site {msg['name']!r}: got a {type(msg['fn']).__name__}, which has no mean; expected numbers. "
            "Leave out sites of categories."
        )
    return mean


class Held(Messenger):
    """Holds latent sites at values that :class:`Record` has recorded.

    Args:
        states: Values by site; the first dimension is rows.
    """

    def __init__(self, states: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.states = states

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.states:
            value = self.states[msg["name"]]
            msg["value"] = value.movedim(0, value.dim() - msg["fn"].event_dim - 1)
            msg["done"] = True


def joined(chunks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Tensor]:
    """Values by site of all chunks, put together along ``dim``."""
    return {name: torch.cat([chunk[name] for chunk in chunks], dim) for name in chunks[0]}


DRAWS = ("chain", "draw", "data")  #: dimensions of a number for each trajectory


def as_numpy(x: Tensor) -> np.ndarray:
    """A tensor's values as a NumPy array, from any device."""
    return x.detach().cpu().numpy()


def dataset(
    dims: tuple[str, ...], variables: Mapping[str, Tensor], **coords: Any
) -> "xarray.Dataset":
    """Tensors whose first dimensions are ``dims``; the others are the event's and are numbered.

    The dimension ``"chain"`` is added to the tensors, with length one. ``coords`` are coordinates by name; a
    dimension without any counts from zero.
    """
    import xarray

    chain = (None,) if "chain" in dims else ()
    arrays = {name: as_numpy(x)[(*chain, ...)] for name, x in variables.items()}
    event = {
        name: [f"{name}_dim_{i}" for i in range(values.ndim - len(dims))]
        for name, values in arrays.items()
    }
    labelled = xarray.Dataset({name: ((*dims, *event[name]), arrays[name]) for name in arrays})
    index = {dim: np.arange(size) for dim, size in labelled.sizes.items()}
    return labelled.assign_coords(index | coords)


def importance_fields(evidence: Evidence) -> dict[str, Any]:
    """Bound and evidence from importance weights, and diagnostics of the weights, by name."""
    return {
        "elbo": evidence.elbo,
        "elbo_standard_error": evidence.elbo_standard_error,
        "evidence": evidence.log_evidence,
        "evidence_standard_error": evidence.standard_error,
        "pareto_k": evidence.pareto_k,
        "ess": evidence.ess,
    }


def states_dataset(
    dims: tuple[str, ...], states: Mapping[str, Tensor], timesteps: list[int] | None
) -> "xarray.Dataset":
    """Latent states as one variable ``x`` along ``timesteps``; for ``None``, a variable for each site."""
    if timesteps is None:
        return dataset(dims, states)
    x = torch.stack([states[f"x_{t}"] for t in timesteps], dim=len(dims) - 1)
    return dataset((*dims, "timestep"), {"x": x}, timestep=timesteps)
