"""Ready-made operators of measurements: callables of data, ``batch + event_shape``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.checks import as_numbers, check_count, described, require

__all__ = ["BlockMeans", "Blur", "Entries", "Subsampling"]


class Entries:
    """Some entries of a datum, in their order.

    Args:
        mask: True where an entry is measured, boolean, of the datum's shape.

    Example:
        >>> Entries(torch.tensor([True, False, True]))(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 3.])
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = as_numbers("mask", mask)
        require(
            self.mask.dtype == torch.bool and bool(self.mask.any()),
            "argument 'mask'",
            f"{described(mask)} and {self.mask.dtype}, {int(self.mask.sum())} of it true",
            "a boolean of the datum's shape, true where an entry is measured",
            "Pass mask.bool() with at least one entry.",
        )

    def __call__(self, x_0: Tensor) -> Tensor:
        return x_0[..., self.mask.to(x_0.device)]

    def __repr__(self) -> str:
        return f"Entries({int(self.mask.sum())} of {self.mask.numel()})"


class Blur:
    """A convolution over the last axes of a datum, which are extended by their edges; the shape stays.

    Args:
        kernel: Weights with an odd size along each of their one or two axes.

    Raises:
        ValueError: A kernel of another number of axes, or of an even size.

    Example:
        >>> Blur(torch.ones(3) / 3)(torch.tensor([0.0, 3.0, 0.0, 0.0]))
        tensor([1., 1., 1., 0.])
    """

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = as_numbers("kernel", kernel)
        require(
            self.kernel.dim() in (1, 2) and all(size % 2 for size in self.kernel.shape),
            "argument 'kernel'",
            described(kernel),
            "weights of one or two axes, each of an odd size",
            "Pad the kernel with a zero, so that it has a centre.",
        )

    def __call__(self, x_0: Tensor) -> Tensor:
        axes = self.kernel.dim()
        images = x_0.reshape(-1, 1, *x_0.shape[x_0.dim() - axes :])
        pads = [size // 2 for size in reversed(self.kernel.shape) for _ in range(2)]
        images = torch.nn.functional.pad(images, pads, mode="replicate")
        convolve = torch.nn.functional.conv1d if axes == 1 else torch.nn.functional.conv2d
        return convolve(images, self.kernel.flip(tuple(range(axes))).to(x_0)[None, None]).reshape(
            x_0.shape
        )

    def __repr__(self) -> str:
        return f"Blur({' × '.join(map(str, self.kernel.shape))})"


class Subsampling:
    """Every so many-th entry along the last axes, beginning with the first one.

    Args:
        step: The step, or one for each of the last axes.

    Example:
        >>> Subsampling(2)(torch.arange(5.0))
        tensor([0., 2., 4.])
    """

    def __init__(self, step: int | Sequence[int]) -> None:
        self.step = _whole("step", step)

    def __call__(self, x_0: Tensor) -> Tensor:
        _check_axes("step", self, self.step, x_0)
        kept: Any = (..., *(slice(None, None, step) for step in self.step))
        return x_0[kept]

    def __repr__(self) -> str:
        return f"Subsampling({', '.join(map(str, self.step))})"


class BlockMeans:
    """Means over blocks of entries along the last axes, whose sizes are multiples of the block's.

    Args:
        size: The block's size, or one for each of the last axes.

    Example:
        >>> BlockMeans((2, 2))(torch.arange(8.0).reshape(2, 4))
        tensor([[2.5000, 4.5000]])
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = _whole("size", size)

    def __call__(self, x_0: Tensor) -> Tensor:
        axes = len(self.size)
        _check_axes("size", self, self.size, x_0)
        kept, blocked = x_0.shape[: x_0.dim() - axes], x_0.shape[x_0.dim() - axes :]
        require(
            not any(length % size for length, size in zip(blocked, self.size, strict=True)),
            "argument 'size' of BlockMeans", f"{self.size} for axes of {tuple(blocked)}",
            "sizes that divide the axes", "Crop the data, or choose another size.",
        )  # fmt: skip
        split = [
            n
            for length, size in zip(blocked, self.size, strict=True)
            for n in (length // size, size)
        ]
        return x_0.reshape(*kept, *split).mean(tuple(range(-2 * axes + 1, 0, 2)))

    def __repr__(self) -> str:
        return f"BlockMeans({', '.join(map(str, self.size))})"


def _whole(argument: str, sizes: Any) -> tuple[int, ...]:
    sizes = tuple(sizes) if isinstance(sizes, list | tuple) else (sizes,)
    return tuple(check_count(argument, size, 1, "Pass a number for each axis.") for size in sizes)


def _check_axes(argument: str, operator: Any, sizes: tuple[int, ...], x_0: Tensor) -> None:
    require(
        x_0.dim() > len(sizes) - 1, f"argument {argument!r} of {type(operator).__name__}",
        f"{len(sizes)} axes for data of shape {tuple(x_0.shape)}", "at most as many as a datum has",
        "Leave out numbers.",
    )  # fmt: skip
