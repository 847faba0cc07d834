"""Hierarchical VAEs against closed forms, and against the diffusion model that they contain."""

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import nn
from torch.distributions.transforms import ExpTransform

from pyro_diffusion import (
    MLP,
    AlphaSchedule,
    BernoulliLikelihood,
    BottomUpEncoder,
    CategoricalLikelihood,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    GaussianDenoiser,
    GaussianLayer,
    GaussianLikelihood,
    HierarchicalVAE,
    LadderEncoder,
    LevelLikelihood,
    LogSNRSchedule,
    NeuralDenoiser,
    PoissonLikelihood,
    Standardize,
    elbo_terms,
    evaluate_bound,
    importance_evidence,
)
from pyro_diffusion.encoders import TopDownEncoder

# ---------------------------------------------------------------- pinned to a diffusion model


class Step(nn.Module):
    """One kernel of a chain as a layer."""

    def __init__(self, kernel, *t):
        super().__init__()
        self.kernel, self.t = kernel, t

    def forward(self, h):
        return self.kernel(h, *self.t)


class ForwardPosterior(TopDownEncoder):
    """q(x_T | x_0) and q(x_{t-1} | x_t, x_0) of a diffusion model."""

    def __init__(self, diffusion):
        super().__init__()
        self.kernels = [diffusion]  # in a list: its parameters are not the encoder's

    def encode(self, x):
        return x

    def initial(self, c):
        return self.kernels[0].process.marginal(c, self.kernels[0].schedule.num_timesteps)

    def transition(self, h, c, t, decoder):
        return self.kernels[0].process.posterior(h, c, t)


def estimate(diffusion):
    """x̂_0(x_1), which a likelihood takes."""
    log_snr = diffusion.schedule.log_snr(1)
    return lambda x_1: diffusion.denoiser.x_0_hat(x_1, log_snr)


def pinned(diffusion, guide):
    """The hierarchical VAE whose layers are √α_t h, (1−α_t) I and the denoiser's reverse kernels."""
    num_timesteps = diffusion.schedule.num_timesteps
    if guide == "guide":
        steps = [Step(diffusion.process.transition, t + 1) for t in range(num_timesteps)]
        encoder = BottomUpEncoder.from_layers(steps)
    else:
        encoder = ForwardPosterior(diffusion)
    first = diffusion.decode if diffusion.likelihood is None else estimate(diffusion)
    decoder = [Step(first)] + [Step(diffusion.denoiser, t) for t in range(2, num_timesteps + 1)]
    return HierarchicalVAE(
        tuple(diffusion.event_shape),
        latent_sizes=(tuple(diffusion.event_shape),) * num_timesteps,
        likelihood=diffusion.likelihood,
        encoder=encoder,
        decoder=decoder,
    )


def misfit(num_timesteps):
    """Exact kernels of another law than the data's: a bound with a gap."""
    schedule = AlphaSchedule(torch.linspace(0.95, 0.3, num_timesteps))
    denoiser = GaussianDenoiser(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 1, 2]), schedule)
    return DiffusionModel(denoiser), torch.randn(6, 3)


def images(num_timesteps):
    """A network over grey levels with a discretised likelihood."""
    network = MLP((2, 2), hidden_size=16, num_blocks=1)
    nn.init.normal_(network.decode.weight, std=0.3)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(num_timesteps, log_snr_max=3.0), (2, 2))
    likelihood = DiscretizedGaussianLikelihood(5, scale=0.3)
    return DiffusionModel(denoiser, likelihood), torch.randint(5, (6, 2, 2)).float()


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 5])
@pytest.mark.parametrize("family", [misfit, images])
def test_pinned_layers_give_the_diffusion_models_bound(double, family, num_timesteps, guide):
    """The assertion that carries the argument: same noise, same numbers, term by term."""
    diffusion, x_0 = family(num_timesteps)
    vae = pinned(diffusion, guide)
    for analytic_kl in (None, False):
        found = []
        for model, q in ((diffusion.model, getattr(diffusion, guide)), (vae.model, vae.guide)):
            pyro.set_rng_seed(1)
            q = poutine.scale(q, 1.0)  # which is read along paths
            found.append(elbo_terms(model, q, x_0, num_particles=3, analytic_kl=analytic_kl))
        ours, theirs = found
        for field in ("reconstruction", "transition", "prior", "standard_error"):
            torch.testing.assert_close(
                getattr(theirs, field), getattr(ours, field), rtol=1e-10, atol=1e-10
            )
        assert ours.kinds == theirs.kinds
        assert ours.site_names == theirs.site_names
    for elbo in [Trace_ELBO] + [TraceMeanField_ELBO] * (guide == "posterior_guide"):
        losses = []
        for model, q in ((diffusion.model, getattr(diffusion, guide)), (vae.model, vae.guide)):
            pyro.set_rng_seed(2)
            losses.append(elbo().loss(model, q, x_0, num_data=60))
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_pinned_layers_sample_what_the_diffusion_model_samples(double):
    diffusion, _ = images(4)
    draws = []
    for family in (diffusion, pinned(diffusion, "guide")):
        pyro.set_rng_seed(3)
        draws.append(family.sample(5))
    torch.testing.assert_close(*draws)


# ---------------------------------------------------------------- linear-Gaussian hierarchies


class Linear(nn.Module):
    """N(A h + b, C)."""

    def __init__(self, matrix, shift, covariance):
        super().__init__()
        self.matrix, self.shift, self.covariance = matrix, shift, covariance

    def forward(self, h):
        return dist.MultivariateNormal(h @ self.matrix.T + self.shift, self.covariance)


