"""The types of Pyro's distributions, for a type checker, and the interface of a likelihood.

Pyro has few type hints, and many functions of this package return a Pyro distribution. This module declares
the interface of these distributions, after ``pyro/distributions/torch_distribution.py``. When a program runs,
``TorchDistribution`` is Pyro's own class.

A user's own code is checked with these lines in ``mypy.ini``::

    [mypy]
    strict = true
    untyped_calls_exclude = torch

    [mypy-pyro.*]
    follow_imports = skip
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    import torch
    from torch.distributions import Distribution, constraints

    class TorchDistribution(Distribution):
        """A torch distribution that can be a site of a Pyro program."""

        has_rsample: bool
        has_enumerate_support: bool

        def __call__(self, sample_shape: Sequence[int] = ...) -> Tensor: ...

        @property
        def event_dim(self) -> int:
            """Number of rightmost dimensions of a draw that depend on one another."""

        @property
        def support(self) -> constraints.Constraint: ...

        def shape(self, sample_shape: Sequence[int] = ...) -> torch.Size:
            """Shape of ``sample(sample_shape)``."""

        def expand(
            self, batch_shape: Sequence[int], _instance: object = None
        ) -> "TorchDistribution": ...

        def expand_by(self, sample_shape: Sequence[int]) -> "TorchDistribution":
            """The distribution with ``sample_shape`` to the left of its batch shape."""

        def to_event(self, reinterpreted_batch_ndims: int | None = None) -> "TorchDistribution":
            """The distribution whose rightmost batch dimensions are event dimensions."""

        def mask(self, mask: bool | Tensor) -> "TorchDistribution":
            """The distribution whose log-probability is zero where the mask is false."""
else:
    from pyro.distributions.torch_distribution import TorchDistribution


class EmbedsData(Protocol):
    r"""A likelihood :math:`p(x_0 \mid x_1)`: one of this package, or any object with these two methods."""

    def embed(self, x_0: Tensor) -> Tensor:
        """Data of shape ``batch_shape + …`` as points of the chain, ``batch_shape + event_shape``."""

    def __call__(self, x_0_hat: Tensor) -> TorchDistribution:
        """The distribution over the data, given an estimate in embedded space."""
