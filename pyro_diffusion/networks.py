r"""Default backbones: a residual MLP and a U-Net for denoisers, a plain MLP for layers of a hierarchy.

A denoiser calls its network as ``network(x_t, log_snr)``, with ``x_t`` of shape ``(B,) + event_shape`` and
``log_snr`` of shape ``(B,)``. The network returns a tensor of ``x_t``'s shape. With ``num_outputs > 1`` it
returns that many numbers for each entry, on one more axis at the end. Any module with this signature will do.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B (sinusoidal embedding).
    https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), section 5.1 (Fourier features of the input).
    https://arxiv.org/abs/2107.00630
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_between, check_count, check_shape, require

__all__ = [
    "MLP",
    "FeedForward",
    "UNet",
    "apply_layer",
    "evaluating",
    "network_dtype",
]

_DEFAULT = "Leave it out to take the default."
_VECTORS = "Pass (64,) for vectors of 64 numbers, () for single numbers."


@contextmanager
def evaluating(*programs: Callable[..., Any]) -> Iterator[None]:
    """Switch modules to evaluation mode, which has no dropout, and restore each module's mode afterwards."""
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules() if m.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def network_dtype(network: nn.Module) -> torch.dtype:
    """Dtype of a network's first floating-point parameter: the dtype in which it takes its states."""
    dtype = _first_dtype(network)  # in the order of parameters(), but quicker
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    return dtype or next(floating, torch.get_default_dtype())


def _first_dtype(module: nn.Module) -> torch.dtype | None:
    own = [p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point()]
    below = (_first_dtype(m) for m in module._modules.values() if m is not None)
    return own[0] if own else next((dtype for dtype in below if dtype), None)


def apply_layer(layer: nn.Module, h: Tensor) -> Any:
    """``layer(h)``; a layer of half precision computes in its own dtype and returns float32."""
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), h.dtype)
    if torch.finfo(dtype).bits >= 32:
        return layer(h)
    output = layer(h.to(dtype))
    return output.float() if isinstance(output, Tensor) else output


