r"""Hierarchical VAEs: the chains of :mod:`~pyro_diffusion.chains` with learned layers (E14).

.. math::
    p(x, h_{1:T}) = p(h_T)\, p(x \mid h_1) \prod_{t=2}^T p(h_{t-1} \mid h_t),

with one of two encoders,

.. math::
    \text{bottom-up:}\quad q(h_{1:T} \mid x) &= q(h_1 \mid x) \prod_{t=2}^T q(h_t \mid h_{t-1}), \\
    \text{ladder:}\quad q(h_{1:T} \mid x) &= q(h_T \mid x) \prod_{t=2}^T q(h_{t-1} \mid h_t, x).

A diffusion model is the same thing with three restrictions: latents of the data's size, an encoder that
is fixed, and a standard normal end. Pinned to those kernels, the programs below have its bound, number
for number (``tests/test_hvae.py``). Latents live at sites ``x_1 … x_T`` as in every chain, ``x_t`` being
:math:`h_t`, and the order of the encoder decides what the terms of the bound are: of a ladder all are
KLs, of a bottom-up encoder only the one at the top, the others are log-ratios and can be negative.

References:
    Auto-Encoding Variational Bayes (Kingma and Welling, 2014). https://arxiv.org/abs/1312.6114
    Ladder Variational Autoencoders (Sønderby et al., 2016), section 2. https://arxiv.org/abs/1602.02282
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), eqs. 23-29.
    https://arxiv.org/abs/2208.11970
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from numbers import Integral
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, Normal, Transform
from torch.nn.functional import softplus

from pyro_diffusion.chains import BottomUpGuide, GenerativeChain, TopDownGuide
from pyro_diffusion.family import Family, describe_part
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.networks import FeedForward

__all__ = [
    "BottomUpEncoder",
    "GaussianLayer",
    "HierarchicalVAE",
    "LadderEncoder",
    "TopDownEncoder",
]

Sizes = Sequence[int | tuple[int, ...]]

_MIN_STD = 1e-4  # a precision of 1e8, which float32 can still add to others
_UNIT = 0.5413  # softplus of it is one


class GaussianLayer(nn.Module):
    r"""A learned Gaussian: :math:`N(\mu(h), \operatorname{diag} \sigma^2(h))` from a perceptron.

    :math:`\sigma` is a softplus, which is one at zero, and at least 1e-4.

    Args:
        input_shape: Shape of :math:`h`.
        output_shape: Shape of what the Gaussian is over.
        settings: Passed on to :class:`~pyro_diffusion.networks.FeedForward`.

    Example:
        >>> layer = GaussianLayer((8, 8), (16,), hidden_size=32)
        >>> layer(torch.randn(5, 8, 8)).event_shape
        torch.Size([16])
    """

    def __init__(
        self, input_shape: tuple[int, ...], output_shape: tuple[int, ...], **settings: Any
    ) -> None:
        super().__init__()
        self.network = FeedForward(input_shape, (2, *output_shape), **settings)

    def forward(self, h: Tensor) -> TorchDistribution:
        """A Normal of ``h``'s batch shape and event shape ``output_shape``."""
        event_dim = len(self.network.output_shape) - 1
        mean, raw = _through(self.network, h).unbind(-1 - event_dim)
        return dist.Normal(mean, softplus(raw + _UNIT) + _MIN_STD).to_event(event_dim)


class BottomUpEncoder(nn.Module):
    r"""The Markovian encoder :math:`q(h_{1:T} \mid x) = q(h_1 \mid x) \prod_t q(h_t \mid h_{t-1})`.

    Args:
        event_shape: Shape of a datum after embedding.
        latent_sizes: Sizes, or shapes, of :math:`h_1 … h_T`.
        settings: Of every layer, passed on to :class:`GaussianLayer`.
    """

    shapes: list[torch.Size] | None  # of data and latents; None where layers are the user's own

    def __init__(self, event_shape: tuple[int, ...], latent_sizes: Sizes, **settings: Any) -> None:
        super().__init__()
        shapes = [_event_shape(event_shape), *_shapes(latent_sizes)]
        self.shapes = shapes
        self.layers = nn.ModuleList(GaussianLayer(*step, **settings) for step in pairwise(shapes))

    @classmethod
    def from_layers(cls, layers: Sequence[nn.Module]) -> Self:
        r"""``layers[t - 1](h_{t-1})`` of your own is :math:`q(h_t \mid h_{t-1})`, :math:`h_0` the datum."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder.shapes, encoder.layers = None, nn.ModuleList(layers)
        return encoder

    @property
    def num_levels(self) -> int:
        """Number of levels, one for each layer."""
        return len(self.layers)

    def transition(self, h: Tensor, t: int) -> TorchDistribution:
        r""":math:`q(h_t \mid h_{t-1})`."""
        return self.layers[t - 1](h)


class TopDownEncoder(nn.Module, ABC):
    r"""An encoder in the model's order, :math:`q(h_T \mid x) \prod_t q(h_{t-1} \mid h_t, x)`; to subclass."""

    @abstractmethod
    def encode(self, x: Tensor) -> Any:
        """The context ``c``, computed once for embedded data ``x``."""

    @abstractmethod
    def initial(self, c: Any) -> TorchDistribution:
        r""":math:`q(h_T \mid x)`."""

    @abstractmethod
    def transition(
        self, h: Tensor, c: Any, t: int, decoder: Callable[[Tensor, int], TorchDistribution]
    ) -> TorchDistribution:
        r""":math:`q(h_{t-1} \mid h_t, x)`; ``decoder(h, t)`` is the model's :math:`p(h_{t-1} \mid h_t)`."""


