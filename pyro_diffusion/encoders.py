r"""Encoders of a hierarchical VAE: :math:`q(h_{1:T} \mid x)`, learned (E14).

.. math::
    \text{bottom-up:}\quad q(h_{1:T} \mid x) &= q(h_1 \mid x) \prod_{t=2}^T q(h_t \mid h_{t-1}), \\
    \text{top-down:}\quad q(h_{1:T} \mid x) &= q(h_T \mid x) \prod_{t=2}^T q(h_{t-1} \mid h_t, x).

Every factor is a layer: a module that returns a Pyro distribution. :class:`GaussianLayer` is the default.
:class:`BottomUpEncoder` has one layer for each level. :class:`TopDownEncoder` is abstract, and
:class:`LadderEncoder` is its usual form. Both can be made of a user's own layers, with ``from_layers``.

The encoder of a conditional model may depend on the context, :math:`q(h_{1:T} \mid x, c)`, and need not
(E16). A layer whose ``forward`` has an argument ``context`` gets it, as ``layer(h, context=c)``, and the
others are called without one. Dropped contexts come as ``null``, boolean, with a row for each datum.

An encoder does not depend on the model, with one exception: a top-down encoder may call the model's own
layers, which it gets as the argument ``decoder``.

References:
    Auto-Encoding Variational Bayes (Kingma and Welling, 2014). https://arxiv.org/abs/1312.6114
    Ladder Variational Autoencoders (Sønderby et al., 2016), section 2. https://arxiv.org/abs/1602.02282
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import pyro.distributions as dist
from torch import Size, Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import softplus

from pyro_diffusion.checks import check_shape, check_unused, require
from pyro_diffusion.given import Given, heard, name_of, takes
from pyro_diffusion.networks import FeedForward, apply_layer
from pyro_diffusion.typed import TorchDistribution

__all__ = [
    "BottomUpEncoder",
    "GaussianLayer",
    "LadderEncoder",
    "Sizes",
    "TopDownEncoder",
    "apply_given",
    "level_shapes",
]

#: Sizes or shapes of h_1 … h_T.
Sizes = Sequence[int | tuple[int, ...]]

_SIZES = "Pass (16, 8), or shapes such as ((4, 4), 8), and leave out levels that hold nothing."
#: Settings of a layer that say which context it takes.
_OF_CONTEXT = ("context_shape", "num_classes", "null_token")
_MIN_STD = 1e-4  # a precision of 1e8, which float32 can still add to others
_UNIT = 0.5413  # softplus of it is one


class GaussianLayer(nn.Module):
    r"""A learned Gaussian: :math:`N(\mu(h), \operatorname{diag} \sigma^2(h))` from a perceptron.

    The perceptron returns :math:`\mu` and a number :math:`s` for each entry, and
    :math:`\sigma = \operatorname{softplus}(s + 0.5413) + 10^{-4}`, which is 1 at :math:`s = 0`. With
    ``context_shape`` or ``num_classes`` both depend on a context too, :math:`\mu(h, c)` and
    :math:`\sigma(h, c)`.

    Args:
        input_shape: Shape of :math:`h`.
        output_shape: Event shape of the Gaussian.
        settings: Passed on to :class:`~pyro_diffusion.networks.FeedForward`.

    Raises:
        ValueError: The errors of :class:`~pyro_diffusion.networks.FeedForward`.

    Example:
        >>> layer = GaussianLayer((8, 8), (16,), hidden_size=32)
        >>> layer(torch.randn(5, 8, 8)).event_shape
        torch.Size([16])
        >>> conditional = GaussianLayer((8,), (16,), num_classes=10)
        >>> conditional(torch.randn(5, 8), torch.arange(5)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self, input_shape: tuple[int, ...], output_shape: tuple[int, ...], **settings: Any
    ) -> None:
        super().__init__()
        self.network = FeedForward(input_shape, (2, *output_shape), **settings)

    if TYPE_CHECKING:

        def __call__(
            self, h: Tensor, context: Any = None, null: Tensor | None = None
        ) -> TorchDistribution: ...

    @property
    def takes_context(self) -> bool:
        """Whether it was built with ``context_shape`` or ``num_classes``."""
        return self.network.takes_context

    def forward(
        self, h: Tensor, context: Any = None, null: Tensor | None = None
    ) -> TorchDistribution:
        """A Normal of ``h``'s batch shape and event shape ``output_shape``."""
        given = Given(context=context, null=null).of_kernels()
        event_dim = len(self.network.output_shape) - 1
        mean, raw = apply_layer(self.network, h, **given).unbind(-1 - event_dim)
        return dist.Normal(mean, softplus(raw + _UNIT) + _MIN_STD).to_event(event_dim)


