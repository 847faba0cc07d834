"""The race between classes of ``examples/classify.py``, against posteriors that are known."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from pyro_diffusion import DiffusionModel, GaussianMixtureDenoiser, LogSNRSchedule

PATH = Path(__file__).parent.parent / "examples/classify.py"
spec = importlib.util.spec_from_file_location("classify", PATH)
classify = importlib.util.module_from_spec(spec)
spec.loader.exec_module(classify)

MEANS = torch.tensor([[0.0, 0.0], [1.2, 0.0], [0.5, 1.0]], dtype=torch.float64)
STD = 0.5
LOG_PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()


@pytest.fixture(scope="module")
def mixture():
    """A model of three classes that overlap, with exact kernels; data, and their log p(x | c)."""
    schedule = LogSNRSchedule(20, log_snr_max=4.0, log_snr_min=-16.0)
    denoiser = GaussianMixtureDenoiser(LOG_PRIOR.exp(), MEANS, STD, schedule)
    torch.manual_seed(0)
    x_0 = denoiser.data_distribution.sample((200,))
    square = (x_0[:, None] - MEANS).square().sum(-1)
    return DiffusionModel(denoiser), x_0, -square / (2 * STD**2) - math.log(2 * math.pi * STD**2)


def test_bayes_agrees_with_the_exact_posterior_within_its_error(mixture):
    diffusion, x_0, log_p = mixture
    torch.manual_seed(1)
    draw = classify.drawn_bounds(diffusion, x_0, draws=4)
    found = classify.race(draw, len(x_0), LOG_PRIOR, looks=(24,), error=1e-12)
    assert found.racing.all()  # so that all classes have all draws
    exact = (LOG_PRIOR + log_p).log_softmax(-1)
    z = (found.log_posterior(LOG_PRIOR) - exact) / found.standard_error(LOG_PRIOR)
    assert abs(z.square().mean().sqrt() - 1) < 0.25
    assert z.abs().max() < 6


def test_the_race_decides_for_the_best_class_with_fewer_draws(mixture):
    diffusion, x_0, log_p = mixture
    torch.manual_seed(2)
    draw = classify.drawn_bounds(diffusion, x_0, draws=4)
    found = classify.race(draw, len(x_0), LOG_PRIOR, looks=(12, 24), error=0.01)
    best = (LOG_PRIOR + log_p).argmax(-1)
    lost = ~found.racing[torch.arange(len(x_0)), best]
    assert lost.sum() <= 6  # 200 images with a chance of 0.01 each
    assert found.decided.sum() > 50
    assert found.difference.isnan().double().mean() > 0.05
    right = found.log_posterior(LOG_PRIOR).argmax(-1) == best
    assert right[found.decided & ~lost].all()


def test_rows_of_one_image_share_the_noise(mixture):
    """The kernels of the mixture have no analytic KL, so that their terms depend on every draw."""
    diffusion, x_0, log_p = mixture
    torch.manual_seed(2)
    draw = classify.drawn_bounds(diffusion, x_0, draws=4, images_at_a_time=7)
    first, second, other = (
        draw(torch.arange(60).repeat_interleave(3), torch.tensor([1, 1, 2]).repeat(60))
        .reshape(60, 3)
        .T
    )
    assert torch.equal(first, second)
    assert not torch.isclose(first, other).any()
    assert (first - other - (log_p[:60, 1] - log_p[:60, 2])).std() < (first - log_p[:60, 1]).std()


@pytest.mark.parametrize("error", [0.02, 0.2])
def test_one_of_two_equal_classes_is_lost_as_often_as_is_stated(error):
    torch.manual_seed(3)
    truth = torch.zeros(20_000, 2, dtype=torch.float64)
    found = classify.race(noisy(truth), len(truth), torch.zeros(2).double(), (8,), error)
    lost = (~found.racing).double().mean(0)
    assert (lost - error).abs().max() < 4 * (error / len(truth)) ** 0.5


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_best_of_many_classes_is_lost_at_most_as_often_as_is_stated(spread):
    """In several looks; classes of equal score have the most rivals that can be ahead by chance."""
    torch.manual_seed(4)
    prior = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64).log()
    score = spread * torch.randn(4_000, 5, dtype=torch.float64)
    found = classify.race(noisy(score - prior), len(score), prior, (8, 16, 32), 0.1)
    lost = ~found.racing.gather(1, score.argmax(-1, keepdim=True))
    assert 0 < lost.double().mean() < 0.1
    if spread:
        assert found.decided.double().mean() > 0.1
        assert found.difference.isnan().double().mean() > 0.1  # the race saves draws


def noisy(truth, std=2.0):
    """A function ``draw`` of noisy values, most of whose noise is common to the classes of an image."""

    def draw(image, label):
        common = 10 * torch.randn(len(truth), dtype=torch.float64)
        own = std * torch.randn(len(image), dtype=torch.float64)
        return truth[image, label] + common[image] + own

    return draw
