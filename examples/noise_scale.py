r"""How noisy is the instrument? The evidence of a measurement as a function of its noise.

A signal of 16 values is a pulse at one of five places, with small fluctuations. An instrument blurs it and
adds independent Gaussian noise of unknown standard deviation σ. One measurement y tells σ, because the prior
p(x) knows what signals look like:

.. math::
    p(y \mid \sigma) = \int p(x)\, N(y;\; A x,\; \sigma^2 I)\, dx, \qquad
    p(\sigma \mid y) \propto p(\sigma)\, p(y \mid \sigma) .

``posterior_samples`` is called once, with a batch of noise levels. With ``common_noise=True`` all levels
share their random numbers, so that the *differences* of log p(y∣σ) have small errors. These come from the
runs: each run r has a ratio :math:`\hat Z_r(\sigma) / \hat Z(\sigma)`, whose mean over the runs is one. The
error of a difference :math:`\log \hat Z(\sigma) - \log \hat Z(\sigma')` is the standard error of the mean
difference of these ratios.

The signals are a mixture of Gaussians, so that log p(y∣σ) is known. It is compared with two priors. The first
is the exact denoiser of the mixture, for which only the Monte Carlo error is left. The second is a network
that was trained on draws of the mixture, and what it differs by beyond the band is what it learned wrongly.

    python examples/noise_scale.py [--device cuda] [--seed 0] [--smoke] [--output outputs/noise_scale]
"""

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pyro
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    HalfNormal,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from pyro_diffusion import (
    MLP,
    DataPrediction,
    DiffusionModel,
    GaussianMixtureDenoiser,
    LinearGaussian,
    LogSNRSchedule,
    NeuralDenoiser,
    Recipe,
    Standardize,
    evaluate_bound,
    fit,
    posterior_samples,
)
from pyro_diffusion.inference import Blur
from pyro_diffusion.style import BLUE, GREEN, INK, RED, new_axes, styled

matplotlib.use("Agg")

LENGTH, PLACES, FLUCTUATION = 16, (2.0, 5.0, 8.0, 11.0, 14.0), 0.3
TRUE_NOISE, PRIOR_SCALE = 0.3, 0.5
INSTRUMENT = Blur(torch.tensor([0.25, 0.5, 0.25]))


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    schedule = LogSNRSchedule(
        10 if args.smoke else args.timesteps, log_snr_max=5.0, log_snr_min=-10.0
    )
    signals = MixtureSameFamily(
        Categorical(torch.ones(len(PLACES))), Independent(Normal(pulses(), FLUCTUATION), 1)
    )
    x = signals.sample()
    y = (INSTRUMENT(x) + TRUE_NOISE * torch.randn(LENGTH)).to(args.device)
    sigma = torch.logspace(-0.9, -0.05, 5 if args.smoke else args.levels)
    exact = Exact(y.cpu(), sigma)
    print(f"a signal of {LENGTH} values, {len(y)} measured numbers, true noise {TRUE_NOISE}")

    oracle = GaussianMixtureDenoiser(torch.ones(len(PLACES)), pulses(), FLUCTUATION, schedule)
    priors = {
        "exact prior": DiffusionModel(oracle).to(args.device),
        "learned prior": learned(signals, schedule, args),
    }
    curves = {name: curve(prior, y, sigma, args) for name, prior in priors.items()}
    apart = curve(priors["exact prior"], y, sigma, args, common_noise=False)
    for name, found in curves.items():
        report(name, found, exact, sigma)
    mean = (curves["exact prior"].error[1:-1] / apart.error[1:-1]).nanmean()
    print(
        f"errors of differences with common_noise, as a share of those without: {mean:.2f} in the mean"
    )
    print("picture:", plot(args.output, x, y, sigma, curves))


class Curve(NamedTuple):
    """log p(y∣σ) by level."""

    log_p: Tensor  #: in nats, (S,)
    error: Tensor  #: of the difference to the maximum, (S,)
    ratios: Tensor  #: Ẑ of a run, divided by their mean, (R, S)
    reliable: Tensor  #: (S,)
    signal: Tensor  #: mean and standard deviation of the signal by level, (2, S, 16)

    def relative(self):
        """log p(y∣σ) minus its largest value."""
        return self.log_p - self.log_p.max()