class LinearGaussian:
    """x = h_0 ← h_1 ← … ← h_T with h_{t-1} = W_t h_t + b_t + noise; everything by conditioning."""

    def __init__(self, sizes, seed=0):
        rng = np.random.default_rng(seed)
        self.sizes = sizes
        self.W = [rng.normal(size=pair) for pair in pairwise(sizes)]
        self.b = [rng.normal(size=size) for size in sizes[:-1]]
        self.noise = [rng.uniform(0.3, 1.0, size=size) for size in sizes[:-1]]
        self.mean, self.covariance = [np.zeros(sizes[-1])], [np.eye(sizes[-1])]
        for W, b, noise in zip(self.W[::-1], self.b[::-1], self.noise[::-1], strict=True):
            self.mean.insert(0, W @ self.mean[0] + b)
            self.covariance.insert(0, W @ self.covariance[0] @ W.T + np.diag(noise**2))

    def decoder(self):
        return [
            Linear(*map(torch.tensor, (W, b, np.diag(noise**2))))
            for W, b, noise in zip(self.W, self.b, self.noise, strict=True)
        ]

    def encoder(self):
        """p(h_t | h_{t-1}) by Bayes' rule: the exact Markovian encoder."""
        layers = []
        for t, W in enumerate(self.W, start=1):
            gain = self.covariance[t] @ W.T @ np.linalg.inv(self.covariance[t - 1])
            shift = self.mean[t] - gain @ self.mean[t - 1]
            covariance = self.covariance[t] - gain @ W @ self.covariance[t]
            layers.append(
                Linear(*map(torch.tensor, (gain, shift, (covariance + covariance.T) / 2)))
            )
        return layers

    def log_evidence(self, x):
        law = dist.MultivariateNormal(*map(torch.tensor, (self.mean[0], self.covariance[0])))
        return law.log_prob(x)


@pytest.mark.parametrize("sizes", [(3, 2), (2, 3), (4, 3, 2), (3, 5, 2, 1)])
def test_an_exact_encoder_has_no_variance_and_no_gap(double, sizes):
    """Every draw of the one-sample bound is log p(x), at any number of levels and any size of each."""
    truth = LinearGaussian(sizes)
    vae = HierarchicalVAE(
        (sizes[0],),
        latent_sizes=sizes[1:],
        encoder=BottomUpEncoder.from_layers(truth.encoder()),
        decoder=truth.decoder(),
    )
    x_0 = torch.randn(5, sizes[0])
    expected = truth.log_evidence(x_0)
    terms = elbo_terms(vae.model, vae.guide, x_0, num_particles=4, analytic_kl=False)
    torch.testing.assert_close(terms.elbo, expected, rtol=1e-10, atol=1e-10)
    assert terms.standard_error.max() < 1e-10
    assert Trace_ELBO().loss(vae.model, vae.guide, x_0) == pytest.approx(-expected.sum().item())
    evidence = importance_evidence(vae.model, vae.guide, x_0, num_particles=30)
    assert (evidence.pareto_k == -torch.inf).all()


class Diagonal(nn.Module):
    """N(w h + b, s²) for one number."""

    def __init__(self, weight, shift, scale):
        super().__init__()
        self.weight, self.shift, self.scale = weight, shift, scale

    def forward(self, h):
        scale = torch.full_like(h, self.scale)
        return dist.Normal(self.weight * h + self.shift, scale).to_event(1)


def test_a_ladder_is_exact_where_merging_is_bayes_rule(double):
    """One number a level: what x says of h_1 is its likelihood N(x; w h_1 + b, s²), read as a law of h_1."""
    truth = LinearGaussian((1, 1, 1), seed=3)
    (w1, w2), (b1, b2), (s1, s2) = (np.ravel(x) for x in (truth.W, truth.b, truth.noise))
    gain = truth.covariance[2] * w2 * w1 / truth.covariance[0]  # p(h_2 | x)
    spread = 1 - gain * w2 * w1
    top = Diagonal(gain.item(), (-gain * truth.mean[0]).item(), np.sqrt(spread).item())
    first = Diagonal(1 / w1, -b1 / w1, s1 / abs(w1))
    path = [nn.Identity(), nn.Identity()]
    vae = HierarchicalVAE(
        (1,),
        latent_sizes=(1, 1),
        encoder=LadderEncoder.from_layers(path, [first, top]),
        decoder=[Diagonal(w1, b1, s1), Diagonal(w2, b2, s2)],
    )
    x_0 = torch.randn(6, 1)
    terms = elbo_terms(vae.model, vae.guide, x_0, analytic_kl=False)
    torch.testing.assert_close(terms.elbo, truth.log_evidence(x_0), rtol=1e-10, atol=1e-10)
    assert terms.standard_error.max() < 1e-10
    assert terms.is_kl


def test_a_bound_below_the_evidence_by_the_kl(double):
    """A plain VAE with the wrong encoder: the gap is the closed-form KL, the evidence is the same."""
    truth = LinearGaussian((2, 2))
    exact, wrong = truth.encoder()[0], copy.deepcopy(truth.encoder()[0])
    wrong.shift, wrong.covariance = wrong.shift + 0.2, 1.5 * wrong.covariance
    vae = HierarchicalVAE(
        (2,), (2,), encoder=BottomUpEncoder.from_layers([wrong]), decoder=truth.decoder()
    )
    x_0 = torch.randn(4, 2)
    gap = torch.distributions.kl_divergence(wrong(x_0), exact(x_0))
    terms = elbo_terms(vae.model, vae.guide, x_0, num_particles=2000)
    assert ((terms.elbo + gap - truth.log_evidence(x_0)).abs() < 5 * terms.standard_error).all()
    evidence = importance_evidence(vae.model, vae.guide, x_0, num_particles=2000)
    error = (evidence.log_evidence - truth.log_evidence(x_0)).abs()
    assert (error < 5 * evidence.standard_error).all()
    assert (error < gap).all()


# ---------------------------------------------------------------- terms, guards, errors


def small(encoder=None, latent_sizes=(4, 3, 2), likelihood=None, event_shape=(2,), **arguments):
    if encoder is LadderEncoder:
        encoder = LadderEncoder(event_shape, latent_sizes, hidden_size=16)
    return HierarchicalVAE(
        event_shape, latent_sizes, likelihood, encoder=encoder, hidden_size=16, **arguments
    )


