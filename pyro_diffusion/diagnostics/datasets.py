"""Tensors as ``xarray`` datasets: names, dimensions and units of every group that ``to_arviz`` returns."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_diffusion.bounds import ELBOTerms
from pyro_diffusion.evidence import Evidence
from pyro_diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    import xarray

__all__ = [
    "DRAWS",
    "as_numpy",
    "bound_dataset",
    "dataset",
    "importance_dataset",
    "schedule_dataset",
    "states_dataset",
]

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


def states_dataset(
    dims: tuple[str, ...], states: Mapping[str, Tensor], timesteps: list[int] | None
) -> "xarray.Dataset":
    """Latent states as one variable ``x`` along ``timesteps``; for ``None``, a variable for each site."""
    if timesteps is None:
        return dataset(dims, states)
    x = torch.stack([states[f"x_{t}"] for t in timesteps], dim=len(dims) - 1)
    return dataset((*dims, "timestep"), {"x": x}, timestep=timesteps)


def bound_dataset(terms: ELBOTerms) -> "xarray.Dataset":
    """Means over data of the bound's terms, by timestep."""
    means = torch.tensor(terms.term_means(), dtype=torch.float64)
    names = ("term", "monte_carlo_error", "sampling_error")
    kind, site = ("timestep", list(terms.kinds)), ("timestep", list(terms.site_names))
    labelled = dataset(("timestep",), dict(zip(names, means.T, strict=True)), kind=kind, site=site)
    return labelled.assign_attrs(units="nats per datum", event_size=terms.event_size)


def importance_dataset(evidence: Evidence) -> "xarray.Dataset":
    """Evidence and bound of every datum from importance weights, with what grades the weights."""
    fields: dict[str, Any] = {
        "elbo": evidence.elbo,
        "elbo_standard_error": evidence.elbo_standard_error,
        "evidence": evidence.log_evidence,
        "evidence_standard_error": evidence.standard_error,
        "pareto_k": evidence.pareto_k,
        "ess": evidence.ess,
    }
    return dataset(("data",), fields).assign_attrs(
        units="nats per datum", estimator=evidence.estimator, data=evidence.data,
        num_particles=evidence.num_particles,
    )  # fmt: skip


def schedule_dataset(schedule: NoiseSchedule) -> "xarray.Dataset":
    """The curves of a schedule by timestep. A curve for each entry is averaged over entries."""
    t = torch.arange(1, schedule.num_timesteps + 1, device=schedule.device)
    curves = {"alpha_bar": schedule.alpha_bar(t), "log_snr": schedule.log_snr(t)}
    means = {name: x.reshape(len(t), -1).mean(1) for name, x in curves.items()}
    return dataset(("timestep",), means, timestep=as_numpy(t))
