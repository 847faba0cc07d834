"""The law of a chain's data by sums: over all states of a discrete chain, or over a grid for each entry.

These are the laws of the models themselves, whatever their networks say.
"""

import itertools
import math

import torch
from torch import nn

from pyro_diffusion import (
    MLP,
    BernoulliLikelihood,
    DataPrediction,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    EnumeratedDenoiser,
    GaussianLikelihood,
    LearnedVariance,
    LevelPrediction,
    LinearDecaySchedule,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralCategoricalDenoiser,
    NeuralDenoiser,
    PoissonLikelihood,
    PosteriorVariance,
)


def all_values(size, count):
    """All data of so many entries with values 0 … size − 1, ``(size ** count, count)``."""
    return torch.tensor(list(itertools.product(range(size), repeat=count))).double()


@torch.no_grad()
def masses_of_states(diffusion, values):
    """log p(x_0) of all ``values`` of a chain whose states are these values."""
    count = len(values)
    log_p = diffusion.prior().expand((count,)).log_prob(values)
    for t in range(diffusion.schedule.num_timesteps, 0, -1):
        denoised = diffusion.denoiser.denoise(values, diffusion.schedule.log_snr(t))
        if t > 1:
            kernel = diffusion.denoiser.reverse_kernel(values, t, denoised)
        else:
            kernel = diffusion.decode(values, denoised)
        steps = torch.stack([kernel.log_prob(value.expand_as(values)) for value in values], 1)
        log_p = (log_p[:, None] + steps).logsumexp(0)  # from a row to a column
    return log_p


@torch.no_grad()
def masses_of_an_entry(diffusion, values, points=1000):
    """log p of the ``values`` of a datum of one entry, by sums over a grid for its real states."""
    grid = torch.linspace(-6, 6, points).double()[:, None]
    log_p = diffusion.prior().expand((points,)).log_prob(grid) + math.log(12 / (points - 1))
    for t in range(diffusion.schedule.num_timesteps, 0, -1):
        denoised = diffusion.denoiser.denoise(grid, diffusion.schedule.log_snr(t))
        if t == 1:
            kernel = diffusion.decode(grid, denoised)
            steps = kernel.expand((1, points)).log_prob(values[:, None, None].expand(-1, points, 1))
            return (log_p + steps).logsumexp(1)
        kernel = diffusion.denoiser.reverse_kernel(grid, t, denoised)
        steps = kernel.log_prob(
            grid[:, None].expand(points, points, 1)
        )  # a row for each next state
        log_p = (log_p + steps).logsumexp(1) + math.log(12 / (points - 1))
    raise AssertionError


class EachEntry(nn.Module):
    """A network that treats each entry by itself: a line, which is not the right one, and a wave on it."""

    def __init__(self, num_outputs=0, seed=0, slope=0.4):
        super().__init__()
        self.slope = slope
        generator = torch.Generator().manual_seed(seed)
        self.size = max(num_outputs, 1)
        self.squeeze = num_outputs == 0
        self.scale = nn.Parameter(torch.rand(self.size, generator=generator).double() + 0.5)
        self.shift = nn.Parameter(torch.randn(self.size, generator=generator).double())

    def forward(self, x_t, log_snr):
        known = torch.sigmoid(log_snr).reshape(-1, *(1,) * x_t.dim())
        x_t = x_t.unsqueeze(-1)
        output = self.slope * (0.2 + known) * x_t + 0.3 * torch.sin(self.scale * x_t + self.shift)
        return output.squeeze(-1) if self.squeeze else output


def curve(num_timesteps=6, log_snr_max=3.0):
    return LogSNRSchedule(num_timesteps, log_snr_max=log_snr_max, log_snr_min=-8.0)


def by_entry(kind, count):
    """A model of ``count`` entries, each with a chain of its own and the same law."""
    shape = (count,)
    if kind == "levels by logits":
        prediction = LevelPrediction(4)
        return DiffusionModel(
            NeuralDenoiser(EachEntry(4, slope=0.0), curve(), shape, prediction=prediction)
        )
    if kind == "learned variance":
        denoiser = NeuralDenoiser(
            EachEntry(2), curve(), shape, prediction=DataPrediction(), variance=LearnedVariance()
        )
        return DiffusionModel(denoiser)
    likelihoods = {
        "levels": DiscretizedGaussianLikelihood(4, scale=0.3),
        "counts": PoissonLikelihood(6),
        "bits by threshold": BernoulliLikelihood(0.8),
        "real": GaussianLikelihood(0.4),
    }
    denoiser = NeuralDenoiser(
        EachEntry(), curve(), shape, prediction=DataPrediction(), variance=PosteriorVariance()
    )
    return DiffusionModel(denoiser, likelihoods[kind])