def test_only_the_top_of_a_bottom_up_encoder_is_a_kl():
    x_0 = torch.randn(8, 2)
    bottom_up, ladder = small(), small(LadderEncoder)
    terms = elbo_terms(bottom_up.model, bottom_up.guide, x_0)
    assert terms.kinds == ("log-likelihood", "log-ratio", "log-ratio", "KL")
    assert "log-ratio at x_1" in terms.table()
    assert "KL at x_3" in terms.table()
    assert "2 log-ratios" in repr(terms)
    terms = elbo_terms(ladder.model, ladder.guide, x_0)
    assert terms.kinds == ("log-likelihood", "KL", "KL", "KL")
    assert (terms.transition >= 0).all()


def test_bottom_up_log_ratios_can_be_negative(double):
    truth = LinearGaussian((4, 3, 2), seed=1)
    vae = HierarchicalVAE(
        (4,),
        (3, 2),
        encoder=BottomUpEncoder.from_layers(truth.encoder()),
        decoder=truth.decoder(),
    )
    x_0 = dist.MultivariateNormal(*map(torch.tensor, (truth.mean[0], truth.covariance[0]))).sample(
        (50,)
    )
    terms = elbo_terms(vae.model, vae.guide, x_0)
    assert (terms.transition < 0).any()


def test_mean_field_elbo_is_refused_for_learned_bottom_up_layers():
    vae, x_0 = small(), torch.randn(4, 2)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    with (
        pytest.warns(UserWarning, match="mean field"),
        pytest.raises(ValueError, match=r"posterior_guide.*LadderEncoder"),
    ):
        svi.step(x_0)
    one = small(latent_sizes=(3,))  # a single site has no order
    assert elbo_terms(one.model, one.guide, x_0).is_kl
    assert np.isfinite(TraceMeanField_ELBO().loss(one.model, one.guide, x_0))


def test_posterior_guide_is_there_for_ladders_only():
    assert hasattr(small(LadderEncoder), "posterior_guide")
    assert not hasattr(small(), "posterior_guide")
    with pytest.raises(AttributeError, match="LadderEncoder"):
        _ = small().posterior_guide
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = small().nothing_of_the_kind


@pytest.mark.parametrize("encoder", [None, LadderEncoder])
def test_svi_trains_every_parameter(encoder):
    x_0 = torch.randn(64, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
    vae = small(encoder)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, Adam({"lr": 3e-3}), Trace_ELBO())
    losses = [svi.step(x_0) for _ in range(150)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_vectorized_particles_estimate_the_same_bound(double, elbo):
    vae, x_0 = small(LadderEncoder), torch.randn(5, 2)
    terms = elbo_terms(vae.model, vae.guide, x_0, num_particles=2000)
    loss = elbo(num_particles=2000, vectorize_particles=True).loss(vae.model, vae.guide, x_0)
    error = 5 * terms.standard_error.square().sum().sqrt().item() * 2**0.5
    assert -loss == pytest.approx(terms.elbo.sum().item(), abs=error)


DATA = {
    "measurements": (None, lambda: torch.randn(6, 2), (2,), None),
    "noise": (GaussianLikelihood(0.5), lambda: torch.randn(6, 2), (2,), None),
    "levels": (DiscretizedGaussianLikelihood(5), lambda: torch.randint(5, (6, 2)), (2,), None),
    "logits": (LevelLikelihood(5), lambda: torch.randint(5, (6, 2)), (2,), None),
    "bits": (BernoulliLikelihood(), lambda: torch.randint(2, (6, 4, 4)), (4, 4), None),
    "categories": (CategoricalLikelihood(3), lambda: torch.randint(3, (6, 2)), (2, 3), None),
    "counts": (PoissonLikelihood(20.0), lambda: torch.randint(20, (6, 2)), (2,), None),
    "positive": (None, lambda: torch.randn(6, 2).exp(), (2,), ExpTransform().inv),
    "scaled": (None, lambda: 7 + torch.randn(6, 2), (2,), Standardize(torch.full((2,), 7.0), torch.ones(2))),
}  # fmt: skip


@pytest.mark.parametrize("encoder", [None, LadderEncoder])
@pytest.mark.parametrize("kind", DATA)
def test_every_likelihood_and_transform(kind, encoder):
    likelihood, draw, event_shape, transform = DATA[kind]
    x_0 = draw()
    vae = small(encoder, (3, 2), likelihood, event_shape, transform=transform)
    terms = elbo_terms(vae.model, vae.guide, x_0, num_particles=2)
    assert terms.event_size == x_0[0].numel()
    assert vae.sample(4).shape == (4, *x_0.shape[1:])
    mask = torch.rand(x_0.shape) < 0.7
    mask[:, 0] = True
    pyro.set_rng_seed(0)
    masked = elbo_terms(vae.model, vae.guide, x_0, mask=mask, num_particles=2)
    assert masked.elbo.isfinite().all()


@pytest.mark.parametrize("encoder", [None, LadderEncoder])
def test_unobserved_entries_and_other_data_do_not_matter(double, encoder):
    """The encoder sees zero in a gap: not what stands there, nor what other rows of the batch hold."""
    vae = small(encoder, latent_sizes=(3, 2))
    x_0, mask = (
        torch.randn(4, 2),
        torch.tensor([[True, False], [True, True], [False, True], [True, True]]),
    )
    other = torch.where(mask, x_0, 100.0)
    other[3] = 5.0
    bounds = []
    for data in (x_0, other):
        pyro.set_rng_seed(0)
        bounds.append(elbo_terms(vae.model, vae.guide, data, mask=mask).elbo[:3])
    torch.testing.assert_close(*bounds)


class Convolution(nn.Module):
    """N over feature maps, or their mean alone."""

    def __init__(self, network, channels, distribution=True):
        super().__init__()
        self.network, self.channels, self.distribution = network, channels, distribution

    def forward(self, h):
        output = self.network(h.reshape(-1, *h.shape[-3:]))
        output = output.reshape(*h.shape[:-3], *output.shape[1:])
        if not self.distribution:
            return output
        mean, log_scale = output.chunk(2, dim=-3)
        return dist.Normal(mean, log_scale.exp()).to_event(3)


def test_convolutional_layers_of_ones_own():
    encoder = BottomUpEncoder.from_layers(
        [
            Convolution(nn.Conv2d(1, 8, 3, stride=2, padding=1), 4),
            GaussianLayer((4, 4, 4), (6,), hidden_size=16),
        ]
    )
    up = nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1)
    decoder = [
        Convolution(up, 1, distribution=False),
        GaussianLayer((6,), (4, 4, 4), hidden_size=16),
    ]
    vae = HierarchicalVAE(
        (1, 8, 8), ((4, 4, 4), 6), BernoulliLikelihood(), encoder=encoder, decoder=decoder
    )
    x_0 = torch.randint(2, (5, 1, 8, 8)).float()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), Trace_ELBO(2, vectorize_particles=True))
    assert np.isfinite(svi.step(x_0))
    assert vae.sample(3).shape == (3, 1, 8, 8)


