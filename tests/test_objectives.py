"""KL warm-up and free bits against the terms that they change; the bound that is read stays the same."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    FreeBitsELBO,
    HierarchicalVAE,
    KLWarmup,
    LadderEncoder,
    LogSNRSchedule,
    NeuralDenoiser,
    elbo_terms,
    importance_evidence,
)


def ladder():
    sizes = (4, 3, 2)
    encoder = LadderEncoder((2,), sizes, hidden_size=16)
    return HierarchicalVAE((2,), sizes, encoder=encoder, hidden_size=16)


def one_draw(vae, x_0, seed=0):
    pyro.set_rng_seed(seed)
    return elbo_terms(vae.model, vae.guide, x_0, num_particles=1)


def sums(terms):
    return terms.reconstruction.sum(), *terms.transition.sum(1), terms.prior.sum()


@pytest.mark.parametrize("scale", [0.3, {"x_1": 0.5, "x_3": 0.0}])
def test_warmup_scales_latent_terms_and_nothing_else(double, scale):
    vae, x_0 = ladder(), torch.randn(7, 2)
    reconstruction, *kls = sums(one_draw(vae, x_0))
    betas = [scale.get(f"x_{t}", 1.0) if isinstance(scale, dict) else scale for t in (1, 2, 3)]
    expected = reconstruction - sum(b * kl for b, kl in zip(betas, kls, strict=True))
    pyro.set_rng_seed(0)
    with KLWarmup(scale):
        loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x_0, num_data=70)
    assert -loss == pytest.approx(10 * expected.item(), rel=1e-10)


def test_warmup_under_trace_elbo_and_a_subsampled_pair(double):
    """Sampled log-ratios are scaled as KLs are; at one it changes nothing."""
    x_0 = torch.randn(7, 2)
    network = MLP((2,), hidden_size=8, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(6), (2,)))
    fast = diffusion.subsampled(3)
    for pair in (ladder(), diffusion, fast):
        losses = []
        for beta in (None, 1.0, 0.0, 0.5):
            pyro.set_rng_seed(0)
            if beta is None:
                losses.append(Trace_ELBO().loss(pair.model, pair.guide, x_0))
            else:
                with KLWarmup(beta):
                    losses.append(Trace_ELBO().loss(pair.model, pair.guide, x_0))
        plain, same, none, half = losses
        assert plain == same
        assert half == pytest.approx((none + same) / 2, rel=1e-10)
        assert none != same


def test_what_is_read_is_never_scaled():
    vae, x_0 = ladder(), torch.randn(5, 2)
    plain = one_draw(vae, x_0)
    pyro.set_rng_seed(0)
    with KLWarmup(0.1):
        scaled = elbo_terms(vae.model, vae.guide, x_0, num_particles=1)
    assert torch.equal(plain.elbo, scaled.elbo)
    results = []
    for beta in (1.0, 0.1):
        pyro.set_rng_seed(0)
        with KLWarmup(beta):
            results.append(importance_evidence(vae.model, vae.guide, x_0, num_particles=5))
    assert torch.equal(results[0].log_evidence, results[1].log_evidence)


def test_warmup_trains():
    vae, x_0 = ladder(), torch.randn(32, 2)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    for step in range(5):
        with KLWarmup(min(1.0, step / 4)):
            assert math.isfinite(svi.step(x_0))


def test_warmup_errors():
    vae, x_0 = ladder(), torch.randn(5, 2)
    for scale in (-0.1, math.nan, math.inf, "1", {"x_1": -1.0}):
        with pytest.raises(ValueError, match="argument 'scale'"):
            KLWarmup(scale)
    with (
        pytest.raises(ValueError, match=r"got the site 'x_9'.*x_1, x_2, x_3"),
        KLWarmup({"x_9": 0.5}),
    ):
        TraceMeanField_ELBO().loss(vae.model, vae.guide, x_0)
    with pytest.raises(RuntimeError, match="first"), KLWarmup({"x_9": 0.5}):
        raise RuntimeError("first")
    assert not poutine.runtime._PYRO_STACK


@pytest.mark.parametrize("num_data", [None, 70])
@pytest.mark.parametrize("free_nats", [0.0, 0.3, 50.0])
def test_free_bits_are_a_floor_under_the_batch_mean(double, free_nats, num_data):
    vae, x_0 = ladder(), torch.randn(7, 2)
    reconstruction, *kls = sums(one_draw(vae, x_0))
    expected = reconstruction - sum(max(7 * free_nats, kl.item()) for kl in kls)
    pyro.set_rng_seed(0)
    elbo = FreeBitsELBO(free_nats)
    loss = elbo.loss(vae.model, vae.guide, x_0, num_data=num_data)
    assert -loss == pytest.approx((1 if num_data is None else 10) * expected.item(), rel=1e-10)


def test_free_bits_stop_the_gradient_of_levels_below_the_floor(double):
    """With everything below the floor only the reconstruction pulls."""
    vae, x_0 = ladder(), torch.randn(7, 2)

    def gradient(elbo, scale):
        vae.zero_grad()
        pyro.set_rng_seed(0)
        with KLWarmup(scale):
            elbo.differentiable_loss(vae.model, vae.guide, x_0).backward()
        return torch.cat([p.grad.flatten() for p in vae.parameters()])

    torch.testing.assert_close(
        gradient(FreeBitsELBO(100.0), 1.0), gradient(TraceMeanField_ELBO(), 0.0)
    )
    torch.testing.assert_close(
        gradient(FreeBitsELBO(0.0), 1.0), gradient(TraceMeanField_ELBO(), 1.0)
    )


def test_free_bits_errors():
    with pytest.raises(ValueError, match="argument 'free_nats'"):
        FreeBitsELBO(-1.0)
    vae, x_0 = HierarchicalVAE((2,), (3, 2), hidden_size=8), torch.randn(4, 2)
    with (
        pytest.warns(UserWarning, match="mean field"),
        pytest.raises(ValueError, match="Trace_ELBO"),
    ):
        FreeBitsELBO(0.1).loss(vae.model, vae.guide, x_0)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_warmup_is_refused_where_it_would_freeze():
    """A traced program keeps the scale of its first run."""
    vae, x_0 = ladder(), torch.randn(4, 2)
    elbo = JitTrace_ELBO(ignore_jit_warnings=True)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), elbo)
    with (
        pytest.raises(ValueError, match=r"being traced; expected an ELBO that runs the program"),
        KLWarmup(0.5),
    ):
        svi.step(x_0)


def test_scales_of_any_kind_of_number(double):
    vae, x_0 = ladder(), torch.randn(4, 2)
    losses = []
    for scale in (0.5, torch.tensor(0.5), np.float32(0.5)):
        pyro.set_rng_seed(0)
        with KLWarmup(scale):
            losses.append(Trace_ELBO().loss(vae.model, vae.guide, x_0))
    assert losses[0] == losses[1] == losses[2]