def values_of(kind):
    """The values of an entry, as many as have any mass."""
    counts = {"levels by logits": 4, "levels": 4, "bits by threshold": 2, "counts": 40}
    return torch.arange(counts[kind]).double()


def small_mlp(shape, **arguments):
    torch.manual_seed(0)
    network = MLP(shape, hidden_size=8, num_blocks=1, **arguments).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def discrete(kind):
    """A chain of three bits or of two categories, with entries that depend on one another."""
    decay = LinearDecaySchedule(5, alpha_bar_max=0.9, alpha_bar_min=0.05)
    if kind == "bits":
        denoiser = NeuralBernoulliDenoiser(small_mlp((3,)), decay, (3,))
        return DiffusionModel(denoiser), all_values(2, 3)
    if kind == "enumerated bits":
        data = torch.tensor([[0, 0, 1], [1, 1, 1], [1, 0, 0], [0, 1, 1]]).double()
        weights = torch.tensor([0.1, 0.5, 0.2, 0.2]).double()
        return DiffusionModel(EnumeratedDenoiser(data, decay, weights)), all_values(2, 3)
    denoiser = NeuralCategoricalDenoiser(small_mlp((2, 3)), decay, (2,), num_categories=3)
    return DiffusionModel(denoiser), all_values(3, 2)


@torch.no_grad()
def masses_of_two_entries(diffusion, values, points=51):
    """log p of the ``values`` (V, 2) of a datum of two entries that depend on one another, on a grid.

    The chain's noise has to be wide against the grid's step, 10 / 50: a largest log-SNR of about zero.
    """
    line = torch.linspace(-5, 5, points).double()
    grid, cell = torch.cartesian_prod(line, line), 2 * math.log(10 / (points - 1))
    log_p = diffusion.prior().expand((len(grid),)).log_prob(grid) + cell
    for t in range(diffusion.schedule.num_timesteps, 0, -1):
        denoised = diffusion.denoiser.denoise(grid, diffusion.schedule.log_snr(t))
        if t == 1:
            kernel = diffusion.decode(grid, denoised)
            return torch.stack(
                [(log_p + kernel.log_prob(v.expand_as(grid))).logsumexp(0) for v in values]
            )
        kernel = diffusion.denoiser.reverse_kernel(grid, t, denoised)
        steps = [kernel.log_prob(state.expand_as(grid)) for state in grid]
        log_p = torch.stack([(log_p + step).logsumexp(0) for step in steps]) + cell
    raise AssertionError


class Mixed(nn.Module):
    """A network whose two outputs depend on both entries: about half of their mean, and a wave on it."""

    def forward(self, x_t, log_snr):
        known = torch.sigmoid(log_snr)[:, None]
        matrix = torch.tensor([[0.6, 0.3], [0.3, 0.6]]).to(x_t)
        shift = torch.tensor([0.3, -0.5]).to(x_t)
        return (0.1 + known) * (x_t @ matrix) + 0.15 * torch.sin(2 * x_t.flip(-1) + shift)


def coupled(kind):
    """A model of two real numbers, levels or counts that depend on one another."""
    schedule = LogSNRSchedule(3, log_snr_max=0.5, log_snr_min=-6.0)
    if kind == "levels by logits":
        network = small_mlp((2,), num_outputs=3)
        denoiser = NeuralDenoiser(network, schedule, (2,), prediction=LevelPrediction(3))
        return DiffusionModel(denoiser)
    denoiser = NeuralDenoiser(Mixed(), schedule, (2,), prediction=DataPrediction())
    likelihoods = {
        "levels": DiscretizedGaussianLikelihood(3, scale=0.7),
        "counts": PoissonLikelihood(3),
        "bits by threshold": BernoulliLikelihood(1.0),
        "real": None,
    }
    return DiffusionModel(denoiser, likelihoods[kind])
