"""A reverse kernel times a linear-Gaussian factor, against Bayes' rule for Gaussians in numpy."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from oracles import MixturePosterior

from pyro_diffusion.inference.conjugate import (
    Conjugate,
    Factor,
    Noise,
    as_gaussians,
    log_normal,
    root_of,
)

D, M = 3, 2  # entries of a state, rows of a factor


@pytest.fixture(autouse=True)
def _double(double):
    """Oracles in float64."""


def kernel_of(kind, batch):
    """A kernel over states, and its weights, means and covariances at each point of the batch."""
    means = torch.randn(*batch, D)
    if kind == "diagonal":
        stds = 0.3 + torch.rand(D)
        covariances = torch.diag(stds**2).expand(*batch, 1, D, D)
        return (
            dist.Normal(means, stds).to_event(1),
            torch.zeros(*batch, 1),
            means[..., None, :],
            covariances,
        )
    if kind == "full":
        root = torch.randn(D, D)
        covariance = root @ root.T + 0.2 * torch.eye(D)
        kernel = dist.MultivariateNormal(means, covariance)
        return (
            kernel,
            torch.zeros(*batch, 1),
            means[..., None, :],
            covariance.expand(*batch, 1, D, D),
        )
    logits, means = torch.randn(*batch, 3), 2 * torch.randn(*batch, 3, D)
    stds = 0.3 + torch.rand(3, D)
    kernel = dist.MixtureSameFamily(
        dist.Categorical(logits=logits), dist.Normal(means, stds).to_event(1)
    )
    return kernel, logits, means, torch.diag_embed(stds**2).expand(*batch, 3, D, D)


def factor_of(batch, *, exact=False):
    """A factor with other numbers at each point of the batch; ``exact`` has no noise."""
    size = 0.0 if exact else 1.0
    return Factor(
        offset=torch.randn(batch),
        residual=torch.randn(*batch, M),
        rows=torch.randn(*batch, M, D),
        centre=torch.randn(*batch, D),
        variance=size * (0.1 + torch.rand(*batch, M)),
        root=size * torch.randn(*batch, M, M).tril(),
    )


def product(kernel, factor, at):
    """The oracle at a point of the batch: e = B (x − m) + noise is y = B x for y = e + B m."""
    _, logits, means, covariances = (x if i == 0 else x[at].numpy() for i, x in enumerate(kernel))
    part = Factor(*(x[at].numpy() for x in factor))
    y = part.residual + part.rows @ part.centre
    noise = part.root @ part.root.T + np.diag(part.variance)
    return MixturePosterior.of(np.exp(logits), means, covariances, part.rows, y, noise)


KINDS = ["diagonal", "full", "mixture"]


@pytest.mark.parametrize("exact", [False, True], ids=["noisy", "without noise"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_normaliser_is_the_evidence(kind, exact):
    batch = (4, 3)
    kernel, factor = kernel_of(kind, batch), factor_of(batch, exact=exact)
    ours = Conjugate(as_gaussians(kernel[0], torch.Size(batch)), factor).log_z
    expected = [
        [factor.offset[i, j] + product(kernel, factor, (i, j)).log_evidence for j in range(3)]
        for i in range(4)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_times_factor_over_the_normaliser_is_the_density_of_the_product(kind):
    """log p(x) + log φ(x) − log Z at random points."""
    batch = (5, 2)
    kernel, factor = kernel_of(kind, batch), factor_of(batch)
    log_z = Conjugate(as_gaussians(kernel[0], torch.Size(batch)), factor).log_z
    x = 2 * torch.randn(*batch, D)
    ours = kernel[0].log_prob(x) + factor.log_prob(x) - log_z
    for i in range(5):
        for j in range(2):
            exact = product(kernel, factor, (i, j)).log_density(x[i, j].numpy())
            assert ours[i, j].item() == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("exact", [False, True], ids=["noisy", "without noise"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_moments_of_the_product(kind, exact):
    """Means and second moments of 20,000 draws a column within four errors; equations hold exactly."""
    kernel, factor = kernel_of(kind, (1, 2)), factor_of((1, 2), exact=exact)
    count = 20_000
    many = Factor(*(x.expand(count, *x.shape[1:]) for x in factor))
    gaussians = as_gaussians(kernel[0].expand((count, 2)), torch.Size((count, 2)))
    x = Conjugate(gaussians, many).draw(Noise(2))
    assert x.shape == (count, 2, D)
    for j in range(2):
        oracle = product(kernel, factor, (0, j))
        error = x[:, j] - torch.tensor(oracle.mean)
        products = error[:, :, None] * error[:, None, :]
        for values, expected in ((error, np.zeros(D)), (products, oracle.covariance)):
            spread = values.std(0) / math.sqrt(count) + 1e-9
            assert ((values.mean(0) - torch.tensor(expected)).abs() < 4 * spread).all()
    if exact:
        assert many.miss(x).abs().max() < 1e-9


def test_components_are_drawn_in_proportion_to_their_terms():
    """Two modes far apart, with unequal shares of the product."""
    means = torch.tensor([[-5.0], [5.0]])
    kernel = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.8])), dist.Normal(means, torch.ones(2, 1)).to_event(1)
    )
    one = torch.ones(40_000, 1, 1)
    factor = Factor(
        offset=one[..., 0], residual=-0.1 * one, rows=one[..., None], centre=0 * one,
        variance=9 * one, root=0 * one[..., None],
    )  # fmt: skip
    gaussians = as_gaussians(kernel.expand((40_000, 1)), torch.Size((40_000, 1)))
    x = Conjugate(gaussians, factor).draw(Noise())
    # shares by hand: w_k N(−0.1; ±5, 1 + 9)
    terms = np.array([0.2, 0.8]) * np.exp(-(np.array([4.9, 5.1]) ** 2) / 20)
    share = (x > 0).double().mean().item()
    expected = terms[1] / terms.sum()
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 40_000))


def test_kernels_that_are_not_gaussian_are_not_taken_for_it():
    size = torch.Size((2, 3))
    assert as_gaussians(dist.Laplace(torch.zeros(2, 3, D), 1.0).to_event(1), size) is None
    heavy = dist.StudentT(torch.tensor(3.0), torch.zeros(2, 3, 2, D), 1.0).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 3, 2)), heavy)
    assert as_gaussians(mixture, size) is None
    full = dist.MultivariateNormal(torch.zeros(2, 3, 2, D), torch.eye(D))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 3, 2)), full)
    assert as_gaussians(mixture, size) is None


def test_kernels_of_many_shapes_are_gaussians():
    """Scalars, images, and a kernel of one state for all particles."""
    size = torch.Size((4, 2))
    mean, scale = torch.randn(4, 2, 3, 5), torch.rand(3, 5)
    image = as_gaussians(dist.Normal(mean, scale).to_event(2), size)
    assert torch.equal(image.means, mean.reshape(4, 2, 1, 15))
    assert torch.equal(image.scale.expand(image.means.shape)[1, 1, 0], scale.flatten())
    shared = as_gaussians(dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1), size)
    assert shared.means.shape == (4, 2, 1, 3)
    scalar = as_gaussians(dist.Normal(torch.zeros(4, 2), 2.0), size)
    assert scalar.means.shape == (4, 2, 1, 1)
    assert (scalar.scale == 2).all()


def test_common_noise_is_the_same_for_all_data_of_a_run():
    like = torch.zeros(50, 6, 4)  # two runs of three data
    for numbers in (Noise(3, common=True).normal(like), Noise(3, common=True).uniform(like)):
        assert numbers.shape == like.shape
        assert torch.equal(numbers[:, 0], numbers[:, 1])
        assert torch.equal(numbers[:, 3], numbers[:, 5])
        assert not torch.equal(numbers[:, 0], numbers[:, 3])
        assert len(numbers[:, 0].unique()) == 200
    own = Noise(3).normal(like)
    assert len(own.unique()) == like.numel()


def test_roots_of_matrices_that_are_barely_covariances():
    """A root where there is one, and else that of the matrix with a floor for its eigenvalues."""
    root = torch.randn(3, 3)
    good, bad = root @ root.T + 0.1 * torch.eye(3), torch.diag(torch.tensor([2.0, 1.0, -1e-3]))
    found = root_of(torch.stack((good, bad)))
    torch.testing.assert_close(found[0] @ found[0].T, good)
    values = torch.linalg.eigvalsh(found[1] @ found[1].T)
    torch.testing.assert_close(values[1:], torch.tensor([1.0, 2.0]), rtol=1e-6, atol=0)
    assert 0 < values[0] < 1e-8


def test_a_normal_density_from_a_root():
    root = torch.randn(2, 3, 3).tril(-1) + torch.diag(torch.tensor([1.0, 0.5, 2.0]))
    x = torch.randn(2, 3)
    exact = dist.MultivariateNormal(torch.zeros(3), scale_tril=root).log_prob(x)
    torch.testing.assert_close(log_normal(x, root), exact)
