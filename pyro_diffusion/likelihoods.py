r"""Likelihoods :math:`p(x_0 \mid x_1)`, and how a datum enters the chain.

The chain runs in a real-valued space of its own. A likelihood connects that space with the user's data:
``embed(x_0)`` is the point where the forward chain starts, and ``likelihood(x_0_hat)`` is the distribution
of the datum given the denoiser's estimate :math:`\hat x_0(x_1)` in embedded space. Any callable with an
``embed`` is a likelihood. Its distributions may have the event dimensions in their batch shape; the chain
declares them as event dimensions.

=========================== ================================= =====================================
data                        likelihood                        point of the chain
=========================== ================================= =====================================
measurements                ``GaussianLikelihood``            the data themselves
grey levels :math:`0 … K-1` ``DiscretizedGaussianLikelihood`` :math:`2k/(K-1) - 1`
bits                        ``BernoulliLikelihood``           :math:`\pm 1`
categories :math:`0 … K-1`  ``CategoricalLikelihood``         one-hot in :math:`\pm 1`, one more axis
counts                      ``PoissonLikelihood``             :math:`2\sqrt{n/m} - 1`
levels, from logits         ``LevelLikelihood``               :math:`2k/(K-1) - 1`
=========================== ================================= =====================================

The noise of :math:`x_1` should be about as large as the resolution of the data. Choose ``log_snr_max`` of the
schedule accordingly: 2 to 4 for bits, categories and a few grey levels. For those data,
:class:`~pyro_diffusion.denoisers.LevelPrediction` needs no likelihood and usually has a better bound.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 13. https://arxiv.org/abs/2006.11239
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_diffusion.checks import (
    check_count,
    check_num_levels,
    check_positive,
    check_values,
    require,
    widened,
)
from pyro_diffusion.distributions import Counts, DiscretizedGaussian
from pyro_diffusion.given import as_real
from pyro_diffusion.typed import TorchDistribution

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "DiscretizedGaussianLikelihood",
    "GaussianLikelihood",
    "LevelLikelihood",
    "Likelihood",
    "PoissonLikelihood",
    "embed_levels",
]


def embed_levels(x_0: Tensor, num_levels: int) -> Tensor:
    """Levels ``0 … K − 1`` as points of [-1, 1], equally spaced.

    Raises:
        ValueError: Data that are not whole numbers in ``0 … K − 1``.
    """
    levels = _whole(
        x_0,
        num_levels - 1,
        f"whole numbers in 0 … {num_levels - 1}, the levels of this model",
        "Pass raw levels, which the model rescales itself, and give it as many levels as the data have.",
    )
    return levels * (2 / (num_levels - 1)) - 1


def _whole(x_0: Tensor, largest: float, expected: str, remedy: str) -> Tensor:
    """Data as floating-point numbers, if they are whole numbers in ``0 … largest``."""
    numbers: Any = as_real(x_0)
    valid = (numbers >= 0) & (numbers <= largest) & (numbers == numbers.round())
    return check_values("site 'x_0'", numbers, valid, expected, remedy)


class Likelihood(nn.Module, ABC):
    """The distribution of a datum given the denoiser's estimate of it; abstract.

    If a likelihood is a module, its parameters are trained with the model, and saved together with its
    buffers. A saved model is loaded only into one whose likelihood has the same ``extra_repr``.
    """

    #: Number of inputs for each entry of a datum. If there are several, they are on one more axis at the end.
    num_outputs: int = 1
    #: The number of entries of the state that each entry on the last axis of a datum becomes, in order, such
    #: as ``(1, 1, 3)`` for two real numbers and a one-hot category of three. ``None`` if an entry stays one
    #: entry, or gets a new axis of its own.
    widths: Sequence[int] | None = None

    @abstractmethod
    def embed(self, x_0: Tensor) -> Tensor:
        """Data of shape ``batch_shape + …`` as points of the chain, ``batch_shape + event_shape``."""

    if TYPE_CHECKING:

        def __call__(self, x_0_hat: Tensor) -> TorchDistribution: ...

    @abstractmethod
    def forward(self, x_0_hat: Tensor) -> TorchDistribution:
        """The distribution over the user's data, given ``x_0_hat`` in embedded space."""

    def embed_mask(self, mask: Tensor) -> Tensor:
        """Observed entries of a state, from those of the data, by :attr:`widths`."""
        if self.widths is None:
            return mask
        remedy = "Give as many as a datum has entries on its last axis."
        for width in self.widths:
            check_count(
                "widths", width, 1, remedy, "entries of the state for an entry of the datum"
            )
        require(
            mask.dim() > 1 and len(self.widths) == mask.shape[-1], "attribute 'widths' of the likelihood",
            f"{len(self.widths)} of them for data of shape {tuple(mask.shape)}", "one for each entry", remedy,
        )  # fmt: skip
        return mask.repeat_interleave(torch.tensor(self.widths, device=mask.device), -1)


