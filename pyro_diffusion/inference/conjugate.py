r"""A reverse kernel times a linear-Gaussian factor: the proposal of posterior sampling, in closed form.

Let :math:`p(x) = \sum_k r_k N(x; \mu_k, V_k)` be a reverse kernel, and

.. math::
    \phi(x) = e^{c}\, N\big(e;\; B (x - m),\; R\big), \qquad R = \Sigma_y + L L^\top,

a factor with few rows :math:`B`. The product is a mixture of Gaussians again. Its normaliser and its draws
are (Matheron's rule)

.. math::
    Z &= \int p\, \phi = e^{c} \sum_k r_k\, N\big(e;\; B (\mu_k - m),\; S_k\big), \qquad
        S_k = R + B V_k B^\top, \\
    x' &= x + V_k B^\top S_k^{-1} \big(e - B (x - m) - n\big), \qquad
        x \sim N(\mu_k, V_k),\; n \sim N(0, R),

with :math:`k` drawn in proportion to its term of :math:`Z`. The density of :math:`x'` is
:math:`p(x')\, \phi(x') / Z`, so that the weight of a draw is :math:`Z / \phi(x')`, whatever the kernel is.

References:
    Conditional simulation by Matheron's rule (Journel and Huijbregts, 1978); Pathwise Conditioning of
    Gaussian Processes (Wilson et al., 2021). https://arxiv.org/abs/2011.04026
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, MultivariateNormal, Normal

from pyro_diffusion.inference.targets import Local

__all__ = [
    "Conjugate",
    "Factor",
    "Gaussians",
    "Noise",
    "as_gaussians",
    "log_normal",
    "positive",
    "ridge",
    "root_of",
]


class Noise:
    """Where random numbers come from. With ``common``, all data of a run share them.

    Args:
        num_data: Number of data :math:`N` in the columns of the particles; the columns are runs of all data.
        common: Whether the data share their random numbers.
    """

    def __init__(self, num_data: int = 1, *, common: bool = False) -> None:
        self.num_data, self.common = num_data, common

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers ``(K, M) + …``."""
        return self._drawn(torch.randn, like)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers ``(K, M) + …``."""
        return self._drawn(torch.rand, like)

    def _drawn(self, draw: Any, like: Tensor) -> Tensor:
        shape, numbers = like.shape, {"dtype": like.dtype, "device": like.device}
        if not self.common:
            return draw(shape, **numbers)
        runs = shape[1] // self.num_data
        drawn = draw((shape[0], runs, 1, *shape[2:]), **numbers)
        return drawn.expand(shape[0], runs, self.num_data, *shape[2:]).reshape(shape)


class Factor(NamedTuple):
    r""":math:`\phi(x) = e^c N(e; B (x - m), \Sigma_y + L L^\top)` for each particle; float64.

    Particles have the shape ``(K, M)``: particles first, and a column for each run and datum.
    """

    offset: Tensor  #: :math:`c`, ``(K, M)``
    residual: Tensor  #: :math:`e`, ``(K, M, m)``
    rows: Tensor  #: :math:`B`, ``(K, M, m, D)``
    centre: Tensor  #: :math:`m`, a flattened state, ``(K, M, D)``
    variance: Tensor  #: the diagonal of :math:`\Sigma_y`, ``(K, M, m)``
    root: Tensor  #: :math:`L`, ``(K, M, m, m)``

    @classmethod
    def at(cls, local: Local, rows: Tensor, centre: Tensor, root: Tensor) -> "Factor":
        """The factor of a likelihood near an estimate, as a function of states around ``centre``."""
        residual = local.residual
        batch = residual.shape[:2]
        return cls(
            local.offset.expand(batch), residual, rows.expand(*batch, *rows.shape[-2:]),
            centre.flatten(2).double(), local.variance.expand(residual.shape), root,
        )  # fmt: skip

    @property
    def covariance(self) -> Tensor:
        """:math:`R`, ``(K, M, m, m)``."""
        return self.root @ self.root.mT + torch.diag_embed(self.variance)

    def miss(self, x: Tensor) -> Tensor:
        """:math:`e - B (x - m)` for flattened states ``(K, M, D)``."""
        return self.residual - _times(self.rows, x.double() - self.centre)

    def log_prob(self, x: Tensor) -> Tensor:
        r""":math:`\log \phi(x)` for flattened states ``(K, M, D)``."""
        return self.offset + log_normal(self.miss(x), root_of(self.covariance))


class Gaussians(NamedTuple):
    """A kernel over flattened states as a mixture of Gaussians; float64."""

    log_weights: Tensor  #: ``(K, M, C)``
    means: Tensor  #: ``(K, M, C, D)``
    #: standard deviations that broadcast to the means, or a lower triangle ``(D, D)``
    scale: Tensor
    diagonal: bool  #: whether ``scale`` are standard deviations

    def spread(self, rows: Tensor) -> Tensor:
        """:math:`B V_k` for ``rows`` of shape ``(K, M, C, m, D)``."""
        if self.diagonal:
            return rows * self.scale.square().unsqueeze(-2)
        return rows @ self.scale @ self.scale.mT

    def at(self, k: Tensor) -> "Gaussians":
        """One component for each particle, ``k`` of shape ``(K, M, 1)``."""
        scale = self.scale
        if self.diagonal:
            scale = _component(scale.expand(self.means.shape), k)
        return self._replace(
            log_weights=torch.zeros_like(k, dtype=self.means.dtype),
            means=_component(self.means, k),
            scale=scale,
        )

    def draw(self, noise: Noise) -> Tensor:
        """A draw of the first component, ``(K, M, D)``."""
        mean = self.means[..., 0, :]
        z = noise.normal(mean)
        if self.diagonal:
            return mean + self.scale[..., 0, :] * z
        return mean + z @ self.scale.mT


def as_gaussians(kernel: Any, batch_shape: torch.Size) -> Gaussians | None:
    """A kernel as a mixture of Gaussians over flattened states; ``None`` if it is not one."""
    if isinstance(kernel, MixtureSameFamily):
        parts = as_gaussians(
            kernel.component_distribution, kernel.component_distribution.batch_shape
        )
        log_weights: Any = kernel.mixture_distribution.logits
        if parts is None or not parts.diagonal:
            return None
        log_weights = (
            log_weights.double().log_softmax(-1).expand(*batch_shape, log_weights.shape[-1])
        )
        means, scale = parts.means.squeeze(-2), parts.scale.squeeze(-2)
        if bool((scale == scale[..., :1, :]).all()):  # one covariance for all components
            scale = scale[..., :1, :]
        means, scale = (x.expand(*batch_shape, *x.shape[-2:]) for x in (means, scale))
        return Gaussians(log_weights, means, scale, True)
    alone = torch.zeros(*batch_shape, 1, dtype=torch.float64)
    if isinstance(kernel, MultivariateNormal):
        if kernel._unbroadcasted_scale_tril.dim() > 2:  # a covariance for each state
            return None
        mean = kernel.loc.double().expand(*batch_shape, -1).unsqueeze(-2)
        tril: Tensor = kernel._unbroadcasted_scale_tril
        return Gaussians(alone.to(mean.device), mean, tril.double(), False)
    base = kernel.base_dist if isinstance(kernel, Independent) else kernel
    if not isinstance(base, Normal):
        return None
    mean, scale = (
        x.double()
        .expand(batch_shape + base.loc.shape[base.loc.dim() - len(kernel.event_shape) :])
        .reshape(*batch_shape, 1, -1)
        for x in (base.loc, base.scale.expand(base.loc.shape))
    )
    return Gaussians(alone.to(mean.device), mean, scale, True)


class Conjugate:
    r"""The product of a kernel and a factor, normalised.

    Attributes:
        log_z: :math:`\log \int p\, \phi`, shape ``(K, M)``.
    """

    def __init__(self, kernel: Gaussians, factor: Factor) -> None:
        self.kernel, self.factor = kernel, factor
        rows = factor.rows.unsqueeze(-3)  # (K, M, 1, m, D)
        covariance = factor.covariance.unsqueeze(-3) + kernel.spread(rows) @ rows.mT
        self.root = root_of(covariance)  # (K, M, C, m, m)
        offsets = kernel.means - factor.centre.unsqueeze(-2)
        miss = factor.residual.unsqueeze(-2) - offsets @ factor.rows.mT
        #: the terms of Z
        self.log_terms = kernel.log_weights + log_normal(miss, self.root)
        self.log_z = factor.offset + self.log_terms.logsumexp(-1)

    def draw(self, noise: Noise) -> Tensor:
        """A draw for each particle, a flattened state ``(K, M, D)``; float64."""
        factor = self.factor
        share = self.log_terms.softmax(-1)
        u = noise.uniform(share[..., :1])
        k = (share.cumsum(-1)[..., :-1] < u).sum(-1, keepdim=True)
        kernel = self.kernel.at(k)
        roots = self.root.expand(*share.shape, *self.root.shape[-2:])
        root = _component(roots, k).squeeze(2)
        x = kernel.draw(noise)
        n = factor.variance.sqrt() * noise.normal(factor.residual)
        n = n + _times(factor.root, noise.normal(factor.residual))
        solved = torch.cholesky_solve((factor.miss(x) - n).unsqueeze(-1), root).squeeze(-1)
        gain = kernel.spread(factor.rows.unsqueeze(-3)).squeeze(-3)
        return x + _times(gain.mT, solved)


def root_of(covariance: Tensor) -> Tensor:
    """Lower triangular roots of covariances.

    Eigenvalues are floored where rounding, or a learned Jacobian, made one negative.
    """
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not failed.any():
        return root
    values, vectors = torch.linalg.eigh(covariance[failed > 0])
    least = 1e-10 * values.amax(-1, keepdim=True).clamp(min=1e-30)
    again = (vectors * values.clamp(min=least).unsqueeze(-2)) @ vectors.mT
    unit = torch.eye(again.shape[-1]).to(again)
    root = root.clone()
    root[failed > 0] = torch.linalg.cholesky(again + least.unsqueeze(-1) * unit)
    return root


def positive(inner: Tensor) -> Tensor:
    """A covariance that a learned Jacobian gave: made symmetric, with its negative eigenvalues at zero."""
    inner = 0.5 * (inner + inner.mT)
    failed = torch.linalg.cholesky_ex(inner + ridge(inner, 1e-6))[1] > 0
    if failed.any():
        values, vectors = torch.linalg.eigh(inner[failed])
        inner = inner.clone()
        inner[failed] = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
    return inner


def ridge(matrix: Tensor, share: float) -> Tensor:
    """A multiple of the identity: a share of the mean of the diagonal, and something for a zero matrix."""
    size = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None]
    return (share * size + 1e-30) * torch.eye(matrix.shape[-1]).to(matrix)


def log_normal(x: Tensor, root: Tensor) -> Tensor:
    r""":math:`\log N(x; 0, L L^\top)` over the last axis."""
    z = torch.linalg.solve_triangular(root, x.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * z.square().sum(-1) - log_det - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _component(x: Tensor, k: Tensor) -> Tensor:
    """Component ``k`` (``(K, M, 1)``) of ``(K, M, C, …)``, with an axis of one in its place."""
    index = k.reshape(k.shape + (1,) * (x.dim() - k.dim()))
    return x.gather(2, index.expand(*k.shape, *x.shape[3:]))
