r"""The context of conditional data inside a network: numbers or a label, embedded as a vector.

A context :math:`c` enters a network as :math:`e(c)`, and where it was dropped as a learned vector
:math:`\varnothing`, the null token, so that one network estimates both :math:`E[x_0 \mid x_t, c]` and
:math:`E[x_0 \mid x_t]`.

References:
    Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), section 3.1. https://arxiv.org/abs/2207.12598
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_count, check_shape, check_values, described, require
from pyro_diffusion.networks.base import network_dtype

_any_label: ContextVar[bool] = ContextVar("any_label", default=False)


@contextmanager
def any_label() -> Iterator[None]:
    """Take a label that does not exist for one that does: to measure memory, where no value is checked.

    On a GPU a lookup outside the table would end the process.
    """
    token = _any_label.set(True)
    try:
        yield
    finally:
        _any_label.reset(token)


class Conditional(nn.Module):
    """A network that may be built to take a context."""

    context: "ContextEmbedding | None"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "context" not in self._modules:
            self.__dict__.setdefault("context", None)  # a pickle from before networks had contexts

    @property
    def takes_context(self) -> bool:
        """Whether it was built with ``context_shape`` or ``num_classes``."""
        return self.context is not None

    def embedded(self, context: Any, null: Tensor | None, count: int) -> Tensor | None:
        """The context of each row; ``None`` for a network that takes none."""
        if self.context is not None:
            return self.context(context, null, count)
        name = type(self).__name__
        require(
            context is None and null is None,
            "argument 'context'",
            f"one for {'an' if name == 'MLP' else 'a'} {name} that was built without one",
            "data alone",
            f"Leave it out, or build {name} with context_shape=(8,), say, or num_classes=10.",
        )
        return None


class ContextEmbedding(nn.Module):
    r"""A context as a vector: a perceptron of numbers, or a row of a table for labels.

    Args:
        context_shape: Shape of the context of a datum, real numbers; ``None`` for labels.
        num_classes: Number of labels :math:`0 … K - 1`; ``None`` for real numbers.
        null_token: Whether a learned vector stands for a context that was dropped.
        size: Size of the vector.

    Raises:
        ValueError: Both, or neither, of shape and number. From a call: a context of another shape or kind, a
            label that does not exist, or a dropped context without a null token.
    """

    null: nn.Parameter | None

    def __init__(
        self,
        context_shape: tuple[int, ...] | None,
        num_classes: int | None,
        null_token: bool,
        size: int,
    ) -> None:
        super().__init__()
        require(
            context_shape is None or num_classes is None,
            "arguments 'context_shape' and 'num_classes'",
            f"{context_shape!r} and {num_classes!r}",
            "one of them, because a context is numbers or a label",
            "For both, write a network with forward(self, x_t, log_snr, context).",
        )
        self.num_classes, self.shape = num_classes, torch.Size()
        if num_classes is not None:
            remedy = "Labels are 0 … num_classes − 1."
            self.num_classes = check_count("num_classes", num_classes, 1, remedy)
            self.embed: nn.Module = nn.Embedding(self.num_classes, size)
        else:
            self.shape = check_shape("context_shape", context_shape, "Pass (8,) for 8 numbers.")
            self.embed = nn.Sequential(
                nn.Linear(self.shape.numel(), size), nn.SiLU(), nn.Linear(size, size)
            )
        self.null = nn.Parameter(torch.zeros(size)) if null_token else None

    if TYPE_CHECKING:

        def __call__(self, context: Any, null: Tensor | None, count: int) -> Tensor: ...

    def forward(self, context: Any, null: Tensor | None, count: int) -> Tensor:
        """A vector for each of ``count`` rows, ``(B, size)``."""
        if context is None:
            return self._token("no context").expand(count, -1)
        embedded = self.embed(self._checked(context, count))
        if null is None:
            return embedded
        return torch.where(null[:, None], self._token("rows without a context"), embedded)

    def _token(self, got: str) -> Tensor:
        if self.null is None:
            raise ValueError(
                f"argument 'context': got {got} for a network without a null token; expected one for every "
                "row. Pass context=, or build the network with null_token=True and train it with context "
                "dropout, so that it estimates data without a context too."
            )
        return self.null

    def _checked(self, context: Any, count: int) -> Tensor:
        """Labels ``(B,)``, or numbers ``(B, size)``."""
        real = isinstance(context, Tensor) and not context.is_complex()
        whole = real and not context.is_floating_point()
        if self.num_classes is None:
            fit = real and context.shape == (count, *self.shape)
            expected = f"real numbers of shape (N,) + {tuple(self.shape)}"
            remedy = "Reshape it, or build the network with the shape of your context_shape."
        else:
            fit = whole and context.shape == (count,)
            expected = f"a whole number 0 … {self.num_classes - 1} for each datum, of shape (N,)"
            remedy = (
                "Pass labels.long(), or build the network with context_shape= for real numbers."
            )
        got = described(context)
        if isinstance(context, Tensor) and context.shape[:1] == (count,):
            got = f"a Tensor of shape (N,) + {tuple(context.shape[1:])} and {context.dtype}"
        require(fit, "argument 'context'", got, expected, remedy)
        if self.num_classes is None:
            return context.reshape(count, -1).to(network_dtype(self))
        labels = context.long()
        if _any_label.get():
            return labels.clamp(0, self.num_classes - 1)
        valid = (labels >= 0) & (labels < self.num_classes)
        return check_values("argument 'context'", labels, valid, expected, "Count labels from 0.")


def context_embedding(
    context_shape: tuple[int, ...] | None, num_classes: int | None, null_token: bool, size: int
) -> ContextEmbedding | None:
    """The embedding of a network's context, if it takes one."""
    if context_shape is not None or num_classes is not None:
        return ContextEmbedding(context_shape, num_classes, null_token, size)
    require(
        not null_token,
        "argument 'null_token'",
        "True for a network that takes no context",
        "it beside context_shape or num_classes",
        "Leave it out.",
    )
    return None
