r"""Variance of the bound's estimate from one network row, by noise schedule, and the smallest possible one.

Denoisers are exact, so that only schedules are learned. The data are the mixture 0.3 N(−1, 0.2²) +
0.7 N(1, 0.5²) and a Gaussian of 64 dimensions, standard deviations from 0.1 to 3. With ℓ(λ) the bound's rate
in the log-SNR, the smallest variance of an independent draw is (∫√E ℓ²)² − (∫E ℓ)², by quadrature.
``MonotoneSchedule`` is trained by ``SVI`` with ``MinimumVarianceELBO`` between the same ends as the schedule
in its row. In the column "stratified", 128 rows share one stratified set of times, and the variance of their
mean is multiplied by 128.

The last table is for a Gaussian of 32 dimensions, standard deviations from 0.01 to 10. It compares one
learned curve with one for every dimension, all ends and interiors trained at once: the integral of the
bound's rate between the ends, and the variance of its estimate from one row.

    python benchmarks/variance.py [--seed 0] [--device cuda] [--smoke] [--output benchmarks/results]

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I. https://arxiv.org/abs/2107.00630
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch.distributions import kl_divergence

from pyro_diffusion import (
    CosineSchedule,
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LinearSchedule,
    LogSNRSchedule,
    MinimumVarianceELBO,
    MonotoneSchedule,
)
from pyro_diffusion.chains import Continuum

STRATA = 128
MIXTURE = ([0.3, 0.7], [[-1.0], [1.0]], [[0.2], [0.5]])


def main() -> None:
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    start = time.process_time()
    rows = []
    print(
        "| data | schedule | log-SNR | its variance | learned | floor | learned / floor | its / learned "
        "| the same, stratified |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, oracle in {"mixture": mixture, "Gaussian, D = 64": gaussian}.items():
        for schedule in (LinearSchedule(), CosineSchedule(), LogSNRSchedule()):
            pyro.set_rng_seed(args.seed)
            rows.append(compare(name, oracle, schedule, args))
            print(markdown(rows[-1]), flush=True)
    print(
        "\n| curves | integral of the rate | variance of a row | ± | stratified |\n"
        "|---|---|---|---|---|"
    )
    wide = [by_dimension(shape, args) for shape in ((), (32,))]
    for r in wide:
        print(
            f"| {r['curves']} | {r['mean']:.1f} | {r['variance']:.4g} | {r['standard_error']:.2g} | "
            f"{r['stratified']:.4g} |"
        )
    write({"rows": rows, "by_dimension": wide, "cpu_seconds": time.process_time() - start}, args)


def mixture(schedule: Any) -> GaussianMixtureDenoiser:
    weights, means, stds = (torch.tensor(x) for x in MIXTURE)
    return GaussianMixtureDenoiser(weights, means, stds, schedule)


def gaussian(schedule: Any) -> GaussianDenoiser:
    return GaussianDenoiser(torch.zeros(64), torch.logspace(-1, math.log10(3), 64), schedule)


def compare(name: str, oracle: Any, schedule: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Compare a schedule with the best one between its ends."""
    ends = schedule.log_snr_at(torch.tensor([0.0, 1.0])).tolist()
    grid = torch.linspace(ends[0], ends[1], 801)
    mean, square = (moment.cpu().numpy() for moment in moments(oracle(schedule), grid))
    at = -grid.cpu().numpy()
    floor = np.trapezoid(np.sqrt(square), at) ** 2 - np.trapezoid(mean, at) ** 2
    learned = fit(oracle, ends, args)

    def variance(curve: Any) -> float:
        u = (torch.arange(20_000) + 0.5) / 20_000
        with torch.no_grad():
            log_snr, speed = curve.log_snr_at(u).cpu().numpy(), -curve.slope_at(u).cpu().numpy()
        m, s = (np.interp(-log_snr, at, moment) for moment in (mean, square))
        return (s * speed**2).mean() - (m * speed).mean() ** 2

    theirs, ours = variance(schedule), variance(learned)
    stratified = [stratified_variance(oracle(curve), args) for curve in (schedule, learned)]
    return {
        "data": name,
        "schedule": type(schedule).__name__,
        "ends": ends,
        "variance": theirs,
        "learned": ours,
        "floor": float(floor),
        "stratified": stratified[0],
        "stratified_learned": stratified[1],
    }