class LadderEncoder(TopDownEncoder):
    r"""The ladder: what the datum says of a level, merged with what the model says.

    A deterministic path upwards, :math:`d_t = \mathrm{path}_t(d_{t-1})` with :math:`d_0 = x`, says of each
    level :math:`\hat q(h_t \mid x) = N(\hat\mu_t, \hat\sigma_t^2)`; on the way down it is merged with the
    model's own :math:`p(h_t \mid h_{t+1}) = N(\mu_p, \sigma_p^2)` by precision,

    .. math::
        q(h_t \mid h_{t+1}, x) = N\!\left(
            \frac{\hat\mu_t \hat\sigma_t^{-2} + \mu_p \sigma_p^{-2}}
                 {\hat\sigma_t^{-2} + \sigma_p^{-2}},\;
            \frac{1}{\hat\sigma_t^{-2} + \sigma_p^{-2}} \right), \qquad
        q(h_T \mid x) = \hat q(h_T \mid x).

    Args:
        event_shape: Shape of a datum after embedding.
        latent_sizes: Sizes, or shapes, of :math:`h_1 … h_T`.
        hidden_size: Width of the path, and of its hidden layers.
        settings: Of every step of the path, passed on to :class:`~pyro_diffusion.networks.FeedForward`.

    References:
        Ladder Variational Autoencoders (Sønderby et al., 2016), section 2.
        https://arxiv.org/abs/1602.02282
    """

    shapes: list[torch.Size] | None  # of data and latents; None where layers are the user's own

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latent_sizes: Sizes,
        *,
        hidden_size: int = 256,
        **settings: Any,
    ) -> None:
        super().__init__()
        shapes, width = _shapes(latent_sizes), (hidden_size,)
        self.shapes = [_event_shape(event_shape), *shapes]
        inputs = [self.shapes[0]] + [torch.Size(width)] * (len(shapes) - 1)
        self.path = nn.ModuleList(
            FeedForward(shape, width, hidden_size=hidden_size, **settings) for shape in inputs
        )
        self.heads = nn.ModuleList(GaussianLayer(width, shape, num_hidden=0) for shape in shapes)

    @classmethod
    def from_layers(cls, path: Sequence[nn.Module], heads: Sequence[nn.Module]) -> Self:
        r"""``path[t - 1](d_{t-1})`` of your own is :math:`d_t`, ``heads[t - 1](d_t)`` a level's Normal."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder.shapes = None
        encoder.path, encoder.heads = nn.ModuleList(path), nn.ModuleList(heads)
        if len(path) != len(heads):
            raise ValueError(
                f"argument 'heads': got {len(heads)} for a path of {len(path)} steps; expected one for each "
                "level. Use nn.Identity() for a step of the path that does nothing."
            )
        return encoder

    @property
    def num_levels(self) -> int:
        """Number of levels, one for each head."""
        return len(self.heads)

    def encode(self, x: Tensor) -> list[TorchDistribution]:
        r""":math:`\hat q(h_1 \mid x) … \hat q(h_T \mid x)`."""
        d, levels = x, []
        for step, head in zip(self.path, self.heads, strict=True):
            d = _through(step, d)
            levels.append(head(d))
        return levels

    def initial(self, c: list[TorchDistribution]) -> TorchDistribution:
        return c[-1]

    def transition(
        self,
        h: Tensor,
        c: list[TorchDistribution],
        t: int,
        decoder: Callable[[Tensor, int], TorchDistribution],
    ) -> TorchDistribution:
        return _merge(c[t - 2], decoder(h, t))


class HierarchicalVAE(Family):
    r"""A Markovian hierarchical VAE: its programs and its sampler.

    ``model`` and ``guide`` are trained by ``SVI`` as those of a diffusion model are. With a
    :class:`LadderEncoder` (or any :class:`TopDownEncoder`) ``guide`` is ``posterior_guide``, which has
    analytic KLs under ``TraceMeanField_ELBO``; a :class:`BottomUpEncoder` of several levels wants
    ``Trace_ELBO``. One level is a plain VAE.

    Args:
        event_shape: Shape of a datum after embedding: that of the data, but for categories.
        latent_sizes: Sizes of :math:`h_1 … h_T`, bottom to top; whole numbers, or shapes for layers of
            your own.
        likelihood: :math:`p(x \mid h_1)` given the first layer's output, and the embedding of the data;
            ``None`` makes the first layer a Gaussian over the data.
        encoder: :math:`q(h_{1:T} \mid x)`; by default a :class:`BottomUpEncoder`.
        decoder: Layers of your own: ``decoder[t - 1](h_t)`` is :math:`p(h_{t-1} \mid h_t)`, and
            ``decoder[0](h_1)`` what the likelihood takes, or without one the distribution of data.
        transform: Torch transform from the user's units to the model's, as in a diffusion model.
        name: Prefix of the parameters in Pyro's param store; ``None`` takes a free one.
        settings: Of the default layers: ``hidden_size``, ``num_hidden`` and ``dropout`` of
            :class:`~pyro_diffusion.networks.FeedForward`.

    Raises:
        ValueError: Sizes that are not positive, no level, layers of another number than levels, or an
            encoder of another kind. From a program: a layer whose output does not fit; data as for
            :class:`~pyro_diffusion.diffusion.DiffusionModel`.

    Example:
        >>> vae = HierarchicalVAE((2,), latent_sizes=(8, 4), hidden_size=32)
        >>> svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(16, 2))
        >>> vae.sample(3).shape
        torch.Size([3, 2])
    """

    encoder: Any

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latent_sizes: Sizes,
        likelihood: Any = None,
        *,
        encoder: BottomUpEncoder | TopDownEncoder | None = None,
        decoder: Sequence[nn.Module] | None = None,
        transform: Transform | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(_event_shape(event_shape), likelihood, transform, name)
        self.latent_shapes = _shapes(latent_sizes)
        if settings and encoder is not None and decoder is not None:
            raise ValueError(
                f"argument {next(iter(settings))!r}: got it beside an encoder and a decoder; expected it for "
                "default layers only. Give it to the layers themselves."
            )
        if encoder is None:
            encoder = BottomUpEncoder(event_shape, latent_sizes, **settings)
        self.encoder = encoder
        self.decoder = nn.ModuleList(self._layers(settings) if decoder is None else decoder)
        self._check_encoder()
        self._check_number("decoder", len(self.decoder))

    def _layers(self, settings: dict[str, Any]) -> list[nn.Module]:
        """The default decoder: Gaussian layers, the first one's output what the likelihood takes."""
        lowest: nn.Module
        if self.likelihood is None:
            lowest = GaussianLayer(self.latent_shapes[0], self.event_shape, **settings)
        else:
            count = getattr(self.likelihood, "num_outputs", 1)
            shape = self.event_shape + ((count,) if count > 1 else ())
            lowest = FeedForward(self.latent_shapes[0], shape, **settings)
        steps = pairwise(self.latent_shapes)
        return [lowest, *(GaussianLayer(above, below, **settings) for below, above in steps)]

    @property
    def num_timesteps(self) -> int:
        """Number of levels :math:`T`."""
        return len(self.latent_shapes)

    @property
    def _reference(self) -> Tensor:
        # Of the layers: a learned scale of the likelihood, or a transform, is in a dtype of its own.
        layers = chain(self.encoder.parameters(), self.decoder.parameters())
        numbers = chain(layers, self.parameters(), self.buffers())
        return next((x for x in numbers if x.is_floating_point()), torch.empty(()))

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype in which the chain runs: that of the parameters, at least float32."""
        return torch.promote_types(self._reference.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Device that the model is on: that of the parameters."""
        return self._reference.device

    @property
    def description(self) -> dict[str, str]:
        """What the numbers of a ``state_dict`` mean: everything but the layers."""
        return super().description | {
            "latent_sizes": str([tuple(shape) for shape in self.latent_shapes]),
            "encoder": describe_part(self.encoder),
        }

    @property
    def model(self) -> GenerativeChain:
        r""":math:`p(x, h_{1:T})` as a Pyro program (E14); sites ``x_T … x_0``."""
        return GenerativeChain(
            self.prior, self.transition, self.decode, num_timesteps=self.num_timesteps, owner=self
        )

    @property
    def guide(self) -> BottomUpGuide | TopDownGuide:
        r""":math:`q(h_{1:T} \mid x)` as a Pyro program (E14), in the encoder's order."""
        if isinstance(self.encoder, TopDownEncoder):
            return self.posterior_guide
        return BottomUpGuide(
            self._bottom_up,
            num_timesteps=self.num_timesteps,
            embed=self.embed,
            owner=self,
            below="encoder",
        )

    @property
    def posterior_guide(self) -> TopDownGuide:
        r"""A ladder's :math:`q(h_T \mid x) \prod_t q(h_{t-1} \mid h_t, x)`, in the model's order."""
        if not isinstance(self.encoder, TopDownEncoder):
            raise AttributeError
        return TopDownGuide(
            self._encode,
            self._initial,
            self._top_down,
            num_timesteps=self.num_timesteps,
            owner=self,  # and all of its parameters: a ladder runs the decoder as well
        )

    def __getattr__(self, name: str) -> Any:
        if name == "posterior_guide":
            raise AttributeError(
                "attribute 'posterior_guide': got a BottomUpEncoder, whose sites run against the model's; "
                "expected a ladder. Use guide with Trace_ELBO, or build with encoder=LadderEncoder(…)."
            )
        return super().__getattr__(name)

    # The kernels that the programs are made of.

    def prior(self) -> TorchDistribution:
        """:math:`p(h_T) = N(0, I)`."""
        shape = self.latent_shapes[-1]
        zero = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return dist.Normal(zero, 1.0).to_event(len(shape))

    def transition(self, h: Tensor, t: int) -> TorchDistribution:
        r""":math:`p(h_{t-1} \mid h_t)`, t = T … 2."""
        return self._checked(self.decoder[t - 1](h), t - 1, "decoder")

    def decode(self, h: Tensor) -> TorchDistribution:
        r""":math:`p(x \mid h_1)`."""
        output = _through(self.decoder[0], h)
        if self.likelihood is not None:
            output = self.likelihood(self._for_the_likelihood(output))
        if not isinstance(output, torch.distributions.Distribution):
            raise ValueError(
                f"argument 'decoder': got a {type(output).__name__} from its first layer; expected a "
                "distribution of the data, since there is no likelihood. Pass likelihood=…, or let the "
                "layer return one."
            )
        return self.data_kernel(output, h.shape[: h.dim() - len(self.latent_shapes[0])])

    def _check_encoder(self) -> None:
        if not isinstance(self.encoder, BottomUpEncoder | TopDownEncoder):
            raise ValueError(
                f"argument 'encoder': got a {type(self.encoder).__name__}; expected a BottomUpEncoder or a "
                "TopDownEncoder. Pass LadderEncoder(event_shape, latent_sizes), say, or put layers of your "
                "own into BottomUpEncoder.from_layers(layers)."
            )
        if not isinstance(self.encoder, BottomUpEncoder | LadderEncoder):
            return
        own = self.encoder.shapes
        if own not in (None, [self.event_shape, *self.latent_shapes]):
            raise ValueError(
                f"argument 'encoder': got one for data of shape {tuple(own[0])} and latents "
                f"{[tuple(shape) for shape in own[1:]]}; expected {tuple(self.event_shape)} and "
                f"{[tuple(shape) for shape in self.latent_shapes]}. Build it with the event_shape and "
                "latent_sizes of the model."
            )
        self._check_number("encoder", self.encoder.num_levels)

    def _check_number(self, argument: str, number: int) -> None:
        if number != len(self.latent_shapes):
            raise ValueError(
                f"argument {argument!r}: got {number} layers for {len(self.latent_shapes)} levels; "
                "expected one for each. Give latent_sizes a size for every level, h_1 first."
            )

    def _for_the_likelihood(self, output: Any) -> Tensor:
        """The first layer's output, if it is a tensor, and of the data's shape where that is known."""
        known = isinstance(self.likelihood, Likelihood) and self.likelihood.num_outputs == 1
        shape = output.shape if isinstance(output, Tensor) else ()
        fits = not known or shape[len(shape) - len(self.event_shape) :] == self.event_shape
        if not isinstance(output, Tensor) or not fits:
            got = f"a {type(output).__name__}" + (f" of shape {tuple(shape)}" if shape else "")
            raise ValueError(
                f"argument 'decoder': got {got} from its first layer; expected a tensor of batch_shape + "
                f"{tuple(self.event_shape)}, which {type(self.likelihood).__name__} makes a distribution of. "
                "Use FeedForward, or leave out the likelihood if the layer returns the distribution itself."
            )
        return output

    def _bottom_up(self, h: Tensor, t: int) -> TorchDistribution:
        return self._checked(self.encoder.transition(h, t), t, "encoder")

    def _encode(self, x_0: Tensor, mask: Tensor | None = None) -> Any:
        return self.encoder.encode(self.embed(x_0, mask))

    def _initial(self, c: Any) -> TorchDistribution:
        return self._checked(self.encoder.initial(c), self.num_timesteps, "encoder")

    def _top_down(self, h: Tensor, c: Any, t: int) -> TorchDistribution:
        kernel = self.encoder.transition(h, c, t, self.transition)
        return self._checked(kernel, t - 1, "encoder")

    def _checked(self, kernel: Any, t: int, layers: str) -> TorchDistribution:
        """A layer's kernel over the latent of level ``t``, if it is one."""
        shape = self.latent_shapes[t - 1]
        if getattr(kernel, "event_shape", None) != shape:
            got = f"a {type(kernel).__name__}"
            if isinstance(kernel, torch.distributions.Distribution):
                got += f" of event shape {tuple(kernel.event_shape)}"
            raise ValueError(
                f"argument {layers!r}: got {got} over level {t}; expected a distribution of event shape "
                f"{tuple(shape)}. Let latent_sizes and the layers agree, and declare event dimensions with "
                "to_event."
            )
        return kernel


