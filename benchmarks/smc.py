r"""Sequential Monte Carlo compared with importance weights, where the chain's own log p is known.

The denoisers are the exact one of a Gaussian (D = 64, T = 1000), and three that are wrong: noise estimates
5 % and 20 % too large, and an x̂_0 5 % too large. Every chain is affine, so that its own log p(x_0) is a
Gaussian that can be computed from N(0, I). ``smc_evidence`` uses K = 1,024 particles in each of four runs,
and importance weights use as many rows of the network, including the pilot run. Errors are in nats, against
the chain's own log p.

    python benchmarks/smc.py [--num-data 4] [--seed 0] [--device cuda] [--smoke]
        [--output benchmarks/results]
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_diffusion import (
    DataPrediction,
    DiffusionModel,
    GaussianDenoiser,
    LogSNRSchedule,
    NeuralDenoiser,
    importance_evidence,
    smc_evidence,
)

DIMENSION, NUM_RUNS, NUM_PILOT = 64, 4, 128
CASES = {
    "exact": {},
    "ε̂ × 1.05": {"noise": 1.05},
    "ε̂ × 1.2": {"noise": 1.2},
    "x̂_0 × 1.05": {"datum": 1.05},
}


def main():
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    rows = []
    print(
        "| denoiser | method | error, nats | ± (its own) | reliable | seconds |\n|---|---|---|---|---|---|"
    )
    for case, factors in CASES.items():
        pyro.set_rng_seed(args.seed)
        diffusion, x_0 = build(factors, args)
        truth = log_evidence(diffusion, x_0)
        as_many = NUM_RUNS * args.num_particles + NUM_PILOT
        for method, run in {
            "sequential": lambda d=diffusion, x=x_0: smc_evidence(
                d, x, num_particles=args.num_particles, num_runs=NUM_RUNS, num_pilot=NUM_PILOT
            ),
            "importance": lambda d=diffusion, x=x_0, k=as_many: importance_evidence(
                d.model, d.guide, x, num_particles=k
            ),
        }.items():
            start = time.perf_counter()
            evidence = run()
            rows.append(row(case, method, evidence, truth, time.perf_counter() - start))
            print(markdown(rows[-1]), flush=True)
    write(rows, args)


def build(factors, args):
    """A diffusion model with the exact estimates of a Gaussian times a factor, and data of the Gaussian."""
    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=8.0, log_snr_min=-10.0)
    mean, std = 0.3 * torch.randn(DIMENSION), 0.3 + torch.rand(DIMENSION)
    x_0 = mean + std * torch.randn(args.num_data, DIMENSION)
    exact = GaussianDenoiser(mean, std, schedule)
    if not factors:
        return DiffusionModel(exact), x_0
    network = Scaled(exact, **factors)
    denoiser = NeuralDenoiser(network, schedule, (DIMENSION,), prediction=DataPrediction())
    return DiffusionModel(denoiser), x_0


class Scaled(nn.Module):
    """x̂_0 of an exact denoiser after its noise estimate, or x̂_0 itself, is multiplied by a factor."""

    def __init__(self, exact, noise=1.0, datum=1.0):
        super().__init__()
        self.exact, self.noise, self.datum = exact, noise, datum

    def forward(self, x_t, log_snr):
        signal = self.exact.schedule.scales(log_snr)[0][:, None]
        x_0_hat = self.exact.x_0_hat(x_t, log_snr)
        if self.noise == 1.0:
            return self.datum * x_0_hat
        return (x_t - self.noise * (x_t - signal * x_0_hat)) / signal


@torch.no_grad()
def log_evidence(diffusion, x_0):
    """log p of affine kernels with independent entries, from x_T ~ N(0, I) down."""
    mean, variance = torch.zeros(DIMENSION), torch.ones(DIMENSION)
    for t in range(diffusion.schedule.num_timesteps, 0, -1):
        ends = (torch.zeros(1, DIMENSION), torch.ones(1, DIMENSION))
        at_zero, at_one = (diffusion.denoiser(x, t) for x in ends)
        slope = (at_one.mean - at_zero.mean)[0]
        mean, variance = slope * mean + at_zero.mean[0], slope**2 * variance + at_zero.variance[0]
    return dist.Normal(mean, variance.sqrt()).to_event(1).log_prob(x_0)


def row(case, method, evidence, truth, seconds):
    errors = evidence.log_evidence - truth
    variance = NUM_RUNS * evidence.standard_error.square()  # of one run's log Ẑ, to first order
    return {
        "denoiser": case,
        "method": method,
        "errors": errors.tolist(),
        "rms_error": errors.square().mean().sqrt().item(),
        "standard_errors": evidence.standard_error.tolist(),
        "within": (errors.abs() < 3 * evidence.standard_error + variance / 2 + 1e-8).tolist(),
        "reliable": evidence.reliable.tolist(),
        "pareto_k": evidence.pareto_k.tolist(),
        "ess": evidence.ess.tolist(),
        "seconds": round(seconds, 1),
    }


def markdown(r):
    error = sum(e**2 for e in r["standard_errors"]) ** 0.5 / len(r["errors"]) ** 0.5
    return (
        f"| {r['denoiser']} | {r['method']} | {r['rms_error']:.2g} | {error:.2g} | "
        f"{sum(r['reliable'])} of {len(r['reliable'])} | {r['seconds']:.0f} |"
    )


def write(rows, args):
    numbers = {
        "rows": rows,
        "dimension": DIMENSION,
        "num_timesteps": args.num_timesteps,
        "num_particles": args.num_particles,
        "num_runs": NUM_RUNS,
        "num_pilot": NUM_PILOT,
        "num_data": args.num_data,
        "seed": args.seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".smc.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "smc.json")
    print(f"\nwrote {args.output / 'smc.json'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-data", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_timesteps, args.num_particles = (20, 32) if args.smoke else (1000, 1024)
    return args


if __name__ == "__main__":
    main()