def test_families_in_one_process_share_nothing(tmp_path):
    one, two = small(LadderEncoder), small(LadderEncoder)
    three = copy.deepcopy(one)
    x_0 = torch.randn(8, 2)
    for vae in (one, two, three):
        before = [p.detach().clone() for p in vae.parameters()]
        SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(x_0)
        assert any(not torch.equal(p, q) for p, q in zip(vae.parameters(), before, strict=True))
    one.save(tmp_path / "vae.pt")
    two.load(tmp_path / "vae.pt")
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="encoder"):
        small().load(tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="latent_sizes"):
        small(latent_sizes=(4, 2, 3)).load(tmp_path / "vae.pt")


def test_arguments_that_do_not_fit():
    for sizes in ((), 3, (4, 0)):
        with pytest.raises(ValueError, match="argument 'latent_sizes'"):
            HierarchicalVAE((2,), sizes)
    with pytest.raises(ValueError, match="argument 'event_shape'"):
        HierarchicalVAE(2, (3,))
    with pytest.raises(ValueError, match="argument 'encoder'.*BottomUpEncoder"):
        HierarchicalVAE((2,), (3,), encoder=nn.Linear(2, 3))
    with pytest.raises(ValueError, match="argument 'encoder': got 2 layers for 1 levels"):
        HierarchicalVAE((2,), (3,), encoder=BottomUpEncoder.from_layers([nn.Identity()] * 2))
    with pytest.raises(ValueError, match="argument 'decoder': got 1 layers for 2 levels"):
        HierarchicalVAE((2,), (3, 3), decoder=[GaussianLayer((3,), (2,))])
    with pytest.raises(ValueError, match="argument 'hidden_size'"):
        HierarchicalVAE(
            (2,), (3,), encoder=LadderEncoder((2,), (3,)), decoder=[GaussianLayer((3,), (2,))], hidden_size=8
        )  # fmt: skip
    with pytest.raises(ValueError, match="argument 'likelihood'"):
        HierarchicalVAE((2,), (3,), BernoulliLikelihood)
    x_0 = torch.randn(3, 2)
    layers = [GaussianLayer((2,), (3,)), GaussianLayer((3,), (4,))]
    wrong = HierarchicalVAE((2,), (3, 3), encoder=BottomUpEncoder.from_layers(layers))
    with pytest.raises(ValueError, match=r"site 'x_2'.*argument 'encoder'.*\(4,\) over level 2"):
        elbo_terms(wrong.model, wrong.guide, x_0)
    no_kernel = HierarchicalVAE((2,), (3,), decoder=[nn.Linear(3, 2)])
    with pytest.raises(ValueError, match=r"site 'x_0'.*argument 'decoder': got a Tensor"):
        no_kernel.sample()
    laplace = Step(lambda h: dist.Laplace(h[..., :1], 1.0).to_event(1))
    ladder = LadderEncoder.from_layers([nn.Identity()] * 2, [laplace, laplace])
    vae = HierarchicalVAE((2,), (1, 1), encoder=ladder)
    with pytest.raises(ValueError, match=r"site 'x_1'.*Laplace.*merges them by precision"):
        elbo_terms(vae.model, vae.guide, x_0)
    vae = small()
    with pytest.raises(ValueError, match=r"argument 'x_0': got data of shape \(24, 5\)"):
        elbo_terms(vae.model, vae.guide, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"argument 'h': got shape"):
        GaussianLayer((2,), (3,))(torch.randn(4, 5))


# ---------------------------------------------------------------- Pyro modules as layers


class Scaled(PyroModule):
    """A layer with a constrained parameter, as Pyro users write them."""

    def __init__(self, size_in, size_out, scale):
        super().__init__()
        self.linear = PyroModule[nn.Linear](size_in, size_out)
        self.scale = PyroParam(torch.full((size_out,), scale), constraint=dist.constraints.positive)

    def forward(self, h):
        return dist.Normal(self.linear(h), self.scale).to_event(1)


@pytest.mark.parametrize("encoder", [None, LadderEncoder])
def test_pyro_modules_as_layers_keep_their_own_parameters(encoder):
    """A ladder's guide runs the decoder before the model does: names must be there by then."""

    def build():
        encode = LadderEncoder if encoder is LadderEncoder else BottomUpEncoder
        decoder = [Scaled(3, 2, 1.0), Scaled(3, 3, 2.0)]
        return HierarchicalVAE((2,), (3, 3), encoder=encode((2,), (3, 3)), decoder=decoder)

    one, two, x_0 = build(), build(), torch.randn(16, 2)
    svi = SVI(one.model, one.guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        svi.step(x_0)
    elbo_terms(two.model, two.guide, x_0)
    copied = copy.deepcopy(one)
    for vae, trained in ((one, True), (two, False), (copied, True)):
        for layer, start in zip(vae.decoder, (1.0, 2.0), strict=True):
            assert layer.scale.allclose(torch.full_like(layer.scale, start), atol=0.01) != trained
    assert all(name.startswith(("hierarchical_vae",)) for name in pyro.get_param_store())
    before = [p.detach().clone() for p in one.parameters()]
    SVI(copied.model, copied.guide, Adam({"lr": 0.05}), Trace_ELBO()).step(x_0)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), before, strict=True))


