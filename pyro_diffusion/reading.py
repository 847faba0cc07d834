"""What it means to read a model: no gradient, no site in a surrounding trace, and a budget of memory.

A *reader* gives numbers of a model that somebody wants to look at: a bound, an evidence, draws. It runs
programs inside :func:`reading`. It works through rows in chunks that :func:`rows_within` counts from the
tensors of a step, as they are measured with a row or two, and not from the shape of a datum.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_diffusion.checks import unchecked
from pyro_diffusion.networks import evaluating
from pyro_diffusion.params import ParamScope

__all__ = [
    "BUDGET",
    "Footprint",
    "alone",
    "footprint",
    "reading",
    "refuse_gradients",
    "rows_within",
]

#: Bytes of tensors that a reader holds at a time, beside the model, the data and the results.
BUDGET = 2**28

#: Rows of the second measurement: enough to tell what a row takes from what all rows share.
_SEVERAL = 8


@contextmanager
def reading(*programs: Callable[..., Any], data: Any = ()) -> Iterator[None]:
    """Run programs to read them: in evaluation mode, without gradients, and unseen by handlers outside.

    Args:
        programs: What is read; modules among them are in evaluation mode meanwhile.
        data: Data, states or context that the result depends on: a tensor, or a tree of them.

    Raises:
        ValueError: Data that require a gradient, where gradients are recorded.
    """
    refuse_gradients(data)
    with torch.no_grad(), alone(*programs):
        yield


@contextmanager
def alone(*programs: Callable[..., Any]) -> Iterator[None]:
    """Run programs unseen by handlers outside, in evaluation mode, with parameters under their own names.

    A family's kernels may be called outside of its programs here: its parameters are stated, and weights that
    are drawn are drawn once.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(*programs))
        stack.enter_context(poutine.block())
        for program in programs:
            if isinstance(program, ParamScope):
                stack.enter_context(program.param_statements())
        yield


def refuse_gradients(data: Any) -> None:
    """Raise a ``ValueError`` if data require a gradient that a reader would cut."""
    leaves = (x for x in pytree.tree_leaves(data) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        raise ValueError(
            "argument 'x_0', or what goes with it: got data that require a gradient; expected numbers, "
            "because this function reads the model and records no gradient. Take bound_by_datum(model, "
            "guide, x_0) or ode_log_likelihood(diffusion, x_0), which pass gradients; or pass x_0.detach()."
        )


class Footprint(NamedTuple):
    """Bytes of tensors that a function makes."""

    held: int  #: of what it returns
    peak: int  #: the most that live at a time


def footprint(function: Callable[[], Any]) -> Footprint:
    """Run a function, and count the bytes of the tensors that it makes. Random states are as before.

    Values are not checked, because the run itself will look at all of them.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), unchecked(), _Memory() as memory:
        result = function()
        held = memory.live
    del result
    return Footprint(held, memory.peak)


def rows_within(cost: Callable[[int], float], most: int, budget: float = BUDGET) -> int:
    """How many rows to take at a time, ``1 … most``, to stay within a budget of memory.

    Args:
        cost: Bytes that a number of rows takes, from a :func:`footprint`.
        most: Rows that suffice.
        budget: Bytes.
    """
    try:
        one = cost(1)
    except ValueError:  # of the data, which the run itself will raise about all of them
        return most
    if one * most <= budget or one * _SEVERAL > budget:
        return max(1, min(most, int(budget // max(one, 1))))
    each = max((cost(_SEVERAL) - one) / (_SEVERAL - 1), 1.0)
    return max(1, min(most, int((budget - max(one - each, 0.0)) // each)))


class _Memory(TorchDispatchMode):
    """Bytes in the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[Any] = set()  # weak references, to storages of others as well

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
