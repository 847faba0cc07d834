r"""The lecture's own form, and the one that scales: two moons by sequential and by subsampled SVI.

A chain of T = 20 steps on two-dimensional data whose density is known by quadrature. The same model
is fitted from the same start for the same time: once with every timestep at every step (the
hierarchical bound as the lecture writes it, ``Trace_ELBO`` on model and forward guide), once with
one random timestep a datum. A step of the latter costs the same at any T, so the third fit has
T = 1000. The bounds are read on the same held-out data, paired with the exact log p(x): the mean of
the difference is what the model misses, free of most of the data's own sampling error. What both
fits at T = 20 miss is the price of 20 Gaussian steps.

    python examples/two_moons.py [--device cuda] [--seed 0] [--smoke] [--output outputs/two_moons]
"""

import argparse
import copy
import math
import os
import time
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from tqdm.auto import tqdm

from pyro_diffusion import MLP, DiffusionModel, LogSNRSchedule, NeuralDenoiser, elbo_terms

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCALE, SHIFT, NOISE = 2.0, torch.tensor([-1.0, -0.2]), 0.1


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    x_0 = two_moons(2_000 if args.smoke else 20_000).to(args.device)
    held_out = two_moons(100 if args.smoke else 2_000).to(args.device)
    log_p = exact_log_density(held_out)
    entropy, error = -log_p.mean(), log_p.std() / len(log_p) ** 0.5
    print(f"exact entropy {exact_entropy():.5f} nats; {entropy:.4f} ± {error:.4f} on held-out data")

    schedule = LogSNRSchedule(20, log_snr_max=5.0, log_snr_min=-8.0)
    network = MLP((2,), hidden_size=128, num_blocks=2).to(args.device)
    fits = {}
    for name, num_timesteps in (("sequential", 20), ("subsampled", 20), ("subsampled", args.long)):
        grid = schedule.with_num_timesteps(num_timesteps)
        diffusion = DiffusionModel(NeuralDenoiser(copy.deepcopy(network), grid, (2,)))
        diffusion = diffusion.to(args.device)
        model, guide, elbo = diffusion.model, diffusion.guide, Trace_ELBO()
        if name == "subsampled":
            model, guide = (pair := diffusion.subsampled(num_timesteps=1)).model, pair.guide
            elbo = TraceMeanField_ELBO()
        name = f"{name}, T = {num_timesteps}"
        steps, seconds = fit(name, model, guide, elbo, x_0, args.seconds)
        terms = elbo_terms(
            diffusion.model, diffusion.posterior_guide, held_out, num_particles=4, analytic_kl=False
        )
        gap = log_p - terms.elbo
        print(
            f"{name:20s}  {steps:5d} steps in {seconds:.0f} s   -ELBO {-terms.mean().value:.4f} "
            f"± {terms.mean().monte_carlo_error:.4f} (Monte Carlo)   "
            f"log p − ELBO {gap.mean():.4f} ± {gap.std() / len(gap) ** 0.5:.4f} nats"
        )
        fits[name] = diffusion.sample(min(2_000, len(x_0)))
    print(f"wrote {plot(args.output, x_0, fits)}")


def fit(name, model, guide, elbo, x_0, seconds):
    """SVI for a given time, with a learning rate that falls to zero over it."""
    rate = {"lr": 2e-3}
    svi = SVI(model, guide, pyro.optim.Adam(lambda name: dict(rate)), elbo)
    steps, start = 0, time.perf_counter()
    with tqdm(total=100, desc=name, unit="%", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        while (share := (time.perf_counter() - start) / seconds) < 1:
            for optimiser in svi.optim.optim_objs.values():
                for group in optimiser.param_groups:
                    group["lr"] = rate["lr"] * 0.5 * (1 + math.cos(math.pi * share))
            batch = x_0[torch.randint(len(x_0), (256,), device=x_0.device)]
            svi.step(batch, num_data=len(x_0))
            steps += 1
            bar.update(int(100 * share) - bar.n)
    return steps, time.perf_counter() - start


def arcs(angle):
    """The two half circles at an angle in [0, π], shape ``angle.shape + (2,)`` each."""
    outer = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return outer, torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=-1)


def two_moons(num_data):
    """Points on either arc with Gaussian noise, in the scale of the published numbers."""
    outer, inner = arcs(math.pi * torch.rand(num_data))
    points = torch.where(torch.rand(num_data, 1) < 0.5, outer, inner)
    return SCALE * (points + NOISE * torch.randn(num_data, 2)) + SHIFT


def exact_log_density(x):
    """log p(x): the noise's density averaged over both arcs, by the midpoint rule."""
    number = 2_000
    angle = (torch.arange(number, dtype=torch.float64) + 0.5) * math.pi / number
    centres = (SCALE * torch.cat(arcs(angle)) + SHIFT.double()).to(x.device)
    square = torch.cdist(x.double(), centres, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    variance = (SCALE * NOISE) ** 2
    log_kernel = -square / (2 * variance) - math.log(2 * math.pi * variance)
    return log_kernel.logsumexp(1) - math.log(2 * number)


def exact_entropy():
    """−∫ p log p by the midpoint rule on a grid that holds all but 1e-9 of the mass."""
    x = torch.linspace(-6, 6, 200, dtype=torch.float64)
    y = torch.linspace(-5, 5, 160, dtype=torch.float64)
    log_p = exact_log_density(torch.cartesian_prod(x, y))
    return -(log_p.exp() * log_p).sum() * (x[1] - x[0]) * (y[1] - y[0])


def plot(folder, x_0, fits):
    folder.mkdir(parents=True, exist_ok=True)
    panels = {"data": x_0[:2_000]} | fits
    fig, axes = plt.subplots(
        1, len(panels), figsize=(13, 3.0), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (name, points) in zip(axes, panels.items(), strict=True):
        ax.plot(*points.cpu().numpy().T, ".", ms=2)
        # The limits suit the data: a model that was stopped early draws a point far away now and then.
        ax.set(
            title=name, xlabel="first coordinate", aspect="equal", xlim=(-4.5, 4.5), ylim=(-3, 3.5)
        )
    axes[0].set_ylabel("second coordinate")
    path, aside = folder / "two_moons.png", folder / ".two_moons.part"
    fig.savefig(aside, dpi=120, format="png")
    os.replace(aside, path)
    return path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/two_moons"))
    args = parser.parse_args()
    args.seconds = 0.2 if args.smoke else 40
    args.long = 30 if args.smoke else 1000
    return args


if __name__ == "__main__":
    main()
