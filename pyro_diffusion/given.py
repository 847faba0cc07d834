r"""What goes with the data: a mask of observed entries, a context, and the rows whose context was dropped.

A program takes them by name, together with the data. :class:`Given` holds them, and :func:`together` splits,
repeats or moves them with the data.

Under a ``mask`` of observed entries a site has the terms of those entries only,

.. math::
    \log p(x_t \mid \cdot) = \sum_{i\ \text{observed}} \log p(x_{t,i} \mid \cdot),

which is the marginal of a kernel whose entries are independent given what it is conditioned on.
The effect handler :class:`ObservedEntries` implements this. The value of an unobserved entry of the data does
not matter, and may be NaN.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent
from torch.utils import _pytree as pytree

from pyro_diffusion.checks import as_numbers, check_finite, described, require, widened
from pyro_diffusion.distributions import WrappedSite
from pyro_diffusion.typed import TorchDistribution

__all__ = [
    "STATE",
    "Given",
    "ObservedEntries",
    "as_real",
    "beside",
    "by_position",
    "chunks",
    "first_repeated",
    "flattened",
    "heard",
    "name_of",
    "observed_part",
    "repeated",
    "run",
    "seen",
    "takes",
    "together",
    "usable",
]

#: The ``infer`` of a site that holds a state or the datum: a mask acts on these sites.
STATE = {"state": True}


class Given(NamedTuple):
    """What goes with data of ``N`` rows; ``None`` for what is not given."""

    mask: Tensor | None = None  #: observed entries, boolean, of the data's shape
    context: Any = None  #: a tensor, or a tuple or dictionary of tensors, ``(N, …)`` each
    null: Tensor | None = None  #: rows whose context was dropped, boolean, ``(N,)``

    @classmethod
    def of(cls, **given: Any) -> "Given":
        """What goes with data, from arguments by name.

        Raises:
            ValueError: Another name.
        """
        unknown = set(given) - set(cls._fields)
        require(
            not unknown,
            f"argument {min(unknown, default='')!r}",
            "a name that is no argument of programs and readers",
            "mask=, context= or null=",
            "Check the spelling.",
        )
        null = given.get("null")
        null = null if null is None or isinstance(null, Tensor) else as_numbers("null", null)
        return cls(**given | {"context": _numbers(given.get("context")), "null": null})

    def with_rows(
        self, count: int | None, *, shared: bool = False, device: torch.device | None = None
    ) -> "Given":
        """The same with a row for each datum: a single number is for all data.

        Args:
            count: Number of data; ``None`` for as many as there are rows, where a plate of the caller has
                the number.
            shared: Whether a context of a single row is for all, as it is for data that are drawn.
            device: Where a single number goes.

        Raises:
            ValueError: Another number of rows, a context that is not finite, or dropped rows of none.
        """
        if count is None:
            leaves = pytree.tree_leaves((self.context, self.null))
            count = max((len(x) for x in leaves if isinstance(x, Tensor) and x.dim()), default=1)
        self._check_null(count)
        if self.context is None:
            return self

        def of(part: Tensor) -> Tensor:
            """A row for each datum."""
            part = part.to(device) if part.dim() == 0 else part
            if part.dim() == 0 or (shared and len(part) == 1):
                part = part.expand(count, *part.shape[1:])
            if len(part) != count:
                for_all = "Pass context[None] for one" if shared else "Expand a context"
                raise ValueError(
                    f"argument 'context': got shape {tuple(part.shape)} for {count} data; expected a row for "
                    f"each datum. {for_all} that all data share, and slice it together with the data."
                )
            return self._checked(part)

        null = None if self.null is None else usable(self.null)
        return self._replace(context=pytree.tree_map(of, self.context), null=null)

    def _check_null(self, count: int) -> None:
        if self.null is None:
            return
        fit = isinstance(self.null, Tensor) and self.null.dtype == torch.bool
        alone = self.context is None
        require(
            fit and self.null.shape == (count,) and not alone,
            "argument 'null'",
            "dropped rows without a context"
            if alone
            else f"{_of_dtype(self.null)} for {count} data",
            "a boolean for each datum beside context=, true where its context was dropped",
            "Leave out both for data without a context.",
        )

    def _checked(self, context: Tensor) -> Tensor:
        """A context, if it is finite where it was not dropped; zero where it was."""
        context = usable(context)
        if self.null is not None:  # a gap, or a label that does not exist, may stand there
            null = self.null.reshape(-1, *(1,) * (context.dim() - 1)).to(context.device)
            context = context.masked_fill(null, 0)
        if not context.is_floating_point():
            return context
        remedy = "Fill the gaps, or drop the context of those rows: null=context.isnan().any(-1)."
        return check_finite("argument 'context'", context, remedy)

    def arguments(self) -> dict[str, Any]:
        """What is given, by the names of a program's arguments."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def of_kernels(self) -> dict[str, Any]:
        """The arguments of a kernel: the context, and the rows without one."""
        return {name: value for name, value in self.arguments().items() if name != "mask"}


