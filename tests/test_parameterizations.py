import numpy as np
import pytest
import torch

from pyro_diffusion.denoisers import (
    DataPrediction,
    LearnedVariance,
    LevelPrediction,
    NeuralDenoiser,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import LogSNRSchedule

INVERTIBLE = [NoisePrediction(), DataPrediction(), VelocityPrediction(), ScorePrediction()]
#: What each output is for x_t = a x_0 + σ ε, from its definition.
MEANING = {
    NoisePrediction: lambda x_0, eps, a, s: eps,
    DataPrediction: lambda x_0, eps, a, s: x_0,
    VelocityPrediction: lambda x_0, eps, a, s: a * eps - s * x_0,
    ScorePrediction: lambda x_0, eps, a, s: -eps / s,
}
SCALES = [(0.6, 0.8), (0.999, 0.02), (0.02, 0.999), (1.0, 5.0), (1.0, 0.01)]  # the last two explode


@pytest.mark.parametrize("prediction", INVERTIBLE, ids=repr)
@pytest.mark.parametrize(("a", "s"), SCALES)
def test_conversions_are_exact_both_ways(prediction, a, s, double):
    x_0, eps, signal, noise = torch.randn(6, 3), torch.randn(6, 3), *torch.tensor([a, s])
    x_t = a * x_0 + s * eps
    output = prediction.output(x_0, x_t, signal, noise)
    torch.testing.assert_close(output, MEANING[type(prediction)](x_0, eps, a, s))
    x_0_hat = prediction.x_0_hat(output, x_t, signal, noise)
    torch.testing.assert_close(x_0_hat, x_0, rtol=1e-10, atol=1e-10)
    output = torch.randn(6, 3)
    there = prediction.x_0_hat(output, x_t, signal, noise)
    torch.testing.assert_close(
        prediction.output(there, x_t, signal, noise), output, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("a_s", SCALES[:4])
@pytest.mark.parametrize("num_levels", [2, 3, 17])
def test_levels_have_the_exact_posterior_of_independent_entries(num_levels, a_s, double):
    """Bayes' rule in numpy: each entry has a prior of its own over the levels."""
    (a, s), rng = a_s, np.random.default_rng(0)
    prior = rng.dirichlet(np.ones(num_levels), size=4)  # (4, K)
    level = 2 * np.arange(num_levels) / (num_levels - 1) - 1
    x_t = a * rng.choice(level, size=(5, 4)) + s * rng.normal(size=(5, 4))
    joint = prior * np.exp(-0.5 * ((x_t[..., None] - a * level) / s) ** 2)
    posterior = joint / joint.sum(-1, keepdims=True)

    prediction = LevelPrediction(num_levels)
    output = torch.tensor(np.log(prior)).expand(5, 4, num_levels)
    arguments = (output, torch.tensor(x_t), *torch.tensor([a, s]))
    np.testing.assert_allclose(
        prediction.logits(*arguments).softmax(-1), posterior, rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        prediction.x_0_hat(*arguments), posterior @ level, rtol=1e-9, atol=1e-12
    )


def test_a_level_has_an_output_that_means_it(double):
    prediction, k = LevelPrediction(5), torch.tensor([[0, 3], [4, 1]])
    x_0, x_t = prediction.embed(k), torch.randn(2, 2)
    output = prediction.output(x_0, x_t, *torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(prediction.x_0_hat(output, x_t, *torch.tensor([0.6, 0.8])), x_0)


def test_levels_far_apart_in_float32():
    """Little noise: a state next to one of 256 levels is at that level, without overflow."""
    prediction = LevelPrediction(256)
    level = prediction.embed(torch.arange(256))
    noise = torch.tensor(1e-4)
    x_0_hat = prediction.x_0_hat(torch.zeros(256, 256), level + 2e-4, torch.tensor(1.0), noise)
    torch.testing.assert_close(x_0_hat, level)


def test_autocast_does_not_round_the_estimate():
    """Under bf16-mixed the network is rounded, the posterior of the levels is not."""
    logits = torch.randn(64, 256)
    exact = LevelPrediction(256).mean(logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LevelPrediction(256).mean(logits), exact)


def test_networks_return_as_many_numbers_as_are_asked_for():
    schedule, x = LogSNRSchedule(10), torch.randn(7, 2, 3)
    for count, arguments in [
        (1, {}),
        (2, {"variance": LearnedVariance()}),
        (4, {"prediction": LevelPrediction(4)}),
        (5, {"prediction": LevelPrediction(4), "variance": LearnedVariance()}),
    ]:
        network = MLP((2, 3), hidden_size=8, num_blocks=1, num_outputs=count)
        kernel = NeuralDenoiser(network, schedule, (2, 3), **arguments)(x, 5)
        assert kernel.batch_shape == (7,)
        assert kernel.event_shape == (2, 3)
        wrong = MLP((2, 3), hidden_size=8, num_blocks=1, num_outputs=count + 1)
        with pytest.raises(ValueError, match=rf"'network'.*{count} number.*num_outputs={count}"):
            NeuralDenoiser(wrong, schedule, (2, 3), **arguments)(x, 5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LevelPrediction(1), "'num_levels'.*got 1"),
        (lambda: LevelPrediction(4).embed(torch.tensor([4])), "'x_0'.*got the value 4;.*0 … 3"),
        (lambda: MLP((2,), hidden_size=0), "'hidden_size'.*got 0"),
        (lambda: MLP((2,), num_outputs=-1), "'num_outputs'.*got -1"),
    ],
)
def test_bad_input_is_refused_in_words(call, says):
    with pytest.raises(ValueError, match=says):
        call()
