r"""Checks of arguments and data, which more than one room needs.

An error message has four parts: which argument or site, what came, what was expected, what to do. The
messages are here, so that the code of the equations contains none.

Every check of *values* calls :func:`holds`. A program that is traced into a graph runs inside
:func:`unchecked`, because a traced tensor has no values. A reader that has checked all data runs the programs
inside :func:`data_checked`, so that they do not check every chunk again.
"""

import cmath
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_diffusion.typed import TorchDistribution

__all__ = [
    "as_numbers",
    "check_argument",
    "check_between",
    "check_count",
    "check_data",
    "check_event_shape",
    "check_finite",
    "check_mask",
    "check_num_levels",
    "check_observed",
    "check_positive",
    "check_shape",
    "check_state",
    "check_timesteps",
    "check_unused",
    "check_values",
    "data_checked",
    "described",
    "finite",
    "holds",
    "looking",
    "require",
    "shape_remedy",
    "unchecked",
    "widened",
]

_looking: ContextVar[bool] = ContextVar("looking", default=True)
_data_due: ContextVar[bool] = ContextVar("data_due", default=True)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds in every entry. Inside :func:`unchecked` it is taken to hold."""
    return not looking() or bool(condition.all())


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Single values are checked only if their sum is not finite."""
    return not looking() or cmath.isfinite(values.sum().item()) or holds(values.isfinite())


def looking() -> bool:
    """Whether values are checked. They are, except inside :func:`unchecked`."""
    return _looking.get()


@contextmanager
def unchecked() -> Iterator[None]:
    """Check shapes and types, but no values: for a program that is traced and not run."""
    token = _looking.set(False)
    try:
        yield
    finally:
        _looking.reset(token)


@contextmanager
def data_checked() -> Iterator[None]:
    """Do not check data: the caller has passed them through :func:`check_data` already."""
    token = _data_due.set(False)
    try:
        yield
    finally:
        _data_due.reset(token)


def require(condition: bool, what: str, got: str, expected: str, remedy: str) -> None:
    """Raise a ``ValueError`` with a message of four parts unless a condition holds.

    Python builds the message even if the condition holds. Use it for arguments of a constructor or a call,
    and not for states of a chain.
    """
    if not condition:
        raise ValueError(f"{what}: got {got}; expected {expected}. {remedy}")


# Arguments.


def described(value: Any) -> str:
    """The type of a value, with the shape of a tensor or the event shape of a distribution."""
    is_kernel, is_tensor = isinstance(value, Distribution), isinstance(value, Tensor)
    shape = f" of event shape {tuple(value.event_shape)}" if is_kernel else ""
    return f"a {type(value).__name__}" + (f" of shape {tuple(value.shape)}" if is_tensor else shape)


def check_argument(name: str, value: Any, kind: type | UnionType, example: str) -> Any:
    """``value``, if it is an instance of ``kind``, a class or a union of classes."""
    if not isinstance(value, kind):
        got = repr(value) if isinstance(value, str | int) else type(value).__name__
        got = f"the class {value.__name__}" if isinstance(value, type) else got
        kinds = " or ".join(part.__name__ for part in get_args(kind) or (kind,)).replace(
            "NoneType", "None"
        )
        raise ValueError(
            f"argument {name!r}: got {got}; expected an instance of {kinds}. "
            f"Pass an object, such as {example}."
        )
    return value


