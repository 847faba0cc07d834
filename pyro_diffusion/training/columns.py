r"""The data of a run of :func:`~pyro_diffusion.training.fit`: columns of rows, and which rows are held out.

Data, mask, context and weights are *columns*: arrays with one row for each datum, by the names of the
programs' arguments; a context may be a tuple or a dictionary of arrays. A part of them is split off at random
before training,

.. math::
    \{1, …, N\} = \text{training} \cup \text{held out},

with a seed, so that a run which is resumed has the same parts. Columns that fit are moved to the model's
device once and stay there. An array on disk stays on disk.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from pyro_diffusion.checks import as_numbers, check_data, check_mask, require
from pyro_diffusion.family import Family, Pair
from pyro_diffusion.given import Given
from pyro_diffusion.reading import reading
from pyro_diffusion.scoring import replayed
from pyro_diffusion.training.batches import (
    ShuffledBatches,
    arrays_of,
    as_tree,
    each,
    permuted,
    rows_of,
)

#: Columns by the names of the programs' arguments; ``x_0`` is among them.
Columns = dict[str, Any]

HELD_OUT = 0.1  #: share of the data that is split off
MOST_HELD_OUT = 10_000  #: and at most so many, which make the error of a mean small
_LOOK = 65_536  # rows whose values are looked at together


class Parts(NamedTuple):
    """The data of a run in two parts."""

    training: Columns
    held_out: Columns


def parts_of(
    family: Pair,
    pair: tuple[Any, Any],
    x_0: Any,
    validation: Any,
    seed: int,
    device: torch.device,
    /,
    **given: Any,
) -> Parts:
    """Training data and held-out data as columns on a device, all of their values checked.

    Args:
        family: The model, or a model and a guide.
        pair: The programs that are trained, which are run for a few rows of conditional data.
        x_0: Data in one of the forms that :func:`columns` takes.
        validation: Held-out data, in one of those forms; ``None`` to split some off.
        seed: Of the split.
        device: The model's device.
        given: Other columns of ``x_0`` by name; ``None`` for what is not given.

    Raises:
        ValueError: Data that do not fit the model, or too few to hold some out.
    """
    data = columns(x_0, device, **given)
    parts = None
    if validation is not None:
        try:
            parts = Parts(data, columns(validation, device))
            _check_values(family, pair, parts.held_out)
        except ValueError as error:
            raise ValueError(f"argument 'validation': {error}") from error
        _check_alike(parts)
    _check_values(family, pair, data)
    parts = split(data, seed) if parts is None else parts
    _check_counts(parts)
    return parts


def _check_alike(parts: Parts) -> None:
    """A context in both parts or in none, so that both bounds are of the same law."""
    has = ["context" in part for part in parts]
    require(
        has[0] == has[1],
        "argument 'validation'",
        "data without a context for a model that is trained with one"
        if has[0]
        else "data with a context for a model that is trained without one",
        "a context in both or in none, because the held-out bound is that of the training data's law",
        'Pass validation={"x_0": x_valid, "context": c_valid} and fit(…, context=c).',
    )


def _check_values(family: Pair, pair: tuple[Any, Any], data: Columns) -> None:
    """Look at all data once, for a graph does not. What is on disk is looked at batch by batch."""
    x_0, mask = data["x_0"], data.get("mask")
    if isinstance(family, Family) and isinstance(x_0, Tensor):
        with reading(family):
            for rows in _slices(len(x_0)):
                seen = None if mask is None else mask[rows].to(family.device)
                family.embed(check_data(x_0[rows].to(family.device), seen), seen)
    if "context" in data or "null" in data:
        _check_context(pair, data)


def _check_context(pair: tuple[Any, Any], data: Columns) -> None:
    """Look at a context once, and run the programs for the rows with its smallest and largest numbers."""
    count, null, places = len(data["x_0"]), data.get("null"), {0}
    Given(context=() if "context" in data else None, null=null).with_rows(count)
    for array in arrays_of(data["context"]):
        if isinstance(array, Tensor):
            for rows in _slices(count):
                part = Given(context=array[rows], null=None if null is None else null[rows])
                part.with_rows(len(array[rows]))
        if not _is_real(array):
            places |= _extremes(array)
    device = next(p.device for program in pair for p in program.parameters())
    few = np.array(sorted(places))
    batch = each(lambda array: rows_of(array, few).to(device), data)
    batch.pop("weights", None)
    with reading(*pair):
        replayed(*pair, batch.pop("x_0"), **batch)


def _slices(count: int) -> Iterator[slice]:
    """All rows, some at a time."""
    return (slice(first, first + _LOOK) for first in range(0, count, _LOOK))


def _is_real(array: Any) -> bool:
    """Whether the numbers are real, and not labels, whose extremes tell whether all of them exist."""
    return bool(
        array[:1].is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    )


def _extremes(array: Any) -> set[int]:
    """The rows with the smallest and the largest number of an array."""
    values = array.cpu().numpy() if isinstance(array, Tensor) else array
    width = math.prod(values.shape[1:])
    return {int(place) // width for place in (values.argmin(), values.argmax())} if width else set()


def _check_counts(parts: Parts) -> None:
    """A datum to train on, and two that are held out; data of weight zero do not count."""
    for part, least, meaning in (
        (parts.training, 1, "one or more to train on"),
        (parts.held_out, 2, "two or more, whose spread is the error of the bound"),
    ):
        weights = part.get("weights")
        require(
            len(part["x_0"]) >= least if weights is None else int((weights > 0).sum()) >= least,
            "argument 'validation'" if weights is None else "argument 'weights'",
            f"{len(part['x_0'])} data" + ("" if weights is None else ", too few with a weight"),
            meaning,
            "Pass more data, or validation= of your own; without it some are split off at random.",
        )


def columns(x_0: Any, device: torch.device, /, **given: Any) -> Columns:
    """Data, with what goes with them, as columns on a device.

    Args:
        x_0: A tensor, an array, a map-style dataset, or a mapping of columns that has ``"x_0"``.
        device: The model's device. An array on disk (``np.memmap``) stays where it is, and so do data that
            would fill more than a quarter of a GPU.
        given: Other columns by name; ``None`` for what is not given.

    Raises:
        ValueError: Data of another kind, columns of different lengths, or weights that are negative,
            not finite or all zero.
    """
    found = _by_name(x_0) | {name: column for name, column in given.items() if column is not None}
    on_disk = isinstance(found["x_0"], np.memmap)
    found = {name: _column(name, column, on_disk) for name, column in found.items()}
    for name, column in found.items():
        for array in arrays_of(column):
            require(
                len(array) == len(found["x_0"]),
                f"argument {name!r}",
                f"{len(array)} rows for {len(found['x_0'])} data",
                "a row for each datum",
                "Give every datum one row in each.",
            )
    if "mask" in found and isinstance(found["x_0"], Tensor):
        check_mask(found["mask"], found["x_0"])
    if "weights" in found:
        found["weights"] = _check_weights(found["weights"], len(found["x_0"]))
    tensors = [x for x in arrays_of(found) if isinstance(x, Tensor)]
    held = sum(x.numel() * x.element_size() for x in tensors)
    if device.type == "cuda" and held > torch.cuda.mem_get_info(device)[0] / 4:
        return found  # Lightning moves each batch
    moved: Columns = each(lambda x: x.to(device) if isinstance(x, Tensor) else x, found)
    return moved


def _by_name(x_0: Any) -> Columns:
    """Columns by name, of whatever data came."""
    if isinstance(x_0, TensorDataset):
        x_0 = x_0.tensors if len(x_0.tensors) > 1 else x_0.tensors[0]
    elif isinstance(x_0, Dataset) and hasattr(x_0, "__len__"):
        x_0 = default_collate([x_0[row] for row in range(len(x_0))])
    require(
        not isinstance(x_0, DataLoader | Dataset | Iterator),
        "argument 'x_0'",
        f"a {type(x_0).__name__}",
        "data of which any rows can be taken",
        "Pass the DataLoader's dataset, a tensor, an array, or np.load(path, mmap_mode='r').",
    )
    if isinstance(x_0, Tensor | np.ndarray):
        return {"x_0": x_0}
    if isinstance(x_0, Mapping):
        require(
            "x_0" in x_0,
            "argument 'x_0'",
            f"columns {sorted(x_0)}",
            "one that is called 'x_0'",
            'Pass {"x_0": x_0, "mask": mask}.',
        )
        return dict(x_0)
    if isinstance(x_0, list | tuple) and len(x_0) == 1 and isinstance(x_0[0], Tensor):
        return {"x_0": x_0[0]}
    raise ValueError(
        f"argument 'x_0': got a {type(x_0).__name__}; expected a tensor, an array, a dataset, or columns "
        'that are named, {"x_0": x_0, "context": c}. Convert numbers with torch.as_tensor, and a table of '
        "pandas with x_0.to_numpy(dtype=float)."
    )


def _column(name: str, column: Any, on_disk: bool) -> Any:
    """A column as a tensor; a context of several as a tuple or a dictionary of tensors."""
    column = as_tree(column) if name == "context" else column
    if name == "context" and isinstance(column, Mapping | tuple):
        return each(lambda part: _array(name, part, on_disk), column)
    return _array(name, column, on_disk)


def _array(name: str, column: Any, on_disk: bool) -> Any:
    """An array as a tensor. One on disk stays there if the data do; one number a row is always read."""
    if isinstance(column, np.memmap) and on_disk and name not in ("weights", "null"):
        return column
    if isinstance(column, np.ndarray):
        column = np.require(column, requirements=["C", "W"])  # torch shares no other memory
    rows = as_numbers(name, column)
    require(
        rows.dim() > 0 and not rows.requires_grad,
        f"argument {name!r}",
        "a single number" if rows.dim() == 0 else "data that require a gradient",
        "a row for each datum, without gradients",
        "Pass x_0[None] for a single datum, and x_0.detach() for computed ones.",
    )
    return rows


def _check_weights(weights: Tensor, count: int) -> Tensor:
    """Shares of the loss, with mean one."""
    weights = as_numbers("weights", weights, dtype=torch.get_default_dtype())
    usable = weights.shape == (count,) and bool((weights >= 0).all() and weights.isfinite().all())
    require(
        usable and bool(weights.sum() > 0),
        "argument 'weights'",
        f"shape {tuple(weights.shape)}, with numbers from {weights.min():.3g} to {weights.max():.3g}",
        f"{count} finite numbers that are not negative, and not all zero",
        "Pass one number for each datum.",
    )
    return weights / weights.mean()


def split(data: Columns, seed: int) -> Parts:
    """ShuffledRows for training and held-out rows: a tenth of the data at random, at most 10,000.

    Raises:
        ValueError: Fewer than ten rows.
    """
    count = len(data["x_0"])
    require(
        count >= 10,
        "argument 'x_0'",
        f"{count} data, of which none can be spared",
        "ten or more",
        "Pass validation=x_valid, data that training does not see.",
    )
    first = min(max(2, round(HELD_OUT * count)), MOST_HELD_OUT)
    return Parts(
        each(lambda array: ShuffledRows(array, first, count, seed).whole(), data),
        each(lambda array: ShuffledRows(array, 0, first, seed).whole(), data),
    )


class ShuffledRows:
    """Some rows of an array, in a random order that the seed determines; nothing is read or listed yet.

    Args:
        array: The rows.
        first: Place of the first row in the order.
        last: Place behind the last.
        seed: Of the order.
    """

    def __init__(self, array: Any, first: int, last: int, seed: int) -> None:
        self.array, self.first, self.last, self.seed = array, first, last, seed

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, rows: np.ndarray | slice) -> Any:
        places = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        taken = permuted(self.first + np.asarray(places), len(self.array), (self.seed,))
        return self.array[torch.from_numpy(taken) if isinstance(self.array, Tensor) else taken]

    def whole(self) -> Any:
        """All of them as a tensor, if the array is one; else the rows as they are, to be read in batches."""
        return self[slice(None)] if isinstance(self.array, Tensor) else self


class Passes(ShuffledBatches):
    """Batches without end, pass after pass, each in another order. To Lightning they are one epoch."""

    @property
    def sampler(self) -> Any:
        """None: Lightning would set its epoch, and go back to the first pass."""
        return None

    def __len__(self) -> int:
        super().__len__()  # there is a batch, or an error
        return 2**31  # a length, so that no batch is fetched in advance of its step

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()

    def first(self) -> Columns:
        """A batch of the first rows, which is not counted as taken."""
        batch: Columns = self._read(slice(0, self.batch_size))
        return self._dropped(batch, np.zeros(self.batch_size, dtype=bool))
