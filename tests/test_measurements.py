"""Linear-Gaussian measurements and their ready-made operators, by themselves and under exact models."""

import math

import numpy as np
import pytest
import torch
from oracles import gaussian_posterior
from torch.distributions import ExpTransform

from pyro_diffusion import (
    DiffusionModel,
    GaussianDenoiser,
    LinearGaussian,
    LogSNRSchedule,
    Standardize,
    posterior_samples,
)
from pyro_diffusion.inference import BlockMeans, Blur, Entries, Subsampling
from pyro_diffusion.inference.measurements import Linear

SCHEDULE = LogSNRSchedule(10, log_snr_max=8.0, log_snr_min=-40.0)


def matrix_of(operator, shape):
    """The matrix of an operator, column by column."""
    unit = torch.eye(math.prod(shape)).reshape(-1, *shape)
    return operator(unit).flatten(1).T


# Operators.


def test_entries_are_those_of_the_mask():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    x = torch.arange(24.0).reshape(2, 2, 2, 3)
    assert torch.equal(Entries(mask)(x), x[..., [0, 0, 1], [0, 2, 1]])
    assert repr(Entries(mask)) == "Entries(3 of 6)"
    assert Entries(mask.numpy())(x).shape == (2, 2, 3)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_blur_is_a_convolution_with_extended_edges(batch):
    """Against the sum by hand, with a kernel that is not symmetric."""
    weights, x = torch.tensor([0.5, 0.3, 0.2]), torch.randn(*batch, 6)
    padded = torch.cat((x[..., :1], x, x[..., -1:]), -1)
    # (w * x)_i = Σ_j w_j x_{i−j}, j = −1, 0, 1
    expected = 0.5 * padded[..., 2:] + 0.3 * padded[..., 1:-1] + 0.2 * padded[..., :-2]
    torch.testing.assert_close(Blur(weights)(x), expected)


def test_a_blur_of_an_image():
    weights, image = torch.randn(3, 5), torch.randn(2, 6, 7)
    padded = np.pad(image.numpy(), ((0, 0), (1, 1), (2, 2)), mode="edge")
    expected = np.zeros((2, 6, 7))
    for i in range(3):
        for j in range(5):
            expected += weights[i, j].item() * padded[:, 2 - i : 8 - i, 4 - j : 11 - j]
    torch.testing.assert_close(
        Blur(weights)(image), torch.tensor(expected).float(), atol=1e-5, rtol=0
    )
    assert repr(Blur(weights)) == "Blur(3 × 5)"


def test_subsampling_and_block_means():
    x = torch.arange(2 * 4 * 6.0).reshape(2, 4, 6)
    assert torch.equal(Subsampling((2, 3))(x), x[:, ::2, ::3])
    assert torch.equal(Subsampling(4)(x), x[..., ::4])
    expected = torch.stack(
        [x[:, i : i + 2, j : j + 3].mean((1, 2)) for i in (0, 2) for j in (0, 3)], 1
    )
    torch.testing.assert_close(BlockMeans((2, 3))(x), expected.reshape(2, 2, 2))
    torch.testing.assert_close(BlockMeans(2)(x), x.reshape(2, 4, 3, 2).mean(-1))
    assert (repr(Subsampling(4)), repr(BlockMeans((2, 3)))) == (
        "Subsampling(4)",
        "BlockMeans(2, 3)",
    )