class BottomUpEncoder(nn.Module):
    r"""The Markovian encoder :math:`q(h_{1:T} \mid x) = q(h_1 \mid x) \prod_t q(h_t \mid h_{t-1})`.

    With layers that take a context it is
    :math:`q(h_{1:T} \mid x, c) = q(h_1 \mid x, c) \prod_t q(h_t \mid h_{t-1}, c)`.

    Args:
        event_shape: Shape of a datum after embedding. It may be left out if ``layers`` are given.
        latent_sizes: Sizes, or shapes, of :math:`h_1 … h_T`. They may be left out if ``layers`` are given.
        layers: The user's own layers: ``layers[t - 1](h_{t-1})`` is :math:`q(h_t \mid h_{t-1})`, with
            :math:`h_0` the embedded datum. ``None`` makes a :class:`GaussianLayer` for each level.
        settings: Settings of the default layers, passed on to :class:`GaussianLayer`; ``context_shape=`` or
            ``num_classes=`` for layers that take a context.

    Raises:
        ValueError: Sizes that are not positive whole numbers, no level, or settings together with ``layers``.
            From a program: a layer that takes a context and got none, and has no null token.
    """

    #: Shapes of the datum and the latents, or ``None`` if only the layers determine them.
    shapes: list[Size] | None

    def __init__(
        self,
        event_shape: tuple[int, ...] | None = None,
        latent_sizes: Sizes | None = None,
        *,
        layers: Sequence[nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if layers is None:
            self.shapes = level_shapes(event_shape, latent_sizes)
            layers = [GaussianLayer(*step, **settings) for step in pairwise(self.shapes)]
        else:
            check_unused(settings, "layers")
            self.shapes = None if event_shape is None else level_shapes(event_shape, latent_sizes)
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_layers(cls, layers: Sequence[nn.Module]) -> Self:
        r"""An encoder of the user's own layers: ``layers[t - 1](h_{t-1})`` is :math:`q(h_t \mid h_{t-1})`."""
        return cls(layers=layers)

    @property
    def num_levels(self) -> int:
        """Number of levels, one for each layer."""
        return len(self.layers)

    def transition(
        self, h: Tensor, t: int, context: Any = None, null: Tensor | None = None
    ) -> TorchDistribution:
        r""":math:`q(h_t \mid h_{t-1})`, or :math:`q(h_t \mid h_{t-1}, c)`."""
        given = Given(context=context, null=null).of_kernels()
        return cast(TorchDistribution, apply_given(self.layers[t - 1], h, given))


class TopDownEncoder(nn.Module, ABC):
    r"""An encoder in the model's order, :math:`q(h_T \mid x) \prod_t q(h_{t-1} \mid h_t, x)`; abstract.

    Each of its methods may have the arguments ``context`` and ``null`` besides; those that do are called
    with them. The ``decoder`` has the context already.
    """

    @abstractmethod
    def encode(self, x: Tensor) -> Any:
        """The code of embedded data ``x``, computed once for all levels."""

    @abstractmethod
    def initial(self, code: Any) -> TorchDistribution:
        r""":math:`q(h_T \mid x)`."""

    @abstractmethod
    def transition(
        self, h: Tensor, code: Any, t: int, decoder: Callable[[Tensor, int], TorchDistribution]
    ) -> TorchDistribution:
        r""":math:`q(h_{t-1} \mid h_t, x)`; ``decoder(h, t)`` is the model's :math:`p(h_{t-1} \mid h_t)`."""


class LadderEncoder(TopDownEncoder):
    r"""The ladder, which merges an estimate from the datum with the model's own kernel at each level.

    A deterministic path upwards, :math:`d_t = \mathrm{path}_t(d_{t-1})` with :math:`d_0 = x`, gives an
    estimate :math:`\hat q(h_t \mid x) = N(\hat\mu_t, \hat\sigma_t^2)` of each level. On the way down, the
    estimate and the model's own :math:`p(h_t \mid h_{t+1}) = N(\mu_p, \sigma_p^2)` are weighted by their
    precisions:

    .. math::
        q(h_t \mid h_{t+1}, x) = N\!\left(
            \frac{\hat\mu_t \hat\sigma_t^{-2} + \mu_p \sigma_p^{-2}}
                 {\hat\sigma_t^{-2} + \sigma_p^{-2}},\;
            \frac{1}{\hat\sigma_t^{-2} + \sigma_p^{-2}} \right), \qquad
        q(h_T \mid x) = \hat q(h_T \mid x).

    Steps and heads that take a context make it :math:`\hat q(h_t \mid x, c)`, and the model's kernel is
    :math:`p(h_t \mid h_{t+1}, c)`.

    Args:
        event_shape: Shape of a datum after embedding. It may be left out if ``path`` and ``heads`` are given.
        latent_sizes: Sizes, or shapes, of :math:`h_1 … h_T`. They may be left out likewise.
        path: The user's own steps of the path: ``path[t - 1](d_{t-1})`` is :math:`d_t`.
        heads: The user's own estimates, one for each step: ``heads[t - 1](d_t)`` is
            :math:`\hat q(h_t \mid x)`, a Normal.
        hidden_size: Width of the default path, and of its hidden layers.
        settings: Settings of the default path, passed on to :class:`~pyro_diffusion.networks.FeedForward`.
            The default heads take a context if the path does.

    Raises:
        ValueError: Sizes that are not positive whole numbers, no level, settings together with ``path`` and
            ``heads``, or a number of steps that differs from the number of heads. From a program: kernels
            that are not Normals, or that have different event shapes; a layer that takes a context and got
            none, and has no null token.

    References:
        Ladder Variational Autoencoders (Sønderby et al., 2016), section 2.
        https://arxiv.org/abs/1602.02282
    """

    #: Shapes of the datum and the latents, or ``None`` if only the layers determine them.
    shapes: list[Size] | None

    def __init__(
        self,
        event_shape: tuple[int, ...] | None = None,
        latent_sizes: Sizes | None = None,
        *,
        path: Sequence[nn.Module] | None = None,
        heads: Sequence[nn.Module] | None = None,
        hidden_size: int = 256,
        **settings: Any,
    ) -> None:
        super().__init__()
        if path is None and heads is None:
            self.shapes, width = level_shapes(event_shape, latent_sizes), (hidden_size,)
            inputs = [self.shapes[0]] + [width] * (len(self.shapes) - 2)
            path = [FeedForward(d, width, hidden_size=hidden_size, **settings) for d in inputs]
            of_heads = {name: settings[name] for name in _OF_CONTEXT if name in settings}
            of_heads |= {"hidden_size": hidden_size, "num_hidden": 0}
            heads = [GaussianLayer(width, shape, **of_heads) for shape in self.shapes[1:]]
        else:
            check_unused(settings, "a path and heads")
            self.shapes = None if event_shape is None else level_shapes(event_shape, latent_sizes)
        self.path, self.heads = nn.ModuleList(path), nn.ModuleList(heads)
        require(
            len(self.path) == len(self.heads),
            "argument 'heads'",
            f"{len(self.heads)} for a path of {len(self.path)} steps",
            "one for each level",
            "Use nn.Identity() for a step of the path that does nothing.",
        )

    @classmethod
    def from_layers(cls, path: Sequence[nn.Module], heads: Sequence[nn.Module]) -> Self:
        r"""A ladder of the user's own layers: ``path[t - 1](d_{t-1})`` is :math:`d_t`, and
        ``heads[t - 1](d_t)`` is :math:`\hat q(h_t \mid x)`.
        """
        return cls(path=path, heads=heads)

    @property
    def num_levels(self) -> int:
        """Number of levels, one for each head."""
        return len(self.heads)

    def encode(
        self, x: Tensor, context: Any = None, null: Tensor | None = None
    ) -> list[TorchDistribution]:
        r""":math:`\hat q(h_1 \mid x) … \hat q(h_T \mid x)`."""
        given = Given(context=context, null=null).of_kernels()
        d, levels = x, []
        for t, (step, head) in enumerate(zip(self.path, self.heads, strict=True), 1):
            try:
                d = apply_given(step, d, given)
                levels.append(apply_given(head, d, given))
            except ValueError as error:
                raise ValueError(f"site 'x_{t}': {error}") from error
        return levels

    def initial(self, code: list[TorchDistribution]) -> TorchDistribution:
        return code[-1]

    def transition(
        self,
        h: Tensor,
        code: list[TorchDistribution],
        t: int,
        decoder: Callable[[Tensor, int], TorchDistribution],
    ) -> TorchDistribution:
        return _merge(code[t - 2], decoder(h, t))


def apply_given(layer: nn.Module, h: Tensor, given: dict[str, Any]) -> Any:
    """``layer(h)``, with those of ``context`` and ``null`` that the layer takes.

    Raises:
        ValueError: The errors of the layer, dropped contexts for a layer that takes a context alone, or no
            context for a layer that needs one.
    """
    try:
        return apply_layer(layer, h, **heard(given, layer))
    except TypeError as error:
        if "context" in given or not takes(layer, "context"):
            raise
        raise ValueError(
            f"argument 'context': got none for {name_of(layer)}, which takes one: {error}; expected a row "
            "for each datum. Pass context=, or let the layer's forward have context=None and compute without "
            "one."
        ) from error


def level_shapes(event_shape: Any, latent_sizes: Any) -> list[Size]:
    """Shapes of a datum and of :math:`h_1 … h_T`, from the datum's shape and sizes or shapes of levels.

    Raises:
        ValueError: A shape that is not a tuple, no level, or a size that is not a positive whole number.
    """
    shape = check_shape("event_shape", event_shape, "Pass (64,) for vectors of 64 numbers.")
    if not isinstance(latent_sizes, Iterable) or not (sizes := list(latent_sizes)):
        raise ValueError(
            f"argument 'latent_sizes': got {latent_sizes!r}; expected a size for every level, h_1 first. "
            "Pass (16,) for a plain VAE with 16 latents, (16, 8, 4) for three levels."
        )
    levels = (size if np.ndim(size) else (size,) for size in sizes)
    return [shape, *(check_shape("latent_sizes", tuple(level), _SIZES) for level in levels)]


def _merge(q_hat: TorchDistribution, p: TorchDistribution) -> TorchDistribution:
    """The product of two Gaussians over one latent, normalised: their precisions add up."""
    q, prior = _check_normals(q_hat, p)
    precision = q.scale**-2 + prior.scale**-2
    mean = (q.loc * q.scale**-2 + prior.loc * prior.scale**-2) / precision
    return dist.Normal(mean, precision.rsqrt()).to_event(len(q_hat.event_shape))


def _check_normals(q_hat: TorchDistribution, p: TorchDistribution) -> list[Any]:
    """The two Normals without their event dimensions, if they are Normals over one latent."""
    if q_hat.event_shape != p.event_shape:
        raise ValueError(
            f"argument 'encoder': got a head of event shape {tuple(q_hat.event_shape)} for a level of "
            f"{tuple(p.event_shape)}; expected the same shape. Build LadderEncoder with the latent_sizes "
            "of the model."
        )
    normals = [k.base_dist if isinstance(k, Independent) else k for k in (q_hat, p)]
    if not all(isinstance(normal, Normal) for normal in normals):
        raise ValueError(
            f"argument 'encoder': got layers that return {' and '.join(type(k).__name__ for k in normals)}; "
            "expected Normals from the head and from the decoder, because a ladder merges them by precision. "
            "Subclass TopDownEncoder for other kernels."
        )
    return normals
