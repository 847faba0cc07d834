r"""Data as the programs take them: checked, and with what was not observed left out.

Under a ``mask`` of observed entries a site has the terms of those entries only,

.. math::
    \log p(x_t \mid \cdot) = \sum_{i\ \text{observed}} \log p(x_{t,i} \mid \cdot),

which is the marginal of a kernel whose entries are independent given what it is conditioned on. What
stands in an unobserved entry of the data does not matter, NaN included.

Every check of values in the package asks :func:`holds`, so that a program can also be run where there are
no values to look at: while it is traced into a graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import Independent

__all__ = [
    "as_real",
    "check_data",
    "check_event_shape",
    "check_mask",
    "check_observed",
    "holds",
    "looking",
    "observed_part",
    "unchecked",
    "zeroed",
]

_checked: ContextVar[bool] = ContextVar("checked", default=True)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds in every entry; inside :func:`unchecked` nobody looks, and it does."""
    return not looking() or bool(condition.all())


def looking() -> bool:
    """Whether values are there to be looked at, which they are outside of :func:`unchecked`."""
    return _checked.get()


@contextmanager
def unchecked() -> Iterator[None]:
    """Take values on trust, shapes and types not: for a program that is traced, not run."""
    token = _checked.set(False)
    try:
        yield
    finally:
        _checked.reset(token)


def observed_part(kernel: TorchDistribution, mask: Tensor | None) -> TorchDistribution:
    """A kernel over entries that are independent, with the terms of the observed entries only."""
    if mask is None:
        return kernel
    event_dim = mask.dim() - 1
    if event_dim == 0:
        return kernel.mask(mask)
    if not isinstance(kernel, Independent) or kernel.reinterpreted_batch_ndims < event_dim:
        raise ValueError(
            f"argument 'mask': got one for a {type(kernel).__name__}, whose entries depend on one "
            "another; expected a kernel with independent entries, from which unobserved ones can be "
            "left out. Use a NeuralDenoiser or GaussianDenoiser, and transforms that act entry by entry."
        )
    masked = MaskedDistribution(kernel.base_dist, mask)
    return masked.to_event(kernel.reinterpreted_batch_ndims)


def zeroed(x_t: Tensor, mask: Tensor | None) -> Tensor:
    """The state as a kernel of the model sees it: nothing where nothing was observed."""
    return x_t if mask is None else torch.where(mask, x_t, 0.0)


def check_data(x_0: Tensor, mask: Tensor | None = None) -> Tensor:
    """``x_0``, if it is a tensor of at least one datum, all of it finite where it is observed.

    Unobserved entries, which may be NaN, become the first value that was observed of the same entry (of
    any, if none was): one that the likelihood and the transform can take, and that no term depends on.
    The tensor is a new object, for transforms remember the last one they saw by its identity.
    """
    if not isinstance(x_0, Tensor) or x_0.dim() == 0 or len(x_0) == 0:
        got = f"shape {tuple(x_0.shape)}" if isinstance(x_0, Tensor) else f"a {type(x_0).__name__}"
        raise ValueError(
            f"argument 'x_0': got {got}; expected a tensor of shape (N,) + event_shape with N ≥ 1. "
            "Convert arrays with torch.as_tensor, skip empty batches, and give the guide the data "
            "that the model observes."
        )
    if mask is not None:
        mask = _check_rows(check_mask(mask, x_0))
        x_0 = torch.where(mask, x_0, _first_observed(x_0, mask))
    if not holds(x_0.isfinite()):
        raise ValueError(
            f"argument 'x_0': got {int((~x_0.isfinite()).sum())} NaN or infinite values in data of "
            f"shape {tuple(x_0.shape)}; expected finite numbers. Drop those entries, or pass "
            "mask=x_0.isfinite() for the bound of the observed part."
        )
    return x_0.view_as(x_0)


def _first_observed(x_0: Tensor, mask: Tensor) -> Tensor:
    first = mask.byte().argmax(0, keepdim=True)
    anywhere = mask.flatten().byte().argmax()
    return torch.where(mask.any(0), x_0.gather(0, first), x_0.take(anywhere))


def check_mask(mask: Tensor, x_0: Tensor) -> Tensor:
    """``mask``, if it is boolean and has the data's shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x_0.shape:
        got = type(mask).__name__
        if isinstance(mask, Tensor):
            got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(
            f"argument 'mask': got {got}; expected torch.bool of the data's shape {tuple(x_0.shape)}, "
            "true where an entry was observed. Pass mask.bool(), expanded to the data's shape."
        )
    return mask


def _check_rows(mask: Tensor) -> Tensor:
    observed = mask.flatten(1).any(1) if mask.dim() > 1 else mask
    if not holds(observed):
        raise ValueError(
            f"argument 'mask': got {int((~observed).sum())} of {len(mask)} data without any observed "
            f"entry, the first at row {int((~observed).nonzero()[0])}; expected at least one for each. "
            "Drop those rows: they say nothing."
        )
    return mask


def check_observed(x_0: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Data for a model, which may be run without any."""
    if x_0 is None and mask is not None:
        raise ValueError(
            "argument 'mask': got a mask without data; expected x_0 as well. Leave out the mask to "
            "draw complete data."
        )
    return None if x_0 is None else check_data(x_0, mask)


def as_real(x_0: Tensor | None) -> Tensor | None:
    """Whole numbers and bits as the floating numbers that torch's distributions take."""
    if x_0 is None or x_0.is_floating_point():
        return x_0
    return x_0.to(torch.get_default_dtype())


def check_event_shape(kernel: TorchDistribution, x_0: Tensor | None) -> TorchDistribution:
    """The kernel of a site, if data that are observed there have its event shape."""
    if x_0 is not None and x_0.shape[1:] != kernel.event_shape:
        raise ValueError(
            f"got data of shape {tuple(x_0.shape)}; expected (N,) + "
            f"{tuple(kernel.event_shape)}. Reshape the data, or build the model with their event "
            "shape."
        )
    return kernel