OPERATORS = {
    "entries": (Entries(torch.arange(16).reshape(4, 4) % 3 == 0), 6),
    "blur": (Blur(torch.tensor([[0.0, 0.1, 0.0], [0.2, 0.3, 0.1], [0.0, 0.3, 0.0]])), 16),
    "subsampling": (Subsampling((2, 3)), 4),
    "block means": (BlockMeans((2, 2)), 4),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_as_good_as_its_matrix(name, double):
    """The posterior of an image with independent entries, exact in numpy."""
    operator, size = OPERATORS[name]
    mean, std = torch.randn(4, 4), 0.5 + torch.rand(4, 4)
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, LogSNRSchedule(8, log_snr_min=-30.0)))
    matrix = matrix_of(operator, (4, 4))
    y = operator(mean + std * torch.randn(4, 4)).flatten() + torch.randn(size)
    likelihood = LinearGaussian(operator, y.reshape(operator(mean).shape), 1.0)
    torch.testing.assert_close(Linear(diffusion, likelihood).rows, matrix)
    torch.testing.assert_close(Linear(diffusion, LinearGaussian(matrix, y, 1.0)).rows, matrix)
    exact = gaussian_posterior(
        mean.flatten().numpy(), np.diag(std.flatten().numpy() ** 2), matrix.numpy(), y.numpy(), np.eye(size)
    )  # fmt: skip
    draws = posterior_samples(
        diffusion, likelihood, 9, num_particles=60, num_runs=8, progress=False
    )
    assert abs(draws.log_evidence - exact.log_evidence) < 4 * draws.standard_error + 1e-7
    mean_of = draws.mean()
    z = (mean_of.value.flatten() - torch.tensor(exact.mean)) / mean_of.standard_error.flatten()
    assert z.square().mean() < 3


def test_a_constant_in_the_operator_is_allowed(double):
    """An affine operator A x + b is the matrix and y − b."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), SCHEDULE)
    one = LinearGaussian(lambda x: x[..., :1] + 3.0, torch.tensor([4.0]), 0.5)
    draws = posterior_samples(DiffusionModel(denoiser), one, 9, num_particles=30, progress=False)
    exact = -0.5 * (1 / 1.25 + math.log(2 * math.pi * 1.25))
    assert draws.log_evidence.item() == pytest.approx(exact, abs=1e-9)


def test_the_likelihood_of_a_datum_is_normalised(double):
    """log N(y; A x, diag s²), of several y with noise of their own."""
    denoiser = GaussianDenoiser(torch.zeros(3), torch.ones(3), SCHEDULE)
    matrix, y, noise = torch.randn(2, 3), torch.randn(4, 2), 0.5 + torch.rand(4, 2)
    target = Linear(DiffusionModel(denoiser), LinearGaussian(matrix, y, noise))
    x_0 = torch.randn(5, 8, 3)  # two runs of four data
    expected = torch.distributions.Normal(x_0 @ matrix.T, noise.repeat(2, 1)).log_prob(
        y.repeat(2, 1)
    )
    torch.testing.assert_close(target.log_prob(x_0), expected.sum(-1))


# Shapes of y and of the noise.


@pytest.mark.parametrize(
    "noise", [0.5, torch.tensor([0.5, 1.0]), torch.ones(3, 1), torch.ones(3, 2)], ids=str
)
def test_noise_broadcasts_to_y(noise):
    likelihood = LinearGaussian(torch.ones(2, 4), torch.zeros(3, 2), noise)
    assert likelihood.noise.shape == likelihood.y.shape == (3, 2)


def test_one_y_with_several_noises_is_several_measurements(double):
    """A curve of the evidence over a noise scale, each value exact."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), SCHEDULE)
    noise = torch.tensor([0.1, 0.5, 2.0])[:, None]
    likelihood = LinearGaussian(torch.eye(2), torch.tensor([1.0, -1.0]), noise)
    draws = posterior_samples(
        DiffusionModel(denoiser), likelihood, 9, num_particles=30, progress=False
    )
    variance = 1 + noise[:, 0] ** 2
    exact = -(1 / variance + (2 * math.pi * variance).log())
    torch.testing.assert_close(draws.log_evidence, exact, rtol=0, atol=1e-8)


def test_what_a_likelihood_prints():
    one = LinearGaussian(torch.ones(1, 3), torch.zeros(1), 0.1)
    assert repr(one) == "LinearGaussian(a matrix (1, 3), y of shape (1,))"
    blurred = LinearGaussian(Blur(torch.ones(3)), torch.zeros(8), 0.1)
    assert repr(blurred) == "LinearGaussian(Blur(3), y of shape (8,))"


# Bad input.


