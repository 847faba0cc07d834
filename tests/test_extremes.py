"""Extremes give right numbers, or a ``ValueError`` in words: sizes, scales, dtypes, ends of schedules."""

import pytest
import torch

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.hvae import HierarchicalVAE, LadderEncoder
from pyro_diffusion.likelihoods import GaussianLikelihood


def hierarchy(encoder, **arguments):
    """A small hierarchical VAE over three numbers."""
    sizes = (4, 2)
    encoder = LadderEncoder((3,), sizes, hidden_size=8) if encoder == "ladder" else None
    return HierarchicalVAE((3,), sizes, encoder=encoder, hidden_size=8, **arguments)


@pytest.mark.parametrize("encoder", ["bottom-up", "ladder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_scale_leaves_the_layers_their_dtype(encoder, dtype):
    """A likelihood's scale is float64, whatever the layers are; fixed and learned are one number."""
    bounds = []
    for learnable in (False, True):
        torch.manual_seed(0)
        vae = hierarchy(encoder, likelihood=GaussianLikelihood(0.3, learnable=learnable))
        for layers in (vae.encoder, vae.decoder):
            layers.to(dtype)
        assert vae.dtype == dtype
        assert vae.sample(2).dtype == dtype
        terms = elbo_terms(vae.model, vae.guide, torch.randn(5, 3, dtype=dtype), progress=False)
        bounds.append(terms.elbo)
    torch.testing.assert_close(*bounds, rtol=1e-6, atol=0)
