"""What networks share: evaluation mode, dtypes, calls of a layer, and checks of their arguments."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_between, check_count
from pyro_diffusion.given import beside

DEFAULT = "Leave it out to take the default."
VECTORS = "Pass (64,) for vectors of 64 numbers, () for single numbers."


@contextmanager
def evaluating(*programs: Callable[..., Any]) -> Iterator[None]:
    """Switch modules to evaluation mode, which has no dropout, and restore each module's mode afterwards."""
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules() if m.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def network_dtype(network: nn.Module) -> torch.dtype:
    """Dtype of a network's first floating-point parameter: the dtype in which it takes its states."""
    dtype = _first_dtype(network)  # in the order of parameters(), but quicker
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    return dtype or next(floating, torch.get_default_dtype())


def _first_dtype(module: nn.Module) -> torch.dtype | None:
    own = [p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point()]
    below = (_first_dtype(m) for m in module._modules.values() if m is not None)
    return own[0] if own else next((dtype for dtype in below if dtype), None)


def apply_layer(layer: nn.Module, h: Tensor, **given: Any) -> Any:
    """``layer(h)``, or ``layer(h, context=c)``.

    A layer of half precision computes in its own dtype and returns float32.
    """
    given = {name: beside(h, value) for name, value in given.items()}
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), h.dtype)
    if torch.finfo(dtype).bits >= 32:
        return layer(h, **given)
    output = layer(h.to(dtype), **given)
    return output.float() if isinstance(output, Tensor) else output


def check_dropout(dropout: Any) -> float:
    """The share of hidden units to drop, in [0, 1]."""
    return check_between(
        "dropout", dropout, 0, 1, "the share of hidden units to drop", DEFAULT, "[]"
    )


def check_counts(**counts: int) -> list[int]:
    """Positive whole numbers of a network's arguments, by name."""
    return [check_count(name, count, 1, DEFAULT) for name, count in counts.items()]


def check_input(argument: str, x: Tensor, batch_dim: int, shape: torch.Size, remedy: str) -> None:
    """Raise a ``ValueError`` for an input of another shape than ``batch_shape + shape``."""
    if batch_dim < 0 or x.shape[batch_dim:] != shape:
        batch = "(B,)" if argument == "x_t" else "batch_shape"
        raise ValueError(
            f"argument {argument!r}: got shape {tuple(x.shape)}; expected {batch} + {tuple(shape)}. {remedy}"
        )
