r"""Fitted two-dimensional densities, compared with their exact entropies.

The densities are a Swiss roll (scikit-learn's, noise 1.0, its first and last coordinate, divided by 5), eight
Gaussians on a circle (radius 4, standard deviation 0.5, all divided by 1.414) and two moons (scikit-learn's,
noise 0.1, times 2, shifted by (-1, -0.2)). All three are centres along curves with Gaussian noise, so that
log p(x) is an average over a curve's parameter, by Gauss-Legendre quadrature, and the entropy is an integral
on a grid: 2.66965, 2.83188 and 2.39388 nats.

A diffusion model is fitted to each by subsampled SVI, with fresh draws at every step, and its weights are
averaged. The bound of T = 1000 steps is then computed on other fresh draws, by log-ratios along whole paths.
Its gap is *paired*: log p(x) − bound(x) is averaged over the same x, which removes most of the sampling error
of −bound. The gap of the continuous chain, T → ∞, is the error of the network; the rest comes from the 1000
Gaussian steps. All numbers have both errors, Monte Carlo ± sampling.

    python benchmarks/toys.py [--steps 12000] [--seed 0] [--device cuda] [--smoke]
        [--output benchmarks/results]
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import trange

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    Estimate,
    LogSNRSchedule,
    NeuralDenoiser,
    Standardize,
    VelocityPrediction,
    elbo_terms,
    evaluate_bound,
)

LOG_SNR_MAX, LOG_SNR_MIN = 7.5, -6.0
NETWORK = {"hidden_size": 128, "num_blocks": 2, "fourier_frequencies": (-2, -1, 0)}
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 512, 2e-3, 0.999
NUM_PARTICLES, HELD_OUT_SEED = 2, 10_000


def main():
    args = parse_arguments()
    torch.set_default_device(args.device)
    rows = []
    print(
        "| density | entropy | −bound | gap, paired | gap as T → ∞ | CPU minutes to fit |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    for name, toy in TOYS.items():
        pyro.set_rng_seed(args.seed)
        cpu, wall = time.process_time(), time.perf_counter()
        diffusion = fit(toy, args, name)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        pyro.set_rng_seed(args.seed + HELD_OUT_SEED)
        x_0 = toy.sample(args.num_data)
        rows.append(
            {
                "density": name,
                "entropy": entropy(toy, args.num_cells),
                "chain": read(diffusion, toy, x_0, args.num_timesteps, args),
                "limit": read(diffusion, toy, x_0, math.inf, args),
                "fit_cpu_seconds": cpu,
                "fit_seconds": wall,
            }
        )
        print(markdown(rows[-1]), flush=True)
    write(rows, args)


class Toy(NamedTuple):
    """Centres on one or more curves, all equally likely, and Gaussian noise around them."""

    curves: Callable[[Tensor], Tensor]  # u ~ U(0, 1), shape (n,), to (n, number of curves, 2)
    noise: float
    num_nodes: int  # of the quadrature over u

    def sample(self, num_data):
        centres = self.curves(torch.rand(num_data))
        curve = torch.randint(centres.shape[1], (num_data,))
        return centres[torch.arange(num_data), curve] + self.noise * torch.randn(num_data, 2)

    def log_prob(self, x):
        """log p(x), float64."""
        nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(self.num_nodes))
        centres = self.curves((nodes + 1) / 2)
        log_weights = (weights / (2 * centres.shape[1])).log().repeat_interleave(centres.shape[1])
        centres, variance = centres.reshape(-1, 2), self.noise**2
        values = []
        for part in x.double().split(4_000):
            square = (part[:, None] - centres).square().sum(-1)
            values.append((log_weights - square / (2 * variance)).logsumexp(1))
        return torch.cat(values) - math.log(2 * math.pi * variance)


def swiss_roll(u):
    angle = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack([angle * angle.cos(), angle * angle.sin()], dim=-1)[:, None] / 5


def eight_gaussians(u):
    angle = torch.arange(8, dtype=u.dtype) * math.pi / 4
    return (4 / 1.414 * torch.stack([angle.cos(), angle.sin()], dim=-1)).expand(len(u), 8, 2)


def moons(u):
    cos, sin = (math.pi * u).cos(), (math.pi * u).sin()
    x, y = torch.stack([cos, 1 - cos], dim=-1), torch.stack([sin, 0.5 - sin], dim=-1)
    return torch.stack([2 * x - 1, 2 * y - 0.2], dim=-1)


TOYS = {
    "Swiss roll": Toy(swiss_roll, 1.0 / 5, num_nodes=400),
    "8 Gaussians": Toy(eight_gaussians, 0.5 / 1.414, num_nodes=1),
    "moons": Toy(moons, 2 * 0.1, num_nodes=200),
}


def entropy(toy, num_cells):
    """−∫ p log p by the midpoint rule on a square that contains all but 1e-9 of the mass."""
    side = 6.5
    edge = ((torch.arange(num_cells, dtype=torch.float64) + 0.5) / num_cells * 2 - 1) * side
    log_p = toy.log_prob(torch.cartesian_prod(edge, edge))
    return -((log_p.exp() * log_p).sum() * (2 * side / num_cells) ** 2).item()


def fit(toy, args, name):
    """Subsampled SVI with a learning rate that falls to zero; the model with averaged weights."""
    denoiser = NeuralDenoiser(
        MLP((2,), **NETWORK),
        LogSNRSchedule(args.num_timesteps, log_snr_max=LOG_SNR_MAX, log_snr_min=LOG_SNR_MIN),
        event_shape=(2,),
        prediction=VelocityPrediction(),
    )
    diffusion = DiffusionModel(denoiser, transform=Standardize.from_data(toy.sample(100_000)))
    averaged = AveragedModel(diffusion, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": LEARNING_RATE}, "T_max": args.steps}
    optimiser = pyro.optim.CosineAnnealingLR(adam)
    pair = diffusion.subsampled(num_timesteps=1)
    svi = SVI(pair.model, pair.guide, optimiser, TraceMeanField_ELBO())
    for _ in trange(args.steps, desc=name, leave=False, mininterval=5):
        svi.step(toy.sample(BATCH_SIZE))
        optimiser.step()
        averaged.update_parameters(diffusion)
    return averaged.module


def read(diffusion, toy, x_0, num_timesteps, args):
    """The bound of a chain of a number of steps, and its gap to the exact log p of the same data."""
    start = time.perf_counter()
    if num_timesteps == math.inf:
        error = args.limit_error
        bound = evaluate_bound(diffusion, x_0, num_timesteps=math.inf, standard_error=error)
    else:
        bound = elbo_terms(
            diffusion.model,
            diffusion.posterior_guide,
            x_0,
            num_particles=NUM_PARTICLES,
            analytic_kl=False,
            progress=False,
        )
    gap = Estimate.of(toy.log_prob(x_0) - bound.elbo, bound.standard_error)
    return {
        "num_timesteps": "infinity" if num_timesteps == math.inf else num_timesteps,
        "negative_bound": Estimate.of(-bound.elbo, bound.standard_error)._asdict(),
        "gap": gap._asdict(),
        "seconds": time.perf_counter() - start,
    }


def markdown(r):
    estimates = [r["chain"]["negative_bound"], r["chain"]["gap"], r["limit"]["gap"]]
    cells = [
        "{value:.4f} ± {monte_carlo_error:.4f} ± {sampling_error:.4f}".format(**e)
        for e in estimates
    ]
    minutes = r["fit_cpu_seconds"] / 60
    return f"| {r['density']} | {r['entropy']:.5f} | {' | '.join(cells)} | {minutes:.1f} |"


def write(rows, args):
    numbers = {
        "rows": rows,
        "unit": "nats",
        "num_timesteps": args.num_timesteps,
        "log_snr_max": LOG_SNR_MAX,
        "log_snr_min": LOG_SNR_MIN,
        "prediction": "velocity",
        "variance": "forward",
        "dequantisation": None,
        "transform": "Standardize, from 100,000 draws",
        "network": {"name": "MLP", **NETWORK},
        "steps": args.steps,
        "batch_size": BATCH_SIZE,
        "optimiser": "Adam, cosine to 0",
        "learning_rate": LEARNING_RATE,
        "ema_decay": EMA_DECAY,
        "num_data": args.num_data,
        "num_particles": NUM_PARTICLES,
        "analytic_kl": False,
        "limit_standard_error": args.limit_error,
        "seed": args.seed,
        "held_out_seed": args.seed + HELD_OUT_SEED,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".toys.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "toys.json")
    print(f"\nwrote {args.output / 'toys.json'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.steps = 20 if args.smoke else args.steps
    args.num_timesteps = 20 if args.smoke else 1000
    args.num_data, args.num_cells = (100, 50) if args.smoke else (4_000, 300)
    args.limit_error = 0.1 if args.smoke else 0.004
    return args


if __name__ == "__main__":
    main()