class _ScaledLikelihood(Likelihood):
    """A likelihood with one positive scale, fixed or learned through its logarithm."""

    log_scale: Tensor

    def __init__(self, scale: float, learnable: bool) -> None:
        super().__init__()
        scale = check_positive(
            "scale",
            scale,
            "Pass learnable=True to have it fitted.",
            "the standard deviation around the estimate",
        )
        log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """Standard deviation in embedded space, a positive float64 scalar."""
        return self.log_scale.exp()

    def __repr__(self) -> str:
        arguments = [self.extra_repr()] if self.extra_repr() else []
        return f"{type(self).__name__}({', '.join([*arguments, f'scale={self.scale.item():.4g}'])})"


class GaussianLikelihood(_ScaledLikelihood):
    r"""Real data with Gaussian noise: :math:`p(x_0 \mid x_1) = N(\hat x_0, s^2 I)`.

    Args:
        scale: Standard deviation :math:`s` in the chain's units. With a ``transform`` these differ from the
            user's: under ``Standardize``, give the noise of the data divided by their standard deviation.
        learnable: If true, :math:`s` is a parameter that starts at ``scale``.

    Raises:
        ValueError: A scale that is not positive and finite.
    """

    def __init__(self, scale: float = 1.0, *, learnable: bool = False) -> None:
        super().__init__(scale, learnable)

    def embed(self, x_0: Tensor) -> Tensor:
        return widened(x_0)

    def forward(self, x_0_hat: Tensor) -> TorchDistribution:
        return dist.Normal(x_0_hat, self.scale.to(x_0_hat.dtype))


class DiscretizedGaussianLikelihood(_ScaledLikelihood):
    r"""Grey levels :math:`0 … K-1`: a Gaussian's mass in each level's bin, tails in the end bins.

    Level :math:`k` embeds as :math:`e_k = 2k/(K-1) - 1`, so that the data fill :math:`[-1, 1]`, and

    .. math::
        p(k \mid x_1) = \Phi\!\Big(\frac{e_k + \delta/2 - \hat x_0}{s}\Big)
                      - \Phi\!\Big(\frac{e_k - \delta/2 - \hat x_0}{s}\Big),
        \qquad \delta = \frac{2}{K-1},

    with the lower edge of level 0 at :math:`-\infty` and the upper edge of level :math:`K-1` at
    :math:`\infty`.

    Args:
        num_levels: Number of levels :math:`K \ge 2`.
        scale: Standard deviation :math:`s` in embedded space. ``None`` takes an eighth of a bin.
        learnable: If true, :math:`s` is a parameter that starts at ``scale``.

    Raises:
        ValueError: Fewer than two levels, a scale that is not positive, or (from ``embed``) data
            that are not whole numbers in ``0 … K − 1``.

    Example:
        >>> likelihood = DiscretizedGaussianLikelihood(num_levels=3)
        >>> likelihood.embed(torch.tensor([0, 1, 2]))
        tensor([-1.,  0.,  1.])

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 13.
        https://arxiv.org/abs/2006.11239
    """

    def __init__(
        self, num_levels: int, scale: float | None = None, *, learnable: bool = False
    ) -> None:
        num_levels = check_num_levels(num_levels)
        super().__init__(1 / (4 * (num_levels - 1)) if scale is None else scale, learnable)
        self.num_levels = num_levels

    def embed(self, x_0: Tensor) -> Tensor:
        return embed_levels(x_0, self.num_levels)

    def forward(self, x_0_hat: Tensor) -> TorchDistribution:
        return DiscretizedGaussian(x_0_hat, self.scale.to(x_0_hat.dtype), self.num_levels)

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}"


