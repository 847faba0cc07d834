r"""The data of a run of :func:`~pyro_diffusion.training.fit`: columns of rows, and which rows are held out.

Data, mask and weights are *columns*: arrays with one row for each datum, by the names of the programs'
arguments. A part of them is split off at random before training,

.. math::
    \{1, …, N\} = \text{training} \cup \text{held out},

with a seed, so that a run which is resumed has the same parts. Columns that fit are moved to the model's
device once and stay there. An array on disk stays on disk.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from pyro_diffusion.checks import as_numbers, check_data, check_mask, require
from pyro_diffusion.family import Family, Pair
from pyro_diffusion.reading import reading
from pyro_diffusion.training.batches import ShuffledBatches, permuted, rows_of
from pyro_diffusion.training.parallel import common_length

#: Columns by the names of the programs' arguments; ``x_0`` is among them.
Columns = dict[str, Any]

HELD_OUT = 0.1  #: share of the data that is split off
MOST_HELD_OUT = 10_000  #: and at most so many, which make the error of a mean small


class Parts(NamedTuple):
    """The data of a run in two parts."""

    training: Columns
    held_out: Columns


def parts_of(
    family: Pair, x_0: Any, validation: Any, seed: int, device: torch.device, /, **given: Any
) -> Parts:
    """Training data and held-out data as columns on a device, all of their values checked.

    Args:
        family: The model, or a model and a guide.
        x_0: Data in one of the forms that :func:`columns` takes.
        validation: Held-out data, in one of those forms; ``None`` to split some off.
        seed: Of the split.
        device: The model's device.
        given: Other columns of ``x_0`` by name; ``None`` for what is not given.

    Raises:
        ValueError: Data that do not fit the model, or too few to hold some out.
    """
    data = columns(x_0, device, **given)
    if validation is None:
        parts = split(data, seed)
        _check_values(family, parts.held_out)
    else:
        try:
            parts = Parts(data, columns(validation, device))
            _check_values(family, parts.held_out)
        except ValueError as error:
            raise ValueError(f"argument 'validation': {error}") from error
    _check_values(family, parts.training)
    _check_counts(parts)
    return parts


def _check_values(family: Pair, data: Columns) -> None:
    """Look at all data once, for a graph does not. What is on disk is looked at batch by batch."""
    x_0, mask = data["x_0"], data.get("mask")
    if not isinstance(family, Family) or not isinstance(x_0, Tensor):
        return
    rows = 65_536
    with reading(family):
        for first in range(0, len(x_0), rows):
            seen = None if mask is None else mask[first : first + rows].to(family.device)
            family.embed(check_data(x_0[first : first + rows].to(family.device), seen), seen)


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
    found = {name: _array(name, column, on_disk) for name, column in found.items()}
    common_length([len(column) for column in found.values()], "Give every datum one row in each.")
    if "mask" in found and isinstance(found["x_0"], Tensor):
        check_mask(found["mask"], found["x_0"])
    if "weights" in found:
        found["weights"] = _check_weights(found["weights"], len(found["x_0"]))
    held = sum(x.numel() * x.element_size() for x in found.values() if isinstance(x, Tensor))
    if device.type == "cuda" and held > torch.cuda.mem_get_info(device)[0] / 4:
        return found  # Lightning moves each batch
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}


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
        'that are named, {"x_0": x_0, "mask": mask}. Convert numbers with torch.as_tensor, and a table of '
        "pandas with x_0.to_numpy(dtype=float)."
    )


def _array(name: str, column: Any, on_disk: bool) -> Any:
    """A column as a tensor. One on disk stays there if the data do; weights are always read."""
    if isinstance(column, np.memmap) and on_disk and name != "weights":
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
    cut = {
        name: (ShuffledRows(column, 0, first, seed), ShuffledRows(column, first, count, seed))
        for name, column in data.items()
    }
    return Parts(
        {name: rest.whole() for name, (_, rest) in cut.items()},
        {name: held.whole() for name, (held, _) in cut.items()},
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
        rows = slice(0, self.batch_size)
        return {name: rows_of(column, rows) for name, column in self.data.items()}