def test_ladders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="argument 'heads': got 1 for a path of 2 steps"):
        LadderEncoder.from_layers([nn.Identity()] * 2, [nn.Identity()])
    heads = [GaussianLayer((2,), (size,)) for size in (1, 2)]
    encoder = LadderEncoder.from_layers([nn.Identity()] * 2, heads)
    vae = HierarchicalVAE((2,), (3, 2), encoder=encoder)
    with pytest.raises(ValueError, match=r"a head of event shape \(1,\) for a level of \(3,\)"):
        elbo_terms(vae.model, vae.guide, torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"'latent_sizes': got 3\.0; expected a whole number"):
        HierarchicalVAE((2,), (3.0, 2))

    class Own(ForwardPosterior):  # an attribute of that name is its own affair
        layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))

    assert HierarchicalVAE((2,), (2, 2), encoder=Own(None)).num_timesteps == 2


def test_encoders_and_decoders_that_do_not_fit_say_so_at_once():
    with pytest.raises(ValueError, match=r"argument 'encoder': got one for data of shape \(3,\)"):
        HierarchicalVAE((2,), (4,), encoder=BottomUpEncoder((3,), (4,)))
    with pytest.raises(
        ValueError, match=r"latents \[\(1,\), \(2,\)\]; expected .* \[\(3,\), \(2,\)\]"
    ):
        HierarchicalVAE((2,), (3, 2), encoder=LadderEncoder((2,), (1, 2)))
    with pytest.raises(ValueError, match="argument 'event_shape'"):
        LadderEncoder(2, (3,))
    for layer, got in (
        (GaussianLayer((4,), (2,)), "a Independent"),
        (nn.Linear(4, 3), r"a Tensor of shape \(5, 3\)"),
    ):
        vae = HierarchicalVAE((2,), (4,), BernoulliLikelihood(), decoder=[layer])
        with pytest.raises(ValueError, match=rf"site 'x_0'.*argument 'decoder': got {got}"):
            vae.sample(5)


def test_numpys_numbers_are_taken_like_pythons():
    """A model and its description, which a checkpoint holds, are those of Python's numbers."""
    for sizes in (np.array([3, 2]), np.array([[3], [2]]), [np.int64(3), (np.int32(2),)]):
        vae = HierarchicalVAE((np.int64(2),), sizes, hidden_size=np.int64(8), num_hidden=np.int8(1))
        assert vae.description == HierarchicalVAE((2,), (3, 2)).description
        assert vae.sample(np.int64(3)).shape == (3, 2)
    for sizes in (np.int64(3), (True,), ((3, 0),), ("a",), (torch.tensor(2.5),)):
        with pytest.raises(ValueError, match="argument 'latent_sizes': got"):
            HierarchicalVAE((2,), sizes)


def test_layers_of_ones_own_are_arguments_like_any_other():
    """With a datum's shape and sizes beside them, they are checked when the model is built."""
    layers = [GaussianLayer((2,), (3,)), GaussianLayer((3,), (2,))]
    path, heads = [nn.Identity()] * 2, [GaussianLayer((2,), (3,)), GaussianLayer((2,), (2,))]
    for kind, own in (
        (BottomUpEncoder, {"layers": layers}),
        (LadderEncoder, {"path": path, "heads": heads}),
    ):
        assert kind(**own).shapes is None
        assert kind.from_layers(*own.values()).shapes is None
        encoder = kind((2,), (3, 2), **own)
        assert encoder.shapes == kind((2,), (3, 2)).shapes == [(2,), (3,), (2,)]
        assert HierarchicalVAE((2,), (3, 2), encoder=encoder).encoder is encoder
        with pytest.raises(ValueError, match=r"got one for data of shape \(2,\)"):
            HierarchicalVAE((3,), (3, 2), encoder=encoder)
        with pytest.raises(ValueError, match="argument 'dropout': got it together with"):
            kind(**own, dropout=0.1)
        with pytest.raises(ValueError, match="argument 'event_shape': got None"):
            kind()
        with pytest.raises(ValueError, match="argument 'latent_sizes': got None"):
            kind((2,))
    with pytest.raises(ValueError, match="argument 'heads': got 0 for a path of 2 steps"):
        LadderEncoder((2,), (3, 2), path=path)


def test_subclasses_are_built_by_their_own_constructors():
    class Counted(BottomUpEncoder):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.count = 0

        def transition(self, h, t):
            self.count += 1
            return super().transition(h, t)

    encoder = Counted.from_layers([GaussianLayer((2,), (3,))])
    vae = HierarchicalVAE((2,), (3,), encoder=encoder)
    vae.guide(torch.randn(5, 2))
    assert encoder.count == 1


# ---------------------------------------------------------------- conditional hierarchies


class LinearGiven(Linear):
    """N(A h + U c + b, C)."""

    def __init__(self, matrix, of_context, shift, covariance):
        super().__init__(matrix, shift, covariance)
        self.of_context = of_context

    def forward(self, h, context):
        mean = h @ self.matrix.T + context @ self.of_context.T + self.shift
        return dist.MultivariateNormal(mean, self.covariance)


class ConditionalLinearGaussian(LinearGaussian):
    """The same chain with h_{t-1} = W_t h_t + U_t c + b_t + noise."""

    def __init__(self, sizes, context_size=3, seed=0):
        super().__init__(sizes, seed)
        rng = np.random.default_rng(seed + 1)
        self.U = [rng.normal(size=(size, context_size)) for size in sizes[:-1]]
        self.of_context = [np.zeros((sizes[-1], context_size))]  # of the mean of each h_t
        for W, U in zip(self.W[::-1], self.U[::-1], strict=True):
            self.of_context.insert(0, W @ self.of_context[0] + U)

    def decoder(self):
        return [
            LinearGiven(*map(torch.tensor, (W, U, b, np.diag(noise**2))))
            for W, U, b, noise in zip(self.W, self.U, self.b, self.noise, strict=True)
        ]

    def encoder(self):
        """p(h_t | h_{t-1}, c) by Bayes' rule: the gain is the same, and the means depend on c."""
        of_context = [
            torch.tensor(self.of_context[t]) - layer.matrix @ torch.tensor(self.of_context[t - 1])
            for t, layer in enumerate(super().encoder(), start=1)
        ]
        return [
            LinearGiven(layer.matrix, u, layer.shift, layer.covariance)
            for layer, u in zip(super().encoder(), of_context, strict=True)
        ]

    def log_evidence(self, x, c):
        mean, covariance, of_context = map(
            torch.tensor, (self.mean[0], self.covariance[0], self.of_context[0])
        )
        return dist.MultivariateNormal(mean + c @ of_context.T, covariance).log_prob(x)