WRONG = {
    "a vector": (lambda: LinearGaussian(torch.ones(3), torch.zeros(1), 0.1), "operator.*matrix"),
    "words": (lambda: LinearGaussian("words", torch.zeros(1), 0.1), "argument 'operator'"),
    "y with gaps": (
        lambda: LinearGaussian(torch.ones(1, 3), torch.tensor([math.nan]), 0.1),
        "argument 'y': got 1 NaN.*Entries",
    ),
    "negative noise": (
        lambda: LinearGaussian(torch.ones(1, 3), torch.zeros(1), -0.1),
        "argument 'noise': got the value -0.1; expected standard deviations of at least zero",
    ),
    "noise that is not finite": (
        lambda: LinearGaussian(torch.ones(1, 3), torch.zeros(1), math.inf),
        "argument 'noise': got the value inf",
    ),
    "noise of another shape": (
        lambda: LinearGaussian(torch.ones(2, 3), torch.zeros(4, 2), torch.ones(4)),
        r"argument 'noise': got shape \(4,\) for a y of shape \(4, 2\).*noise\[:, None\]",
    ),
    "a mask of numbers": (lambda: Entries(torch.ones(3)), "argument 'mask'.*torch.float32"),
    "a mask of nothing": (lambda: Entries(torch.ones(3) < 0), "argument 'mask'.*0 of it true"),
    "an even kernel": (lambda: Blur(torch.ones(4)), "argument 'kernel'.*odd size.*Pad"),
    "a kernel of three axes": (lambda: Blur(torch.ones(3, 3, 3)), "argument 'kernel'.*one or two axes"),
    "a step of zero": (lambda: Subsampling(0), "argument 'step': got 0"),
    "half a block": (lambda: BlockMeans(1.5), "argument 'size'"),
    "blocks that do not fit": (
        lambda: BlockMeans(3)(torch.zeros(2, 4)),
        r"argument 'size' of BlockMeans: got \(3,\) for axes of \(4,\); expected sizes that divide.*Crop",
    ),
    "blocks of more axes": (lambda: BlockMeans((2, 2))(torch.zeros(4)), "argument 'size' of BlockMeans"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_get_four_beats(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert all(part in str(caught.value) for part in (": got ", "; expected ", ". "))


def read(likelihood, **settings):
    denoiser = GaussianDenoiser(torch.zeros(3), torch.ones(3), SCHEDULE)
    model = DiffusionModel(denoiser, **settings)
    return posterior_samples(model, likelihood, 9, num_particles=30, num_runs=2, progress=False)


@pytest.mark.parametrize(
    "shape",
    [
        (3,),
        (),
        (1, 2, 2),
        (4, 3),
        (0, 2),
    ],
    ids=str,
)
def test_a_y_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"argument 'y': got shape .* whose output has 2 numbers"):
        read(LinearGaussian(torch.ones(2, 3), torch.zeros(shape), 0.1))


@pytest.mark.parametrize(
    "operator", [torch.ones(2, 4), Entries(torch.ones(4) > 0)], ids=["matrix", "entries"]
)
def test_an_operator_for_other_data_is_refused(operator):
    with pytest.raises(ValueError, match="argument 'operator': got .*; expected .*"):
        read(LinearGaussian(operator, torch.zeros(2), 0.1))


def test_what_is_not_affine_is_refused_unless_it_may_be_linearised():
    likelihood = LinearGaussian(torch.ones(1, 3), torch.tensor([4.0]), 1.0)
    with pytest.raises(ValueError, match="not affinely; expected .* affine .*linearize=True"):
        read(likelihood, transform=ExpTransform().inv)
    with pytest.raises(ValueError, match="not affinely"):
        read(LinearGaussian(lambda x: x.square(), torch.ones(3), 1.0))
    read(likelihood, transform=Standardize(1.0, 2.0))  # an affine transform is no obstacle
    read(
        LinearGaussian(torch.ones(1, 3), torch.tensor([4.0]), 1.0, linearize=True),
        transform=ExpTransform().inv,
    )