def _of_dtype(value: Any) -> str:
    """What a value is, with the dtype of a tensor."""
    return described(value) + (f" and {value.dtype}" if isinstance(value, Tensor) else "")


def _numbers(context: Any, *, inside: bool = False) -> Any:
    """A context with tensors in place of arrays, numbers and lists of numbers; ``inside`` a tree of them."""
    if isinstance(context, Tensor) or (context is None and not inside):
        return context
    if isinstance(context, Mapping):
        return {name: _numbers(part, inside=True) for name, part in context.items()}
    if isinstance(context, tuple):
        parts = [_numbers(part, inside=True) for part in context]
        return type(context)(*parts) if hasattr(context, "_fields") else tuple(parts)
    if context is None:
        raise ValueError(
            "argument 'context': got None in a tuple or a dictionary; expected a tensor in each place. "
            "Leave the entry out, or pass null= for rows whose context is not known."
        )
    if isinstance(context, list) and any(isinstance(x, Tensor) and x.dim() for x in context):
        raise ValueError(
            f"argument 'context': got a list of {len(context)} tensors; expected a tensor, or a tuple or "
            "dictionary of tensors. Pass torch.stack(list) for rows, or tuple(list) for several contexts."
        )
    return as_numbers("context", context)


def together(
    function: Callable[[Tensor], Tensor], x_0: Tensor, given: Given
) -> tuple[Tensor, Given]:
    """Apply one function of rows to the data, and to each tensor that goes with them."""
    return function(x_0), Given(*(_each(function, part) for part in given))