class BernoulliLikelihood(_ScaledLikelihood):
    r"""Bits, which embed as :math:`\mp 1`: :math:`\operatorname{logit} p(1 \mid x_1) = 2 \hat x_0 / s^2`.

    That is the posterior of a bit with prior odds of one, if :math:`\hat x_0` is a measurement of it with
    standard deviation :math:`s`.

    Args:
        scale: Standard deviation :math:`s` in embedded space.
        learnable: If true, :math:`s` is a parameter that starts at ``scale``.

    Raises:
        ValueError: A scale that is not positive, or (from ``embed``) data other than 0 and 1.

    Example:
        >>> BernoulliLikelihood().embed(torch.tensor([0, 1, 1]))
        tensor([-1.,  1.,  1.])
    """

    def __init__(self, scale: float = 0.5, *, learnable: bool = False) -> None:
        super().__init__(scale, learnable)

    def embed(self, x_0: Tensor) -> Tensor:
        return embed_levels(x_0, 2)

    def forward(self, x_0_hat: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=2 * x_0_hat / self.scale.to(x_0_hat.dtype) ** 2)


class CategoricalLikelihood(_ScaledLikelihood):
    r"""Categories :math:`0 … K-1` without an order: category :math:`k` embeds as a corner of a cube.

    The corner has :math:`+1` at entry :math:`k` and :math:`-1` elsewhere, on a new last axis. The event shape
    of the chain is that of the data followed by :math:`(K,)`, and

    .. math::
        p(k \mid x_1) \propto \exp(2 \hat x_{0,k} / s^2).

    That is the posterior of a category with a uniform prior, if :math:`\hat x_0` is a measurement of its
    corner with standard deviation :math:`s`.

    Args:
        num_categories: Number of categories :math:`K \ge 2`.
        scale: Standard deviation :math:`s` in embedded space.
        learnable: If true, :math:`s` is a parameter that starts at ``scale``.

    Raises:
        ValueError: Fewer than two categories, a scale that is not positive, or (from ``embed``) data
            that are not whole numbers in ``0 … K − 1``.

    Example:
        >>> CategoricalLikelihood(num_categories=3).embed(torch.tensor([0, 2]))
        tensor([[ 1., -1., -1.],
                [-1., -1.,  1.]])
    """

    def __init__(self, num_categories: int, scale: float = 0.5, *, learnable: bool = False) -> None:
        super().__init__(scale, learnable)
        self.num_categories = check_num_levels(num_categories, "num_categories")

    def embed(self, x_0: Tensor) -> Tensor:
        dtype = embed_levels(x_0, self.num_categories).dtype  # which also checks the data
        return 2 * one_hot(x_0.long(), self.num_categories).to(dtype) - 1

    def forward(self, x_0_hat: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=2 * x_0_hat / self.scale.to(x_0_hat.dtype) ** 2)

    def extra_repr(self) -> str:
        return f"num_categories={self.num_categories}"