def moments(denoiser: Any, log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E ℓ and E ℓ² at log-SNRs: a closed form for the Gaussian, quadrature for the mixture."""
    snr = log_snr.exp()[:, None]
    if isinstance(denoiser, GaussianDenoiser):
        left = denoiser.variance / (1 + snr * denoiser.variance)  # Var[x_0 | x_t]
        mean = 0.5 * (snr * left).sum(1)
        return mean, mean**2 + 0.5 * (snr * left).square().sum(1)
    nodes, weights = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(100))
    weights = weights / weights.sum()
    x_0 = denoiser.means + denoiser.variances.sqrt() * nodes  # (2, 100)
    share = denoiser.log_weights.exp()[:, None] * weights
    signal, noise = (s[:, None, None, None] for s in denoiser.schedule.scales(log_snr))
    x_t = signal * x_0[:, :, None] + noise * nodes  # (G, 2, 100, 100)
    level = log_snr[:, None, None, None].expand(x_t.shape)
    parts = [
        denoiser.x_0_hat(x[..., None], lam).squeeze(-1)
        for x, lam in zip(x_t.split(20), level.split(20), strict=True)
    ]
    rate = 0.5 * snr[:, :, None, None] * (x_0[:, :, None] - torch.cat(parts)).square()
    weight = share[:, :, None] * weights
    return (rate * weight).sum((1, 2, 3)), (rate.square() * weight).sum((1, 2, 3))


def fit(oracle: Any, ends: list[float], args: argparse.Namespace) -> MonotoneSchedule:
    """Train the interior alone, with the ends of the other schedule."""
    schedule = MonotoneSchedule(1000, log_snr_max=ends[0], log_snr_min=ends[1])
    schedule.log_snr_min.requires_grad_(False)
    schedule.log_range.requires_grad_(False)
    train(DiffusionModel(oracle(schedule)), schedule, 0.3, args)
    return schedule


def train(
    diffusion: DiffusionModel, schedule: MonotoneSchedule, lr: float, args: argparse.Namespace
) -> None:
    """Train the interior for the variance, and the ends, if they are learned, for the bound."""
    pair, law = diffusion.continuous(), diffusion.denoiser.data_distribution
    decay = {"betas": (0.9, 0.99), "lrd": 0.02 ** (1 / args.num_steps)}

    def settings(name: str) -> dict[str, Any]:
        return decay | {"lr": lr if name.endswith("interior") else 0.002}

    elbo = MinimumVarianceELBO([schedule.interior])
    svi = SVI(pair.model, pair.guide, ClippedAdam(settings), elbo)
    for _ in range(args.num_steps):
        svi.step(law.sample((args.batch,)))


@torch.no_grad()
def stratified_variance(denoiser: Any, args: argparse.Namespace) -> float:
    """128 times the variance of a mean over 128 rows whose times are stratified."""
    diffusion, means = DiffusionModel(denoiser), []
    for _ in range(args.num_repeats):
        x_0 = denoiser.data_distribution.sample((STRATA,))
        u = (torch.randperm(STRATA) + torch.rand(STRATA)) / STRATA
        means.append(rate_of_rows(diffusion, x_0, u).mean())
    return STRATA * torch.stack(means).var().item()


def rate_of_rows(diffusion: DiffusionModel, x_0: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The bound's rate at given times, one row for each datum."""
    x_u = diffusion.process.marginal_at(x_0, u).sample()
    return kl_divergence(
        diffusion.process.increment(x_u, x_0, u), Continuum().pair(diffusion, x_u, u)[0]
    )


def by_dimension(event_shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, Any]:
    """Train ends by the bound and interiors by its variance, on standard deviations from 0.01 to 10."""
    pyro.set_rng_seed(args.seed)
    std = torch.logspace(-2, 1, 32)
    # Initial ends that are wide enough for all dimensions, or for each alone.
    high, low = 6 - 2 * std.log(), -8 - 2 * std.log()
    if not event_shape:
        high, low = high.max(), low.min()
    schedule = MonotoneSchedule(50, log_snr_max=high, log_snr_min=low, event_shape=event_shape)
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(32), std, schedule))
    train(diffusion, schedule, 0.05 if event_shape else 0.3, args)  # each at its best
    law = diffusion.denoiser.data_distribution
    x_0 = law.sample((args.num_rows,))
    with torch.no_grad():
        rates = rate_of_rows(diffusion, x_0, torch.rand(args.num_rows))
    square = (rates - rates.mean()).square()
    ends = [e.min().item() for e in (schedule.log_snr_at(torch.tensor(u)) for u in (0.0, 1.0))]
    return {
        "curves": "one" if not event_shape else "one a dimension",
        "mean": rates.mean().item(),
        "variance": square.mean().item(),
        "standard_error": (square.std() / len(square) ** 0.5).item(),
        "stratified": stratified_variance(diffusion.denoiser, args),
        "least_ends": ends,
    }


def markdown(r: dict[str, Any]) -> str:
    return (
        f"| {r['data']} | {r['schedule']} | {r['ends'][0]:.1f} … {r['ends'][1]:.1f} | {r['variance']:.4g} | "
        f"{r['learned']:.4g} | {r['floor']:.4g} | {r['learned'] / r['floor']:.3f} | "
        f"{r['variance'] / r['learned']:.2f} | {r['stratified'] / r['stratified_learned']:.2f} |"
    )


def write(numbers: dict[str, Any], args: argparse.Namespace) -> None:
    numbers |= {
        "num_steps": args.num_steps,
        "batch": args.batch,
        "num_repeats": args.num_repeats,
        "num_rows": args.num_rows,
        "strata": STRATA,
        "seed": args.seed,
        "smoke": args.smoke,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".variance.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "variance.json")
    print(f"\nwrote {args.output / 'variance.json'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_steps, args.batch, args.num_repeats, args.num_rows = (
        (3, 50, 5, 200) if args.smoke else (500, 500, 1000, 20_000)
    )
    return args


if __name__ == "__main__":
    main()
