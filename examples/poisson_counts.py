r"""Counts of a simulated detector: the bound against the exact log p, and intervals of every pixel.

A source of random position and brightness shines on a detector of 8×8 pixels, over a background. Pixel i
counts n_i ~ Poisson(b + A psf(i - position)). A sum over a grid of positions and brightnesses gives the exact
probability of an image, the entropy of the images, and the distribution of the counts of every pixel.
``fit`` trains a diffusion model with a Poisson likelihood on the raw counts. The schedule is trained too: the
log-SNRs at both ends of the chain are parameters of the guide.

    python examples/poisson_counts.py [--device cuda] [--seed 0] [--smoke] [--output outputs/poisson]
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import matplotlib
import pyro
import torch

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LogSNRSchedule,
    NeuralDenoiser,
    PoissonLikelihood,
    elbo_terms,
    fit,
    plot_samples,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDE, BACKGROUND, WIDTH = 8, 0.5, 1.2


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    start = time.perf_counter()
    field = RateField(args.device)
    train, held_out = field.counts(args.num_train), field.counts(args.num_held_out)
    validation = field.counts(1_000)

    likelihood = PoissonLikelihood(max_count=30.0)
    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=args.log_snr_max, learnable=True)
    network = MLP((SIDE, SIDE), num_blocks=3)
    denoiser = NeuralDenoiser(network, schedule, (SIDE, SIDE))
    diffusion = DiffusionModel(denoiser, likelihood).to(args.device)
    print(fit(diffusion, train, validation=validation, max_steps=args.num_steps, seed=args.seed))
    fitted = time.perf_counter()
    ends = [end.item() for end in (diffusion.schedule.log_snr_max, diffusion.schedule.log_snr_min)]
    print(f"log-SNR at x_1 and x_T, learned: {ends[0]:.2f} and {ends[1]:.2f}")

    terms = elbo_terms(
        diffusion.model, diffusion.posterior_guide, held_out, num_particles=4, analytic_kl=False
    )
    samples = diffusion.sample(args.num_samples)
    numbers = report(terms, field, held_out, samples)
    paths = write(args.output, numbers, samples, held_out, field)
    print("\nwrote " + "\n      ".join(map(str, paths)))
    print(
        f"{fitted - start:.0f} s to fit, {time.perf_counter() - fitted:.0f} s to evaluate and draw"
    )


class RateField:
    """The simulator: the rates by position and brightness, and exact probabilities by a grid of both."""

    def __init__(self, device):
        self.device = device
        self.pixels = torch.arange(SIDE, device=device) + 0.5
        # Grids of midpoints. One image determines its position to 0.12 pixels and its brightness to 10 %.
        self.rates = self.grid(56, 24)
        coarse, levels = self.grid(28, 12), torch.arange(100, device=device).double()
        log_rate, rate = coarse.log(), coarse
        mass = [(c * log_rate - rate - torch.lgamma(c + 1)).exp().mean(0) for c in levels]
        self.mean_rate, self.mass = rate.mean(0), torch.stack(mass)  # (8, 8), (100, 8, 8)

    def grid(self, positions, brightnesses):
        """Rates, shape ``(nodes, 8, 8)``, at the midpoints of equally probable cells."""
        position = (torch.arange(positions, device=self.device) + 0.5) / positions
        level = (torch.arange(brightnesses, device=self.device) + 0.5) / brightnesses
        return self(torch.cartesian_prod(position, position, level).T.double())

    def __call__(self, source):
        """Rates, shape ``(N, 8, 8)``: position in units of the detector, brightness 20 to 100."""
        x, y, level = source
        psf = [
            torch.exp(-0.5 * ((self.pixels - SIDE * centre[:, None]) / WIDTH) ** 2)
            for centre in (y, x)
        ]
        brightness = 20 * 5 ** level[:, None, None] / (2 * math.pi * WIDTH**2)
        return BACKGROUND + brightness * psf[0][:, :, None] * psf[1][:, None, :]

    def counts(self, n):
        """Images drawn from the simulator itself, not from its grid."""
        return torch.poisson(self(torch.rand(3, n, device=self.device)))

    def log_prob(self, counts):
        """Exact log p(n) by integrating over the source, shape ``(N,)``."""
        log_rate, total = self.rates.flatten(1).log().T, self.rates.flatten(1).sum(1)
        flat = counts.flatten(1).double()
        log_likelihood = [(part @ log_rate - total).logsumexp(1) for part in flat.split(50)]
        return torch.cat(log_likelihood) - torch.lgamma(flat + 1).sum(1) - math.log(len(total))

    def independent_log_prob(self, counts):
        """log p of independent pixels, each with its exact distribution."""
        mass = self.mass.log().flatten(1).T  # (64, 100)
        return mass.gather(1, counts.flatten(1).long().T).sum(0)

    def coverage(self, low, high):
        """P(low ≤ n_i ≤ high) of every pixel, for whole bounds of shape ``(8, 8)``."""
        level = torch.arange(len(self.mass), device=self.device)[:, None, None]
        return (self.mass * ((level >= low) & (level <= high))).sum(0)

    def interval(self, nominal):
        """The central interval of every pixel under its exact distribution."""
        below = self.mass.cumsum(0)
        return tuple((below < p).sum(0) for p in ((1 - nominal) / 2, (1 + nominal) / 2))


def report(terms, field, held_out, samples):
    """The bound against the exact log p, image by image; rates and intervals, pixel by pixel."""
    n = len(held_out)
    exact, independent = field.log_prob(held_out), field.independent_log_prob(held_out)
    gap = exact - terms.elbo
    print("\nnats per image of 64 counts, held out")
    print(
        f"  exact -log p(n)            {-exact.mean():.3f} ± {exact.std() / n**0.5:.3f} (sampling)"
    )
    print(f"  diffusion, -ELBO           {-terms.elbo.mean():.3f}")
    print(f"  independent pixels, exact  {-independent.mean():.3f}")
    print(f"  gap log p - ELBO, paired   {gap.mean():.3f} ± {gap.std() / n**0.5:.3f}")

    error = samples.double().std(0) / len(samples) ** 0.5
    bias = samples.double().mean(0) - field.mean_rate
    print(f"\nmean count of {len(samples)} samples against the known mean rate of each pixel")
    print(
        f"  root mean square of (difference / error)   {(bias / error).square().mean().sqrt():.2f}"
    )
    print(
        f"  largest difference                         {(bias / field.mean_rate).abs().max():.1%}"
    )

    print("\ncentral intervals of each pixel: exact probability, mean over pixels")
    coverage = {}
    for nominal in (0.5, 0.8, 0.9, 0.95):
        ours = field.coverage(*interval(samples, nominal))
        best = field.coverage(*field.interval(nominal))
        coverage[nominal] = [
            ours.mean().item(),
            best.mean().item(),
            (ours - best).abs().max().item(),
        ]
        print(
            f"  nominal {nominal:.2f}   from samples {ours.mean():.3f}   exact {best.mean():.3f}   "
            f"largest difference {(ours - best).abs().max():.3f}"
        )
    return {
        "exact_nats": -exact.mean().item(),
        "minus_elbo": -terms.elbo.mean().item(),
        "pixels_alone": -independent.mean().item(),
        "gap": [gap.mean().item(), (gap.std() / n**0.5).item()],
        "rate_z": (bias / error).square().mean().sqrt().item(),
        "interval_coverage": coverage,
    }


def interval(samples, nominal):
    """The central interval of every pixel of the samples, wider than asked for: counts are whole numbers."""
    ordered = samples.sort(0).values
    return tuple(ordered[int(p * len(ordered))] for p in ((1 - nominal) / 2, (1 + nominal) / 2))


def write(folder, numbers, samples, held_out, field):
    """Write pictures and numbers, each under another name first, so that no file is ever half written."""
    folder.mkdir(parents=True, exist_ok=True)
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    plot_samples(samples[:25], held_out[:25], axes[:2])
    means = {"mean of samples": samples.mean(0), "known mean rate": field.mean_rate}
    for ax, (name, mean) in zip(axes[2:], means.items(), strict=True):
        picture = ax.imshow(mean.cpu(), vmin=0, vmax=float(field.mean_rate.max()) * 1.1)
        ax.set(title=name, xticks=[], yticks=[])
    fig.colorbar(picture, ax=axes[2:], label="counts per pixel")
    writers = {
        "counts.png": lambda path: fig.savefig(path, dpi=120, format="png"),
        "result.json": lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"),
    }
    for name, save in writers.items():
        aside = folder / f".{name}.part"
        save(aside)
        os.replace(aside, folder / name)
    return [folder / name for name in writers]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log-snr-max", type=float, default=2.5, help="the start, before it is learned"
    )
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/poisson"))
    args = parser.parse_args()
    args.num_timesteps = 20 if args.smoke else 500
    args.num_steps = 20 if args.smoke else 5_000
    args.num_train = 500 if args.smoke else 100_000
    args.num_held_out = 20 if args.smoke else 500
    args.num_samples = 50 if args.smoke else 4000
    return args


if __name__ == "__main__":
    main()