class Exact:
    """What is known: the measurement of each pulse is Gaussian."""

    def __init__(self, y, sigma):
        A = INSTRUMENT(torch.eye(LENGTH, dtype=torch.float64)).T
        noise = sigma.double()[:, None, None, None] ** 2 * torch.eye(LENGTH)
        normal = MultivariateNormal(pulses().double() @ A.T, FLUCTUATION**2 * A @ A.T + noise)
        log_terms = normal.log_prob(y.double())
        self.log_p = log_terms.logsumexp(-1) - torch.tensor(float(len(PLACES))).log()
        self.reliable = torch.ones(len(sigma), dtype=torch.bool)
        self.ratios = torch.ones(2, len(sigma), dtype=torch.float64)


def pulses():
    """A pulse at each place, ``(5, 16)``."""
    t = torch.arange(float(LENGTH)) + 0.5
    return (-((t - torch.tensor(PLACES)[:, None]) ** 2) / 4).exp()


def learned(signals, schedule, args):
    """A network that has seen 20,000 signals."""
    start = time.perf_counter()
    train = signals.sample((1_000 if args.smoke else 20_000,)).to(args.device)
    network = MLP((LENGTH,), hidden_size=64, num_blocks=2)
    diffusion = DiffusionModel(
        NeuralDenoiser(network, schedule, (LENGTH,), prediction=DataPrediction()),
        transform=Standardize.from_data(train),
    ).to(args.device)
    steps = 30 if args.smoke else args.steps
    fit(diffusion, train, max_steps=steps, seed=args.seed, recipe=Recipe(batch_size=512))
    held_out = signals.sample((500,)).to(args.device)
    bound = evaluate_bound(diffusion, held_out, standard_error=0.1).mean()
    entropy = -signals.log_prob(held_out.cpu()).mean()
    seconds = time.perf_counter() - start
    print(f"trained in {seconds:.0f} s: bound {bound} on log p(x), exact {-entropy:.3f}")
    return diffusion


def curve(prior, y, sigma, args, *, common_noise=True):
    """log p(y∣σ) at all levels in one call."""
    likelihood = LinearGaussian(INSTRUMENT, y.expand(len(sigma), -1), sigma[:, None].to(y.device))
    start = time.perf_counter()
    draws = posterior_samples(
        prior, likelihood, 100, num_particles=args.particles, num_runs=4 if args.smoke else args.runs,
        common_noise=common_noise, progress=False,
    )  # fmt: skip
    ratios = (draws.log_evidence_by_run - draws.log_evidence).exp()  # Ẑ of each run over their mean
    best = draws.log_evidence.argmax()
    error = (ratios - ratios[:, [best]]).std(0) / len(ratios) ** 0.5
    print(f"{time.perf_counter() - start:.0f} s for {len(sigma)} noise levels")
    signal = torch.stack([draws.mean().value, draws.std().value])
    return Curve(*(v.cpu() for v in (draws.log_evidence, error, ratios, draws.reliable, signal)))


def posterior(curve, sigma):
    """The density of σ on the grid, its mean, and the Monte Carlo error of the mean."""
    log_sigma = sigma.double().log()
    prior = HalfNormal(PRIOR_SCALE).log_prob(sigma.double())
    cells = torch.gradient(log_sigma)[0] * sigma  # dσ of a level
    weight = (curve.log_p + prior + cells.log()).softmax(0)
    mean = weight @ sigma.double()
    of_runs = curve.ratios @ (weight * (sigma - mean))  # its mean over runs is zero
    return weight / cells, mean, of_runs.std() / len(of_runs) ** 0.5


