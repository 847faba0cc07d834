r"""Default backbones: a residual MLP and a U-Net for denoisers, a plain MLP for layers of a hierarchy.

A denoiser calls its network as ``network(x_t, log_snr)``, and for conditional data as
``network(x_t, log_snr, context)``, with ``x_t`` of shape ``(B,) + event_shape`` and ``log_snr`` of shape
``(B,)``. The network returns a tensor of ``x_t``'s shape. With ``num_outputs > 1`` it returns that many
numbers for each entry, on one more axis at the end. Any module with this signature will do.
"""

from pyro_diffusion.networks.base import apply_layer, evaluating, network_dtype
from pyro_diffusion.networks.context import Conditional, ContextEmbedding
from pyro_diffusion.networks.perceptrons import (
    MLP,
    FeedForward,
    _Block,  # noqa: F401 - where pickles of version 0.1 look for it
    _Sinusoids,  # noqa: F401
)
from pyro_diffusion.networks.unet import UNet

__all__ = [
    "MLP",
    "Conditional",
    "ContextEmbedding",
    "FeedForward",
    "UNet",
    "apply_layer",
    "evaluating",
    "network_dtype",
]
