r"""The observed part of a program: what was not observed is left out of its terms.

Under a ``mask`` of observed entries a site has the terms of those entries only,

.. math::
    \log p(x_t \mid \cdot) = \sum_{i\ \text{observed}} \log p(x_{t,i} \mid \cdot),

which is the marginal of a kernel whose entries are independent given what it is conditioned on. What
stands in an unobserved entry of the data does not matter, NaN included.
"""

import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import Independent

__all__ = ["as_real", "observed_part", "zeroed"]


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


def as_real(x_0: Tensor | None) -> Tensor | None:
    """Whole numbers and bits as the floating numbers that torch's distributions take."""
    if x_0 is None or x_0.is_floating_point():
        return x_0
    return x_0.to(torch.get_default_dtype())
