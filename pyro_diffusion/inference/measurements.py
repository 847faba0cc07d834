r"""Linear-Gaussian measurements of a datum, :math:`y = A x_0 + n`, and ready-made operators.

An operator is any callable that maps data ``batch + event_shape`` to ``batch`` + the shape of a measurement.
Autograd finds its adjoint. :class:`Entries`, :class:`Blur`, :class:`Subsampling` and :class:`BlockMeans` are
operators of this kind.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.checks import (
    as_numbers,
    check_count,
    check_finite,
    check_values,
    described,
    require,
)

__all__ = ["BlockMeans", "Blur", "Entries", "LinearGaussian", "Subsampling"]

Operator = Callable[[Tensor], Tensor]


class LinearGaussian:
    r"""The likelihood :math:`N(y; A x_0, \operatorname{diag} s^2)` of a linear measurement.

    :func:`~pyro_diffusion.inference.posterior_samples` multiplies the reverse kernels with the measurement in
    closed form. If the noise is correlated, whiten the operator and ``y``.

    Args:
        operator: :math:`A`: a matrix ``(d_y, D)`` for the flattened datum, or a callable that maps
            ``batch + event_shape`` to ``batch`` + the shape of a measurement, such as ``Blur(kernel)``. A
            constant may be added: the operator may be affine.
        y: The measurement in the user's units, or several, ``(N,)`` + the shape of one; each has a posterior.
        noise: Standard deviation :math:`s` of the noise, a number or a tensor that broadcasts to ``y``. Zero
            conditions on :math:`A x_0 = y` exactly, if the data are real numbers.
        linearize: Whether to linearise what is not affine (a transform such as ``Logit``, or the operator) at
            :math:`\hat x_0(x_t)`. The weights stay exact.

    Raises:
        ValueError: A noise that is negative, not finite, or of another shape than ``y``; a ``y`` that is not
            finite. From ``posterior_samples``: a ``y`` of another shape than the operator's output, or
            something that is not affine without ``linearize``.

    Example:
        >>> LinearGaussian(torch.ones(1, 3), y=torch.tensor([0.5]), noise=0.1)
        LinearGaussian(a matrix (1, 3), y of shape (1,))

    References:
        Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024).
        https://arxiv.org/abs/2310.06721
        Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024).
        https://arxiv.org/abs/2405.13712
    """

    def __init__(
        self,
        operator: Tensor | Operator,
        y: Tensor,
        noise: Tensor | float,
        *,
        linearize: bool = False,
    ) -> None:
        matrix = None if callable(operator) else as_numbers("operator", operator)
        self.operator: Any = operator if matrix is None else matrix
        require(
            matrix is None or matrix.dim() == 2,
            "argument 'operator'",
            described(operator),
            "a matrix (d_y, D) for the flattened datum, or a callable",
            "Pass row[None] for a single measurement.",
        )
        self.y = check_finite(
            "argument 'y'", as_numbers("y", y), "Leave out what was not measured: Entries(mask)."
        )
        self.noise = as_numbers("noise", noise, like=self.y)
        check_values(
            "argument 'noise'",
            self.noise,
            self.noise.isfinite() & (self.noise >= 0),
            "standard deviations of at least zero",
            "Pass the standard deviation of the measurement's noise, not its variance or precision.",
        )
        try:
            self.noise = self.noise.expand(torch.broadcast_shapes(self.noise.shape, self.y.shape))
            self.y = self.y.expand(self.noise.shape)
        except RuntimeError:
            require(
                False, "argument 'noise'", f"shape {tuple(self.noise.shape)} for a y of shape "
                f"{tuple(self.y.shape)}", "a number, or a shape that broadcasts with y's",
                "For a noise for each of N measurements, pass noise[:, None].",
            )  # fmt: skip
        self.linearize = linearize

    def __repr__(self) -> str:
        matrix = isinstance(self.operator, Tensor)
        what = f"a matrix {tuple(self.operator.shape)}" if matrix else repr(self.operator)
        return f"LinearGaussian({what}, y of shape {tuple(self.y.shape)})"

    def measured(self, x_0: Tensor, event_dim: int) -> Tensor:
        """:math:`A x_0` for data of ``batch + event_shape``, flattened to ``batch + (d_y,)``."""
        batch = x_0.shape[: x_0.dim() - event_dim]
        if isinstance(self.operator, Tensor):
            return x_0.reshape(*batch, -1) @ self.operator.to(x_0).mT
        measured: Tensor = self.operator(x_0).reshape(*batch, -1)
        return measured


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


def _whole(argument: str, sizes: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return tuple(check_count(argument, size, 1, "Pass a number for each axis.") for size in sizes)
