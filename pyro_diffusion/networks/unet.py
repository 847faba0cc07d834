"""A U-Net for images, made of the layers of diffusers."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_shape, require
from pyro_diffusion.networks.base import check_counts, check_dropout, check_input
from pyro_diffusion.networks.context import Conditional, context_embedding


class UNet(Conditional):
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
        context_shape: Shape of the context of a datum, as for :class:`MLP`; its embedding is added to the
            timestep's.
        num_classes: Number of labels, where the context is a label.
        null_token: Whether a learned vector stands for a context that was dropped, or is not given.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: An event shape whose sides cannot be halved that often, levels that do not exist, or
            (from the call) states or a context of another shape.

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
        context_shape: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        null_token: bool = False,
    ) -> None:
        super().__init__()
        layers_per_block, self.num_outputs = check_counts(
            layers_per_block=layers_per_block, num_outputs=num_outputs
        )
        dropout = check_dropout(dropout)
        self.event_shape = check_shape("event_shape", event_shape, "Pass (C, H, W), or (H, W).")
        _check_image(self.event_shape, channels, attention)
        image_channels, *sides = (1, *self.event_shape)[-3:]
        channels = tuple(map(int, channels))
        self.context = context_embedding(context_shape, num_classes, null_token, 4 * channels[0])
        self.unet = _unet_2d()(
            sample_size=tuple(sides),
            in_channels=image_channels,
            out_channels=image_channels * self.num_outputs,
            block_out_channels=channels,
            layers_per_block=layers_per_block,
            **_levels(len(channels), attention),
            attention_head_dim=math.gcd(8, *channels),
            # Groups of several channels: the embeddings of timestep and context are the same number in all
            # pixels of a channel, which the norm of a group of one channel would subtract.
            norm_num_groups=math.gcd(max(channels[0] // 4, 1), *channels),
            dropout=dropout,
            class_embed_type="identity" if self.takes_context else None,  # of the timestep's size
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def get_extra_state(self) -> Tensor:
        """The number of groups of the norms, which the shapes of the weights do not tell."""
        return torch.tensor(self._norms[0].num_groups)

    def set_extra_state(self, state: Tensor) -> None:
        """Compute with the groups of the weights that are loaded."""
        for norm in self._norms:
            norm.num_groups = int(state)

    @property
    def _norms(self) -> list[nn.GroupNorm]:
        return [module for module in self.unet.modules() if isinstance(module, nn.GroupNorm)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights of version 0.1 do not tell it: they were trained with as many groups as possible, up to 32.
        channels = [norm.num_channels for norm in self._norms]
        old = torch.tensor(math.gcd(32, *channels))
        state_dict.setdefault(f"{prefix}_extra_state", old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    if TYPE_CHECKING:

        def __call__(
            self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
        ) -> Tensor: ...

    def forward(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Tensor:
        """Output of shape ``(B,) + event_shape``, or ``(B,) + event_shape + (num_outputs,)``."""
        check_input("x_t", x_t, 1, self.event_shape, "Build UNet with the denoiser's event shape.")
        images = x_t.reshape(len(x_t), -1, *self.event_shape[-2:])
        timestep = 25 * (20 - log_snr)
        c = self.embedded(context, null, len(x_t))
        output = self.unet(images, timestep, class_labels=c, return_dict=False)[0]
        output = output.reshape(len(x_t), -1, self.num_outputs, *self.event_shape[-2:])
        output = output.movedim(2, -1).reshape(*x_t.shape, self.num_outputs)
        return output if self.num_outputs > 1 else output.squeeze(-1)


def _levels(count: int, attention: tuple[int, ...]) -> dict[str, Any]:
    """The kinds of the blocks, downwards and upwards."""
    down = ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(count)]
    return {
        "down_block_types": tuple(down),
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "add_attention": bool(attention),
    }


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
