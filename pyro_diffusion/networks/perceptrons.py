"""Perceptrons: a residual one for denoisers, and a plain one for layers of a hierarchy.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B (sinusoidal embedding).
    https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), section 5.1 (Fourier features of the input).
    https://arxiv.org/abs/2107.00630
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_count, check_shape
from pyro_diffusion.given import flattened
from pyro_diffusion.networks.base import DEFAULT, VECTORS, check_counts, check_dropout, check_input
from pyro_diffusion.networks.context import Conditional, context_embedding


class MLP(Conditional):
    r"""Residual multilayer perceptron, conditioned on log-SNR, with a zero-initialised output.

    Each block adds :math:`h \leftarrow h + W_2\,\mathrm{drop}\,\phi((1 + \gamma) \odot
    W_1 \mathrm{norm}(h) + \delta)`, :math:`\phi` the SiLU and :math:`(\gamma, \delta)` an affine
    function of the log-SNR's embedding. At initialisation the output is zero everywhere. The embedding of a
    context is added to the first :math:`h`, and an affine function of it to every :math:`(\gamma, \delta)`.

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
        context_shape: Shape of the context of a datum, real numbers. Give them mean 0 and variance 1.
        num_classes: Number of labels, where the context is a label :math:`0 … K - 1`.
        null_token: Whether a learned vector stands for a context that was dropped, or is not given.

    Raises:
        ValueError: A size or number that is not a positive whole number, an event shape that is not a tuple,
            or (from the call) states or a context of another shape, or a context for a network that was
            built without one.

    Example:
        >>> network = MLP((8, 8), fourier_frequencies=(2, 3, 4))
        >>> network(torch.randn(5, 8, 8), torch.zeros(5)).shape
        torch.Size([5, 8, 8])
        >>> conditional = MLP((2,), num_classes=10)
        >>> conditional(torch.randn(5, 2), torch.zeros(5), torch.arange(5)).shape
        torch.Size([5, 2])
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
        context_shape: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        null_token: bool = False,
    ) -> None:
        super().__init__()
        hidden_size, num_blocks, num_outputs = check_counts(
            hidden_size=hidden_size, num_blocks=num_blocks, num_outputs=num_outputs
        )
        dropout = check_dropout(dropout)
        self.event_shape = check_shape("event_shape", event_shape, VECTORS)
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
        self.context = context_embedding(context_shape, num_classes, null_token, hidden_size)
        if self.context is not None:
            self.modulate = nn.Linear(hidden_size, 2 * num_blocks * hidden_size)

    if TYPE_CHECKING:

        def __call__(
            self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
        ) -> Tensor: ...

    def forward(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Tensor:
        """Output of shape ``(B,) + event_shape``, or ``(B,) + event_shape + (num_outputs,)``."""
        check_input("x_t", x_t, 1, self.event_shape, "Build MLP with the denoiser's event shape.")
        x = x_t.reshape(len(x_t), -1)
        angles = [2**n * math.pi * x for n in self.fourier_frequencies]
        waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
        h = self.encode(torch.cat([x, *waves], dim=-1))
        condition, c = self.condition(log_snr), self.embedded(context, null, len(x_t))
        if c is not None:
            h, condition = h + c, condition + self.modulate(nn.functional.silu(c))
        parts = condition.chunk(2 * len(self.blocks), dim=-1)
        for block, gain, shift in zip(self.blocks, parts[::2], parts[1::2], strict=True):
            h = block(h, gain, shift)
        return self.decode(_normalise(h)).reshape(len(x_t), *self.output_shape)


class FeedForward(Conditional):
    r"""A plain perceptron that maps states of one shape to states of another, for layers of a hierarchy.

    Hidden layers are :math:`h \leftarrow \mathrm{drop}\, \phi(\mathrm{norm}(W h + b))`, :math:`\phi` the
    SiLU.

    Args:
        input_shape: Shape of an input, behind any number of batch dimensions.
        output_shape: Shape of an output.
        hidden_size: Width of the hidden layers.
        num_hidden: Number of hidden layers. With 0 the network is an affine map.
        dropout: Probability with which a hidden unit is dropped during training.
        context_shape: Shape of the context of a datum, real numbers; its embedding is part of the input.
        num_classes: Number of labels, where the context is a label :math:`0 … K - 1`.
        null_token: Whether a learned vector stands for a context that was dropped, or is not given.

    Raises:
        ValueError: A shape that is not a tuple, a size that is not a positive whole number, or (from the
            call) an input or a context of another shape.

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
        context_shape: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        null_token: bool = False,
    ) -> None:
        super().__init__()
        hidden_size = check_count("hidden_size", hidden_size, 1, DEFAULT)
        num_hidden = check_count("num_hidden", num_hidden, 0, DEFAULT)
        dropout = check_dropout(dropout)
        self.input_shape = check_shape("input_shape", input_shape, VECTORS)
        self.output_shape = check_shape("output_shape", output_shape, VECTORS)
        self.context = context_embedding(context_shape, num_classes, null_token, hidden_size)
        first = self.input_shape.numel() + (hidden_size if self.takes_context else 0)
        *sizes, last = [first] + [hidden_size] * num_hidden
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

        def __call__(
            self, h: Tensor, context: Any = None, null: Tensor | None = None
        ) -> Tensor: ...

    def forward(self, h: Tensor, context: Any = None, null: Tensor | None = None) -> Tensor:
        """Output of shape ``batch_shape + output_shape``."""
        batch_dim = h.dim() - len(self.input_shape)
        check_input(
            "h", h, batch_dim, self.input_shape, "Build the layer with the shape of its input."
        )
        batch_shape = h.shape[:batch_dim]
        inputs = h.reshape(*batch_shape, -1)
        context, null = (x if x is None else flattened(x, batch_shape) for x in (context, null))
        c = self.embedded(context, null, batch_shape.numel())
        if c is not None:
            inputs = torch.cat((inputs, c.reshape(*batch_shape, -1)), dim=-1)
        return self.layers(inputs).reshape(*batch_shape, *self.output_shape)


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
