r"""Work divided among processes: each rank has a share of the data, and all ranks get the whole result.

Of :math:`N` data and :math:`W` ranks, rank :math:`r` works on the rows

.. math::
    \lfloor r N / W \rfloor, …, \lfloor (r + 1) N / W \rfloor - 1,

and the results are joined in the order of ranks, which is the order of the data. Every datum counts once,
whether or not :math:`W` divides :math:`N`. The processes are those of ``torch.distributed``, started by
``torchrun``, by Lightning's Trainer or in another way. If it is not initialised, there is a single process,
rank 0, with all the data.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_diffusion.checks import require

_Result = TypeVar("_Result")  # of a function of data


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and the number of processes; ``(0, 1)`` for a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def share(count: int) -> slice:
    """This rank's part of ``count`` rows; possibly empty."""
    rank, size = rank_and_size()
    return slice(rank * count // size, (rank + 1) * count // size)


def gather(thing: Any) -> list[Any]:
    """The objects of all ranks, in the order of ranks. Every rank must call it, and gets the same list.

    Tensors are sent through CPU memory with any backend, and are returned there.
    """
    size = rank_and_size()[1]
    if size == 1:
        return [thing]
    things: list[Any] = [None] * size
    torch.distributed.all_gather_object(things, thing)
    return things


def agreed_seed() -> int:
    """A number from the torch generator of rank 0, the same on every rank. Every rank must call it."""
    return gather(int(torch.randint(2**62, ())))[0]


def common_length(lengths: Sequence[int], remedy: str) -> int:
    """The number of rows of several arrays, if it is the same for all and positive."""
    require(
        len(set(lengths)) == 1 and lengths[0] >= 1,
        "argument 'data'",
        f"{' and '.join(map(str, lengths)) or 'no'} rows",
        "as many in each, at least one",
        remedy,
    )
    return lengths[0]


def over_ranks(function: Callable[..., _Result], *data: Any) -> _Result:
    """Call a function on this rank's share of the data, and join the results of all ranks.

    Every rank calls it with the same data and gets the same result. On one process it is
    ``function(*data)``. On several, each rank draws its own noise, seeded by a number from rank 0's
    generator. Afterwards the generators continue from where they were.

    Args:
        function: Called with this rank's rows of each tensor, or with its part of a count. It returns a
            tensor with one row for each datum, or a named tuple whose tensors have the data in their last
            dimension, such as :class:`~pyro_diffusion.bounds.ELBOTerms` and
            :class:`~pyro_diffusion.evidence.Evidence`.
        data: Tensors or arrays (also on disk) of ``N`` rows each, or the number ``N`` of data to draw. A
            context may be a tuple or a dictionary of tensors.

    Returns:
        The result of ``function`` for all ``N`` data, on this rank's device and in the order of the data.
        Under a mask ``event_size`` is averaged over data.

    Raises:
        ValueError: Tensors of different lengths, or results that cannot be joined. An error on one rank is
            raised on that rank, and on the others with the rank's number, so that no rank waits for ever.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> diffusion = DiffusionModel(denoiser)
        >>> bound = lambda x: elbo_terms(diffusion.model, diffusion.posterior_guide, x)
        >>> over_ranks(bound, torch.zeros(3, 2)).elbo.shape
        torch.Size([3])
        >>> over_ranks(diffusion.sample, 16).shape
        torch.Size([16, 2])
    """
    remedy = "Pass tensors with the data in front, or the number of data to draw."
    leaves = tree_leaves(data, is_leaf=_is_rows)
    count = common_length([x if isinstance(x, int) else len(x) for x in leaves], remedy)
    if rank_and_size()[1] == 1:
        return function(*data)
    rows, seed = share(count), agreed_seed()
    size, mine, error = rows.stop - rows.start, None, None
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):  # other noise on every rank
        torch.manual_seed(seed + rank_and_size()[0])
        try:
            if size:
                own = tree_map(
                    lambda x: size if isinstance(x, int) else x[rows], data, is_leaf=_is_rows
                )
                mine = function(*own)
        except Exception as caught:
            error = caught
    parts = gather((_on_cpu(mine), _device_type(mine), size, error and str(error)))
    if error is not None:
        raise error
    for rank, (_, _, _, said) in enumerate(parts):
        if said is not None:
            raise ValueError(f"rank {rank}: {said}")
    values, kinds, sizes, _ = zip(*(part for part in parts if part[2]), strict=True)
    result: _Result = _joined(values, sizes, kinds[0])
    return result


def _is_rows(x: Any) -> bool:
    """Whether an argument is rows of data, and not a tuple or a dictionary of them."""
    return isinstance(x, list)


def _device_type(value: Any) -> str:
    """The device of a tensor, or of the first tensor in a named tuple."""
    fields = value if isinstance(value, tuple) else (value,)
    return next((x.device.type for x in fields if isinstance(x, Tensor)), "cpu")


def _on_cpu(value: Any) -> Any:
    """A copy to be sent. The copy of a view has its rows only, and not the whole storage."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return type(value)(*map(_on_cpu, value)) if hasattr(value, "_fields") else value


def _joined(values: Sequence[Any], sizes: Sequence[int], device: str) -> Any:
    """Results of shares as one: rows of a tensor, or a named tuple field by field."""
    first = values[0]
    if isinstance(first, Tensor) and _lengths(values, 0) == list(sizes):
        return torch.cat(list(values)).to(device)
    if not hasattr(first, "_fields"):
        shape = f" of shape {tuple(first.shape)}" if isinstance(first, Tensor) else ""
        raise ValueError(
            f"argument 'function': got one that returns a {type(first).__name__}{shape} for {sizes[0]} data; "
            "expected a tensor with a row for each datum, or a named tuple such as ELBOTerms. Return values "
            "for each datum, and take means of the joined result."
        )
    return type(first)(
        *(
            _joined_field(name, parts, sizes, device)
            for name, parts in zip(first._fields, zip(*values, strict=True), strict=True)
        )
    )


def _joined_field(name: str, parts: Sequence[Any], sizes: Sequence[int], device: str) -> Any:
    """Join tensors along the data; keep what is the same on all ranks; average ``event_size`` over data."""
    first = parts[0]
    if isinstance(first, Tensor):
        if _lengths(parts, -1) == list(sizes):
            return torch.cat(list(parts), dim=-1).to(device)
    elif all(part == first for part in parts):
        return first
    elif isinstance(first, str):  # the fingerprint of the data
        return "+".join(parts)
    elif name == "event_size":
        return sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
    raise ValueError(
        f"argument 'function': got results whose field {name!r} is not given by datum; expected "
        "tensors with the data in the last dimension and numbers that are equal on all ranks, as in "
        "ELBOTerms and Evidence. Pass elbo_terms or importance_evidence, or join the results yourself."
    )


def _lengths(parts: Sequence[Tensor], dim: int) -> list[int]:
    return [part.shape[dim] if part.dim() else 0 for part in parts]