def as_numbers(
    argument: str, values: Any, like: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The real numbers of an argument, a tensor, an array, a sequence or a number, as a tensor.

    Args:
        argument: Name of the argument.
        values: The numbers. Half precision becomes float32.
        like: Tensor whose dtype and device the numbers take; by default they keep their own.
        dtype: Dtype to read them in.
    """
    if hasattr(values, "to_numpy"):  # a table of pandas, which is no sequence of its rows
        values = values.to_numpy()
    flags = getattr(values, "flags", None)
    try:
        numbers = torch.as_tensor(values if getattr(flags, "writeable", True) else values.copy())
        is_real = not numbers.is_complex()
        if is_real and (dtype is not None or like is not None):
            numbers = torch.as_tensor(values, dtype=dtype if like is None else like.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"argument {argument!r}: got {described(values)} ({error}); expected numbers. Pass a tensor, an "
            "array or a number."
        ) from error
    require(
        is_real, f"argument {argument!r}", "complex numbers", "real ones",
        "Pass torch.view_as_real(…).",
    )  # fmt: skip
    return widened(numbers if like is None else numbers.to(like.device))


def check_count(argument: str, number: Any, least: int, remedy: str, meaning: str = "") -> int:
    """``number`` as an int, if it is a whole number of at least ``least``. NumPy integers are accepted."""
    if not isinstance(number, Integral) or isinstance(number, bool) or int(number) < least:
        meaning = f", {meaning}" if meaning else ""
        raise ValueError(
            f"argument {argument!r}: got {number!r}; expected a whole number of at least {least}{meaning}. "
            f"{remedy}"
        )
    return int(number)


def check_num_levels(num_levels: Any, argument: str = "num_levels") -> int:
    """``num_levels`` as an int, if it is a whole number of at least 2."""
    remedy = "8-bit images have 256, bits 2."
    return check_count(argument, num_levels, 2, remedy, "the number of values an entry can have")


def check_positive(argument: str, number: Any, remedy: str, meaning: str = "") -> float:
    """``number`` as a float, if it is positive and finite."""
    proper = isinstance(number, Real) and not isinstance(number, bool)
    if not proper or not 0 < float(number) < math.inf:
        meaning = f", {meaning}" if meaning else ""
        raise ValueError(
            f"argument {argument!r}: got {number!r}; expected a positive number{meaning}. {remedy}"
        )
    return float(number)


def check_between(
    argument: str, number: Any, low: float, high: float, meaning: str, remedy: str, ends: str = "()"
) -> float:
    """``number`` as a float, if it is a number between two others; ``ends`` is ``"[]"`` to include them."""
    proper = isinstance(number, Real) and not isinstance(number, bool)
    value = float(number) if proper else math.nan
    inside = (
        low < value < high
        or (value == low and ends[0] == "[")
        or (value == high and ends[1] == "]")
    )
    if not inside:
        raise ValueError(
            f"argument {argument!r}: got {number!r}; expected a number in "
            f"{ends[0]}{low:g}, {high:g}{ends[1]}, {meaning}. {remedy}"
        )
    return value


def check_shape(argument: str, shape: Any, remedy: str) -> torch.Size:
    """``shape`` as a ``torch.Size``, if it is a tuple of whole numbers of at least 1."""
    require(isinstance(shape, tuple), f"argument {argument!r}", repr(shape), "a tuple", remedy)
    return torch.Size([check_count(argument, size, 1, remedy, "in every entry") for size in shape])


def check_state(state: Any, num_timesteps: int) -> int:
    """``state``, if it is a timestep in ``0 … T``."""
    whole = isinstance(state, Integral) and not isinstance(state, bool)
    require(
        whole and 0 <= int(state) <= num_timesteps,
        "argument 'state'",
        repr(state),
        f"a timestep in 0 … {num_timesteps}",
        "Pass 0 for data.",
    )
    return int(state)


def check_timesteps(timesteps: Sequence[int], first: int, last: int, remedy: str) -> list[int]:
    """``timesteps`` as a list, if there is at least one and each is a whole number in ``first … last``."""
    steps = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    steps = steps if isinstance(steps, Sequence) else ()
    wrong = [
        t
        for t in steps
        if isinstance(t, bool) or not isinstance(t, Integral) or not first <= int(t) <= last
    ]
    got, expected = repr(wrong[0] if wrong else timesteps), f"whole numbers in {first} … {last}"
    require(len(steps) > 0 and not wrong, "argument 'timesteps'", got, expected, remedy)
    return [int(t) for t in steps]


def check_unused(settings: Mapping[str, Any], beside: str) -> None:
    """Raise a ``ValueError`` if there are settings of default layers, but the layers are the user's own."""
    if settings:
        raise ValueError(
            f"argument {next(iter(settings))!r}: got it together with {beside}; expected it for default "
            "layers only. Pass it to your layers when you make them."
        )


def check_finite(what: str, values: Tensor, remedy: str) -> Tensor:
    """``values``, if none of them is NaN or infinite."""
    if not finite(values):
        count = int((~values.isfinite()).sum())
        raise ValueError(
            f"{what}: got {count} NaN or infinite values of {values.numel()}; expected finite numbers. "
            f"{remedy}"
        )
    return values


def check_values(what: str, values: Tensor, valid: Tensor, expected: str, remedy: str) -> Tensor:
    """``values``, if ``valid`` holds in every entry."""
    if not holds(valid):
        raise ValueError(
            f"{what}: got the value {values[~valid][0].item():g}; expected {expected}. {remedy}"
        )
    return values


# Data.


def check_data(x_0: Any, mask: Tensor | None = None) -> Tensor:
    """``x_0``, if it is a tensor of at least one datum, all of it finite where it is observed.

    Floating-point data of less than 32 bits become float32. Unsigned integers of more than 8 bits become
    int64, because torch has few operations for them. Unobserved entries may be NaN. Each is replaced by the
    first observed value of the same entry (or of any entry, if this one was never observed). The likelihood
    and the transform accept this value, and no term depends on it. The result is a new tensor object,
    because a transform recognises its last argument by identity.
    """
    if not isinstance(x_0, Tensor) or x_0.dim() == 0 or len(x_0) == 0:
        got = f"shape {tuple(x_0.shape)}" if isinstance(x_0, Tensor) else f"a {type(x_0).__name__}"
        raise ValueError(
            f"argument 'x_0': got {got}; expected a tensor of shape (N,) + event_shape with N ≥ 1. "
            f"{_remedy_for(x_0)}"
        )
    if not _data_due.get():
        return x_0.view_as(x_0)
    require(
        not x_0.is_complex(), "argument 'x_0'", f"data of {x_0.dtype}", "real numbers",
        "Pass torch.view_as_real(x_0).",
    )  # fmt: skip
    x_0 = widened(x_0)
    if mask is not None:
        _check_observed_finite(x_0, check_mask(mask, x_0))
        mask = _check_rows(mask)
        x_0 = torch.where(mask, x_0, _first_observed(x_0, mask))
    if not finite(x_0):
        raise ValueError(
            f"argument 'x_0': got {int((~x_0.isfinite()).sum())} NaN or infinite values in data of "
            f"shape {tuple(x_0.shape)}; expected finite numbers. Drop those entries, or pass "
            "mask=x_0.isfinite() for the bound of the observed part."
        )
    return x_0.view_as(x_0)


def widened(x: Tensor) -> Tensor:
    """Numbers of half precision as float32, and unsigned integers of more than 8 bits as int64."""
    if x.is_floating_point():
        return x.to(torch.promote_types(x.dtype, torch.float32))
    return x.long() if x.dtype in _UNSIGNED else x


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _remedy_for(x_0: Any) -> str:
    """What to do about data that are not a tensor of rows."""
    if isinstance(x_0, Tensor):
        return "Pass x_0[None] for a single number." if x_0.dim() == 0 else "Skip empty batches."
    if hasattr(x_0, "to_numpy"):  # pandas and similar libraries
        return "Pass torch.tensor(x_0.to_numpy(dtype=float))."
    if hasattr(x_0, "__array__"):
        return "Convert it with torch.as_tensor. For an array of objects, call x_0.astype(float) first."
    if isinstance(x_0, Sequence | Mapping) and not isinstance(x_0, str):
        return "Unpack the batch of a DataLoader, (x_0,) = batch; convert numbers with torch.as_tensor."
    return "Pass the data, and give the guide the data that the model observes."


def _check_observed_finite(x_0: Tensor, mask: Tensor) -> None:
    """Raise a ``ValueError`` if an entry that counts as observed is not finite."""
    finite = x_0.isfinite()
    if not holds(finite | ~mask):
        inverted = bool((finite != mask).all())
        raise ValueError(
            f"argument 'mask': got {int((mask & ~finite).sum())} NaN or infinite values that it marks as "
            "observed; expected true where an entry was observed, and a finite number there. "
            + ("Pass ~mask: it is inverted." if inverted else "Pass mask & x_0.isfinite().")
        )


def check_mask(mask: Tensor, x_0: Tensor) -> Tensor:
    """``mask``, if it is boolean and has the data's shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x_0.shape:
        is_tensor = isinstance(mask, Tensor)
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if is_tensor else type(mask).__name__
        raise ValueError(
            f"argument 'mask': got {got}; expected torch.bool of the data's shape {tuple(x_0.shape)}, "
            "true where an entry was observed. Pass mask.bool(), expanded to the data's shape."
        )
    return mask


def check_observed(x_0: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Data for a model, which may also be run without data."""
    if x_0 is None and mask is not None:
        raise ValueError(
            "argument 'mask': got a mask without data; expected x_0 as well. Leave out the mask to "
            "draw complete data."
        )
    return None if x_0 is None else check_data(x_0, mask)


def check_event_shape(kernel: TorchDistribution, x_0: Tensor | None) -> TorchDistribution:
    """The kernel of site ``x_0``, if the data have its event shape."""
    if x_0 is not None and x_0.shape[1:] != kernel.event_shape:
        raise ValueError(
            f"site 'x_0': got data of shape {tuple(x_0.shape)}; expected (N,) + "
            f"{tuple(kernel.event_shape)}. {shape_remedy(x_0.shape, kernel.event_shape)}"
        )
    return kernel


def shape_remedy(shape: torch.Size, event_shape: torch.Size) -> str:
    """What to do about data of another shape than ``(N,) + event_shape``."""
    if len(shape) == len(event_shape):
        return "Pass x_0[None] for a single datum, or reshape the data."
    return f"Reshape the data, or build the model with event_shape {tuple(shape[1:])}."


def _check_rows(mask: Tensor) -> Tensor:
    observed = mask.flatten(1).any(1) if mask.dim() > 1 else mask
    if not holds(observed):
        raise ValueError(
            f"argument 'mask': got {int((~observed).sum())} of {len(mask)} data without any observed "
            f"entry, the first at row {int((~observed).nonzero()[0])}; expected at least one for each. "
            "Drop those rows: they contain no information."
        )
    return mask


def _first_observed(x_0: Tensor, mask: Tensor) -> Tensor:
    first = mask.byte().argmax(0, keepdim=True)
    anywhere = mask.flatten().byte().argmax()
    return torch.where(mask.any(0), x_0.gather(0, first), x_0.take(anywhere))
