r"""Data that need not fit into memory, in batches: an array on disk, divided among processes.

An array is any object with rows that can be indexed by a numpy array of row numbers:
``np.load(path, mmap_mode="r")``, a ``np.memmap``, an array, a tensor. Only the rows of a batch are read. No
list of row numbers is made: the order of a pass is a permutation :math:`\pi` of :math:`\{0, …, N - 1\}` that
is *computed*, row number by row number, with a key from the seed and the number of the pass. It takes no
memory at any :math:`N`. Two numbers describe the position of a run for any number of processes: the pass,
and the rows taken from it.

The permutation is a Feistel network: a row number is split into halves of :math:`b` bits, and each round

.. math::
    (\ell, r) \leftarrow (r,\ \ell \oplus (h(r + k_i) \bmod 2^b))

can be inverted for any hash :math:`h`. The rounds together permute :math:`\{0, …, 4^b - 1\}`. If the result
is outside :math:`\{0, …, N - 1\}`, the rounds are applied to it again, until it is inside.

References:
    How to Construct Pseudorandom Permutations from Pseudorandom Functions (Luby and Rackoff, 1988).
    https://doi.org/10.1137/0217022
    Ciphers with Arbitrary Finite Domains (Black and Rogaway, 2002): cycle walking, Feistel networks.
    https://doi.org/10.1007/3-540-45760-7_9
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from pyro_diffusion.checks import check_between, check_count, require
from pyro_diffusion.training.parallel import common_length, rank_and_size, share

_AHEAD = (
    64  # batches whose row numbers are computed together; this costs little more than one batch
)
_ROUNDS = 8  # four suffice in theory, for large halves; an order of ten rows needs more
_DROPOUT = 1  # in the key of the dropped contexts, whose numbers thus differ from those of an order


class Batches(ABC):
    """Batches of this rank's rows of an array. Every rank has the same number of batches.

    Args:
        data: Array of ``N`` rows, or several such arrays by the names of the programs' arguments
            (``{"x_0": …, "context": …}``). A context may be a tuple or a dictionary of arrays.
        batch_size: Rows in a batch, on each rank.
    """

    def __init__(self, data: Any, batch_size: int) -> None:
        self.data = data
        self.num_data = common_length(
            [len(array) for array in arrays_of(data)],
            'Pass an array, or arrays by the names of the programs\' arguments, {"x_0": …, "mask": …}.',
        )
        self.batch_size = check_count(
            "batch_size",
            batch_size,
            1,
            "256 suits small networks.",
            "the rows that each process reads at a time",
        )

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in a pass over the data."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The batches of a pass: tensors, or dictionaries of tensors."""

    def _read(self, rows: np.ndarray | slice) -> Any:
        return each(lambda array: rows_of(array, rows), self.data)