def _through(layer: nn.Module, h: Tensor) -> Any:
    """A layer's output. A layer of half precision works in that; the chain around it is in float32."""
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), h.dtype)
    if torch.finfo(dtype).bits >= 32:
        return layer(h)
    output = layer(h.to(dtype))
    return output.float() if isinstance(output, Tensor) else output


def _merge(q_hat: TorchDistribution, p: TorchDistribution) -> TorchDistribution:
    """Two Gaussians of one latent multiplied: precisions add up."""
    ours, theirs = (k.base_dist if isinstance(k, Independent) else k for k in (q_hat, p))
    if q_hat.event_shape != p.event_shape:
        raise ValueError(
            f"argument 'encoder': got a head of event shape {tuple(q_hat.event_shape)} for a level of "
            f"{tuple(p.event_shape)}; expected one and the same. Build LadderEncoder with the latent_sizes "
            "of the model."
        )
    if not (isinstance(ours, Normal) and isinstance(theirs, Normal)):
        raise ValueError(
            f"argument 'encoder': got layers that return {type(ours).__name__} and {type(theirs).__name__}; "
            "expected Normals on both sides of a ladder, which merges them by precision. Subclass "
            "TopDownEncoder for other kernels."
        )
    precision = ours.scale**-2 + theirs.scale**-2
    mean = (ours.loc * ours.scale**-2 + theirs.loc * theirs.scale**-2) / precision
    event_dim = q_hat.reinterpreted_batch_ndims if isinstance(q_hat, Independent) else 0
    return dist.Normal(mean, precision.rsqrt()).to_event(event_dim)


def _event_shape(event_shape: tuple[int, ...]) -> torch.Size:
    if not isinstance(event_shape, tuple):
        raise ValueError(
            f"argument 'event_shape': got {event_shape!r}; expected a tuple. Pass (64,) for vectors of 64 "
            "numbers."
        )
    return torch.Size(event_shape)


def _shapes(latent_sizes: Sizes) -> list[torch.Size]:
    """Latent shapes by level, from sizes or shapes."""
    if isinstance(latent_sizes, int) or not len(latent_sizes):
        raise ValueError(
            f"argument 'latent_sizes': got {latent_sizes!r}; expected a size for every level, h_1 first. "
            "Pass (16,) for a plain VAE with 16 latents, (16, 8, 4) for three levels."
        )
    try:
        shapes = [torch.Size([s] if isinstance(s, Integral) else tuple(s)) for s in latent_sizes]  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            f"argument 'latent_sizes': got {latent_sizes!r}; expected whole numbers, or shapes. Pass (16, 8)."
        ) from error
    if any(number < 1 for shape in shapes for number in shape):
        raise ValueError(
            f"argument 'latent_sizes': got {tuple(latent_sizes)}; expected positive sizes. Leave out levels "
            "that hold nothing."
        )
    return shapes