def report(name, found, exact, sigma):
    """The curve at some levels, and the posterior of σ."""
    difference = exact.log_p - exact.log_p[found.log_p.argmax()]
    print(f"\n{name}: {int(found.reliable.sum())} of {len(sigma)} levels are reliable")
    print("      σ   log p(y∣σ) − maximum     exact")
    for i in range(0, len(sigma), max(1, len(sigma) // 8)):
        shown = f"{found.relative()[i]:9.3f} ± {found.error[i]:.3f}"
        print(f"  {sigma[i]:.3f}   {shown:>20}   {difference[i]:9.3f}")
    _, mean, error = posterior(found, sigma)
    print(
        f"  posterior mean of σ: {mean:.4f} ± {error:.4f}, exact {posterior(exact, sigma)[1]:.4f}"
    )


@styled
def plot(folder, x, y, sigma, curves):
    """The curves with their bands, what they differ by from the exact one, and what follows for σ and x."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = new_axes(2, 3, (11, 5.6))
    fine = torch.logspace(sigma[0].log10(), sigma[-1].log10(), 200)
    levels, between = Exact(y.cpu(), sigma), Exact(y.cpu(), fine)
    top, bottom = axes[:, 2]
    top.plot(fine, posterior(between, fine)[0], color=INK, ls="--", lw=1.2, label="exact")
    for column, color, (name, found) in zip(axes.T, (BLUE, RED), curves.items(), strict=False):
        best = found.log_p.argmax()
        above, below = column
        above.plot(
            fine, between.log_p - levels.log_p[best], color=INK, ls="--", lw=1.2, label="exact"
        )
        draw_band(above, sigma, found.relative(), found.error, color, "found")
        above.set(title=name, ylabel="log p(y∣σ) − maximum, nats", ylim=(-8, 0.6))
        above.legend(loc="lower center", fontsize="small")
        below.axhline(0, color=INK, ls="--", lw=1.2)
        difference = found.relative() - (levels.log_p - levels.log_p[best])
        draw_band(below, sigma, difference, found.error, color, "with ± 2 errors")
        below.set(ylabel="found − exact, nats", xlabel="σ")
        below.legend(fontsize="small")
        for ax in column:
            ax.set_xscale("log")
            ax.set_xticks([0.15, 0.3, 0.6], ["0.15", "0.3", "0.6"])
            ax.set_xticks([], minor=True)
        density = posterior(found, sigma)[0]
        top.plot(sigma, density, color=color, marker="o", ms=4, lw=0, label=name)
    top.axvline(TRUE_NOISE, color=GREEN, lw=1, label="true σ")
    top.set(title="posterior of the noise", xlabel="σ", ylabel="p(σ∣y)", xlim=(0.1, 0.8))
    top.legend(fontsize="small")
    draw_signal(bottom, x, y, curves["learned prior"])
    path, aside = folder / "noise_scale.png", folder / ".noise_scale.part"
    top.figure.savefig(aside, dpi=150, format="png")
    os.replace(aside, path)
    return path


def draw_band(ax, sigma, value, error, color, label):
    ax.fill_between(sigma, value - 2 * error, value + 2 * error, color=color, alpha=0.25, lw=0)
    ax.plot(sigma, value, color=color, lw=1.4, marker="o", ms=4, label=label)


def draw_signal(ax, x, y, found):
    """The signal and its measurement, with the posterior at the best noise level."""
    t, best = torch.arange(LENGTH) + 0.5, found.log_p.argmax()
    mean, std = found.signal[:, best]
    ax.fill_between(t, mean - 2 * std, mean + 2 * std, color=RED, alpha=0.2, lw=0)
    ax.plot(t, mean, color=RED, label="posterior, ± 2 sd")
    ax.plot(t, x, color=INK, lw=1.2, ls=":", label="true signal")
    ax.scatter(t, y.cpu(), s=18, color=GREEN, zorder=3, label="measured")
    ax.set(title="the signal at the best σ, learned prior", xlabel="position")
    ax.set_ylim(top=ax.get_ylim()[1] + 0.9)
    ax.legend(fontsize="small", loc="upper left", ncols=2)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--timesteps", type=int, default=30)
    parser.add_argument("--levels", type=int, default=11)
    parser.add_argument("--particles", type=int, default=128)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/noise_scale"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
