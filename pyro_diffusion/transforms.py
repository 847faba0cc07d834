r"""Transforms between the user's units and the model's.

``DiffusionModel(denoiser, transform=f)`` models :math:`y = f(x_0)` and reports the bound on
:math:`\log p(x_0) = \log p(y) + \log |\det \partial f / \partial x_0|`. Any bijective torch transform
will do, including ``ExpTransform().inv`` (the logarithm) and Pyro's normalising flows, if its values are the
whole real line. :class:`Standardize` brings data of any scale to mean zero and standard deviation one.
:class:`Logit` maps data in an interval to the real line. Both compute in at least float32.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from numpy.typing import ArrayLike
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import ComposeTransform, SigmoidTransform, Transform, constraints
from torch.distributions.transforms import _InverseTransform

from pyro_diffusion.checks import (
    as_numbers,
    check_argument,
    check_between,
    check_data,
    check_finite,
    check_mask,
    check_values,
    holds,
    require,
    widened,
)

__all__ = [
    "Logit",
    "Standardize",
    "check_codomain",
    "check_transform",
    "describe",
    "forget",
    "parts",
    "transformed",
]


class Standardize(TransformModule):
    r""":math:`y = (x - m) / s`; :math:`m` and :math:`s` are buffers, saved in the model's ``state_dict``.

    Args:
        loc: Mean :math:`m`, a number, array or tensor broadcastable to ``event_shape``.
        scale: Standard deviation :math:`s > 0`, likewise.

    Raises:
        ValueError: A scale that is not positive, or a mean or scale that is not finite.

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

    def __init__(self, loc: ArrayLike, scale: ArrayLike) -> None:
        super().__init__()
        for name, value in (("loc", loc), ("scale", scale)):
            dtype = None if isinstance(value, Tensor) else torch.float64
            self.register_buffer(name, as_numbers(name, value, dtype=dtype).detach().clone())
        check_finite("argument 'loc'", self.loc, "Drop entries that have no mean.")
        check_values(
            "argument 'scale'",
            self.scale,
            self.scale.isfinite() & (self.scale > 0),
            "positive standard deviations",
            "Drop entries that are constant in the data, or give them a scale of one.",
        )

    @classmethod
    def from_data(cls, x_0: ArrayLike, *, mask: ArrayLike | None = None) -> Self:
        """Mean and standard deviation of each entry over data of shape ``(N,) + event_shape``.

        Args:
            x_0: Data of at least two rows, a tensor or an array.
            mask: Boolean, of the data's shape, true where an entry was observed. ``None`` means everywhere.

        Returns:
            The transform, in the dtype of the data.

        Raises:
            ValueError: An entry that is constant, or observed less than twice.
        """
        x_0 = as_numbers("x_0", x_0)
        x_0 = x_0 if x_0.is_floating_point() else x_0.to(torch.get_default_dtype())
        if mask is None:
            mask = torch.ones_like(check_data(x_0), dtype=torch.bool)
        observed = check_mask(as_numbers("mask", mask), x_0)
        values = x_0.double().where(observed, 0.0)
        count = observed.sum(0)
        mean = values.sum(0) / count
        squares = (values - mean).square().where(observed, 0.0).sum(0)
        scale = (squares / (count - 1)).sqrt()
        require(
            bool((count >= 2).all()),
            "argument 'x_0'",
            f"an entry that was observed {int(count.min())} time(s)",
            "each at least twice, to have a standard deviation",
            "Drop it, or give Standardize its own loc and scale.",
        )
        require(
            bool((scale > 1e-12 * values.abs().amax(0)).all()),  # constant but for rounding
            "argument 'x_0'",
            f"an entry that is constant in the data (standard deviation {scale.min().item():g})",
            "entries that vary",
            "Drop it: it has no density.",
        )
        return cls(mean.to(x_0.dtype), scale.to(x_0.dtype))

    def _call(self, x: Tensor) -> Tensor:
        return (widened(x) - self.loc) / self.scale

    def _inverse(self, y: Tensor) -> Tensor:
        return y * self.scale + self.loc

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`-\log s` for each entry."""
        return -self.scale.log().expand(x.shape)


class Logit(Transform):
    r"""A map from an interval to the real line, :math:`y = \log(x - l) - \log(h - x)`.

    The two logarithms lose no digits at either end. In contrast, torch's ``SigmoidTransform().inv`` clamps a
    number that is within rounding of one, and so changes its value by up to :math:`\log 2` nats. The
    log-Jacobian is :math:`\log(h - l) - \log(x - l) - \log(h - x)`.

    Args:
        low: Lower end :math:`l`, a number.
        high: Upper end :math:`h > l`, a number.

    Raises:
        ValueError: Ends that are not finite numbers in order. From a program: data outside the interval, or
            at its ends.

    Example:
        >>> Logit()(torch.tensor([0.5, 1 - 2**-24]))
        tensor([ 0.0000, 16.6355])
    """

    bijective = True
    sign = 1
    codomain = constraints.real

    def __init__(self, low: float = 0.0, high: float = 1.0, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        remedy = "Pass the ends of the interval that the data lie in, such as Logit(0, 100)."
        infinity = math.inf
        self.low = check_between("low", low, -infinity, infinity, "the lower end", remedy)
        self.high = check_between("high", high, self.low, infinity, "the upper end", remedy)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def domain(self) -> constraints.Constraint:
        """The interval."""
        return constraints.interval(self.low, self.high)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Logit) and (self.low, self.high) == (other.low, other.high)

    __hash__ = Transform.__hash__

    def __repr__(self) -> str:
        return f"Logit(low={self.low:g}, high={self.high:g})"

    def with_cache(self, cache_size: int = 1) -> "Logit":
        """The same transform, which keeps its last value."""
        return Logit(self.low, self.high, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        x = widened(x)
        return (x - self.low).log() - (self.high - x).log()

    def _inverse(self, y: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * y.sigmoid()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`\log(h - l) - \log(x - l) - \log(h - x)` for each entry."""
        x = widened(x)
        return math.log(self.high - self.low) - (x - self.low).log() - (self.high - x).log()


