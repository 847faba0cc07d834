"""What it means to read a model: no gradient, no site in a surrounding trace, and a budget of memory.

A *reader* is a function that returns results of a model: a bound, an evidence, draws. It runs programs inside
:func:`reading`, and takes the rows of the data in chunks. :func:`rows_within` finds the size of a chunk. It
measures the memory that a step takes with a few rows, and does not guess it from the shape of a datum.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_diffusion.checks import unchecked
from pyro_diffusion.networks import evaluating
from pyro_diffusion.networks.context import any_label
from pyro_diffusion.params import ParamScope

__all__ = [
    "BUDGET",
    "Footprint",
    "alone",
    "footprint",
    "forked",
    "reading",
    "refuse_gradients",
    "rows_within",
]

#: Bytes of tensors that a reader holds at a time, besides the model, the data and the results.
BUDGET = 2**28

#: Rows of the second measurement: enough to separate the memory of a row from what all rows share.
_SEVERAL = 8


@contextmanager
def reading(*programs: Callable[..., Any], data: Any = ()) -> Iterator[None]:
    """Run programs to read them: in evaluation mode, without gradients, and hidden from outer handlers.

    Args:
        programs: The programs. Modules among them are in evaluation mode meanwhile.
        data: Data, states or context that the result depends on: a tensor, or a tree of them.

    Raises:
        ValueError: Data that require a gradient, where gradients are recorded.
    """
    refuse_gradients(data)
    with torch.no_grad(), alone(*programs):
        yield


def forked() -> AbstractContextManager[None]:
    """Leave the random numbers of all devices as they are: draws inside do not move them on."""
    return torch.random.fork_rng(
        range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    )


@contextmanager
def alone(*programs: Callable[..., Any]) -> Iterator[None]:
    """Run programs hidden from outer handlers, in evaluation mode, with parameters under their own names.

    A family's kernels may be called here outside of its programs, because its parameters are stated. Weights
    with a prior are drawn once.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(*programs))
        stack.enter_context(poutine.block())
        for program in programs:
            if isinstance(program, ParamScope):
                stack.enter_context(program.param_statements())
        yield


def refuse_gradients(data: Any) -> None:
    """Raise a ``ValueError`` if data require a gradient, which a reader does not record."""
    leaves = (x for x in pytree.tree_leaves(data) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        raise ValueError(
            "argument 'x_0', or what goes with it: got data that require a gradient; expected data that "
            "require none, because this function records no gradient. Use bound_by_datum(model, guide, x_0) "
            "or ode_log_likelihood(diffusion, x_0), which pass gradients, or pass x_0.detach()."
        )


class Footprint(NamedTuple):
    """Bytes of tensors that a function makes."""

    held: int  #: of what it returns
    peak: int  #: the most that exist at one time


def footprint(function: Callable[[], Any]) -> Footprint:
    """Run a function, and count the bytes of the tensors that it makes. Random states are restored.

    Values are not checked, because the real run will check all of them.
    """
    with forked(), unchecked(), any_label(), _Memory() as memory:
        result = function()
        held = memory.live
    del result
    return Footprint(held, memory.peak)


def rows_within(cost: Callable[[int], float], most: int, budget: float = BUDGET) -> int:
    """How many rows to take at a time, ``1 … most``, to stay within a budget of memory.

    Args:
        cost: Bytes that a number of rows takes, from a :func:`footprint`.
        most: The largest useful number of rows.
        budget: Bytes.
    """
    try:
        one = cost(1)
    except (ValueError, IndexError):  # bad data or labels: the run itself will raise the error
        return most
    if one * most <= budget or one * _SEVERAL > budget:
        return max(1, min(most, int(budget // max(one, 1))))
    each = max((cost(_SEVERAL) - one) / (_SEVERAL - 1), 1.0)
    return max(1, min(most, int((budget - max(one - each, 0.0)) // each)))


class _Memory(TorchDispatchMode):
    """The bytes in the storages that operations make, as long as these exist."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[Any] = set()  # weak references, also to storages that existed before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._note(x, made=False)
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self._note(x, made=True)
        return result

    def _note(self, x: Tensor, made: bool) -> None:
        storage = x.untyped_storage()
        size = storage.nbytes() if made else 0
        reference = weakref.ref(storage, lambda gone: self._forget(gone, size))
        if reference not in self._known:
            self._known.add(reference)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, gone: Any, size: int) -> None:
        if gone in self._known:
            self._known.discard(gone)
            self.live -= size
