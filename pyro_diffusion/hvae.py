r"""Hierarchical VAEs: the chains of :mod:`~pyro_diffusion.chains` with learned layers (E14).

.. math::
    p(x, h_{1:T}) = p(h_T)\, p(x \mid h_1) \prod_{t=2}^T p(h_{t-1} \mid h_t),

with an encoder of :mod:`~pyro_diffusion.encoders`, bottom-up or top-down. Given a context :math:`c` (E16),

.. math::
    p(x, h_{1:T} \mid c) = p(h_T)\, p(x \mid h_1, c) \prod_{t=2}^T p(h_{t-1} \mid h_t, c),

and the encoder may depend on the context too, which that of a diffusion model does not.

A diffusion model is a hierarchical VAE with three restrictions: latents of the data's size, a fixed
encoder, and a standard normal distribution at the end. With the kernels of a diffusion model as its layers,
the programs below have the same bound, term by term (``tests/test_hvae.py``).

The latent :math:`h_t` is at site ``x_t``, as in every chain. The order of the encoder decides the form
of the bound's terms. With a top-down encoder every term is a KL. With a bottom-up encoder only the term at
the top is a KL; the others are log-ratios, and can be negative.

References:
    Auto-Encoding Variational Bayes (Kingma and Welling, 2014). https://arxiv.org/abs/1312.6114
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), eqs. 23-29.
    https://arxiv.org/abs/2208.11970
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_diffusion.chains import BottomUpGuide, GenerativeChain, TopDownGuide
from pyro_diffusion.checks import check_argument, check_unused, described, require
from pyro_diffusion.display import size_in_words
from pyro_diffusion.encoders import (
    BottomUpEncoder,
    GaussianLayer,
    LadderEncoder,
    Sizes,
    TopDownEncoder,
    apply_given,
    level_shapes,
)
from pyro_diffusion.family import Family, describe_part
from pyro_diffusion.given import heard, takes
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.networks import FeedForward
from pyro_diffusion.typed import EmbedsData, TorchDistribution

__all__ = [
    "BottomUpEncoder",
    "GaussianLayer",
    "HierarchicalVAE",
    "LadderEncoder",
    "TopDownEncoder",
]

_ENCODER = "LadderEncoder(event_shape, latent_sizes), or BottomUpEncoder.from_layers([…])"


class HierarchicalVAE(Family):
    r"""A Markovian hierarchical VAE: its programs and its sampler.

    ``SVI`` trains ``model`` and ``guide`` as it trains those of a diffusion model. With a
    :class:`LadderEncoder`, or any :class:`TopDownEncoder`, ``guide`` is ``posterior_guide``, which has
    analytic KLs under ``TraceMeanField_ELBO``. A :class:`BottomUpEncoder` of several levels needs
    ``Trace_ELBO``. A model of one level is a plain VAE.

    With ``context_shape=`` or ``num_classes=`` the default layers take a context :math:`c` of each datum, and
    the model is :math:`p(x, h_{1:T} \mid c)`: ``model(x_0, c)``, ``guide(x_0, c)``, ``elbo_terms(vae, x_0,
    context=c)``, ``sample(n, context=c)``. With ``null_token=True`` as well the same programs without a
    context are those of :math:`p(x, h_{1:T})`.

    Args:
        event_shape: Shape of a datum after embedding. It is the shape of the data, except for categories.
        latent_sizes: Sizes of :math:`h_1 … h_T`, bottom to top: whole numbers, or shapes for the user's own
            layers.
        likelihood: Embeds the data, and gives :math:`p(x \mid h_1)` from the first layer's output.
            ``None`` makes the first layer a Gaussian over the data.
        encoder: :math:`q(h_{1:T} \mid x)`. ``None`` makes a :class:`BottomUpEncoder`.
        decoder: The user's own layers. For :math:`t \ge 2`, ``decoder[t - 1](h_t)`` is
            :math:`p(h_{t-1} \mid h_t)`. The likelihood is called with ``decoder[0](h_1)``; without a
            likelihood that is the distribution of the data. ``None`` makes Gaussian layers. A layer whose
            ``forward`` has an argument ``context`` is called with it, ``layer(h, context=c)``; likewise
            ``null``, the rows whose context was dropped.
        transform: Torch transform from the user's units to the model's, as in a diffusion model.
        name: Prefix of the parameters in Pyro's param store. ``None`` takes a free one.
        settings: Settings of the default layers of encoder and decoder: ``hidden_size``, ``num_hidden``,
            ``dropout``, ``context_shape``, ``num_classes`` and ``null_token`` of
            :class:`~pyro_diffusion.networks.FeedForward`.

    Raises:
        ValueError: A size that is not a positive whole number, no level, a number of layers that is not the
            number of levels, settings where no layer is made by default, or an encoder of another kind. From
            a program: a layer whose output does not fit, a context for a decoder whose layers take none, no
            context for a layer that needs one, and data as for
            :class:`~pyro_diffusion.diffusion.DiffusionModel`.

    Example:
        >>> vae = HierarchicalVAE((2,), latent_sizes=(8, 4), hidden_size=32)
        >>> svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(16, 2))
        >>> vae.sample(3).shape
        torch.Size([3, 2])
        >>> conditional = HierarchicalVAE((2,), latent_sizes=(8, 4), num_classes=10)
        >>> conditional.sample(3, context=torch.arange(3)).shape
        torch.Size([3, 2])
    """

    encoder: Any

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latent_sizes: Sizes,
        likelihood: EmbedsData | None = None,
        *,
        encoder: BottomUpEncoder | TopDownEncoder | None = None,
        decoder: Sequence[nn.Module] | None = None,
        transform: Transform | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        shapes = level_shapes(event_shape, latent_sizes)
        super().__init__(shapes[0], likelihood, transform, name)
        self.latent_shapes = shapes[1:]
        if encoder is not None and decoder is not None:
            check_unused(settings, "an encoder and a decoder")
        self.encoder = (
            BottomUpEncoder(event_shape, latent_sizes, **settings)
            if encoder is None
            else check_argument("encoder", encoder, BottomUpEncoder | TopDownEncoder, _ENCODER)
        )
        if isinstance(self.encoder, BottomUpEncoder | LadderEncoder):
            _check_shapes(self.encoder.shapes, shapes)
            _check_number("encoder", self.encoder.num_levels, self.num_timesteps)
        self.decoder = nn.ModuleList(self._layers(settings) if decoder is None else decoder)
        _check_number("decoder", len(self.decoder), self.num_timesteps)

    def _layers(self, settings: dict[str, Any]) -> list[nn.Module]:
        """The default decoder: Gaussian layers, and at the bottom a network if there is a likelihood."""
        count = getattr(self.likelihood, "num_outputs", 1)
        shape = self.event_shape + ((count,) if count > 1 else ())
        kind = GaussianLayer if self.likelihood is None else FeedForward
        steps = [(above, below) for below, above in pairwise(self.latent_shapes)]
        lowest = kind(self.latent_shapes[0], shape, **settings)
        return [lowest, *(GaussianLayer(*step, **settings) for step in steps)]

    @property
    def num_timesteps(self) -> int:
        """Number of levels :math:`T`."""
        return len(self.latent_shapes)

    @property
    def _reference(self) -> Tensor:
        # Layers first: a learned scale of the likelihood, or a transform, has a dtype of its own.
        modules = self.encoder, self.decoder, self
        numbers = chain(*(module.parameters() for module in modules), self.buffers())
        return next((x for x in numbers if x.is_floating_point()), torch.empty(()))

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype in which the chain runs: the dtype of the parameters, but at least float32."""
        return torch.promote_types(self._reference.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._reference.device

    @property
    def description(self) -> dict[str, str]:
        """What a ``state_dict`` must have in common with the model, except for the layers."""
        return super().description | {
            "latent_sizes": str([tuple(shape) for shape in self.latent_shapes]),
            "encoder": describe_part(self.encoder),
        }

    def _rows(self) -> dict[str, str]:
        sizes = [f"h_{t} {tuple(shape)}" for t, shape in enumerate(self.latent_shapes, 1)]
        conditional = any(takes(layer, "context") for layer in self.decoder)
        own = {
            "latents": ", ".join(sizes if len(sizes) < 7 else [*sizes[:3], "…", *sizes[-2:]]),
            "encoder": size_in_words([self.encoder]),
            "decoder": size_in_words(self.decoder) + (" with a context" if conditional else ""),
        }
        return own | super()._rows()

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
        r"""A top-down :math:`q(h_T \mid x) \prod_t q(h_{t-1} \mid h_t, x)`, in the model's order."""
        if not isinstance(self.encoder, TopDownEncoder):
            raise AttributeError
        return TopDownGuide(
            self._encode,
            self._initial,
            self._top_down,
            num_timesteps=self.num_timesteps,
            owner=self,  # and all of its parameters: a ladder runs the decoder as well
        )

    if not TYPE_CHECKING:  # a type checker would then accept every name

        def __getattr__(self, name: str) -> Any:
            if name == "posterior_guide":
                raise AttributeError(
                    "attribute 'posterior_guide': got a BottomUpEncoder, whose order is opposite to the "
                    "model's; expected a TopDownEncoder. Use guide with Trace_ELBO, or build the model with "
                    "encoder=LadderEncoder(…)."
                )
            return super().__getattr__(name)

    # The kernels of the programs.

    def prior(self) -> TorchDistribution:
        """:math:`p(h_T) = N(0, I)`."""
        shape = self.latent_shapes[-1]
        zero = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return dist.Normal(zero, 1.0).to_event(len(shape))

    def transition(self, h: Tensor, t: int, **given: Any) -> TorchDistribution:
        r""":math:`p(h_{t-1} \mid h_t)`, t = T … 2; ``given`` is ``context=`` and ``null=``, if any."""
        kernel = apply_given(self.decoder[t - 1], h, self._checked_given(given))
        return self._checked(kernel, t - 1, "decoder")

    def decode(self, h: Tensor, **given: Any) -> TorchDistribution:
        r""":math:`p(x \mid h_1)`."""
        output = apply_given(self.decoder[0], h, self._checked_given(given))
        if self.likelihood is not None:
            output = self.likelihood(_check_estimate(output, self.event_shape, self.likelihood))
        if not isinstance(output, Distribution):
            raise ValueError(
                f"argument 'decoder': got {described(output)} from its first layer; expected a distribution "
                "of the data, since there is no likelihood. Pass likelihood=…, or let the layer return one."
            )
        kernel = cast(TorchDistribution, output)
        return self.data_kernel(kernel, h.shape[: h.dim() - len(self.latent_shapes[0])])

    def _bottom_up(self, h: Tensor, t: int, **given: Any) -> TorchDistribution:
        kernel = self._of_encoder("transition", given)(h, t)
        return self._checked(kernel, t, "encoder")

    def _encode(self, x_0: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
        return self._of_encoder("encode", given)(self.embed(x_0, mask))

    def _initial(self, code: Any, **given: Any) -> TorchDistribution:
        kernel = self._of_encoder("initial", given)(code)
        return self._checked(kernel, self.num_timesteps, "encoder")

    def _top_down(self, h: Tensor, code: Any, t: int, **given: Any) -> TorchDistribution:
        decoder = partial(self.transition, **given)
        kernel = self._of_encoder("transition", given)(h, code, t, decoder)
        return self._checked(kernel, t - 1, "encoder")

    def _of_encoder(self, name: str, given: dict[str, Any]) -> Callable[..., Any]:
        """A method of the encoder, with what it takes of a context and its dropped rows."""
        method = getattr(self.encoder, name)
        return partial(method, **heard(self._checked_given(given), method))

    def _checked_given(self, given: dict[str, Any]) -> dict[str, Any]:
        """``given``, if it is empty or the decoder depends on a context."""
        if given and not any(takes(layer, "context") for layer in self.decoder):
            layers = ", ".join(type(layer).__name__ for layer in self.decoder)
            raise ValueError(
                f"argument 'context': got one for a decoder whose layers ({layers}) take none; expected data "
                "alone. Leave it out, or build the model with context_shape=(8,), say, or num_classes=10, or "
                "with layers whose forward has an argument context."
            )
        return given

    def _checked(self, kernel: Any, t: int, layers: str) -> TorchDistribution:
        """A layer's kernel over the latent of level ``t``, if it is a distribution over it."""
        shape = self.latent_shapes[t - 1]
        if getattr(kernel, "event_shape", None) != shape:
            raise ValueError(
                f"argument {layers!r}: got {described(kernel)} over level {t}; expected a distribution of "
                f"event shape {tuple(shape)}. Let latent_sizes and the layers agree, and declare event "
                "dimensions with to_event."
            )
        return kernel


def _check_shapes(theirs: list[torch.Size] | None, ours: list[torch.Size]) -> None:
    """Raise a ``ValueError`` if the encoder's shapes of datum and latents are not the model's."""
    if theirs not in (None, ours):
        (x, *h), expected = ([tuple(shape) for shape in shapes] for shapes in (theirs, ours))
        raise ValueError(
            f"argument 'encoder': got one for data of shape {x} and latents {h}; expected {expected[0]} and "
            f"{expected[1:]}. Build it with the event_shape and latent_sizes of the model."
        )


def _check_number(argument: str, number: int, num_levels: int) -> None:
    require(
        number == num_levels,
        f"argument {argument!r}",
        f"{number} layers for {num_levels} levels",
        "one for each",
        "Give latent_sizes a size for every level, h_1 first.",
    )


def _check_estimate(output: Any, event_shape: torch.Size, likelihood: Any) -> Tensor:
    """The first layer's output, if it is a tensor, and of the data's shape where that is known."""
    known = isinstance(likelihood, Likelihood) and likelihood.num_outputs == 1
    shape = event_shape if known else torch.Size()
    if not isinstance(output, Tensor) or output.shape[output.dim() - len(shape) :] != shape:
        raise ValueError(
            f"argument 'decoder': got {described(output)} from its first layer; expected a tensor of "
            f"batch_shape + {tuple(event_shape)}, from which {type(likelihood).__name__} makes a "
            "distribution. Use FeedForward, or leave out the likelihood if the layer returns a distribution."
        )
    return output