class ExactTopDown(TopDownEncoder):
    """p(h_T | x, c), and p(h_1 | h_2, x, c) from the decoder's p(h_1 | h_2, c) and the likelihood of x."""

    def __init__(self, truth):
        super().__init__()
        last, size = len(truth.W), truth.sizes[0]
        W = truth.W[0] if last == 1 else truth.W[0] @ truth.W[1]
        gain = W.T @ np.linalg.inv(truth.covariance[0])
        covariance = np.eye(truth.sizes[-1]) - gain @ W
        shift, of_context = -gain @ truth.mean[0], -gain @ truth.of_context[0]
        numbers = gain, of_context, shift, (covariance + covariance.T) / 2
        self.top = LinearGiven(*map(torch.tensor, numbers))
        bottom = truth.W[0], truth.U[0], truth.b[0], np.diag(truth.noise[0] ** -2.0)
        self.W, self.U, self.b, self.precision = map(torch.tensor, bottom)
        assert self.b.shape == (size,)

    def encode(self, x, context):
        return x, context

    def initial(self, code):
        return self.top(*code)

    def transition(self, h, code, t, decoder, context):
        x, c = code
        assert t == 2
        assert torch.equal(c, context)
        prior = decoder(h, t)
        inverse = prior.precision_matrix + self.W.T @ self.precision @ self.W
        of_data = (x - c @ self.U.T - self.b) @ (self.precision @ self.W)
        of_prior = (prior.precision_matrix @ prior.mean[..., None])[..., 0]
        covariance = torch.linalg.inv(inverse)
        mean = ((of_prior + of_data)[..., None, :] @ covariance)[..., 0, :]
        return dist.MultivariateNormal(mean, (covariance + covariance.mT) / 2)


def exact(truth, order):
    encoder = (
        ExactTopDown(truth) if order == "top-down" else BottomUpEncoder.from_layers(truth.encoder())
    )
    return HierarchicalVAE(
        (truth.sizes[0],), truth.sizes[1:], encoder=encoder, decoder=truth.decoder()
    )


@pytest.mark.parametrize("order", ["bottom-up", "top-down"])
@pytest.mark.parametrize("sizes", [(3, 2), (2, 3), (4, 3, 2)])
def test_an_exact_conditional_encoder_has_no_variance_and_no_gap(double, sizes, order):
    """Every path's weight is log p(x | c), datum by datum, in every reader and under SVI's ELBO."""
    truth = ConditionalLinearGaussian(sizes)
    vae = exact(truth, order)
    x_0, c = torch.randn(5, sizes[0]), torch.randn(5, 3)
    expected = truth.log_evidence(x_0, c)
    terms = elbo_terms(vae, x_0, context=c, num_particles=4, analytic_kl=False)
    torch.testing.assert_close(terms.elbo, expected, rtol=1e-8, atol=1e-8)
    assert terms.standard_error.max() < 1e-8
    bound = evaluate_bound(vae, x_0, context=c, standard_error=0.01)
    if order == "top-down" and len(sizes) > 2:  # with the KL at x_1 a path has another weight
        assert bound.monte_carlo_error <= 0.01
        assert ((bound.elbo - expected).abs() < 5 * bound.standard_error).all()
    else:
        torch.testing.assert_close(bound.elbo, expected, rtol=1e-8, atol=1e-8)
        assert bound.monte_carlo_error < 1e-8
    evidence = importance_evidence(vae, x_0, context=c, num_particles=30)
    torch.testing.assert_close(evidence.log_evidence, expected, rtol=1e-8, atol=1e-8)
    assert (evidence.pareto_k == -torch.inf).all()
    for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        loss = elbo.loss(vae.model, vae.guide, x_0, c)
        assert loss == pytest.approx(-expected.sum().item(), abs=1e-8)
    other = elbo_terms(vae, x_0, context=c + 1, num_particles=4, analytic_kl=False)
    torch.testing.assert_close(other.elbo, truth.log_evidence(x_0, c + 1), rtol=1e-8, atol=1e-8)
    assert (other.elbo - expected).abs().min() > 0.01


def test_the_evidence_of_a_latent_given_a_context(double):
    """The chain above h_1 takes the context as the whole chain does."""
    truth = ConditionalLinearGaussian((4, 3, 2))
    vae = exact(truth, "bottom-up")
    h_1, c = torch.randn(5, 3), torch.randn(5, 3)
    mean, covariance, of_context = map(
        torch.tensor, (truth.mean[1], truth.covariance[1], truth.of_context[1])
    )
    expected = dist.MultivariateNormal(mean + c @ of_context.T, covariance).log_prob(h_1)
    evidence = importance_evidence(vae, h_1, state=1, context=c, num_particles=30)
    torch.testing.assert_close(evidence.log_evidence, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("order", ["bottom-up", "top-down"])
def test_a_wrong_context_lowers_the_bound_by_the_kl(double, order):
    """An encoder that gets c + 1 in place of c: the gap is the KL of two Gaussians with one covariance."""

    class Shifted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, h, context):
            return self.layer(h, context + 1.0)

    truth = ConditionalLinearGaussian((3, 2))
    vae = exact(truth, order)
    x_0, c = torch.randn(5, 3), torch.randn(5, 3)
    layer = truth.encoder()[0]
    if order == "top-down":
        vae.encoder.top = Shifted(vae.encoder.top)
    else:
        vae.encoder.layers[0] = Shifted(layer)
    gap = torch.distributions.kl_divergence(layer(x_0, c + 1.0), layer(x_0, c))
    terms = elbo_terms(vae, x_0, context=c, num_particles=2000, analytic_kl=False)
    error = terms.elbo + gap - truth.log_evidence(x_0, c)
    assert gap.min() > 0.1
    assert (error.abs() < 5 * terms.standard_error).all()