class MLP(nn.Module):
    r"""Residual multilayer perceptron, conditioned on log-SNR, with a zero-initialised output.

    Each block adds :math:`h \leftarrow h + W_2\,\mathrm{drop}\,\phi((1 + \gamma) \odot
    W_1 \mathrm{norm}(h) + \delta)`, :math:`\phi` the SiLU and :math:`(\gamma, \delta)` an affine
    function of the log-SNR's embedding. At initialisation the output is zero everywhere.

    Args:
        event_shape: Shape of one datum; an event of any rank is flattened inside.
        hidden_size: Width of the residual stream.
        num_blocks: Number of residual blocks.
        fourier_frequencies: Powers :math:`n` for which :math:`\sin(2^n \pi x_t)` and
            :math:`\cos(2^n \pi x_t)` are added to the input. For integer data, choose powers whose
            period is between one level and a few levels: 2, 3 and 4 for 17 levels in [-1, 1]. Other
            data need none.
        dropout: Probability with which a hidden unit is dropped during training.
        num_outputs: Number of outputs for each entry of a datum. It is K for ``LevelPrediction(K)``, and one
            more with ``LearnedVariance()``. If it is more than one, the output has one more axis at the end.

    Raises:
        ValueError: A size or number that is not a positive whole number, an event shape that is not a tuple,
            or (from the call) states of another shape.

    Example:
        >>> network = MLP((8, 8), fourier_frequencies=(2, 3, 4))
        >>> network(torch.randn(5, 8, 8), torch.zeros(5)).shape
        torch.Size([5, 8, 8])
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        hidden_size: int = 256,
        num_blocks: int = 4,
        fourier_frequencies: tuple[int, ...] = (),
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__()
        hidden_size, num_blocks, num_outputs = _counts(
            hidden_size=hidden_size, num_blocks=num_blocks, num_outputs=num_outputs
        )
        dropout = _share(dropout)
        self.event_shape = check_shape("event_shape", event_shape, _VECTORS)
        self.fourier_frequencies = tuple(fourier_frequencies)
        self.output_shape = self.event_shape + ((num_outputs,) if num_outputs > 1 else ())
        size = self.event_shape.numel()
        self.encode = nn.Linear(size * (1 + 2 * len(self.fourier_frequencies)), hidden_size)
        self.condition = nn.Sequential(
            _Sinusoids(64),
            nn.Linear(64, 64),
            nn.SiLU(),
            nn.Linear(64, 2 * num_blocks * hidden_size),
        )
        self.blocks = nn.ModuleList(_Block(hidden_size, dropout) for _ in range(num_blocks))
        self.decode = nn.Linear(hidden_size, size * num_outputs)
        nn.init.zeros_(self.decode.weight)
        nn.init.zeros_(self.decode.bias)

    if TYPE_CHECKING:

        def __call__(self, x_t: Tensor, log_snr: Tensor) -> Tensor: ...

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """Output of shape ``(B,) + event_shape``, or ``(B,) + event_shape + (num_outputs,)``."""
        _check_input("x_t", x_t, 1, self.event_shape, "Build MLP with the denoiser's event shape.")
        x = x_t.reshape(len(x_t), -1)
        angles = [2**n * math.pi * x for n in self.fourier_frequencies]
        waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
        h = self.encode(torch.cat([x, *waves], dim=-1))
        conditions = self.condition(log_snr).chunk(2 * len(self.blocks), dim=-1)
        for block, gain, shift in zip(self.blocks, conditions[::2], conditions[1::2], strict=True):
            h = block(h, gain, shift)
        return self.decode(_normalise(h)).reshape(len(x_t), *self.output_shape)


class FeedForward(nn.Module):
    r"""A plain perceptron that maps states of one shape to states of another, for layers of a hierarchy.

    Hidden layers are :math:`h \leftarrow \mathrm{drop}\, \phi(\mathrm{norm}(W h + b))`, :math:`\phi` the
    SiLU.

    Args:
        input_shape: Shape of an input, behind any number of batch dimensions.
        output_shape: Shape of an output.
        hidden_size: Width of the hidden layers.
        num_hidden: Number of hidden layers. With 0 the network is an affine map.
        dropout: Probability with which a hidden unit is dropped during training.

    Raises:
        ValueError: A shape that is not a tuple, a size that is not a positive whole number, or (from the
            call) an input of another shape.

    Example:
        >>> FeedForward((8, 8), (16,))(torch.randn(5, 8, 8)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        *,
        hidden_size: int = 256,
        num_hidden: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_size = check_count("hidden_size", hidden_size, 1, _DEFAULT)
        num_hidden = check_count("num_hidden", num_hidden, 0, _DEFAULT)
        dropout = _share(dropout)
        self.input_shape = check_shape("input_shape", input_shape, _VECTORS)
        self.output_shape = check_shape("output_shape", output_shape, _VECTORS)
        *sizes, last = [self.input_shape.numel()] + [hidden_size] * num_hidden
        hidden = [
            layer
            for size in sizes
            for layer in (
                nn.Linear(size, hidden_size),
                nn.LayerNorm(hidden_size),
                nn.SiLU(),
                nn.Dropout(dropout),
            )
        ]
        self.layers = nn.Sequential(*hidden, nn.Linear(last, self.output_shape.numel()))

    if TYPE_CHECKING:

        def __call__(self, h: Tensor) -> Tensor: ...

    def forward(self, h: Tensor) -> Tensor:
        """Output of shape ``batch_shape + output_shape``."""
        batch_dim = h.dim() - len(self.input_shape)
        _check_input(
            "h", h, batch_dim, self.input_shape, "Build the layer with the shape of its input."
        )
        batch_shape = h.shape[:batch_dim]
        output = self.layers(h.reshape(*batch_shape, -1))
        return output.reshape(*batch_shape, *self.output_shape)


class UNet(nn.Module):
    r"""A U-Net for images, conditioned on log-SNR, with a zero-initialised output.

    The network is diffusers' ``UNet2DModel``, which embeds a timestep in 0 … 1000 by sinusoids. The timestep
    need not be a whole number. Here it is

    .. math::
        \tau = 25\, (20 - \lambda),

    which is 0 at a log-SNR of 20 and 1000 at −20, and is not clamped outside that range. Install the library
    with ``pip install 'pyro-diffusion[images]'``.

    Args:
        event_shape: Shape of one datum, ``(C, H, W)`` or ``(H, W)``.
        channels: Number of channels of each level, the finest first. Each level after the first halves the
            sides.
        layers_per_block: Number of residual layers of each level.
        attention: Levels with self-attention; 0 is the finest. If there are any, the middle block has
            self-attention too.
        dropout: Probability with which a hidden unit is dropped during training.
        num_outputs: Number of outputs for each entry of a datum, as for :class:`MLP`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: An event shape whose sides cannot be halved that often, levels that do not exist, or
            (from the call) states of another shape.

    Example:
        >>> network = UNet((8, 8), channels=(8, 16), attention=())
        >>> network(torch.randn(5, 8, 8), torch.zeros(5)).shape
        torch.Size([5, 8, 8])

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B.
        https://arxiv.org/abs/2006.11239
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        channels: tuple[int, ...] = (32, 64, 64),
        layers_per_block: int = 2,
        attention: tuple[int, ...] = (2,),
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__()
        layers_per_block, self.num_outputs = _counts(
            layers_per_block=layers_per_block, num_outputs=num_outputs
        )
        dropout = _share(dropout)
        self.event_shape = check_shape("event_shape", event_shape, "Pass (C, H, W), or (H, W).")
        _check_image(self.event_shape, channels, attention)
        image_channels, *sides = (1, *self.event_shape)[-3:]
        channels = tuple(map(int, channels))
        downwards = [
            "AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(len(channels))
        ]
        self.unet = _unet_2d()(
            sample_size=tuple(sides),
            in_channels=image_channels,
            out_channels=image_channels * self.num_outputs,
            block_out_channels=channels,
            layers_per_block=layers_per_block,
            down_block_types=tuple(downwards),
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(downwards)),
            add_attention=bool(attention),
            attention_head_dim=math.gcd(8, *channels),
            norm_num_groups=math.gcd(32, *channels),
            dropout=dropout,
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    if TYPE_CHECKING:

        def __call__(self, x_t: Tensor, log_snr: Tensor) -> Tensor: ...

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """Output of shape ``(B,) + event_shape``, or ``(B,) + event_shape + (num_outputs,)``."""
        _check_input("x_t", x_t, 1, self.event_shape, "Build UNet with the denoiser's event shape.")
        images = x_t.reshape(len(x_t), -1, *self.event_shape[-2:])
        timestep = 25 * (20 - log_snr)
        output = self.unet(images, timestep, return_dict=False)[0]
        output = output.reshape(len(x_t), -1, self.num_outputs, *self.event_shape[-2:])
        output = output.movedim(2, -1).reshape(*x_t.shape, self.num_outputs)
        return output if self.num_outputs > 1 else output.squeeze(-1)


def _unet_2d() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "UNet: got no diffusers, the library that provides its layers; expected it to be installed. "
            "Run pip install 'pyro-diffusion[images]', or use MLP."
        ) from error
    return UNet2DModel


def _check_image(
    event_shape: torch.Size, channels: tuple[int, ...], attention: tuple[int, ...]
) -> None:
    """Raise for sides that the levels cannot halve, and for attention at levels that do not exist."""
    levels = range(len(channels)) if isinstance(channels, tuple) else range(0)
    require(
        len(levels) > 0 and set(attention) <= set(levels),
        "arguments 'channels' and 'attention'",
        f"{channels!r} and {attention!r}",
        "channels for at least one level, and attention at these levels only, counted from 0",
        "Pass attention=() for none.",
    )
    halvings = 2 ** (len(levels) - 1)
    require(
        len(event_shape) in (2, 3) and not any(side % halvings for side in event_shape[-2:]),
        "argument 'event_shape'",
        f"{tuple(event_shape)}",
        f"(C, H, W) or (H, W) with sides that {len(levels)} levels can halve, multiples of {halvings}",
        "Pad the images, or give fewer channels=(…).",
    )


def _share(dropout: Any) -> float:
    return check_between(
        "dropout", dropout, 0, 1, "the share of hidden units to drop", _DEFAULT, "[]"
    )


def _counts(**counts: int) -> list[int]:
    return [check_count(name, count, 1, _DEFAULT) for name, count in counts.items()]


def _check_input(argument: str, x: Tensor, batch_dim: int, shape: torch.Size, remedy: str) -> None:
    if batch_dim < 0 or x.shape[batch_dim:] != shape:
        batch = "(B,)" if argument == "x_t" else "batch_shape"
        raise ValueError(
            f"argument {argument!r}: got shape {tuple(x.shape)}; expected {batch} + {tuple(shape)}. {remedy}"
        )


def _normalise(h: Tensor) -> Tensor:
    """Layer normalisation without parameters, because the layer that follows has weights and a bias."""
    return nn.functional.layer_norm(h, h.shape[-1:])


class _Block(nn.Module):
    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(size, size)
        self.drop = nn.Dropout(dropout)
        self.narrow = nn.Linear(size, size)

    def forward(self, h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        update = nn.functional.silu((1 + gain) * self.widen(_normalise(h)) + shift)
        return h + self.narrow(self.drop(update))


class _Sinusoids(nn.Module):
    """Sines and cosines of a log-SNR, with periods from 1 to 100, which resolve the range ±20 finely."""

    frequencies: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        periods = torch.logspace(0, 2, size // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)

    def forward(self, log_snr: Tensor) -> Tensor:
        angles = log_snr[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