class LevelLikelihood(Likelihood):
    r"""Levels :math:`0 … K-1`, for each of which the decoder of a hierarchical VAE returns a logit.

    .. math::
        p(k \mid h_1) \propto \exp(\ell_k(h_1))

    for each entry. The levels embed on :math:`[-1, 1]`. A diffusion model does not take this likelihood,
    because :math:`\hat x_0` has no logits; there, use
    :class:`~pyro_diffusion.denoisers.LevelPrediction`.

    Args:
        num_levels: Number of levels :math:`K \ge 2`.

    Raises:
        ValueError: Fewer than two levels, or (from ``embed``) data that are not whole numbers in
            ``0 … K − 1``.

    Example:
        >>> vae = HierarchicalVAE((8, 8), latent_sizes=(16,), likelihood=LevelLikelihood(17))
        >>> vae.decode(torch.zeros(3, 16)).event_shape
        torch.Size([8, 8])
    """

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.num_outputs = check_num_levels(num_levels)

    def embed(self, x_0: Tensor) -> Tensor:
        return embed_levels(x_0, self.num_outputs)

    def forward(self, logits: Tensor) -> TorchDistribution:
        if logits.dim() == 0 or logits.shape[-1] != self.num_outputs:
            raise ValueError(
                f"argument 'likelihood': got an output of shape {tuple(logits.shape)}; expected a logit for "
                f"each of {self.num_outputs} levels on a last axis. Let the decoder's first layer return "
                "them."
            )
        return dist.Categorical(logits=logits)

    def extra_repr(self) -> str:
        return f"num_levels={self.num_outputs}"


class PoissonLikelihood(Likelihood):
    r"""Counts :math:`n`: :math:`p(n \mid x_1) = \operatorname{Poisson}(\rho(\hat x_0))`.

    Counts embed on the square-root scale, where their noise is the same for every rate, and :math:`\rho` is
    close to the inverse of the embedding:

    .. math::
        e(n) = 2 \sqrt{n / m} - 1, \qquad
        \rho(\hat x_0) = \Big(\tfrac12 y + \tfrac12 \sqrt{y^2 + c^2}\Big)^2
                       = \tfrac14 c^2 e^{2 \operatorname{asinh}(y / c)}, \quad
        y = \sqrt m\, (\hat x_0 + 1) / 2, \; c = \tfrac18 .

    The rate :math:`\rho(e(n))` is :math:`n` to one per cent for :math:`n \ge 1`, and :math:`\rho` is positive
    everywhere. On the square-root scale, Poisson noise has standard deviation :math:`1/\sqrt m`, which is the
    noise of the chain at :math:`\lambda = \log m`. With a ``log_snr_max`` of that size or a little less, the
    likelihood accounts for the counting noise. ``LogSNRSchedule(learnable=True)`` finds the value with the
    best bound (``examples/poisson_counts.py``).

    Args:
        max_count: Count :math:`m > 0` that embeds at 1. Larger counts embed above 1.

    Raises:
        ValueError: A ``max_count`` that is not positive and finite, or (from ``embed``) data that are not
            whole numbers of at least 0.

    Example:
        >>> likelihood = PoissonLikelihood(max_count=100)
        >>> likelihood(likelihood.embed(torch.tensor([4, 25, 100]))).rate
        tensor([  4.0078,  25.0078, 100.0078])
    """

    def __init__(self, max_count: float | Tensor) -> None:
        super().__init__()
        if isinstance(max_count, Tensor) and max_count.numel() == 1:  # x_0.max()
            max_count = max_count.item()
        self.max_count = check_positive(
            "max_count",
            max_count,
            "Take x_0.max().",
            "a large count of the data, which embeds at 1",
        )

    def embed(self, x_0: Tensor) -> Tensor:
        remedy = "Pass raw counts: subtract no background and divide by no exposure."
        counts = _whole(x_0, math.inf, "counts, whole numbers of at least 0", remedy)
        return 2 * (counts / self.max_count).sqrt() - 1

    def forward(self, x_0_hat: Tensor) -> TorchDistribution:
        root = math.sqrt(self.max_count) * (x_0_hat + 1) / 2
        return Counts((2 * (8 * root).asinh()).exp() / 256)

    def extra_repr(self) -> str:
        return f"max_count={self.max_count:g}"