def test_draws_of_a_conditional_hierarchy(double):
    """A context of one row is for all draws; otherwise each row has its own."""
    truth = ConditionalLinearGaussian((3, 2, 2))
    vae, n = exact(truth, "bottom-up"), 4000
    c = torch.randn(n, 3)
    draws = {}
    for name, context in {"one": c[:1], "expanded": c[:1].expand(n, -1), "each": c}.items():
        pyro.set_rng_seed(0)
        draws[name] = vae.sample(n, context=context)
    assert torch.equal(draws["one"], draws["expanded"])
    of_context = torch.tensor(truth.of_context[0])
    # the same noise: the difference of the draws is that of their means
    torch.testing.assert_close(draws["each"] - draws["one"], (c - c[:1]) @ of_context.T)
    residual = draws["each"] - c @ of_context.T - torch.tensor(truth.mean[0])
    error = torch.tensor(truth.covariance[0]).diagonal().sqrt() / n**0.5
    assert (residual.mean(0).abs() < 5 * error).all()


class StepGiven(Step):
    """One kernel of a conditional chain as a layer."""

    def forward(self, h, context=None, null=None):
        given = {"context": context, "null": null}
        return self.kernel(h, *self.t, **{k: v for k, v in given.items() if v is not None})


def conditional_images(num_timesteps):
    """A network over grey levels with labels and a null token, and its first layer's estimate."""
    network = MLP((2, 2), hidden_size=16, num_blocks=1, num_classes=3, null_token=True)
    for parameter in (network.decode.weight, network.context.null):
        nn.init.normal_(parameter, std=0.3)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(num_timesteps, log_snr_max=3.0), (2, 2))
    return DiffusionModel(denoiser, DiscretizedGaussianLikelihood(5, scale=0.3))


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("num_timesteps", [1, 3])
def test_pinned_layers_give_the_conditional_diffusion_models_bound(double, num_timesteps, guide):
    """Its encoder does not see c, as that of a diffusion model; the decoder's layers do."""
    diffusion = conditional_images(num_timesteps)
    vae, log_snr = pinned(diffusion, guide), diffusion.schedule.log_snr(1)
    later = [StepGiven(diffusion.denoiser, t) for t in range(2, num_timesteps + 1)]
    vae.decoder = nn.ModuleList([StepGiven(diffusion.denoiser.x_0_hat, log_snr), *later])
    x_0, labels = torch.randint(5, (6, 2, 2)).float(), torch.arange(6) % 3
    null, bounds = torch.arange(6) < 2, []
    for given in ({"context": labels}, {"context": labels, "null": null}, {}):
        found = []
        for model, q in ((diffusion.model, getattr(diffusion, guide)), (vae.model, vae.guide)):
            pyro.set_rng_seed(1)
            q = partial(q)  # which is read along paths
            found.append(elbo_terms(model, q, x_0, num_particles=3, **given))
        ours, theirs = found
        for field in ("reconstruction", "transition", "prior", "standard_error"):
            torch.testing.assert_close(
                getattr(theirs, field), getattr(ours, field), rtol=1e-10, atol=1e-10
            )
        bounds.append(theirs.elbo)
    conditional, partly, without = bounds  # with one noise: row by row what its context says
    torch.testing.assert_close(partly, torch.where(null, without, conditional))
    assert ((conditional - without).abs() > 1e-3).all()


class DiagonalGiven(Diagonal):
    """N(w h + c + b, s²) for each number."""

    def forward(self, h, context):
        return super().forward(h + context / self.weight)


def test_a_mask_and_a_context_together(double):
    """Entries are independent given c: log p of the observed ones, and the KL of the others' encoder.

    In a gap the encoder sees zero; there its q(h | 0, c) is not the prior, and the term at x_0 is left out.
    """
    w, b, s = 0.8, 0.3, 0.5
    gain, spread = w / (w * w + s * s), s / (w * w + s * s) ** 0.5
    layer = Step(lambda x, context: Diagonal(gain, 0.0, spread)(x - context - b))
    layer.forward = layer.kernel
    vae = HierarchicalVAE(
        (3,), (3,), encoder=BottomUpEncoder.from_layers([layer]), decoder=[DiagonalGiven(w, b, s)]
    )
    x_0, c, mask = torch.randn(6, 3), torch.randn(6, 3), torch.rand(6, 3) < 0.6
    evidence = dist.Normal(c + b, (w * w + s * s) ** 0.5).log_prob(x_0)
    of_gap = dist.Normal(gain * (-c - b), torch.full_like(c, spread))
    kl = torch.distributions.kl_divergence(of_gap, dist.Normal(0.0, torch.ones_like(c)))
    expected = torch.where(mask, evidence, -kl).sum(1)
    data = torch.where(mask, x_0, torch.nan)
    terms = elbo_terms(vae, data, context=c, mask=mask, num_particles=4000)
    assert ((terms.elbo - expected).abs() < 5 * terms.standard_error).all()
    assert terms.standard_error.max() < 0.05
    wrong = elbo_terms(vae, data, context=c.flip(0), mask=mask, num_particles=4000)
    assert ((wrong.elbo - expected).abs() > 5 * wrong.standard_error).any()


