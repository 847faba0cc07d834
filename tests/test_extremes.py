"""Extremes give right numbers, or a ``ValueError`` in words: sizes, scales, dtypes, ends of schedules."""

import numpy as np
import pytest
import scipy.stats
import torch

from pyro_diffusion.bounds import elbo_terms, log_density
from pyro_diffusion.hvae import HierarchicalVAE, LadderEncoder
from pyro_diffusion.likelihoods import GaussianLikelihood, PoissonLikelihood


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


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("encoder", ["bottom-up", "ladder"])
def test_layers_of_half_precision(encoder, scale):
    """The chain is in float32, and the bound that of the same numbers in float64, to bfloat16's rounding."""
    likelihood = None if scale is None else GaussianLikelihood(scale)
    vae = hierarchy(encoder, likelihood=likelihood).to(torch.bfloat16)
    x_0, bounds = torch.randn(20, 3), []
    for layers in (torch.bfloat16, torch.float64):
        vae.to(layers)
        torch.manual_seed(0)
        data = x_0.to(torch.promote_types(layers, torch.float32))
        terms = elbo_terms(vae.model, vae.guide, data, num_particles=500, progress=False)
        bounds.append(terms.mean())
        assert vae.sample(2).dtype == data.dtype
    rounding = 5 * torch.finfo(torch.bfloat16).eps * abs(bounds[1].value)
    error = 5 * sum(bound.monte_carlo_error for bound in bounds)
    assert abs(bounds[0].value - bounds[1].value) < rounding + error


@pytest.mark.parametrize("count", [1, 100, 10_000, 1_000_000, 1_000_000_000])
def test_large_counts_in_float32(count):
    """Against scipy in float64; in float32 n log ρ − ρ − log n! of a million is off by a nat."""
    root = (count**-0.5) * torch.randn(200)
    kernel = PoissonLikelihood(max_count=count)(1 + root)
    counts = torch.poisson(torch.full((200,), float(count), dtype=torch.float64)).long()
    expected = scipy.stats.poisson(kernel.rate.double().numpy()).logpmf(counts.numpy())
    found = log_density(kernel, counts.float() if count < 2**24 else counts.double())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
