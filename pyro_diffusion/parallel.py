r"""Work shared out among processes: each rank has a contiguous share of the data, all get the whole result.

Of :math:`N` data and :math:`W` ranks, rank :math:`r` works on the rows

.. math::
    \lfloor r N / W \rfloor, …, \lfloor (r + 1) N / W \rfloor - 1,

and the results are joined in the order of ranks, which is that of the data: every datum once, whether
or not :math:`W` divides :math:`N`. The processes are those of ``torch.distributed``, however they were
started (``torchrun``, Lightning's Trainer); where it was not initialised there is one, and all is as if
this module was not there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["agreed_seed", "gather", "over_ranks", "rank_and_size", "share"]


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many processes there are; ``(0, 1)`` for one that stands alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def share(count: int) -> slice:
    """The rows of ``count`` that are this rank's; possibly none."""
    rank, size = rank_and_size()
    return slice(rank * count // size, (rank + 1) * count // size)


def gather(thing: Any) -> list[Any]:
    """What every rank has, in the order of ranks, on every rank; all of them must call it.

    Tensors travel through CPU memory, whatever the backend, and stay there.
    """
    size = rank_and_size()[1]
    if size == 1:
        return [thing]
    things: list[Any] = [None] * size
    torch.distributed.all_gather_object(things, thing)
    return things


def agreed_seed() -> int:
    """A number from the torch generator of rank 0, the same on every rank; all of them must call it."""
    return gather(int(torch.randint(2**62, ())))[0]


def over_ranks(function: Callable[..., Any], *data: Any) -> Any:
    """Call a function on this rank's share of the data, and join the results of all ranks.

    Every rank calls it with the same data and gets the same result. On one process it is
    ``function(*data)``. On several each rank draws its own noise, seeded by a number from rank 0's
    generator, and the generators go on from where they were.

    Args:
        function: Called with this rank's rows of each, or with its part of a count. Returns a
            tensor of one row for each datum; or a named tuple whose tensors have the data in their last
            dimension: :class:`~pyro_diffusion.bounds.ELBOTerms` and
            :class:`~pyro_diffusion.evidence.Evidence` are.
        data: Tensors or arrays (on disk, too) of ``N`` rows each, or the number ``N`` of data to draw.

    Returns:
        What ``function`` returns, for all ``N``: on this rank's device, in the order of the data. Under
        a mask ``event_size`` is averaged over data.

    Raises:
        ValueError: Tensors of different lengths, or results that cannot be joined. An error on one rank
            is raised there, and on the others with the rank's number, so that none waits for it.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> diffusion = DiffusionModel(denoiser)
        >>> bound = lambda x: elbo_terms(diffusion.model, diffusion.posterior_guide, x)
        >>> over_ranks(bound, torch.zeros(3, 2)).elbo.shape
        torch.Size([3])
        >>> over_ranks(diffusion.sample, 16).shape
        torch.Size([16, 2])
    """
    count = _count(data)
    if rank_and_size()[1] == 1:
        return function(*data)
    rows = share(count)
    mine, error = None, None
    with _noise_of_its_own():
        if rows.stop > rows.start:
            try:
                mine = function(*(_part(x, rows) for x in data))
            except Exception as caught:
                error = caught
    parts = gather(
        (_on_cpu(mine), _device_type(mine), rows.stop - rows.start, error and str(error))
    )
    if error is not None:
        raise error
    for rank, (_, _, _, said) in enumerate(parts):
        if said is not None:
            raise ValueError(f"rank {rank}: {said}")
    values, devices, sizes, _ = zip(*(part for part in parts if part[2]), strict=True)
    return _joined(values, sizes, devices[0])


def _count(data: Sequence[Any]) -> int:
    counts = [x if isinstance(x, int) else len(x) for x in data]
    if not counts or len(set(counts)) > 1 or counts[0] < 1:
        raise ValueError(
            f"argument 'data': got {' and '.join(map(str, counts)) or 'no'} rows; expected as many in "
            "each, at least one. Pass tensors with the data in front, or how many data to draw."
        )
    return counts[0]


def _part(x: Any, rows: slice) -> Any:
    return rows.stop - rows.start if isinstance(x, int) else x[rows]


@contextmanager
def _noise_of_its_own() -> Iterator[None]:
    """Draw other numbers on every rank, and let the generators go on from where they were."""
    seed = agreed_seed()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank_and_size()[0])
        yield


def _fields(value: Any) -> tuple[Any, ...]:
    """A tensor alone, or the fields of a named tuple."""
    return value if isinstance(value, tuple) else (value,)


def _device_type(value: Any) -> str:
    return next((x.device.type for x in _fields(value) if isinstance(x, Tensor)), "cpu")


def _on_cpu(value: Any) -> Any:
    """A copy to be sent: of a view the rows, and not the whole storage."""
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
            "expected a tensor with a row for each datum, or a named tuple such as ELBOTerms. Return what is "
            "known of each datum, and take means of the joined result."
        )
    fields = zip(first._fields, zip(*values, strict=True), strict=True)
    return type(first)(*(_joined_field(name, field, sizes, device) for name, field in fields))


def _joined_field(name: str, parts: Sequence[Any], sizes: Sequence[int], device: str) -> Any:
    """Tensors with the data in the last dimension; words; a number that is the same, or a mean over data."""
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
        f"argument 'function': got results whose field {name!r} is no property of single data; expected "
        "tensors with the data in the last dimension and numbers that all ranks agree on, as in ELBOTerms "
        "and Evidence. Share out elbo_terms or importance_evidence, or average such results yourself."
    )


def _lengths(parts: Sequence[Tensor], dim: int) -> list[int]:
    return [part.shape[dim] if part.dim() else 0 for part in parts]