def conditional(encoder=None, latent_sizes=(3, 2), *, sees=True, **settings):
    """A small VAE of default layers with a context, whose encoder sees it or does not."""
    settings = {"context_shape": (3,), "hidden_size": 16} | settings
    theirs = settings if sees else {"hidden_size": 16}
    kind = LadderEncoder if encoder is LadderEncoder else BottomUpEncoder
    return HierarchicalVAE(
        (2,), latent_sizes, encoder=kind((2,), latent_sizes, **theirs), **settings
    )


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("encoder", [None, LadderEncoder])
def test_default_layers_take_a_context(double, encoder, sees):
    """Rows do not mix; a dropped row is a row without a context; SVI trains every parameter."""
    vae = conditional(encoder, sees=sees, null_token=True)
    for name, parameter in vae.named_parameters():
        if name.endswith("context.null"):
            nn.init.normal_(parameter)
    x_0, c, null = torch.randn(6, 2), torch.randn(6, 3), torch.arange(6) < 3

    def bound(**given):
        pyro.set_rng_seed(0)
        return elbo_terms(vae, x_0, num_particles=2, **given).elbo

    with_c, without = bound(context=c), bound()
    torch.testing.assert_close(bound(context=c, null=null), torch.where(null, without, with_c))
    changed = torch.where(null[:, None], c + 1.0, c)
    assert torch.equal(bound(context=changed)[3:], with_c[3:])
    assert ((bound(context=changed) - with_c)[:3].abs() > 1e-6).all()
    mask = torch.ones(6, 2, dtype=torch.bool)
    torch.testing.assert_close(bound(context=c, mask=mask), with_c)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi.step(x_0, c, null=null)
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    embedded = sum(name.endswith("context.embed.0.weight") for name in before)
    of_encoder = (
        0 if not sees else 4 if encoder is LadderEncoder else 2
    )  # path and heads, or layers
    assert embedded == 2 + of_encoder


def test_a_conditional_bound_is_above_the_unconditional_one():
    """Three groups and their labels: right, none, wrong; without labels about the same as a model of p(x)."""
    labels = torch.arange(600) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    x_0 = centres[labels] + 0.3 * torch.randn(600, 2)
    given = HierarchicalVAE((2,), (2,), hidden_size=32, num_classes=3, null_token=True)
    alone = HierarchicalVAE((2,), (2,), hidden_size=32)
    for vae in (given, alone):
        svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), TraceMeanField_ELBO())
        for _ in range(300):
            rows = torch.randint(600, (128,))
            null = torch.rand(128) < 0.3
            arguments = ((labels[rows],), {"null": null}) if vae is given else ((), {})
            svi.step(x_0[rows], *arguments[0], **arguments[1])
    right, wrong, without = (
        elbo_terms(given, x_0, num_particles=10, **context).elbo.mean()
        for context in ({"context": labels}, {"context": (labels + 1) % 3}, {})
    )
    unconditional = elbo_terms(alone, x_0, num_particles=10).elbo.mean()
    assert right > unconditional + 0.5
    assert right > without + 0.5
    assert without > wrong + 2.0
    assert (without - unconditional).abs() < 0.5


class Alone(nn.Module):
    """A layer that takes a context, and no dropped rows."""

    def forward(self, h, context):
        return dist.Normal(h + context["shift"][:, None], 1.0).to_event(1)


def test_layers_of_ones_own_get_what_they_take():
    """A dictionary as a context, beside layers that take none."""
    plain = [GaussianLayer((2,), (2,)), GaussianLayer((2,), (2,))]
    encoder = BottomUpEncoder.from_layers(plain)
    vae = HierarchicalVAE((2,), (2, 2), encoder=encoder, decoder=[Alone(), plain[0]])
    x_0, c = torch.randn(4, 2), {"shift": torch.arange(4)}
    elbo_terms(vae, x_0, context=c)
    pyro.set_rng_seed(0)
    draws = vae.sample(4, context=c)
    pyro.set_rng_seed(0)
    zero = vae.sample(4, context={"shift": torch.zeros(1, dtype=torch.long)})
    torch.testing.assert_close(draws - zero, c["shift"][:, None].expand(-1, 2).float())
    with pytest.raises(ValueError, match=r"site 'x_0'.*'null': got dropped contexts for Alone"):
        vae.model(x_0, c, null=torch.ones(4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"site 'x_0'.*'context': got none for Alone.*Pass context="
    ):
        elbo_terms(vae, x_0)
    with pytest.raises(TypeError, match="positional"):  # of a layer that takes none: it is its own
        HierarchicalVAE((2,), (2,), decoder=[Step(lambda h, g: h)]).sample()


@pytest.mark.parametrize("encoder", [None, LadderEncoder])
def test_contexts_that_do_not_fit(encoder):
    x_0, c = torch.randn(4, 2), torch.randn(4, 3)
    for settings in ({}, {"encoder": BottomUpEncoder((2,), (3, 2), context_shape=(3,))}):
        none = HierarchicalVAE((2,), (3, 2), hidden_size=8, **settings)
        for call in (
            lambda none=none: elbo_terms(none, x_0, context=c),
            lambda none=none: none.sample(4, context=c),
            lambda none=none: none.guide(x_0, c),
        ):
            message = (
                r"site 'x_1': argument 'context': got one for a decoder whose layers \(Gaussian"
            )
            with pytest.raises(ValueError, match=message):
                call()
    vae = conditional(encoder)
    missing = r"site 'x_1': argument 'context': got no context for a network without a null token"
    for call in (lambda: elbo_terms(vae, x_0), vae.sample, lambda: vae.guide(x_0)):
        with pytest.raises(ValueError, match=missing):
            call()
    with pytest.raises(ValueError, match=r"site 'x_1'.*rows without a context for a network"):
        vae.guide(x_0, c, null=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got shape \(3, 3\) for 4 data"):
        elbo_terms(vae, x_0, context=c[:3])
    with pytest.raises(ValueError, match=r"site 'x_1'.*real numbers of shape \(N,\) \+ \(3,\)"):
        vae.guide(x_0, c[:, :2])
    with pytest.raises(ValueError, match="argument 'context': got one for a FeedForward"):
        GaussianLayer((2,), (3,))(x_0, c)
    with pytest.raises(ValueError, match="argument 'context_shape': got it together with"):
        BottomUpEncoder(layers=[GaussianLayer((2,), (3,))], context_shape=(3,))


def test_layers_of_half_precision_take_a_context():
    vae = conditional(LadderEncoder, num_classes=3, context_shape=None).bfloat16()
    terms = elbo_terms(vae, torch.randn(4, 2), context=torch.arange(4) % 3)
    assert terms.elbo.isfinite().all()
    assert vae.sample(2, context=torch.tensor(1)).dtype == torch.float32