class ShuffledBatches(Batches):
    r"""Batches for training: every pass has a new order, which the seed determines.

    A batch of all :math:`W` ranks is the next :math:`W n` rows in the order of the pass, and each rank has
    :math:`n` of them. The last ``N mod W n`` rows of an order are left out. An iteration continues where the
    last one stopped: it is the rest of a pass, or the next pass. Lightning takes the object as a training
    dataloader, calls ``set_epoch``, and writes the position into its checkpoints. A run that is resumed
    therefore continues after exactly those batches that it was trained on.

    With ``context_dropout=p`` each batch has a column ``"null"`` of booleans. It is true in a row with
    probability :math:`p`: the context of this row is dropped, and a network with a null token learns
    :math:`p(x)` beside :math:`p(x \mid c)`. The seed, the pass and the place in its order determine which
    rows these are, so that a run that is resumed has the same ones. If the data have a column ``"null"`` of
    their own, for rows without a context, a row is null if either is true.

    Args:
        data: Array of ``N`` rows, or several such arrays by the names of the programs' arguments
            (``{"x_0": …, "context": …}``). A context may be a tuple or a dictionary of arrays.
        batch_size: Rows in a batch :math:`n`, on each rank.
        seed: Seed of the orders and of the dropped contexts, the same on every rank.
        context_dropout: Probability :math:`p` in [0, 1) with which the context of a row is dropped.

    Attributes:
        epoch: Number of the pass.
        taken: Rows of the pass that were taken, by all ranks together.

    Raises:
        ValueError: Arrays of different lengths, fewer rows than a batch of all ranks has, or dropout without
            a context. From ``load_state_dict``: a position in other data or in another order.

    References:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), algorithm 1 (context dropout).
        https://arxiv.org/abs/2207.12598

    Example:
        >>> batches = ShuffledBatches(torch.arange(5.0), batch_size=2)
        >>> len(batches), sum(len(batch) for batch in batches)
        (2, 4)
    """

    def __init__(
        self, data: Any, batch_size: int, *, seed: int = 0, context_dropout: float = 0.0
    ) -> None:
        super().__init__(data, batch_size)
        self.seed, self.epoch, self.taken = seed, 0, 0
        self.context_dropout = check_context_dropout(context_dropout)
        require(
            context_dropout == 0 or (isinstance(data, Mapping) and "context" in data),
            "argument 'context_dropout'",
            f"{context_dropout} for data without a context",
            'a column "context", which is dropped in some rows',
            'Pass {"x_0": x_0, "context": context}, for fit context=; or leave out the dropout.',
        )

    @property
    def sampler(self) -> Self:
        """The object itself: Lightning calls ``sampler.set_epoch`` when an epoch begins."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of a pass, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.taken = epoch, 0

    def rewind(self) -> None:
        """Go to the first batch of the first pass."""
        self.epoch, self.taken = 0, 0

    def __len__(self) -> int:
        count = self.num_data // self._step
        require(
            count > 0,
            "argument 'batch_size'",
            f"{self.batch_size} on each of {rank_and_size()[1]} ranks, for {self.num_data} rows",
            "at most all rows in a batch",
            "Pass a smaller batch_size.",
        )
        return count

    def __iter__(self) -> Iterator[Any]:
        len(self)  # raises an error if there is no batch
        if self.taken + self._step > self.num_data:
            self.set_epoch(self.epoch + 1)
        while (left := (self.num_data - self.taken) // self._step) > 0:
            places = self._next_places(min(left, _AHEAD))
            orders = permuted(places, self.num_data, (self.seed, self.epoch))
            for rows, null in zip(orders, self._nulls(places), strict=True):
                self.taken += self._step
                yield self._dropped(self._read(rows), null)

    def _next_places(self, count: int) -> np.ndarray:
        """The places of this rank's rows in the order of the pass, in the next batches, ``(count, n)``."""
        first = self.taken + rank_and_size()[0] * self.batch_size
        starts = first + self._step * np.arange(count)
        return starts[:, None] + np.arange(self.batch_size)

    def _nulls(self, places: np.ndarray) -> np.ndarray:
        """Whether the context is dropped, by place in the order of the pass."""
        if not self.context_dropout:
            return np.zeros(places.shape, dtype=bool)
        return uniform(places, (self.seed, self.epoch, _DROPOUT)) < self.context_dropout

    def _dropped(self, batch: Any, null: np.ndarray) -> Any:
        """A batch with its dropped rows, and with those that have no context of their own."""
        if not self.context_dropout:
            return batch
        dropped = torch.from_numpy(null).to(batch["x_0"].device)
        own = batch.get("null")
        return batch | {"null": dropped if own is None else own | dropped}

    @property
    def _step(self) -> int:
        """Rows in a batch of all ranks."""
        return self.batch_size * rank_and_size()[1]

    def state_dict(self) -> dict[str, int]:
        """The position, with the seed, the number of rows and the step that it depends on."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "seed": self.seed,
            "num_data": self.num_data,
            "step": self._step,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue from a position in the same data; all ranks together must read as many rows a step."""
        ours = self.state_dict()
        # With another step, Lightning's count of batches would be wrong.
        for name in ("seed", "num_data", "step"):
            require(
                state_dict.get(name) == ours[name],
                "argument 'state_dict'",
                f"a position in data with {name} {state_dict.get(name)}",
                str(ours[name]),
                (
                    "Resume with the same data, the same seed and as many rows a step (batch_size times "
                    "ranks); or load the checkpoint's weights and start a new run."
                ),
            )
        self.epoch, self.taken = state_dict["epoch"], state_dict["taken"]


