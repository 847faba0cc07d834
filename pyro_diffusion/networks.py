r"""A small default backbone: a residual MLP that knows how noisy its input is.

A network is any module called ``network(x_t, log_snr)`` with one batch axis in front: ``x_t`` of
shape ``(B,) + event_shape``, ``log_snr`` of shape ``(B,)``, output of ``x_t``'s shape.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B (sinusoidal embedding).
    https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), section 5.1 (Fourier features of the input).
    https://arxiv.org/abs/2107.00630
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""Residual multilayer perceptron, conditioned on log-SNR, with a zero-initialised output.

    Each block adds :math:`h \leftarrow h + W_2\,\mathrm{drop}\,\phi(\gamma \odot W_1 \mathrm{norm}(h)
    + \delta)`, :math:`\phi` the SiLU and :math:`(\gamma, \delta)` an affine function of the log-SNR's
    embedding. At initialisation the output is zero everywhere.

    Args:
        event_shape: Shape of one datum; an event of any rank is flattened inside.
        hidden_size: Width of the residual stream.
        num_blocks: Number of residual blocks.
        fourier_frequencies: Powers :math:`n` for which :math:`\sin(2^n \pi x_t)` and
            :math:`\cos(2^n \pi x_t)` join the input. Integer data want them, with
            :math:`2^{n}` around the number of levels a unit apart; others do without.
        dropout: Probability with which a hidden unit is dropped while training.

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
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.fourier_frequencies = tuple(fourier_frequencies)
        size = self.event_shape.numel()
        self.embed_log_snr = nn.Sequential(
            _Sinusoids(64), nn.Linear(64, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.encode = nn.Linear(size * (1 + 2 * len(self.fourier_frequencies)), hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size, dropout) for _ in range(num_blocks))
        self.decode = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, size))
        nn.init.zeros_(self.decode[-1].weight)
        nn.init.zeros_(self.decode[-1].bias)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """Output of shape ``(B,) + event_shape``."""
        x = x_t.flatten(1)
        waves = [wave(2**n * math.pi * x) for n in self.fourier_frequencies for wave in _WAVES]
        h = self.encode(torch.cat([x, *waves], dim=-1))
        condition = self.embed_log_snr(log_snr)
        for block in self.blocks:
            h = block(h, condition)
        return self.decode(h).reshape(x_t.shape)


_WAVES = (torch.sin, torch.cos)


class _Block(nn.Module):
    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.widen = nn.Linear(size, size)
        self.condition = nn.Linear(size, 2 * size)
        self.drop = nn.Dropout(dropout)
        self.narrow = nn.Linear(size, size)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        gain, shift = self.condition(condition).chunk(2, dim=-1)
        update = nn.functional.silu((1 + gain) * self.widen(self.norm(h)) + shift)
        return h + self.narrow(self.drop(update))


class _Sinusoids(nn.Module):
    """Sines and cosines of a log-SNR; periods from 1 to 100, so that ±20 is told apart finely."""

    def __init__(self, size: int) -> None:
        super().__init__()
        periods = torch.logspace(0, 2, size // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)

    def forward(self, log_snr: Tensor) -> Tensor:
        angles = log_snr[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
