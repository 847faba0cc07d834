r"""Transforms between the user's units and the model's.

``DiffusionModel(denoiser, transform=f)`` models :math:`y = f(x_0)` and reports the bound on
:math:`\log p(x_0) = \log p(y) + \log |\det \partial f / \partial x_0|`. Any bijective torch transform
will do, ``SigmoidTransform().inv`` (the logit) or a normalising flow of Pyro's included;
:class:`Standardize` is the one that data of any scale want.
"""

from typing import ClassVar, Self

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["Standardize", "check_transform", "transformed"]


class Standardize(TransformModule):
    r""":math:`y = (x - m) / s`, with :math:`m` and :math:`s` in the model's ``state_dict``.

    Args:
        loc: Mean :math:`m`, broadcastable to ``event_shape``.
        scale: Standard deviation :math:`s > 0`, broadcastable to ``event_shape``.

    Raises:
        ValueError: A scale that is not positive, or numbers that are not finite.

    Example:
        >>> transform = Standardize.from_data(torch.tensor([[1e6], [3e6]]))
        >>> transform(torch.tensor([[1e6], [2e6]]))
        tensor([[-0.7071],
                [ 0.0000]])
    """

    bijective = True
    sign = 1
    domain: ClassVar[constraints.Constraint] = constraints.real
    codomain: ClassVar[constraints.Constraint] = constraints.real

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor | float, scale: Tensor | float) -> None:
        super().__init__()
        loc, scale = (
            x.detach().clone() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
            for x in (loc, scale)
        )
        if not loc.isfinite().all() or not scale.isfinite().all() or not (scale > 0).all():
            raise ValueError(
                f"arguments 'loc' and 'scale': got a smallest scale of {scale.min().item():g}; expected "
                "finite means and positive standard deviations. Drop entries that are constant in the "
                "data, or give them a scale of one."
            )
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    @classmethod
    def from_data(cls, x_0: Tensor, *, mask: Tensor | None = None) -> Self:
        """Mean and standard deviation of each entry over data of shape ``(N,) + event_shape``.

        Args:
            x_0: Data, of at least two rows.
            mask: Observed entries, of the data's shape; ``None`` for all of them.
        """
        observed = torch.ones_like(x_0, dtype=torch.bool) if mask is None else mask
        count = observed.sum(0)
        values = x_0.double().where(observed, 0.0)
        mean = values.sum(0) / count
        squares = (values - mean).square().where(observed, 0.0).sum(0)
        return cls(mean.to(x_0.dtype), (squares / (count - 1)).sqrt().to(x_0.dtype))

    def _call(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale

    def _inverse(self, y: Tensor) -> Tensor:
        return y * self.scale + self.loc

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`-\log s` for each entry."""
        return -self.scale.log().expand(x.shape)


def check_transform(transform: Transform | None) -> Transform | None:
    """``transform``, if it is a bijective torch transform, or ``None``."""
    if transform is not None and not isinstance(transform, Transform):
        got = transform.__name__ if isinstance(transform, type) else type(transform).__name__
        raise ValueError(
            f"argument 'transform': got {got}; expected a torch transform from the data's units to the "
            "model's. Pass an object, such as Standardize.from_data(x_0)."
        )
    if transform is not None and not transform.bijective:
        raise ValueError(
            f"argument 'transform': got {transform}, which is not a bijection; expected one, because "
            "its log-Jacobian enters the bound. Apply it to the data beforehand if it only prepares "
            "them."
        )
    return transform


def transformed(transform: Transform, x_0: Tensor) -> Tensor:
    """``transform(x_0)``, if the transform is a bijection on these data.

    Raises:
        ValueError: A datum outside the transform's domain, on its edge (where a bijection to the real
            line has no value), or one that does not come back. Modules, which are bijective by
            construction and may be slow to invert, are not asked to come back.
    """
    domain = transform.domain
    base = getattr(domain, "base_constraint", domain)
    edges = [getattr(base, name, None) for name in ("lower_bound", "upper_bound")]
    inside = domain.check(x_0).all() and all(e is None or (x_0 != e).all() for e in edges)
    y = transform(x_0)
    if inside and y.isfinite().all() and not isinstance(transform, torch.nn.Module):
        # A clamped or saturated transform moves the datum by about its own size.
        tolerance = torch.finfo(y.dtype).eps ** 0.5 * x_0.abs().max()
        inside = ((transform.inv(y) - x_0).abs() <= tolerance).all()
    if not inside or not y.isfinite().all():
        low, high = x_0.aminmax()
        raise ValueError(
            f"argument 'transform': got data from {low.item():g} to {high.item():g}, on which "
            f"{transform} is not a bijection; expected data inside its domain {domain}, edges excluded, "
            "that come back under its inverse. Choose another transform, or move the data off the edges."
        )
    return y