class OrderedBatches(Batches):
    r"""Batches for validation, testing and evaluation: every row once, in order, on a single rank.

    Each rank has a contiguous share (:func:`~pyro_diffusion.training.parallel.share`). All ranks have the
    same number of batches, so that none waits for a batch that another does not have. A batch can therefore
    have a row less than the others, or none. :class:`~pyro_diffusion.training.lightning_module.SVIModule`
    skips empty batches.

    Args:
        data: Array of ``N`` rows, or several such arrays by the names of the programs' arguments
            (``{"x_0": …, "context": …}``). A context may be a tuple or a dictionary of arrays.
        batch_size: Largest number of rows in a batch, on each rank.

    Raises:
        ValueError: Arrays of different lengths.

    Example:
        >>> [batch.tolist() for batch in OrderedBatches(torch.arange(5), batch_size=2)]
        [[0, 1], [2, 3], [4]]
    """

    def __len__(self) -> int:
        largest_share = math.ceil(self.num_data / rank_and_size()[1])
        return math.ceil(largest_share / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        rows = share(self.num_data)
        for batch in range(len(self)):
            start = min(rows.start + batch * self.batch_size, rows.stop)
            yield self._read(slice(start, min(start + self.batch_size, rows.stop)))


def split_batch(batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """A batch of any loader as data, and the other arguments of the programs by name."""
    if isinstance(batch, Mapping) and "x_0" in batch:
        given = {name: value for name, value in batch.items() if name != "x_0"}
        return batch["x_0"], given | {n: as_tree(c) for n, c in given.items() if n == "context"}
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        raise ValueError(
            f"argument 'batch': got a {type(batch).__name__}{size}; expected a tensor of data, one tensor "
            'in a list, or a dictionary with "x_0". Name further arguments: {"x_0": x_0, "context": c}.'
        )
    return batch, {}


def check_shares(stage: str, loaders: Any) -> None:
    """Raise a ``ValueError`` if several ranks would read the same data."""
    world_size = rank_and_size()[1]
    loaders = [x for x in pytree.tree_leaves(loaders) if isinstance(x, DataLoader)]
    for loader in loaders if world_size > 1 else []:
        sampler, num_data = loader.sampler, len(loader.dataset)
        padded = isinstance(sampler, DistributedSampler) and sampler.total_size > num_data
        require(
            not padded and not isinstance(sampler, SequentialSampler | RandomSampler),
            f"{stage} data",
            (
                f"a DataLoader with a {type(sampler).__name__}, which reads some of {num_data} data more "
                f"than once on {world_size} ranks"
            ),
            "each of them once, on one rank",
            "Pass OrderedBatches(data, batch_size) as the dataloader.",
        )


def permuted(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    r"""The row numbers at some places of a random order of :math:`\{0, …, N - 1\}`.

    Args:
        places: Places in the order, whole numbers in {0 … N − 1}.
        size: :math:`N`.
        key: Whole numbers, not negative, that determine the order.

    Returns:
        Row numbers, of the shape of ``places``.
    """
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    bits = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    rows = _feistel(places.astype(np.uint64), bits, keys)
    while (outside := rows >= size).any():
        rows[outside] = _feistel(rows[outside], bits, keys)
    return rows.astype(np.int64)


def uniform(places: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Independent uniform numbers in [0, 1) for whole numbers: the same number for the same place and key."""
    first, second = np.random.SeedSequence(key).generate_state(2, np.uint64)
    words = _hash(_hash(places.astype(np.uint64) + first) + second)
    return (words >> np.uint64(11)) * 2.0**-53


def check_context_dropout(probability: Any) -> float:
    """The probability with which the context of a row is dropped, in [0, 1)."""
    meaning, remedy = "the probability that a row has no context", "0.1 is usual."
    return check_between("context_dropout", probability, 0.0, 1.0, meaning, remedy, "[)")


def each(function: Callable[[Any], Any], data: Any) -> Any:
    """A function of each array in data: of one array, or of columns by name, of which a context is a tree."""
    if isinstance(data, Mapping):
        return {name: each(function, part) for name, part in data.items()}
    if isinstance(data, tuple):
        parts = (each(function, part) for part in data)
        return type(data)(*parts) if hasattr(data, "_fields") else tuple(parts)
    return function(data)


def as_tree(context: Any) -> Any:
    """A context whose tuples a loader made into lists, as ``default_collate`` does, with tuples again."""
    if isinstance(context, Mapping):
        return {name: as_tree(part) for name, part in context.items()}
    tensors = isinstance(context, list) and all(isinstance(x, Tensor | Mapping) for x in context)
    return tuple(map(as_tree, context)) if tensors else context


def arrays_of(data: Any) -> list[Any]:
    """The arrays in data, in order."""
    found: list[Any] = []
    each(found.append, data)
    return found


def _feistel(x: np.ndarray, bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers with ``2 * bits`` bits."""
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = x >> bits, x & mask
    for key in keys:
        left, right = right, left ^ (_hash(right + key) & mask)
    return (left << bits) | right


def _hash(x: np.ndarray) -> np.ndarray:
    """A word of 64 bits in which each bit depends on all of ``x`` (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rows_of(array: Any, rows: np.ndarray | slice) -> Tensor:
    """Rows as a tensor; for other arrays than tensors, a copy."""
    if isinstance(array, Tensor):
        return array[rows if isinstance(rows, slice) else torch.from_numpy(rows)]
    return torch.from_numpy(np.array(array[rows]))