def check_transform(transform: Transform | None) -> Transform | None:
    """``transform``, if it is a bijective torch transform, or ``None``."""
    check_argument("transform", transform, Transform | None, "Standardize.from_data(x_0)")
    require(
        transform is None or transform.bijective,
        "argument 'transform'",
        f"{transform}, which is not a bijection",
        "one, because its log-Jacobian enters the bound",
        "Apply it to the data beforehand if it only prepares them.",
    )
    return transform


def transformed(transform: Transform, x_0: Tensor) -> Tensor:
    """``transform(x_0)``, if the transform is a bijection on these data; part by part if it is composed.

    The inverse is called to check this, except for the inverse of a module: modules are bijective by
    construction, and may be slow to invert.

    Raises:
        ValueError: Data of a shape that the transform does not take. A datum that is outside the transform's
            domain, on its edge (where a bijection to the real line has no value), or not recovered by the
            inverse. Data in a margin where torch's transform is clamped.
    """
    if type(transform) is ComposeTransform:
        for part in transform.parts:
            x_0 = transformed(part, x_0)
        return x_0
    _check_margin(transform, x_0)
    domain = transform.domain
    base = getattr(domain, "base_constraint", domain)
    edges = [getattr(base, name, None) for name in ("lower_bound", "upper_bound")]
    inside = holds(domain.check(x_0)) and all(e is None or holds(x_0 != e) for e in edges)
    try:
        y = transform(x_0)
    except RuntimeError as error:
        raise ValueError(
            f"argument 'transform': got {transform}, which does not take data of shape "
            f"{tuple(x_0.shape)} ({error}); expected one for these data. Check its event shape."
        ) from error
    if inside and holds(y.isfinite()) and not isinstance(transform, nn.Module):
        # A round trip moves a datum by rounding; in a clamped or saturated transform, by about its own size.
        eps, size = torch.finfo(y.dtype).eps, x_0.abs()
        tolerance = eps**0.5 * size.amax(0) + eps * size.amax()
        inside = holds((transform.inv(y) - x_0).abs() <= tolerance)
    if not inside or not holds(y.isfinite()):
        low, high = x_0.aminmax()
        raise ValueError(
            f"argument 'transform': got data from {low.item():g} to {high.item():g}, on which "
            f"{transform} is not a bijection; expected data inside its domain {domain}, edges excluded, "
            "that its inverse recovers. Choose another transform, or move the data off the edges."
        )
    return y


def _check_margin(transform: Transform, x_0: Tensor) -> None:
    """Raise for numbers so close to 0 or 1 that torch's logit clamps them and returns a wrong value."""
    if isinstance(transform, _InverseTransform) and isinstance(transform.inv, SigmoidTransform):
        info = torch.finfo(x_0.dtype) if x_0.is_floating_point() else torch.finfo(torch.float32)
        clamped = (x_0 > 0) & (x_0 < 1) & ((x_0 < info.tiny) | (x_0 > 1 - info.eps))
        expected = f"numbers that torch's logit does not clamp to [{info.tiny:g}, 1 - {info.eps:g}]"
        remedy = "Use transform=Logit(), which loses no digits there."
        check_values("argument 'transform', its data", x_0, ~clamped, expected, remedy)


def check_codomain(transform: Transform, support: constraints.Constraint) -> None:
    """Raise a ``ValueError`` if a kernel has mass where the transform has no values."""
    values, needed = (getattr(c, "base_constraint", c) for c in (transform.codomain, support))
    bounded = isinstance(values, type(constraints.simplex)) or any(
        hasattr(values, name) for name in ("lower_bound", "upper_bound")
    )
    if bounded and isinstance(needed, type(constraints.real)):
        raise ValueError(
            f"argument 'transform': got {transform}, whose values are in {values}, for a kernel over the "
            "real line; expected a transform from the user's units onto the whole line, because otherwise "
            f"part of the model's mass is lost. Pass its inverse, {type(transform).__name__}(…).inv, if you "
            "meant that, or compose it with a transform onto the line, such as ExpTransform().inv."
        )


def parts(transform: Any) -> Iterator[Transform]:
    """The transform and all transforms that it is made of. An inverse counts as the transform it inverts."""
    if isinstance(transform, _InverseTransform):
        yield from parts(transform.inv)
    elif isinstance(transform, Transform):
        yield transform
        for inner in (*getattr(transform, "parts", ()), *getattr(transform, "transforms", ())):
            yield from parts(inner)


def describe(transform: Transform | None) -> str:
    """The classes of a transform's parts. Parts that are not modules come with their numbers."""
    words = []
    for part in parts(transform):
        numbers = {
            name: torch.as_tensor(value).tolist()
            for name, value in ({} if isinstance(part, nn.Module) else vars(part)).items()
            if not name.startswith("_") and isinstance(value, Tensor | float | int)
        }
        words.append(type(part).__name__ + (str(numbers) if numbers else ""))
    return " ".join(words) or "None"


def forget(transform: Transform | None) -> None:
    """Clear the caches in which a transform's parts keep the last data, so that they are not copied."""
    for part in parts(transform):
        for name in [name for name in vars(part) if name.startswith("_cached_")]:
            setattr(part, name, (None, None) if name == "_cached_x_y" else None)