def _each(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def repeated(x: Tensor, times: int) -> Tensor:
    """All rows, several times over, ``(times · N, …)``: for particles in front of the data."""
    return x.repeat(times, *(1,) * (x.dim() - 1))


def chunks(x_0: Tensor, given: Given, size: int) -> Iterator[tuple[int, Tensor, Given]]:
    """Data in chunks of so many rows, with what goes with them: the first row's number, data, given."""
    for start in range(0, len(x_0), size):
        yield start, *together(itemgetter(slice(start, start + size)), x_0, given)


def first_repeated(x_0: Tensor, given: Given, times: int) -> tuple[Tensor, Given]:
    """The first datum several times over, with what goes with it: rows to measure a step with."""
    return together(lambda x: repeated(x[:1], times), x_0, given)


def flattened(context: Any, batch_shape: torch.Size) -> Any:
    """A context of ``(N, …)`` as a network takes it: one flat batch axis, a row for each state."""

    def of(part: Tensor) -> Tensor:
        """The same for one tensor."""
        if part.dim() and part.shape[:1] not in ((1,), batch_shape[-1:]):
            raise ValueError(
                f"argument 'context': got {len(part)} rows for states of batch shape {tuple(batch_shape)}; "
                "expected a row for each datum, or one for all. In a plate of your own, pass as many rows "
                "as the plate has."
            )
        return part.expand(batch_shape + part.shape[1:]).reshape(-1, *part.shape[1:])

    return _each(of, context)


def by_position(x_0: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a program under Pyro's handlers, which have an argument ``context`` of their own."""
    rest = {name: value for name, value in given.items() if name != "context"}
    return [x_0] + ([given["context"]] if given.get("context") is not None else []), rest


def beside(state: Tensor, context: Any) -> Any:
    """A context in the dtype of a state, if it is on the same device; whole numbers stay whole."""

    def of(part: Tensor) -> Tensor:
        """The same for one tensor."""
        if part.device != state.device:
            raise ValueError(
                f"argument 'context': got a tensor on {part.device}; expected {state.device}, where the "
                f"model is. Call context.to({str(state.device)!r})."
            )
        return part.to(state.dtype) if part.is_floating_point() else part

    return _each(of, context)


def run(program: Callable[..., Any], x_0: Any, given: dict[str, Any]) -> Any:
    """Run a program with data and what goes with them, by name.

    A program that a Pyro handler wraps, as ``poutine.scale(model, 2.0)``, gets its context by position.
    """
    if not _is_wrapped(program):
        return program(x_0, **given)
    arguments, rest = by_position(x_0, given)
    return program(*arguments, **rest)


def _is_wrapped(program: Callable[..., Any]) -> bool:
    """Whether a program is inside of a handler, whose own argument ``context`` is in the way."""
    function: Any = program
    while isinstance(function, partial):
        function = function.func
    bound = function is not program and "context" in _parameters(function)
    return bound and "context" not in _parameters(program)


def heard(
    given: dict[str, Any],
    function: Callable[..., Any],
    hears: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """What a function takes of ``given``; ``hears(name)`` tells it where it is known already.

    Raises:
        ValueError: Dropped contexts for a function that takes a context alone.
    """
    hears = partial(takes, function) if hears is None else hears
    taken = {name: value for name, value in given.items() if hears(name)}
    if "null" in given and "context" in taken and "null" not in taken:
        raise ValueError(
            f"argument 'null': got dropped contexts for {name_of(function)}, which takes a context and not "
            "null; expected one that takes both. Give it the argument null, or leave out dropped contexts."
        )
    return taken


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, or a module's class."""
    return str(getattr(function, "__qualname__", type(function).__name__))


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function, or a module's forward, has an argument of that name (or takes any).

    A module that has the argument, and may have been built without a context, says so by ``takes_context``.
    """
    if argument in ("context", "null") and hasattr(function, "takes_context"):
        return bool(function.takes_context)
    parameters = _parameters(function)
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a function, or of a module's forward; none where Python does not know them."""
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of handlers of Pyro around one another
        return {}


def usable(x: Tensor) -> Tensor:
    """A tensor that may take part in a graph: a copy of one that was made in ``torch.inference_mode``."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def as_real(x_0: Tensor | None) -> Tensor | None:
    """Whole numbers and bits as floating-point numbers of at least 32 bits, which distributions take."""
    if x_0 is None:
        return None
    return widened(x_0 if x_0.is_floating_point() else x_0.to(torch.get_default_dtype()))


def seen(x_t: Tensor, mask: Tensor | None, gap: float | None) -> Tensor:
    """The state as a kernel of the model gets it: ``gap`` in place of each unobserved entry."""
    if mask is None:
        return x_t
    if gap is None:
        raise ValueError(
            "argument 'mask': got one for states that have no value for a gap; expected none, because "
            'every value of a bit or a category is a state, and none means "unobserved". Leave out data '
            "with gaps, or use a NeuralDenoiser with LevelPrediction(K)."
        )
    return torch.where(mask, x_t, gap)


class ObservedEntries(Messenger):
    """An effect handler that leaves unobserved entries out of the terms of states and data.

    It acts on sites with ``infer={"state": True}``, and on no others. Programs open it themselves.

    Args:
        of_data: Observed entries of the data, boolean, of their shape.
        of_state: Observed entries of a latent state, of its shape; ``None`` leaves latents whole.
    """

    def __init__(self, of_data: Tensor, of_state: Tensor | None) -> None:
        super().__init__()
        self.of_data, self.of_state = of_data, of_state

    def _pyro_sample(self, msg: Any) -> None:
        if msg["infer"].get("state"):
            mask = self.of_data if msg["is_observed"] else self.of_state
            msg["fn"] = observed_part(msg["fn"], mask)


def observed_part(kernel: TorchDistribution, mask: Tensor | None) -> TorchDistribution:
    """A kernel over independent entries, with the terms of the observed entries only."""
    if mask is None:
        return kernel
    if isinstance(kernel, WrappedSite):
        return type(kernel)(observed_part(kernel.base_dist, mask))
    event_dim = mask.dim() - 1
    if event_dim == 0:
        return kernel.mask(mask)
    if not isinstance(kernel, Independent) or kernel.reinterpreted_batch_ndims < event_dim:
        raise ValueError(
            f"argument 'mask': got one for a {type(kernel).__name__}, whose entries depend on one "
            "another; expected a kernel with independent entries, from which unobserved ones can be "
            "left out. Use a NeuralDenoiser or GaussianDenoiser, and transforms that act entry by entry."
        )
    masked = MaskedDistribution(kernel.base_dist, mask)
    return masked.to_event(kernel.reinterpreted_batch_ndims)
