"""Extremes give right numbers, or a ``ValueError`` in words: sizes, scales, dtypes, ends of schedules."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from pyro_diffusion.bounds import elbo_terms, log_density
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import importance_evidence
from pyro_diffusion.flow import ode_log_likelihood
from pyro_diffusion.hvae import HierarchicalVAE, LadderEncoder
from pyro_diffusion.likelihoods import GaussianLikelihood, PoissonLikelihood
from pyro_diffusion.report import summary
from pyro_diffusion.schedules import AlphaSchedule, LogSNRSchedule, VarianceExploding


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


def gaussian(scale=1.0, num_timesteps=20, dtype=torch.float64, **ends):
    """The exact chain of two numbers, and three data of their law's size."""
    mean, std = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    schedule = LogSNRSchedule(num_timesteps, **ends)
    denoiser = GaussianDenoiser(scale * mean.to(dtype), scale * std.to(dtype), schedule)
    x_0 = scale * torch.tensor([[0.1, 0.2], [1.0, -3.0], [0.0, 2.0]], dtype=dtype)
    return DiffusionModel(denoiser), x_0


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("log_snr_max", [8.0, 14.0, 20.0, 30.0, 40.0])
def test_noise_is_not_lost_in_rounding(log_snr_max, scale, dtype, guide):
    """The exact chain's every path is log p(x_0); where states cannot hold the noise, words.

    In float32 a log-SNR of 40 was wrong by 5,000 nats, and said ± 0.1.
    """
    diffusion, x_0 = gaussian(scale, 20, dtype, log_snr_max=log_snr_max, log_snr_min=-60.0)
    arguments = diffusion.model, getattr(diffusion, guide), x_0
    rounding = torch.finfo(dtype).eps * 3 * scale / math.exp(-log_snr_max / 2)
    if rounding > 1:
        with pytest.raises(ValueError, match=r"rounding; expected .*Standardize"):
            elbo_terms(*arguments, progress=False)
        return
    terms = elbo_terms(*arguments, num_particles=16, analytic_kl=False, progress=False)
    expected = diffusion.denoiser.data_distribution.log_prob(x_0).double()
    allowed = (0.02 if dtype == torch.float32 else 1e-3) + 0.3 * rounding
    torch.testing.assert_close(terms.elbo, expected, rtol=0, atol=allowed)


def test_a_single_particle_is_not_called_reliable():
    """One weight is the same as itself, and says nothing of the others."""
    diffusion, x_0 = gaussian(num_timesteps=5)
    evidence = importance_evidence(
        diffusion.model, diffusion.guide, x_0, num_particles=1, progress=False
    )
    assert evidence.pareto_k.isnan().all()
    assert not evidence.reliable.any()
    exact = importance_evidence(
        diffusion.model, diffusion.guide, x_0, num_particles=1, state=5, progress=False
    )  # of x_T there is nothing to average
    expected = diffusion.prior().log_prob(x_0)
    torch.testing.assert_close(exact.log_evidence, expected)
    assert exact.reliable.all()
    assert (exact.standard_error == 0).all()


@pytest.mark.parametrize("exploding", [False, True])
def test_the_flow_of_a_chain_of_one_step(exploding):
    """It is the curve's, which a grid of one step has left but for its end: 3 nats below."""
    mean, std = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    schedule = LogSNRSchedule(1, log_snr_max=20.0, log_snr_min=-20.0)
    schedule = VarianceExploding(schedule) if exploding else schedule
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, schedule))
    x_0 = torch.tensor([[0.1, 0.2], [1.0, -3.0]]).double()
    found = ode_log_likelihood(diffusion, x_0, rtol=1e-7, atol=1e-7).log_evidence
    expected = diffusion.denoiser.data_distribution.log_prob(x_0)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)  # √ᾱ_T times the mean


def test_one_step_without_a_curve_has_no_flow():
    """A single α is no curve: the flow refuses, and the summary leaves it out."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), AlphaSchedule([1e-3]))
    diffusion, x_0 = DiffusionModel(denoiser), torch.randn(3, 2)
    with pytest.raises(ValueError, match="AlphaSchedule of 1 steps.*Use LinearSchedule"):
        ode_log_likelihood(diffusion, x_0)
    assert list(summary(diffusion, x_0).groups()) == ["chain, T = 1"]
