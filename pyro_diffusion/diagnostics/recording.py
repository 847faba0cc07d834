"""Programs run from outside, and the values of their sample sites.

:class:`Record` reads the sites of a program, :class:`Held` sets latent sites to values that were recorded.
In both, the rows of the data plate are the first dimension of a value.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.family import Family

__all__ = ["Held", "Pair", "Record", "joined", "programs", "record_particles", "repeated"]

Pair = Family | tuple[Callable[..., Any], Callable[..., Any]]


def programs(family: Pair) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide. A family's guide is the one in the model's order, if it has one."""
    if isinstance(family, Family):
        return family.model, getattr(family, "posterior_guide", family.guide)
    if isinstance(family, tuple | list) and len(family) == 2 and all(map(callable, family)):
        return family[0], family[1]
    raise ValueError(
        f"argument 'family': got a {type(family).__name__}; expected a DiffusionModel, a HierarchicalVAE or "
        "a pair of programs. Pass (model, guide)."
    )


class Record(Messenger):
    """Records the values of sample sites, or the means of the distributions at the sites; rows in front.

    Args:
        keep: Names of the sites to record; ``None`` is all of them.
        mean: Record means. Where a distribution has no formula for its mean, the draw is recorded.
    """

    def __init__(self, keep: Collection[str] | None = None, *, mean: bool = False) -> None:
        super().__init__()
        self.keep, self.mean = keep, mean
        self.values: dict[str, Tensor] = {}
        self.observed: list[str] = []

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
        states: Values by site, rows in front.
    """

    def __init__(self, states: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.states = states

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.states:
            value = self.states[msg["name"]]
            msg["value"] = value.movedim(0, value.dim() - msg["fn"].event_dim - 1)
            msg["done"] = True


def repeated(x: Tensor, particles: int) -> Tensor:
    """The rows of ``x`` once for each particle, shape ``(particles * N, …)``; particles change slowest."""
    return x.repeat(particles, *(1,) * (x.dim() - 1))


def record_particles(
    record: Record, program: Callable[..., Any], x_0: Tensor, particles: int
) -> dict[str, Tensor]:
    """What ``record`` sees of ``program(x_0)``, run once for all particles; ``(particles, N, …)`` by site."""
    with record:
        program(repeated(x_0, particles))
    return {name: x.unflatten(0, (particles, -1)) for name, x in record.values.items()}


def joined(chunks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Tensor]:
    """Values by site of all chunks, put together along ``dim``."""
    return {name: torch.cat([chunk[name] for chunk in chunks], dim) for name in chunks[0]}
